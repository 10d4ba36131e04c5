from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hiertune.config import DataConfig, KmerConfig
from hiertune.data import import_fasta, open_dataset, split_of_ids
from hiertune.data.importers.fasta import read_fasta
from hiertune.data.kmers import kmer_features
from hiertune.errors import InputError

LEVELS = ("domain", "family", "genus")

FASTA = """\
>s1\tBacteria;Aaaceae;Aus
ACGTACGTAC
GTNNACGT

>s2 Bacteria; Aaaceae ;Bus;
acguacguaa
>s3\tBacteria;Incertae Sedis XI;Cus
GGGTTTAAAC
>s4\tArchaea
TTTTTT
"""


def open_rows(path: Path):
    data = open_dataset(DataConfig(path=str(path)), require=())
    return data, data.inputs.rows(np.arange(len(data)))


def message(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz"])
def test_fasta(tmp_path, name):
    path, out = tmp_path / name, tmp_path / "out.h5"
    (gzip.open if name.endswith(".gz") else open)(path, "wb").write(FASTA.encode())
    assert import_fasta(path, out, LEVELS, k=3, transform="frequency") == out
    kmer = open_dataset(DataConfig(path=str(out))).kmer
    assert kmer == KmerConfig(k=3, transform="frequency"), "a model of it can read FASTA"
    data, rows = open_rows(out)
    assert data.ids.tolist() == ["s1", "s2", "s3", "s4"]
    assert data.levels == LEVELS
    lineages = [
        ("Bacteria", "Aaaceae", "Aus"),
        ("Bacteria", "Aaaceae", "Bus"),
        ("Bacteria", None, "Cus"),
        ("Archaea", None, None),
    ]
    assert np.array_equal(data.labels, data.taxonomy.encode(lineages))
    assert data.labels[2:, 1].tolist() == [-1, -1]
    assert data.taxonomy.num_classes == (2, 1, 3)
    sequences = [b"ACGTACGTACGTNNACGT", b"ACGTACGTAA", b"GGGTTTAAAC", b"TTTTTT"]
    assert torch.equal(rows, torch.from_numpy(kmer_features(sequences, 3, "frequency")))
    assert np.array_equal(data.split, split_of_ids(data.ids))


def test_fasta_options(tmp_path):
    path, out = tmp_path / "a.fasta", tmp_path / "out.h5"
    path.write_text(">a\tX|env\nACGT\n>b\tX|Y\nCCCC\n")
    import_fasta(path, out, ["top", "low"], k=1, transform="counts", separator="|", unknown=["ENV"])
    data, rows = open_rows(out)
    assert data.labels.tolist() == [[0, -1], [0, 0]]
    assert rows.tolist() == [[1, 1, 1, 1], [0, 4, 0, 0]]
    assert message(import_fasta, path, out, ["top", "low"], separator="|").startswith(
        f"{out}: exists already"
    )
    import_fasta(path, out, ["top", "low"], separator="|", k=2, overwrite=True)
    assert open_rows(out)[1].shape == (2, 16)


def test_fasta_of_many_blocks(tmp_path):
    rng = np.random.default_rng(0)
    sequences = [
        "".join(rng.choice(list("ACGTN"), 30)) for _ in range(70)
    ]  # 32 rows of 4096 features a block
    path, out = tmp_path / "a.fasta", tmp_path / "out.h5"
    path.write_text("".join(f">{i}\tA{i % 3}\n{sequence}AAAAAA\n" for i, sequence in enumerate(sequences)))
    import_fasta(path, out, ["top"])
    expected = kmer_features([f"{sequence}AAAAAA".encode() for sequence in sequences], 6, "sqrt")
    assert torch.equal(open_rows(out)[1], torch.from_numpy(expected))


def test_fasta_records(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(b"\xef\xbb\xbf\n>id with space\tA;B c\r\nAC\r\nGT\r\n>2\nA\n")
    records = [(r.id, r.description, r.sequence, r.line) for r in read_fasta(path)]
    assert records == [("id with space", "A;B c", b"ACGT", 2), ("2", "", b"A", 5)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": has no sequences"),
        ("\n\n", ": has no sequences"),
        ("ACGT\n", ":1: text before the first header"),
        (">a\tX\nACGT\n>\tX\nACGT\n", ":3: a header without an id"),
        (">\nACGT\n", ":1: a header without an id"),
        (">a\tX\n>b\tX\nACGT\n", ":1: 'a' has no sequence"),
        (">a\tX\nACGT\n\n>b\tX\n", ":4: 'b' has no sequence"),
        (">a\tX\nACGT\nAC-T\n", ":3: '-' in a sequence"),
        (">a\tX\nACGT\n>b\tX\nACäT\n", ":4: 'ä' in a sequence"),
        (">a\tX\nACGT\n>b\tX\nCCC\n>a\tX\nACGT\n", ":5: the id 'a' occurred in line 1"),
        (">a\tX\nACGT\n>b\nACGT\n", ":3: 'b' has no lineage"),
        (">a\tX;Y;Z\nACGT\n", ":1: 'a' has 3 ranks"),
        (">a\tX\nACGT\n>b\tX\nACNGT\n", ":3: 'b' has no word of 3 letters A, C, G, T"),
        (">a\tX\nAC\n", ":1: 'a' has no word of 3 letters A, C, G, T"),
    ],
)
def test_bad_fasta(tmp_path, text, expected):
    path = tmp_path / "a.fasta"
    path.write_text(text)
    found = message(import_fasta, path, tmp_path / "out.h5", ["top"], k=3)
    assert found.splitlines()[0] == f"{path}{expected}"
    assert not (tmp_path / "out.h5").exists()


def test_what_is_allowed_is_said(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\tX;Y;Z\nACGT\n")
    found = message(import_fasta, path, tmp_path / "out.h5", ["top", "low"])
    assert found.splitlines()[1] == "  allowed: 1 to 2 ranks, with ';' between them"


@pytest.mark.parametrize(
    "content", [b">a\tX\nAC\xff\n", b"\x1f\x8b\x08", gzip.compress(b">a\tX\nACGT\n" * 99)[:20]]
)
def test_unreadable_fasta(tmp_path, content):
    path = tmp_path / ("a.fasta.gz" if content.startswith(b"\x1f") else "a.fasta")
    path.write_bytes(content)
    assert message(import_fasta, path, tmp_path / "out.h5", ["top"]).startswith(f"{path}: cannot be read: ")
    missing = tmp_path / "no.fasta"
    assert message(import_fasta, missing, tmp_path / "o.h5", ["top"]).startswith(
        f"{missing}: cannot be read: "
    )


def test_a_level_without_names(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\tX;unknown\nACGT\n")
    assert "level 'low' is empty" in message(import_fasta, path, tmp_path / "out.h5", ["top", "low"], k=2)


def test_records_unknown_at_all_ranks_are_left_out(tmp_path):
    path, out = tmp_path / "a.fasta", tmp_path / "a.h5"
    path.write_text(">a\tX;p\nACGT\n>b\tunknown;NA\nACGT\n>c\tX;unknown\nCCCC\n")
    console = Console(file=io.StringIO(), width=300)
    import_fasta(path, out, ["top", "low"], k=1, transform="counts", console=console)
    data = open_dataset(DataConfig(path=str(out)), require=())
    assert data.ids.tolist() == ["a", "c"]
    assert data.labels.tolist() == [[0, 0], [0, -1]]
    assert data.inputs.rows(np.arange(2)).tolist() == [[1, 1, 1, 1], [0, 4, 0, 0]]
    assert console.file.getvalue() == "note: 1 of 3 rows are unknown at all levels, and left out\n"

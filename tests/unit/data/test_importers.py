from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch

from hiertune.config import DataConfig, KmerConfig
from hiertune.data import import_fasta, import_table, open_dataset, split_of_ids
from hiertune.data.importers import clean_rank, read_fasta
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


# --------------------------------------------------------------------------------- unknown ranks


@pytest.mark.parametrize(
    "name",
    ["", "  ", "Incertae Sedis", "Incertae sedis 7", "Lachnospiraceae Incertae Sedis", "incertae_sedis",
     "Xaceae_INCERTAE-SEDIS_2", "NA", "n/a", "NaN", "none", "NULL", "unknown", "Unknown Family",
     "unclassified_Xaceae", "Unclassified", "unassigned", "uncultured bacterium", "unidentified", "g__",
     "-", "?"],
)  # fmt: skip
def test_placeholders(name):
    assert clean_rank(name) is None


@pytest.mark.parametrize(
    "name",
    ["Nautilia", "Nonea", "Unknownia", "Nanus", "g__Aus", "Sedis", "Incertae", "NA-17", "U", "0", "nulla"],
)
def test_names_that_are_names(name):
    assert clean_rank(f" {name} ") == name


def test_more_placeholders_can_be_given():
    assert clean_rank("Environmental", ["environmental", "misc"]) is None
    assert clean_rank("Environmental samples", ["environmental"]) == "Environmental samples"


# ----------------------------------------------------------------------------------------- FASTA


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


# ---------------------------------------------------------------------------------------- tables

TABLE = pd.DataFrame(
    {
        "name": ["p", "q", "NA", "s"],
        "order": ["A", "A", "B", "incertae sedis"],
        "genus": ["x", "", "NA", "w"],
        "size": [1.5, 2.0, -3.0, 1e3],
        "note": ["red", "blue", "1", "green"],
        "count": [1, 2, 3, 4],
        "part": ["train", "val", "test", "train"],
    }
)
LABELS = ["order", "genus"]


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_table(tmp_path, name):
    path, out = write_table(TABLE, tmp_path / name), tmp_path / "out.h5"
    assert import_table(path, out, LABELS, id_column="name", split_column="part") == out
    data, rows = open_rows(out)
    assert data.ids.tolist() == ["p", "q", "NA", "s"]
    assert data.levels == ("order", "genus")
    lineages = [("A", "x"), ("A", None), ("B", None), (None, "w")]
    assert np.array_equal(data.labels, data.taxonomy.encode(lineages))
    assert data.split.tolist() == [0, 1, 2, 0]
    expected = np.array([[1.5, 1], [2, 2], [-3, 3], [1e3, 4]], np.float32)  # size, count: not the note
    assert np.array_equal(rows.numpy(), expected)


def test_table_without_ids_is_split_by_row_numbers(tmp_path):
    path, out = write_table(TABLE, tmp_path / "a.csv"), tmp_path / "out.h5"
    import_table(path, out, LABELS, features=["count"])
    data, rows = open_rows(out)
    assert data.ids.tolist() == ["0", "1", "2", "3"]
    assert np.array_equal(data.split, split_of_ids(["0", "1", "2", "3"]))
    assert rows.tolist() == [[1], [2], [3], [4]]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_numbers_can_be_labels_and_ids(tmp_path, name):
    path, out = tmp_path / name, tmp_path / "out.h5"
    if name == "a.csv":
        path.write_text("id,kind,f\n10,3,0.5\n11,,1\n12,2,2\n")
    else:  # without pandas' own notes on types, an integer column with gaps could become 3.0, nan, 2.0
        columns = {"id": [10, 11, 12], "kind": [3, None, 2], "f": [0.5, 1.0, 2.0]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    import_table(path, out, ["kind"], id_column="id")
    data, rows = open_rows(out)
    assert data.taxonomy.names == (("2", "3"),)
    assert data.labels.tolist() == [[1], [-1], [0]]
    assert data.ids.tolist() == ["10", "11", "12"]
    assert rows.tolist() == [[0.5], [1], [2]]


def test_row_numbers_and_dates_are_no_features(tmp_path):
    frame = pd.DataFrame({"kind": ["a", "b"], "f": [1.0, 2.0], "b": [True, False]})
    frame.to_csv(tmp_path / "a.csv")  # with pandas' column of row numbers
    import_table(tmp_path / "a.csv", tmp_path / "a.h5", ["kind"])
    assert open_rows(tmp_path / "a.h5")[1].tolist() == [[1, 1], [2, 0]]
    frame["day"] = pd.to_datetime(["2020-01-01", "2021-01-01"])
    frame.to_parquet(tmp_path / "a.parquet")
    import_table(tmp_path / "a.parquet", tmp_path / "b.h5", ["kind"])
    assert open_rows(tmp_path / "b.h5")[1].tolist() == [[1, 1], [2, 0]]


CSV = 'id,kind,f,note\n1,a,0.5,"two\nlines"\n\n2,b,oops,x\n3,c,0.25,y\n4,c,0.25,y\n'


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (CSV, {}, ":5: column 'f' is 'oops'"),  # lines, not rows
        (CSV.replace("oops", ""), {}, ":5: column 'f' is missing"),
        (CSV.replace("oops", "inf"), {}, ":5: column 'f' is 'inf'"),
        (CSV.replace("oops", "1e99"), {}, ":5: column 'f' is '1e+99'"),
        (CSV, {"features": ["note"]}, ":2: column 'note' is 'two\\nlines'"),
        (CSV, {"features": ["g"]}, ": has no column 'g'"),
        (CSV, {"features": ["kind"]}, ": column 'kind' cannot be a feature as well"),
        (CSV, {"labels": ["kin"]}, ": has no column 'kin'"),
        (CSV, {"id_column": "ID"}, ": has no column 'ID'"),
        (CSV, {"split_column": "note", "features": ["id"]}, ":2: column 'note' is 'two\\nlines'"),
        (CSV, {"id_column": "kind", "labels": ["note"], "features": ["id"]},
         ":7: column 'kind' is 'c' again, as in row 2"),
        (CSV.replace("2,b,oops", ",b,1"), {"id_column": "id"}, ":5: column 'id' is missing"),
        (CSV, {"features": []}, ": has no feature columns"),
        ("kind,note\na,b\n", {}, ": has no feature columns"),
        ("kind,f\n", {}, ": has no rows"),
    ],
)  # fmt: skip
def test_bad_table(tmp_path, text, options, expected):
    path = tmp_path / "a.csv"
    path.write_text(text)
    options = {"labels": ["kind"], **options}
    found = message(import_table, path, tmp_path / "out.h5", **options).splitlines()[0]
    assert found == f"{path}{expected}"
    assert not (tmp_path / "out.h5").exists()


def test_near_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV)
    assert message(import_table, path, tmp_path / "o.h5", ["kin"]).splitlines()[1] == "  allowed: kind"
    found = message(import_table, path, tmp_path / "o.h5", ["zzz"])
    assert found.splitlines()[1] == "  allowed: id, kind, f, note"
    path.write_text(",".join(f"c{i}" for i in range(12)))
    found = message(import_table, path, tmp_path / "o.h5", ["zzz"])
    assert found.splitlines()[1] == "  allowed: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, ..."


def test_bad_cell_of_parquet_is_named_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"kind": ["a", "b", "c"], "f": [1.0, 2.0, None]}).to_parquet(path)
    found = message(import_table, path, tmp_path / "out.h5", ["kind"])
    assert found.splitlines()[0] == f"{path}: row 2, column 'f' is missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("a.csv", b"a,b\n1,2\n1,2,3\n"), ("a.csv", b"a\n\xff\n"), ("a.csv.gz", b"a,b\n"),
     ("a.parquet", b"PAR1"), ("no.csv", None)],
)  # fmt: skip
def test_unreadable_table(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    found = message(import_table, path, tmp_path / "out.h5", ["a"])
    assert found.startswith(f"{path}: cannot be read as a table: ")
    assert len(found.splitlines()) == 1


def test_unknown_kind_of_table(tmp_path):
    found = message(import_table, tmp_path / "a.xlsx", tmp_path / "out.h5", ["a"])
    assert found.splitlines()[0] == f"{tmp_path / 'a.xlsx'}: is no known kind of table"

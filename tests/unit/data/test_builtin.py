from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hiertune.data.builtin as builtin
from hiertune.config import DataConfig, KmerConfig
from hiertune.data import builtin_names, describe, open_dataset
from hiertune.data.kmers import kmer_features
from hiertune.errors import InputError

FOLDER = Path(builtin.__file__).parent / "builtin"
LEVELS = ("domain", "phylum", "class", "order", "family", "genus")


@pytest.fixture(autouse=True)
def _cache(builtin_cache, monkeypatch):
    monkeypatch.setenv("HIERTUNE_CACHE", str(builtin_cache))


@pytest.fixture(scope="module")
def records() -> list[tuple[str, list[str], str]]:
    """Id, lineage and sequence of each record, read plainly."""
    lines = gzip.open(FOLDER / "rrna16s.fasta.gz", "rt").read().splitlines()  # noqa: SIM115
    heads = [line[1:].split("\t") for line in lines[::2]]
    return [(name, ranks.split(";"), seq) for (name, ranks), seq in zip(heads, lines[1::2], strict=True)]


def test_rrna16s(records):
    data = open_dataset(DataConfig(path="builtin:rrna16s"), require=("train", "val", "test"))
    assert data.source == "builtin:rrna16s"
    assert len(data) == 5181
    assert data.levels == LEVELS
    assert data.inputs.shape == (5181, 4096)
    assert data.ids.tolist() == [name for name, _, _ in records]
    # with "Incertae Sedis" counted as names there would be 242 families and 1196 genera
    assert data.taxonomy.num_classes == (2, 26, 40, 91, 221, 1187)
    placed = [[None if "ncertae" in rank else rank for rank in lineage] for _, lineage, _ in records]
    assert sum(None in lineage for lineage in placed) == 282
    assert np.array_equal(data.labels, data.taxonomy.encode(placed))
    for row in (0, 1234, 5180):
        expected = kmer_features([records[row][2].encode()], 6, "sqrt")
        assert torch.equal(data.inputs.rows(np.array([row])), torch.from_numpy(expected))


def test_rrna16s_split(records):
    data = open_dataset(DataConfig(path="builtin:rrna16s"))
    assert [len(data.rows(split)) for split in ("train", "val", "test")] == [3124, 498, 1559]
    share = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name, _, _ in records]
    assert data.rows("train", "val").tolist() == [i for i, value in enumerate(share) if value < 0.7]
    genus = data.labels[:, 5]
    test = genus[data.rows("test")]
    seen = np.isin(test, genus[data.rows("train", "val")]) & (test >= 0)
    assert int((test >= 0).sum()) == 1515
    assert int(seen.sum()) == 1295
    lineages = ["/".join(lineage) for _, lineage, _ in records]  # as names: the figure of the data's README
    fitted = {lineages[i] for i in data.rows("train", "val")}
    assert sum(lineages[i] in fitted for i in data.rows("test")) == 1337


def test_no_incertae_sedis_is_a_class():
    names = open_dataset(DataConfig(path="builtin:rrna16s")).taxonomy.names
    assert not any("incertae" in name.lower() for level in names for name in level)
    assert len(set(names[4])) == len(names[4])  # the names that two families share are such ranks


def test_description():
    description = describe("builtin:rrna16s")
    genus = description.levels[-1]
    assert description.source == "builtin:rrna16s"
    assert (genus.trained, genus.singletons, genus.orphans) == (924, 549, 66)
    assert genus.seen == {"val": 405, "test": 1274}


def test_features_are_computed_once(monkeypatch):
    config = DataConfig(path="builtin:rrna16s")
    open_dataset(config)
    monkeypatch.setattr(builtin, "import_fasta", None)  # would raise if called
    open_dataset(config)


def fake_set(monkeypatch, tmp_path) -> None:
    """A built-in data set of two sequences."""
    monkeypatch.setenv("HIERTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_FOLDER", tmp_path)
    monkeypatch.setattr(builtin, "_LEVELS", {"tiny": ("top",)})
    with gzip.open(tmp_path / "tiny.fasta.gz", "wt") as file:
        file.write(">a\tX\nACGTACGTAC\n>b\tY\nAAAAAAAAAA\n")


def test_cache_tells_options_sources_and_versions_apart(monkeypatch, tmp_path):
    fake_set(monkeypatch, tmp_path)
    configs = [KmerConfig(), KmerConfig(k=2), KmerConfig(transform="presence")]
    paths = [builtin.builtin_path("tiny", config) for config in configs]
    monkeypatch.setattr(builtin, "VERSION", 99)
    paths.append(builtin.builtin_path("tiny", KmerConfig()))
    with gzip.open(tmp_path / "tiny.fasta.gz", "at") as file:
        file.write(">c\tX\nACGTACGTAC\n")
    paths.append(builtin.builtin_path("tiny", KmerConfig()))
    assert len(set(paths)) == 5
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(path.name for path in paths)
    shapes = [
        open_dataset(DataConfig(path=str(path)), require=()).inputs.shape for path in [*paths[:3], paths[4]]
    ]
    assert shapes == [(2, 4096), (2, 16), (2, 4096), (3, 4096)]
    rows = open_dataset(DataConfig(path="builtin:tiny", kmer=configs[2]), require=()).inputs.rows(
        np.arange(2)
    )
    assert rows.sum(dim=1).tolist() == [4, 1]  # presence of words


def build(queue, barrier) -> None:
    barrier.wait()
    path = builtin.builtin_path("tiny", KmerConfig())
    queue.put(open_dataset(DataConfig(path=str(path)), require=()).fingerprint)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_processes_at_once_agree_and_leave_one_file(monkeypatch, tmp_path):
    fake_set(monkeypatch, tmp_path)
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    children = [context.Process(target=build, args=(queue, barrier)) for _ in range(4)]
    for child in children:
        child.start()
    prints = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(prints) == 1
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_another_process_may_be_first(monkeypatch, tmp_path):
    fake_set(monkeypatch, tmp_path)
    real = builtin.import_fasta

    def second(*arguments, **options):
        real(*arguments, **options)  # the other one's
        return real(*arguments, **options)

    monkeypatch.setattr(builtin, "import_fasta", second)
    assert builtin.builtin_path("tiny", KmerConfig()).exists()


def test_unknown_name():
    with pytest.raises(InputError) as error:
        open_dataset(DataConfig(path="builtin:silva"))
    assert str(error.value) == (
        "data.path: there is no built-in data set 'silva'\n  allowed: builtin:rrna16s"
    )
    assert builtin_names() == ["rrna16s"]


def test_a_cache_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HIERTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set HIERTUNE_CACHE to one"):
        open_dataset(DataConfig(path="builtin:rrna16s"))


def test_cache_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("HIERTUNE_CACHE")
    assert builtin.cache_folder().name == "hiertune"
    monkeypatch.setenv("HIERTUNE_CACHE", "~/features")
    assert builtin.cache_folder() == Path.home() / "features"


def test_the_licence_travels_with_the_data():
    notice = (FOLDER / "rrna16s.LICENSE.txt").read_text()
    assert "Copyright (c) 2009-2010, The Broad Institute" in notice
    assert "Redistributions in binary form must reproduce the above copyright notice" in notice


def test_importing_data_does_not_load_ray_or_mlflow():
    code = "import sys, hiertune.data; sys.exit(bool({'ray', 'mlflow', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

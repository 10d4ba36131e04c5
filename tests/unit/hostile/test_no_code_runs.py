"""A pickle that runs code when it is loaded, in every place where a file comes from somebody else."""

import hashlib
import json
import os
import pickle
import zipfile

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hiertune.train.checkpoint import Checkpoint


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def evil(folder):
    """The pickle; it leaves `hacked` in the folder. Where it is not loaded, nothing does."""
    return Evil(folder / "hacked")


@pytest.fixture(autouse=True)
def _nothing_ran(folder):
    yield
    assert not (folder / "hacked").exists()


def test_the_pickle_works(folder, evil):
    pickle.loads(pickle.dumps(evil))
    assert (folder / "hacked").exists()
    (folder / "hacked").unlink()


@pytest.mark.parametrize(
    "name",
    [
        "data.h5",
        "x.npy",
        "x.csv",
        "t.csv",
        "t.parquet",
        "x.fasta",
        "space.yaml",
        "config.yaml",
        "inat.json",
        "labels.h5",
        "model/model.json",
        "model/model.safetensors",
        "images/class0/0.png",
        "runs/demo/ledger.log",
        "runs/demo/trials.csv",
        "runs/demo/curves.csv",
        "runs/demo/summary.json",
        "runs/demo/space.yaml",
        "runs/demo/trials/0002/val_logits.safetensors",
    ],
)
def test_a_pickle_in_place_of_the_file(folder, refused, commands, evil, name):
    (folder / name).write_bytes(pickle.dumps(evil))
    refused(commands[name], (folder / name).name)


def test_a_pickle_of_torch_in_place_of_weights(folder, refused, commands, evil):
    for name in ("model/model.safetensors", "runs/demo/trials/0002/val_logits.safetensors"):
        torch.save({"labels": evil}, folder / name)
        path = folder / "model" / "model.json"
        digest = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": digest}))
        refused(commands[name], "model.json" if name.startswith("model") else "val_logits")


def test_arrays_of_objects(folder, refused, evil):
    np.save(folder / "x.npy", np.array([[evil]] * 5, object), allow_pickle=True)
    refused(["predict", "model", "x.npy"], "x.npy")
    with zipfile.ZipFile(folder / "x.npy", "w") as archive:  # what np.load takes for an .npz
        archive.writestr("arr_0.npy", pickle.dumps(evil))
    refused(["predict", "model", "x.npy"], "x.npy")


def test_hdf5_of_pickles(folder, refused, commands, evil):
    """h5py keeps bytes as bytes, whatever they are tagged as."""
    with h5py.File(folder / "data.h5", "r+") as file:
        del file["ids"]
        file["ids"] = np.array([np.void(pickle.dumps(evil))] * 100)
        file.attrs["kmer"] = np.void(pickle.dumps(evil))
    refused(commands["data.h5"], "data.h5")


def test_parquet_with_metadata_of_pandas(folder, run, commands, evil):
    table = pa.Table.from_pandas(pd.read_csv(folder / "t.csv"))
    spoiled = {
        b"pandas": b"{}",
        b"PANDAS_ATTRS": pickle.dumps(evil),
        b"ARROW:extension:metadata": pickle.dumps(evil),
    }
    pq.write_table(table.replace_schema_metadata(spoiled), folder / "t.parquet")
    assert run(commands["t.parquet"])[0] in (0, 2)


@pytest.mark.parametrize("protocol", [2, 4])
def test_checkpoints(folder, refused, evil, protocol):
    path = folder / "out" / "checkpoint"
    torch.save({"trial": evil}, folder / "saved", pickle_protocol=protocol)
    for payload in ((folder / "saved").read_bytes(), pickle.dumps(evil)):
        Checkpoint(path).save(payload)
        refused(["train", "config.yaml", "--out", "out"], "checkpoint")


def test_weights_of_a_backbone(folder, refused, evil):
    pytest.importorskip("timm")
    rows = np.zeros((30, 8, 8, 3), np.uint8)
    from hiertune import Taxonomy
    from hiertune.data import write_dataset

    lineages = [("f", f"g{i % 2}") for i in range(30)]
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    write_dataset(folder / "i.h5", rows, taxonomy.encode(lineages), taxonomy, [str(i) for i in range(30)])
    for name, make in (
        ("w.pth", lambda path: torch.save({"state_dict": {"x": evil}}, path)),
        ("v.pth", lambda path: path.write_bytes(pickle.dumps(evil))),
        ("w.safetensors", lambda path: path.write_bytes(pickle.dumps(evil))),
    ):
        make(folder / name)
        (folder / "config.yaml").write_text(
            "data: {path: i.h5}\ntrain: {epochs: 1, batch_size: 4}\n"
            f"model: {{backbone: {{kind: timm, name: test_resnet, weights: {name}, image_size: 32}}}}\n"
        )
        refused(["train", "config.yaml", "--out", "new"], name)


def test_a_resumed_search_with_a_spoiled_record(folder, refused, evil):
    (folder / "runs" / "demo" / "summary.json").unlink()
    (folder / "space.yaml").write_text((folder / "runs/demo/space.yaml").read_text().replace("../../", ""))
    (folder / "runs" / "demo" / "search.lock").touch()
    (folder / "runs" / "demo" / "ledger.log").write_bytes(pickle.dumps(evil) + b"\n{}\n")
    refused(["search", "space.yaml", "--name", "demo", "--resume"], "ledger.log")


def test_what_is_read_with_yaml_runs_nothing(folder, refused, commands):
    for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"):
        text = f"name: !!python/{tag} ['touch {folder}/hacked']\n"
        for name in ("space.yaml", "config.yaml", "linnaeus.yaml"):
            (folder / name).write_text(text)
            refused(commands[name], name)

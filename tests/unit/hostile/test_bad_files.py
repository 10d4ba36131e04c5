"""Files that are broken in known ways: one error that names the file, exit code 2, nothing written."""

import gzip
import json
import random
import struct

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from hiertune.train.checkpoint import Checkpoint, encode_checkpoint

SEED = 20


def random_bytes(content):
    return random.Random(SEED).randbytes(len(content) or 64)


DAMAGE = {
    "empty": lambda content: b"",
    "a NUL": lambda content: b"\0",
    "NULs": lambda content: b"\0" * len(content),
    "random bytes": random_bytes,
    "cut in half": lambda content: content[: len(content) // 2],
    "zeros in the middle": lambda content: content[:8] + b"\0" * (len(content) - 8),
    "UTF-16": lambda content: content.decode("latin1").encode("utf-16"),
    "HTML": lambda content: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
}
HARMLESS = {
    # no curves is what a search has before its first epoch; the space file is shown as it is
    ("runs/demo/curves.csv", "empty"),
    ("runs/demo/space.yaml", "empty"),
    ("runs/demo/space.yaml", "a NUL"),
    ("runs/demo/space.yaml", "NULs"),
    ("runs/demo/space.yaml", "cut in half"),
    ("runs/demo/space.yaml", "zeros in the middle"),
    ("runs/demo/space.yaml", "HTML"),
    # so is a table or a journal that ends early at the end of a line
    ("runs/demo/ledger.log", "cut in half"),
    ("runs/demo/trials.csv", "cut in half"),
    ("runs/demo/curves.csv", "cut in half"),
    ("x.csv", "zeros in the middle"),
    ("t.csv", "cut in half"),
    ("t.tsv", "cut in half"),
    # JSON may be UTF-16
    ("model/model.json", "UTF-16"),
    ("runs/demo/model/model.json", "UTF-16"),
    ("inat.json", "UTF-16"),
}
TAKEN = [
    "space.yaml",
    "data.h5",
    "config.yaml",
    "linnaeus.yaml",
    "x.fasta",
    "x.fasta.gz",
    "t.csv",
    "t.tsv",
    "t.csv.gz",
    "t.parquet",
    "x.npy",
    "x.csv",
    "model/model.json",
    "model/model.safetensors",
    "images/class0/0.png",
    "images/class1/1j.jpg",
    "classes.csv",
    "inat.json",
    "labels.h5",
    "runs/demo/ledger.log",
    "runs/demo/trials.csv",
    "runs/demo/curves.csv",
    "runs/demo/summary.json",
    "runs/demo/space.yaml",
    "runs/demo/trials/0002/val_logits.safetensors",
    "runs/demo/model/model.json",
]
CASES = [(name, damage) for name in TAKEN for damage in DAMAGE if (name, damage) not in HARMLESS]


FAST = ("empty", "random bytes", "cut in half")


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(*case, marks=() if case[1] in FAST else pytest.mark.slow) for case in CASES],
)
def test_a_file_that_is_damaged_as_a_whole(folder, refused, commands, name, damage):
    path = folder / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    refused(commands[name], path.name)


@pytest.mark.parametrize("name", TAKEN)
def test_a_folder_in_place_of_a_file(folder, refused, commands, name):
    if name.startswith("images/"):
        pytest.skip("a folder among images is searched")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(commands[name], "demo" if name.startswith("runs/demo/model") else (folder / name).name)


# ---------------------------------------------------------------------------------------- HDF5


def replaced(name, **options):
    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change


def huge(file):
    del file["inputs"]
    file.create_dataset("inputs", (10**13, 4), "f4", chunks=(1, 4))


def wide(file):
    del file["inputs"]
    file.create_dataset("inputs", (100, 2**40), "f4", chunks=(1, 1024))


def external_link(file):
    del file["inputs"]
    file["inputs"] = h5py.ExternalLink("other.h5", "inputs")


def behind_a_link(file):
    del file["inputs"]
    file["elsewhere"] = h5py.ExternalLink("other.h5", "/")
    file["inputs"] = h5py.SoftLink("/elsewhere/inputs")


def no_such_link(file):
    del file["labels"]
    file["labels"] = h5py.ExternalLink("/etc/passwd", "labels")


def dangling(file):
    del file["ids"]
    file["ids"] = h5py.SoftLink("/nowhere")


def cyclic(file):
    del file["labels"]
    file["labels"] = h5py.SoftLink("/labels2")
    file["labels2"] = h5py.SoftLink("/labels")


def group_in_itself(file):
    file["taxonomy/parents/loop"] = file["taxonomy"]
    del file["taxonomy/levels"]


def virtual(file):
    del file["inputs"]
    layout = h5py.VirtualLayout((100, 3), "f4")
    layout[...] = h5py.VirtualSource("other.h5", "inputs", (100, 3))
    file.create_virtual_dataset("inputs", layout)


def raw_file(file):
    del file["inputs"]
    file.create_dataset("inputs", (4, 4), "f4", external=[("/etc/passwd", 0, 64)])


def references(file):
    del file["ids"]
    file.create_dataset("ids", data=[file.ref] * 100, dtype=h5py.ref_dtype)


def vlen(file):
    del file["inputs"]
    file.create_dataset("inputs", (100,), h5py.vlen_dtype(np.float32))


def nans(file):
    file["inputs"][4, 1] = np.nan


def label(value):
    def change(file):
        file["labels"][3, 1] = value

    return change


def attribute(name, value):
    def change(file):
        file.attrs[name] = value

    return change


def remove(name):
    def change(file):
        del file[name]

    return change


def not_utf8(file):
    del file["ids"]
    file.create_dataset("ids", data=np.array([b"\xff\xfe"] * 100))


def parent(level, value):
    def change(file):
        file[f"taxonomy/parents/{level}"][0] = value

    return change


HDF5 = {
    "huge rows": huge,
    "wide rows": wide,
    "external link": external_link,
    "behind an external link": behind_a_link,
    "a link to no HDF5 file": no_such_link,
    "dangling link": dangling,
    "cyclic links": cyclic,
    "a group in itself": group_in_itself,
    "virtual dataset": virtual,
    "raw external file": raw_file,
    "object references": references,
    "rows of several lengths": vlen,
    "complex inputs": replaced("inputs", data=np.zeros((100, 3), complex)),
    "compound labels": replaced("labels", data=np.zeros(100, [("a", "i4"), ("b", "i4")])),
    "float labels": replaced("labels", data=np.zeros((100, 2))),
    "string split": replaced("split", data=[b"train"] * 100),
    "too few labels": replaced("labels", data=np.zeros((7, 2), int)),
    "scalar labels": replaced("labels", data=3),
    "ids twice": replaced("ids", data=["a"] * 100),
    "ids are numbers": replaced("ids", data=np.arange(100)),
    "ids are not UTF-8": not_utf8,
    "split 7": replaced("split", data=np.full(100, 7)),
    "NaN": nans,
    "label too high": label(10**9),
    "label -2": label(-2),
    "label of another parent": label(0),
    "no format": attribute("format", "other"),
    "format is an array": attribute("format", np.arange(3)),
    "version 99": attribute("version", 99),
    "version is text": attribute("version", "x"),
    "kmer is no JSON": attribute("kmer", "{"),
    "kmer 99": attribute("kmer", '{"k": 99}'),
    "kmer is a number": attribute("kmer", 4),
    "parent of itself": parent(1, 77),
    "parent -5": parent(1, -5),
    "no taxonomy": remove("taxonomy"),
    "no names": remove("taxonomy/names/1"),
    "no inputs": remove("inputs"),
    "levels twice": replaced("taxonomy/levels", data=["a", "a"]),
    "level with a slash": replaced("taxonomy/levels", data=["../up", "b"]),
    "level that is empty": replaced("taxonomy/levels", data=["", "b"]),
    "level of an escape": replaced("taxonomy/levels", data=["\x1b[31mred", "b"]),
    "a thousand levels": replaced("taxonomy/levels", data=[f"l{i}" for i in range(1000)]),
    "levels are numbers": replaced("taxonomy/levels", data=[1, 2]),
    "anchors too few": replaced("taxonomy/anchors/1", data=[1]),
    "names too few": replaced("taxonomy/names/1", data=["x"]),
}


@pytest.mark.parametrize("case", HDF5)
def test_an_hdf5_file_that_is_not_what_it_says(folder, refused, commands, case):
    (folder / "other.h5").write_bytes((folder / "data.h5").read_bytes())
    with h5py.File(folder / "data.h5", "r+") as file:
        HDF5[case](file)
    refused(commands["data.h5"], "data.h5")


# --------------------------------------------------------------------------------------- models


def described(folder, **changes):
    path = folder / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MODELS = {
    "another format": {"format": "other"},
    "another version": {"version": 2},
    "version is a list": {"version": [1]},
    "no config": {"config": None},
    "config is text": {"config": "mlp"},
    "unknown backbone": {"config": {"data": {"path": "x"}, "model": {"backbone": {"kind": "lstm"}}}},
    "a huge model": {
        "config": {"data": {"path": "x"}, "model": {"backbone": {"kind": "mlp", "hidden": [10**12]}}}
    },
    "another model": {"config": {"data": {"path": "x"}, "model": {"backbone": {"kind": "mlp"}}}},
    "shape of text": {"input_shape": ["three"]},
    "shape below zero": {"input_shape": [-3]},
    "shape is a number": {"input_shape": 3},
    "no shape": {"input_shape": []},
    "no taxonomy": {"taxonomy": {}},
    "taxonomy is a list": {"taxonomy": [1, 2]},
    "kmer 99": {"kmer": {"k": 99}},
    "kmer of another key": {"kmer": {"k": 2, "x": 1}},
    "unknown outcome": {"outcomes": ["order"]},
    "outcomes are numbers": {"outcomes": [7]},
    "unknown rule": {"decoding": {"kind": "magic"}},
    "rule is a list": {"decoding": [1]},
    "checksum of another": {"weights_sha256": "0" * 64},
    "checksum is null": {"weights_sha256": None},
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_folder_that_contradicts_itself(folder, refused, case):
    described(folder, **MODELS[case])
    refused(["predict", "model", "x.npy"], "model.")


def test_weights_of_another_shape_with_the_right_checksum(folder, refused):
    import hashlib

    weights = safetensors.torch.save({"x": torch.zeros(3)})
    (folder / "model" / "model.safetensors").write_bytes(weights)
    described(folder, weights_sha256=hashlib.sha256(weights).hexdigest())
    refused(["predict", "model", "x.npy"], "model.json")
    (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    described(
        folder,
        weights_sha256=hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest(),
    )
    refused(["predict", "model", "x.npy"], "model")


# ------------------------------------------------------------------------------------ arrays


def npy(header):
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 240


NPY = {
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (5, 3), }",
    "code in the header": "__import__('os').system('touch hacked')",
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 3), }",
    "overflow": "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "below zero": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    "text": "{'descr': '<U4', 'fortran_order': False, 'shape': (5, 3), }",
    "records": "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (5,), }",
    "complex": "{'descr': '<c8', 'fortran_order': False, 'shape': (5, 3), }",
    "dates": "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (5, 3), }",
    "scalar": "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
    "another width": "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 4), }",
    "deep": "(" * 900 + ")" * 900,
    "open string": "{'descr': '''",
    "no shape": "{'descr': '<f4', 'fortran_order': False}",
}


@pytest.mark.parametrize("case", NPY)
def test_an_array_that_is_none(folder, refused, case):
    (folder / "x.npy").write_bytes(npy(NPY[case]))
    refused(["predict", "model", "x.npy"], "x.npy")
    assert not (folder / "hacked").exists()


# ------------------------------------------------------------- tables, sequences, spaces, runs

TEXTS = {
    "yaml: aliases that multiply": (
        "space.yaml",
        "a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}, *a]\n" for i in range(30)),
    ),
    "yaml: a merge": ("space.yaml", "a: &a {x: 1}\nb: {<<: *a}\n"),
    "yaml: deep": ("space.yaml", "a: " + "[" * 5000 + "]" * 5000),
    "yaml: wide": ("space.yaml", "a: [" + "1," * 200000 + "]"),
    "yaml: code": ("space.yaml", "name: !!python/object/new:os.system [touch hacked]\n"),
    "yaml: two documents": ("space.yaml", "name: a\n---\nname: b\n"),
    "yaml: a binary tag": ("space.yaml", "name: !!binary aGFja2Vk\n"),
    "yaml: a name that climbs": ("space.yaml", "name: ../up\ndata: {path: data.h5}\n"),
    "yaml: an absolute name": ("space.yaml", "name: /tmp/x\ndata: {path: data.h5}\n"),
    "yaml: a NUL in the path": ("space.yaml", 'name: it\ndata: {path: "a\\0b.h5"}\n'),
    "config: a distribution": (
        "config.yaml",
        "name: it\ndata: {path: data.h5}\noptimizer: {lr: {uniform: [1, 2]}}\n",
    ),
    "csv: ragged": ("x.csv", "id,a,b,c\nr,1,2\n"),
    "csv: words": ("x.csv", "a,b,c\n1,2,three\n"),
    "csv: infinite": ("x.csv", "a,b,c\n1,2,inf\n"),
    "csv: other columns": ("x.csv", "a,b\n1,2\n"),
    "csv: a quote that never ends": ("x.csv", 'id,a,b,c\n"r,1,2,3\n' + "x" * 200000),
    "table: no such column": ("t.csv", "id,split,order,genus,a\nr,train,o,g,1\n"),
    "table: header alone": ("t.csv", "id,split,family,genus,a\n"),
    "table: an id twice": ("t.csv", "id,split,family,genus,a\nr,train,f,g,1\nr,train,f,g,2\n"),
    "table: a split of its own": ("t.csv", "id,split,family,genus,a\nr,dev,f,g,1\n"),
    "table: no numbers": ("t.csv", "id,split,family,genus,a\nr,train,f,g,x\n"),
    "table: too large a number": ("t.csv", "id,split,family,genus,a\nr,train,f,g,1e400\nq,train,f,g,2\n"),
    "table: all unknown": ("t.csv", "id,split,family,genus,a\nr,train,,,1\n"),
    "fasta: no header": ("x.fasta", "ACGT\n"),
    "fasta: no sequence": ("x.fasta", ">a\tf;g\n>b\tf;g\nACGT\n"),
    "fasta: gaps": ("x.fasta", ">a\tf;g\nAC-GT\n"),
    "fasta: no lineage": ("x.fasta", ">a\nACGT\n"),
    "fasta: too many ranks": ("x.fasta", ">a\tf;g;s\nACGT\n"),
    "fasta: an id twice": ("x.fasta", ">a\tf;g\nACGT\n>a\tf;g\nACGT\n"),
    "fasta: an escape": ("x.fasta", ">a\tf;g\nAC\x1b[2JGT\n"),
    "fasta: no word": ("x.fasta", ">a\tf;g\nN\n"),
    "json: a list": ("inat.json", "[]"),
    "json: no images": ("inat.json", '{"annotations": [], "categories": []}'),
    "json: deep": ("inat.json", "[" * 100000 + "]" * 100000),
    "json: a path that climbs": ("inat.json", None),
    "json: an absolute path": ("inat.json", None),
    "json: no such category": ("inat.json", None),
    "trials: without columns": ("runs/demo/trials.csv", "a,b\n1,2\n"),
    "trials: a number of words": ("runs/demo/trials.csv", "trial,state,objective\none,completed,0.5\n"),
    "trials: an objective of words": ("runs/demo/trials.csv", "trial,state,objective\n1,completed,half\n"),
    "curves: other columns": ("runs/demo/curves.csv", "a,b\n1,2\n"),
    "ledger: JSON of another kind": ("runs/demo/ledger.log", '{"a": 1}\n'),
    "ledger: a list": ("runs/demo/ledger.log", "[1, 2]\n"),
    "ledger: an unknown operation": ("runs/demo/ledger.log", '{"op_code": 99, "worker_id": "x"}\n'),
    "ledger: a trial of no study": (
        "runs/demo/ledger.log",
        '{"op_code": 4, "worker_id": "x", "study_id": 5, "datetime_start": "now"}\n',
    ),
    "summary: a list": ("runs/demo/summary.json", "[]"),
    "summary: empty": ("runs/demo/summary.json", "{}"),
    "summary: deep": ("runs/demo/summary.json", "[" * 100000 + "]" * 100000),
}
SPOILED = {
    "json: a path that climbs": lambda inat: inat["images"][0].update(file_name="../../secret.png"),
    "json: an absolute path": lambda inat: inat["images"][0].update(file_name="/etc/passwd"),
    "json: no such category": lambda inat: inat["annotations"][0].update(category_id=99),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_says_something_else(folder, refused, commands, case):
    name, text = TEXTS[case]
    path = folder / name
    if text is None:
        content = json.loads(path.read_text())
        SPOILED[case](content)
        text = json.dumps(content)
    path.write_text(text)
    shown = {"json: an absolute path": "passwd", "json: a path that climbs": "secret"}
    shown |= {"yaml: a name that climbs": "space.yaml", "yaml: a NUL in the path": r"a\x00b.h5"}
    refused(commands[name], shown.get(case, path.name))
    assert not (folder / "hacked").exists()


SUMMARIES = {
    "a metric that is text": lambda summary: summary["winner"]["metrics"].update({"test/loss": "low"}),
    "counts of text": lambda summary: summary.update(trials={"completed": "3"}),
    "a winner of no number": lambda summary: summary["winner"].update(trial="../../x"),
    "a mode of its own": lambda summary: summary["objective"].update(mode="best"),
    "seconds without end": lambda summary: summary.update(seconds=float("inf")),
    "controls in a list": lambda summary: summary.update(controls=[1]),
    "no seed": lambda summary: summary.pop("seed"),
    "a fingerprint of a number": lambda summary: summary["data"].update(fingerprint=3),
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_a_summary_that_is_none(folder, refused, case):
    path = folder / "runs" / "demo" / "summary.json"
    summary = json.loads(path.read_text())
    SUMMARIES[case](summary)
    path.write_text(json.dumps(summary))
    refused(["report", "runs/demo"], "summary.json")
    if case == "a metric that is text":
        refused(["export", "runs/demo", "out"], "summary.json")


# ----------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_something_else_is_refused(folder, refused):
    """Its checksum is right; one with a wrong checksum was cut off, and the one before it counts."""
    path = folder / "out" / "checkpoint"
    for state in ({"trial": "another"}, {}):
        Checkpoint(path).save(encode_checkpoint(state))
        assert "another config" in refused(["train", "config.yaml", "--out", "out"], "checkpoint")


def test_a_gzip_bomb_ends(folder, refused):
    """A gigabyte of one line, in a megabyte: no number, and no sequence."""
    (folder / "x.fasta.gz").write_bytes(gzip.compress(b"\0" * 2**26))
    refused(["data", "import-fasta", "x.fasta.gz", "new.h5", "--levels", "family,genus"], "x.fasta.gz")


def test_there_are_enough(capsys):
    """Of the issue's 150; those of broken_spaces.txt and broken_for_data.txt come on top."""
    count = len(CASES) + len(TAKEN) - 2 + len(HDF5) + len(MODELS) + len(NPY) + len(TEXTS) + len(SUMMARIES)
    assert count > 300

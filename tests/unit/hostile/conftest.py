"""One good file of every kind that hiertune reads, to be broken; and the command line, held to its word."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from PIL import Image

from hiertune import Taxonomy
from hiertune.cli import main
from hiertune.config import DataConfig, IdentityConfig, KmerConfig, ModelConfig, TrialConfig
from hiertune.data import write_dataset
from hiertune.decoding import ValidationLogits
from hiertune.export import save_model
from hiertune.models import build_model
from hiertune.tracking.spool import encode

LINEAGES = [(f"f{i // 2}", f"g{i}") for i in range(4)] * 25
TAXONOMY = Taxonomy.from_lineages(LINEAGES, ["family", "genus"])
SPACE = """name: it
data: {path: data.h5}
model: {backbone: {kind: mlp, hidden: [8]}, head: {kind: linear}}
optimizer: {kind: adamw, lr: {loguniform: [1e-4, 1e-2]}}
train: {epochs: 2, batch_size: 8}
search: {trials: 2}
"""
CONFIG = SPACE.replace("{loguniform: [1e-4, 1e-2]}", "0.01").replace("search: {trials: 2}\n", "")
FASTA = "".join(f">r{i}\tf{i % 2};g{i % 4}\nACGTACGTTGCA{'ACGT'[i % 4] * 9}\n" for i in range(40))
TABLE = "id,split,family,genus,a,b\n" + "".join(
    f"r{i},{'train' if i % 3 else 'val'},f{i % 2},g{i % 4},{i},{i / 7:.4f}\n" for i in range(40)
)
EXPERIMENT = """TRAIN: {EPOCHS: 2, AMP_OPT_LEVEL: O0}
DATA: {TASK_KEYS_H5: [taxa_L20, taxa_L30], BATCH_SIZE: 16}
LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: TaxonomyAwareLabelSmoothing}}}
SCHEDULE: {MIX: {MIXUP: {ENABLED: False}}}
"""
INAT = {
    "images": [{"id": i, "file_name": f"class{i % 2}/{i}.png"} for i in range(4)],
    "annotations": [{"image_id": i, "category_id": i % 2} for i in range(4)],
    "categories": [{"id": i, "name": f"s{i}", "supercategory": "x"} for i in range(2)],
}


def build(folder: Path) -> None:
    random = np.random.default_rng(0)
    labels = TAXONOMY.encode(LINEAGES)
    inputs = random.normal(size=(100, 3)).astype(np.float32)
    write_dataset(folder / "data.h5", inputs, labels, TAXONOMY, [f"row{i}" for i in range(100)])
    (folder / "space.yaml").write_text(SPACE)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "linnaeus.yaml").write_text(EXPERIMENT)
    (folder / "x.fasta").write_text(FASTA)
    (folder / "x.fasta.gz").write_bytes(gzip.compress(FASTA.encode(), mtime=0))
    (folder / "t.csv").write_text(TABLE)
    (folder / "t.tsv").write_text(TABLE.replace(",", "\t"))
    (folder / "t.csv.gz").write_bytes(gzip.compress(TABLE.encode(), mtime=0))
    pd.read_csv(folder / "t.csv").to_parquet(folder / "t.parquet")
    np.save(folder / "x.npy", inputs[:5])
    (folder / "x.csv").write_text("id,a,b,c\n" + "".join(f"r{i},{i},1.5,-2e3\n" for i in range(9)))
    for number in range(4):
        place = folder / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (12, 12, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        Image.fromarray(pixels).save(place / f"{number}j.jpg")
    (folder / "classes.csv").write_text("class,order,family\nclass0,o,f0\nclass1,o,f1\n")
    (folder / "inat.json").write_text(json.dumps(INAT))
    import h5py

    with h5py.File(folder / "labels.h5", "w") as file:
        file["img_identifiers"] = [f"{i}.png" for i in range(4)]
        file["taxa_L10"] = np.array([1, 2, 3, 4])
        file["taxa_L20"] = np.array([5, 5, 6, 6])
        file["images"] = random.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    _model(folder / "model", (3,), None)
    _model(folder / "kmers", (4**2,), KmerConfig(k=2))
    _run(folder / "runs" / "demo", labels, random)


def _model(folder: Path, shape: tuple[int, ...], kmer: KmerConfig | None) -> None:
    config = TrialConfig(data=DataConfig(path="d.h5"), model=ModelConfig(backbone=IdentityConfig()))
    torch.manual_seed(0)
    model = build_model(config.model, TAXONOMY, shape, (torch.zeros(shape), torch.ones(shape)))
    save_model(folder, model, config, TAXONOMY, None, shape, kmer)


def _run(folder: Path, labels: np.ndarray, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    _model(folder / "model", (3,), None)
    (folder / "space.yaml").write_text(
        SPACE.replace("data.h5", "../../data.h5").replace("name: it", "name: demo")
    )
    (folder / "best.yaml").write_text(CONFIG)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "ledger.log"))
    storage = optuna.storages.JournalStorage(backend)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=storage, study_name="demo", direction="maximize", sampler=sampler)
    rows = []
    for number in range(3):
        trial = study.ask()
        lr = trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True)
        trial.report(0.5, 1)
        metrics = {"val/accuracy/genus": 0.5 + number / 10, "val/loss": 1.0}
        for name, value in {"epochs": 2, "seconds": 1.5, "metrics": metrics, "reason": None}.items():
            trial.set_user_attr(name, value)
        study.tell(trial, metrics["val/accuracy/genus"])
        row = {"trial": number, "state": "completed", "reason": None, "epochs": 2, "seconds": 1.5}
        rows.append({**row, "objective": 0.5 + number / 10, "param/optimizer.lr": lr, **metrics})
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    (folder / "curves.csv").write_text("trial,epoch,metric,value\n0,1,val/accuracy/genus,0.5\n")
    base = {
        level: torch.from_numpy(random.normal(size=(100, size))).float()
        for level, size in zip(TAXONOMY.levels, TAXONOMY.num_classes, strict=True)
    }
    seen = tuple(torch.ones(size, dtype=torch.bool) for size in TAXONOMY.num_classes)
    ValidationLogits(base, torch.from_numpy(labels), seen).save(
        folder / "trials" / "0002" / "val_logits.safetensors"
    )
    metrics = {"test/accuracy/genus": 0.7, "val/accuracy/genus": 0.7, "test/loss": 1.0, "val/loss": 1.0}
    summary = {
        "name": "demo",
        "objective": {"metric": "val/accuracy/genus", "mode": "max", "value": 0.7},
        "trials": {"completed": 3},
        "winner": {"trial": 2, "params": {"optimizer.lr": 0.01}, "metrics": metrics},
        "controls": {"flat": {"metrics": metrics, "against_winner": None}},
        "refit": True,
        "seconds": 9.5,
        "seed": 0,
        "versions": {"python": "3.11"},
        "data": {"path": "data.h5", "fingerprint": "0" * 64, "rows": 100},
        "tracking": {"uri": "sqlite:////x/mlflow.db", "delivered": 3, "total": 3, "error": None},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    opened = {
        "op": "open",
        "t": 0,
        "trial": None,
        "uri": "http://127.0.0.1:9",
        "experiment": "e",
        "search": "demo",
    }
    (folder / "tracking.jsonl").write_bytes(encode({**opened, "uid": "u", "pid": 1}, 0))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    build(folder)
    return folder


@pytest.fixture
def folder(tmp_path, good, monkeypatch):
    """A copy of the good files, to be broken; the current folder."""
    work = tmp_path / "work"
    shutil.copytree(good, work)
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return work


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under `folder`; what may be read of it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    return found


@pytest.fixture(scope="session")
def contents():
    return _contents


@pytest.fixture
def run(capfd):
    """`run(argv)`: exit code and what was printed. Anything but SystemExit is a traceback, so a failure."""

    def call(argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in argv])
        printed = capfd.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


@pytest.fixture
def refused(run, folder):
    """`refused(argv, names)`: exit code 2, one error with `names` in it, and the folder as it was."""

    def check(argv, names):
        before = _contents(folder)
        code, out, err = run(argv)
        assert code == 2, (code, out, err)
        assert err.startswith("error: "), err
        assert "Traceback" not in out + err
        assert str(names) in err, err
        assert len(err) < 4000
        assert not any(ord(letter) < 32 and letter != "\n" for letter in err), repr(err)
        assert _contents(folder) == before
        return err

    return check


COMMANDS = {
    "space.yaml": ["search", "space.yaml", "--dry-run"],
    "data.h5": ["data", "describe", "data.h5"],
    "config.yaml": ["train", "config.yaml", "--out", "new"],
    "linnaeus.yaml": ["import", "linnaeus-config", "linnaeus.yaml"],
    "x.fasta": ["data", "import-fasta", "x.fasta", "new.h5", "--levels", "family,genus", "--kmer", "2"],
    "x.fasta.gz": ["data", "import-fasta", "x.fasta.gz", "new.h5", "--levels", "family,genus", "--kmer", "2"],
    "t.csv": [
        "data",
        "import-table",
        "t.csv",
        "new.h5",
        "--labels",
        "family,genus",
        "--id",
        "id",
        "--split",
        "split",
    ],
    "t.tsv": ["data", "import-table", "t.tsv", "new.h5", "--labels", "family,genus", "--id", "id"],
    "t.csv.gz": ["data", "import-table", "t.csv.gz", "new.h5", "--labels", "family,genus", "--id", "id"],
    "t.parquet": ["data", "import-table", "t.parquet", "new.h5", "--labels", "family,genus", "--id", "id"],
    "x.npy": ["predict", "model", "x.npy"],
    "x.csv": ["predict", "model", "x.csv"],
    "kmers/model.json": ["predict", "kmers", "x.fasta"],
    "model/model.json": ["predict", "model", "x.npy"],
    "model/model.safetensors": ["predict", "model", "x.npy"],
    "images/class0/0.png": [
        "data",
        "import-images",
        "images",
        "new.h5",
        "--levels",
        "kind",
        "--size",
        "8",
        "--threads",
        "1",
    ],
    "images/class1/1j.jpg": [
        "data",
        "import-images",
        "images",
        "new.h5",
        "--levels",
        "kind",
        "--size",
        "8",
        "--threads",
        "1",
    ],
    "classes.csv": ["data", "import-images", "images", "new.h5", "--taxonomy", "classes.csv", "--size", "8"],
    "inat.json": ["data", "import-inat", "inat.json", "new.h5", "--images", "images", "--size", "8"],
    "labels.h5": ["data", "import-linnaeus", "labels.h5", "new.h5", "--images", "labels.h5", "--size", "8"],
    "runs/demo/ledger.log": ["report", "runs/demo"],
    "runs/demo/trials.csv": ["report", "runs/demo"],
    "runs/demo/curves.csv": ["report", "runs/demo"],
    "runs/demo/summary.json": ["report", "runs/demo"],
    "runs/demo/space.yaml": ["report", "runs/demo"],
    "runs/demo/trials/0002/val_logits.safetensors": ["decode", "runs/demo"],
    "runs/demo/model/model.json": ["export", "runs/demo", "new"],
}
"""The command that reads each file."""


@pytest.fixture(scope="session")
def commands():
    return COMMANDS

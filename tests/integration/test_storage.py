"""Whole searches that are kept in storage too, and go on where the run folder never was."""

import csv
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import s3

from hiertune.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

SPACE = """
name: kept
data: {path: DATA}
storage: STORAGE
model: {backbone: {kind: mlp, hidden: [16]}}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-3, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 50}
search: {trials: 3, max_concurrent: 1, scheduler: {kind: none}}
tracking: {uri: "TRACKING"}
"""


@pytest.fixture
def write_space(tmp_path, data_file):
    def write(storage, epochs=3):
        uri = f"sqlite:////{tmp_path}/mlflow.db"
        text = SPACE.replace("DATA", str(data_file)).replace("STORAGE", str(storage))
        path = tmp_path / "space.yaml"
        path.write_text(text.replace("EPOCHS", str(epochs)).replace("TRACKING", uri))
        return path

    return write


@pytest.fixture(params=["s3", "path"])
def storage(request, tmp_path):
    return request.getfixturevalue("s3_folder") if request.param == "s3" else tmp_path / "shared"


def rows_of(run):
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def curves_of(run):
    with (run / "curves.csv").open() as file:
        found = [(row["trial"], row["epoch"], row["metric"], row["value"]) for row in csv.DictReader(file)]
    return [row for row in found if not row[2].endswith("seconds")]


def check(done, code=0):
    assert done.returncode == code, done.stdout + done.stderr


def test_a_search_goes_on_on_another_machine(hiertune, write_space, storage, tmp_path):
    space = write_space(storage)
    check(hiertune("search", space, "--runs", "here", capture_output=True))
    here, there = tmp_path / "here" / "kept", tmp_path / "there" / "kept"
    place = Folder.at(storage).child("kept")
    left = [name for name in place.sizes(deep=True) if name.startswith(("trials/", "model/"))]
    winner = json.loads((here / "summary.json").read_text())["winner"]["trial"]
    assert sorted(left) == [
        "model/README.md",
        "model/model.json",
        "model/model.safetensors",
        f"trials/{winner:04d}/val_logits.safetensors",
    ]
    first, curves = rows_of(here), curves_of(here)
    model = (here / "model" / "model.safetensors").read_bytes()
    no_secret_in(tmp_path)

    # The name is taken there too.
    refused = hiertune("search", space, "--runs", "there", capture_output=True)
    check(refused, 2)
    assert "exists already" in refused.stderr

    shutil.rmtree(tmp_path / "here")
    resumed = hiertune("search", space, "--runs", "there", "--resume", "--trials", "4", capture_output=True)
    check(resumed)
    rows = rows_of(there)
    assert rows[:3] == first
    assert len(rows) == 4
    assert curves_of(there)[: len(curves)] == curves
    summary = json.loads((there / "summary.json").read_text())
    assert summary["tracking"]["delivered"] == summary["tracking"]["total"] > 0
    if summary["winner"]["trial"] == winner:
        assert (there / "model" / "model.safetensors").read_bytes() == model
    no_secret_in(tmp_path)

    # A third machine has it all by asking, and nothing is trained.
    shutil.rmtree(tmp_path / "there")
    check(hiertune("search", space, "--runs", "again", "--resume", "--trials", "4", capture_output=True))
    again = tmp_path / "again" / "kept"
    assert rows_of(again) == rows
    check(hiertune("decode", again, capture_output=True))
    check(hiertune("report", again, capture_output=True))
    check(hiertune("export", f"{storage}/kept", "exported", capture_output=True))
    exported = (tmp_path / "exported" / "model.safetensors").read_bytes()
    assert exported == (again / "model" / "model.safetensors").read_bytes()


def test_nothing_told_is_lost_with_the_machine(start_hiertune, hiertune, write_space, storage, tmp_path):
    """SIGKILL in the middle, and the run folder is gone: storage has what was told, and checkpoints."""
    space = write_space(storage, epochs=40)
    whole = hiertune("search", space, "--runs", "whole", "--name", "whole", capture_output=True)
    check(whole)
    process = start_hiertune("search", space, "--runs", "here")
    here = tmp_path / "here" / "kept"
    deadline = time.monotonic() + 400
    while not (told := told_in(here)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = told_in(here)
    assert told
    ended_by_ray(tmp_path)
    shutil.rmtree(tmp_path / "here")

    check(hiertune("search", space, "--runs", "there", "--resume", capture_output=True))
    rows = rows_of(tmp_path / "there" / "kept")
    assert [row["trial"] for row in rows] == ["0", "1", "2"]
    assert {row["state"] for row in rows} == {"completed"}
    expected = rows_of(tmp_path / "whole" / "whole")
    lr = "param/optimizer.lr"  # what was asked after the kill is drawn anew
    alike = [(row, same) for row, same in zip(rows, expected, strict=True) if row[lr] == same[lr]]
    assert len(alike) >= len(told)
    for row, same in alike:
        for key in ("objective", "epochs", "val/loss", "train/loss"):
            assert row[key] == same[key], key
    points = {row[:3] for row in curves_of(tmp_path / "there" / "kept")}
    wanted = {row[:3] for row in curves_of(tmp_path / "whole" / "whole") if row[0] in map(str, told)}
    assert wanted <= points


def told_in(run):
    """Numbers of the trials that the journal calls ended."""
    ledger = run / "ledger.log"
    if not ledger.exists():
        return []
    lines = [line for line in ledger.read_text().splitlines() if line.endswith("}")]
    return [json.loads(line)["trial_id"] for line in lines if json.loads(line).get("state") == 1]


def ended_by_ray(folder, seconds=120):
    """Wait until what the killed driver had started is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        if not any(str(folder) in line and "pytest" not in line for line in listing.splitlines()):
            return
        time.sleep(0.5)


def no_secret_in(folder):
    """No file of the searches, of MLflow or of Ray has the key."""
    secret = s3.SECRET_KEY.encode()
    begun = folder.stat().st_ctime - 600
    sessions = [path for path in Path("/tmp/ray").glob("session_2*") if path.stat().st_mtime > begun]
    assert sessions
    for root in (folder, *sessions):
        for path in root.rglob("*"):
            if path.is_file() and path.stat().st_size < 50 << 20:
                assert secret not in path.read_bytes(), path
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, check=True).stdout
    assert secret not in listing


def test_what_is_wrong_is_said_before_anything_starts(hiertune, write_space, s3_environment, tmp_path):
    cases = {
        f"s3://AKIA:{s3.SECRET_KEY}@bucket/x": "credentials must not stand in an address",
        "s3://no-such-bucket/x": "has no such bucket",
        "ftp://host/x": "'ftp' addresses are not known",
        str(tmp_path / "runs"): "is the runs folder itself",
    }
    for address, problem in cases.items():
        refused = hiertune("search", write_space(address), capture_output=True)
        check(refused, 2)
        assert problem in refused.stderr
        assert "space.yaml:4: storage: " in refused.stderr
        assert s3.SECRET_KEY not in refused.stderr + refused.stdout
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / "runs").exists()

"""Commands whose output nobody reads to its end, as in `hiertune schema | head -1`."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import DataConfig, LinearHeadConfig, MLPConfig, ModelConfig, TrialConfig
from hiertune.data import write_dataset
from hiertune.export import save_model
from hiertune.models import build_model

LINEAGES = [(f"f{i // 2}", f"g{i}") for i in range(4)] * 25
TAXONOMY = Taxonomy.from_lineages(LINEAGES, ["family", "genus"])
SPACE = (
    "name: it\ndata: {path: data.h5}\nmodel: {backbone: {kind: mlp, hidden: [8]}}\ntrain: {batch_size: 8}\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    inputs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    write_dataset(
        tmp_path / "data.h5", inputs, TAXONOMY.encode(LINEAGES), TAXONOMY, [f"row{i}" for i in range(100)]
    )
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "t.csv").write_text("a,kind\n" + "".join(f"{i},k{i % 3}\n" for i in range(60)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def unread():
    """The end of a pipe to write to; nobody reads from it."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    "words",
    [
        "schema",
        "--help",
        "search --help",
        "data describe data.h5",
        "search space.yaml --dry-run",
        "data import-table t.csv t.h5 --labels kind",
    ],
)
def test_a_command_that_nobody_listens_to_ends_well(folder, words):
    with unread() as writer:
        command = [sys.executable, "-m", "hiertune", *words.split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "t.h5").exists() == ("t.h5" in words), "what it is there for, it has done"


def test_errors_that_nobody_reads_have_their_code(folder):
    with unread() as writer:
        command = [sys.executable, "-m", "hiertune", "data", "describe", "none.h5"]
        assert subprocess.run(command, stdout=writer, stderr=writer, timeout=200).returncode == 2


def test_a_pipe_that_is_read_has_it_all(folder):
    words = (
        "import json, sys; from hiertune.space import json_schema; print(json.dumps(json_schema(), indent=2))"
    )
    command = [sys.executable, "-m", "hiertune", "schema"]
    expected = subprocess.run([sys.executable, "-c", words], capture_output=True, check=True).stdout
    assert subprocess.run(command, capture_output=True, check=True).stdout == expected


def test_predictions_that_nobody_reads_are_not_made(folder):
    model = ModelConfig(backbone=MLPConfig(hidden=[4]), head=LinearHeadConfig())
    torch.manual_seed(0)
    config = TrialConfig(data=DataConfig(path="data.h5"), model=model)
    save_model(folder / "model", build_model(model, TAXONOMY, (3,), None), config, TAXONOMY, None, (3,), None)
    os.mkfifo("endless.csv")
    with unread() as writer:
        command = [sys.executable, "-m", "hiertune", "predict", "model", "endless.csv"]
        process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True)

        def feed():
            try:
                with open("endless.csv", "w") as file:
                    file.write("x,y,z\n")
                    while True:
                        file.write("1,2,3\n")
            except BrokenPipeError:
                pass

        threading.Thread(target=feed, daemon=True).start()
        _, said = process.communicate(timeout=200)
    assert (process.returncode, said) == (0, "")


def test_ctrl_c_while_a_search_says_how_far_it_got_loses_nothing_of_it(folder):
    code = (
        "import sys; from hiertune.cli import main; from hiertune.search import driver\n"
        "def run_search(plan, console, interruption, again):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    interruption.stopped('1 of 2 trials ended; go on')\n"
        "driver.run_search = run_search\n"
        "main(['search', 'space.yaml'])\n"
    )
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):  # full
        while True:
            os.write(writer, bytes(1 << 16))
    os.set_blocking(writer, True)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert process.stderr.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopped: 1 of 2 trials ended; go on\n"
    os.close(reader)
    assert process.wait(timeout=200) == 130
    process.stderr.close()

"""A small data set that real searches learn in a second, and the command line as users call it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiertune import Taxonomy
from hiertune.data import write_dataset
from hiertune.search import cluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """600 rows of 20 features around the centres of 8 genera in 4 families and 2 domains."""
    rng = np.random.default_rng(0)
    lineages = [(f"d{i // 4}", f"f{i // 2}", f"g{i}") for i in rng.integers(0, 8, 600)]
    taxonomy = Taxonomy.from_lineages(lineages, ["domain", "family", "genus"])
    labels = taxonomy.encode(lineages)
    centres = rng.normal(size=(8, 20))
    inputs = (centres[labels[:, -1]] + rng.normal(size=(600, 20))).astype(np.float32)
    labels[::17, 1] = -1  # some families are not known
    return write_dataset(
        tmp_path_factory.mktemp("data") / "data.h5", inputs, labels, taxonomy, [f"row{i}" for i in range(600)]
    )


@pytest.fixture(scope="module")
def ray_session():
    """Ray on this machine, for tests that need no driver."""
    cluster.connect()
    yield
    cluster.disconnect()
    assert not cluster.is_in_use()


@pytest.fixture(scope="session")
def machines():
    """The module beside this file: several machines on one."""
    spec = importlib.util.spec_from_file_location(
        "hiertune_machines", Path(__file__).with_name("machines.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hiertune(tmp_path):
    """Runs `python -m hiertune ARGS` in an empty folder."""

    def run(*args, **options):
        return subprocess.run(command(*args), **_in(tmp_path), **options)

    return run


@pytest.fixture
def start_hiertune(tmp_path):
    """Starts `python -m hiertune ARGS` in an empty folder and returns the process."""
    started = []

    def start(*args):
        process = subprocess.Popen(
            command(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **_in(tmp_path)
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def command(*args):
    return [sys.executable, "-m", "hiertune", *map(str, args)]


def _in(folder):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment |= {"PYTHONPATH": path, "COLUMNS": "200"}
    options = {"cwd": folder, "env": environment, "text": True}
    return options

"""Settings that all tests share, and generated images."""

import importlib.util
import sys
import uuid
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import s3

# Two processes of one compute thread each are faster than one of two, and small layers suffer most.
torch.set_num_threads(1)

_BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.fixture(scope="session")
def bench_module():
    """`bench_module(name)`: a module of the benchmarks, which are no package."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"hiertune_bench{name}", _BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shape_images(bench_module):
    """`shape_images(rows, size, seed)`: the data set of the image benchmark."""
    return bench_module("_shapes").shape_images


@pytest.fixture(scope="session")
def s3_endpoint():
    """`host:port` of a real S3 API with the bucket of `s3.BUCKET`."""
    with s3.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_environment(s3_endpoint, monkeypatch):
    """The settings by which S3 is found; credentials too."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://{s3_endpoint}",
        "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def s3_folder(s3_environment, tmp_path_factory):
    """The URI of an empty folder."""
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def faulty_s3(s3_environment, s3_endpoint, monkeypatch):
    """The way to S3, on which things can go wrong: `s3.FaultyWay`."""
    way = s3.FaultyWay(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{way.endpoint}")
    yield way
    way.close()

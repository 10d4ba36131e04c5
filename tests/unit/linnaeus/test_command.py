"""`hiertune import linnaeus-config` from the command line."""

import h5py
import numpy as np
import pytest

from hiertune import Taxonomy
from hiertune.cli import main
from hiertune.data import write_dataset
from hiertune.space import load_config

EXPERIMENT = """TRAIN:
  EPOCHS: 2
  AMP_OPT_LEVEL: O0
  WORKERS: 3
DATA:
  TASK_KEYS_H5: [taxa_L20, taxa_L30]
  BATCH_SIZE: 16
LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: TaxonomyAwareLabelSmoothing}}}
SCHEDULE: {MIX: {MIXUP: {ENABLED: False}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    lineages = [(f"f{i // 2}", f"g{i}") for i in range(4)] * 25
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    ids = [f"row{i}" for i in range(100)]
    write_dataset(tmp_path / "data.h5", inputs, taxonomy.encode(lineages), taxonomy, ids)
    (tmp_path / "x.yaml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in ("import", "linnaeus-config", *arguments)])
    return ended.value.code


def test_the_config_goes_to_stdout_and_the_account_to_stderr(folder, capsys):
    assert run("x.yaml") == 0
    printed = capsys.readouterr()
    (folder / "piped.yaml").write_text(printed.out)
    assert load_config(folder / "piped.yaml").train.epochs == 2
    counts = "6 keys carried over, 0 not, 1 unknown"
    assert printed.out.startswith(f"# From the Linnaeus experiment x.yaml: {counts}.\nname: x\ndata:\n")
    assert printed.err.startswith(f"x.yaml: {counts}\n\nunknown:\n  x.yaml:4: TRAIN.WORKERS: ")


def test_the_config_goes_to_a_file_and_the_account_to_stdout(folder, capsys):
    assert run("x.yaml", "--out", "c.yaml", "--data", "data.h5", "--names", "family,genus") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("x.yaml: 6 keys carried over")
    assert printed.out.endswith("\nwrote c.yaml: hiertune train c.yaml\n")
    config = load_config(folder / "c.yaml")
    assert config.data.path == str(folder / "data.h5")
    assert config.model.backbone.kind == "mlp"


def test_a_config_is_not_overwritten_unasked(folder, capsys):
    (folder / "c.yaml").write_text("mine")
    assert run("x.yaml", "--out", "c.yaml") == 2
    assert "c.yaml: exists already\n  allowed: another --out, or --overwrite" in capsys.readouterr().err
    assert (folder / "c.yaml").read_text() == "mine"
    assert run("x.yaml", "--out", "c.yaml", "--overwrite") == 0
    assert load_config(folder / "c.yaml").train.epochs == 2


def test_images_get_an_image_backbone(folder, capsys):
    with h5py.File(folder / "data.h5", "r+") as file:
        del file["inputs"]
        file["inputs"] = np.zeros((100, 4, 4, 3), np.uint8)
    assert run("x.yaml", "--out", "c.yaml", "--data", "data.h5", "--names", "family,genus") == 0
    assert load_config(folder / "c.yaml").model.backbone.kind == "timm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("y.yaml",), "y.yaml: "),
        (("x.yaml", "--names", "genus"), "--names: got genus"),
        (("x.yaml", "--data", "data.h5"), "allowed: --names family,genus"),
        (("x.yaml", "--data", "none.h5"), "none.h5"),
        (("x.yaml", "--out", "no/folder.yaml"), "no/folder.yaml: cannot be written"),
    ],
)
def test_bad_input(folder, capsys, arguments, message):
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.out == ""

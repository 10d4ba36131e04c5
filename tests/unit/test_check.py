"""Rules that only the data, or several sections together, can decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.check import check_with_data, objective_metrics, warnings_with_data
from hiertune.data import HierarchicalDataset, MemoryInputs
from hiertune.errors import InputError
from hiertune.metrics import Evaluation
from hiertune.space import load_space, parse_space

BASE = "name: t\ndata: {path: x.h5}\n"
LEVELS = ("family", "genus")


def dataset(
    train: int = 60, val: int = 20, test: int = 20, row: tuple[int, ...] = (4,)
) -> HierarchicalDataset:
    rows = train + val + test
    taxonomy = Taxonomy.from_parents(LEVELS, [[-1, -1], [0, 0, 1]])
    return HierarchicalDataset(
        inputs=MemoryInputs(torch.zeros(rows, *row)),
        labels=np.zeros((rows, 2), np.int64),
        ids=np.array([f"r{index}" for index in range(rows)], object),
        split=np.repeat(np.arange(3), [train, val, test]).astype(np.int8),
        taxonomy=taxonomy,
        source="x.h5",
    )


DATA = dataset()
IMAGES = dataset(row=(8, 8, 2))
"""Of two channels, for the cases whose name begins with `image`."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def batches(size: str = "16") -> str:
    return f"{BASE}train: {{batch_size: {size}}}\n"


def objective(metric: str, mode: str = "max") -> str:
    return f"{batches()}search:\n  objective:\n    metric: {metric}\n    mode: {mode}\n"


WORKERS = "search: {gpus_per_worker: 0}\n"


def read_broken() -> dict[str, tuple[str, str]]:
    """By name: a file's text, and the whole message it must give (FILE stands for its path)."""
    text = Path(__file__).with_name("broken_for_data.txt").read_text(encoding="utf-8")
    cases = {}
    for case in text.split("#### ")[1:]:
        name, _, rest = case.partition("\n")
        space, _, message = rest.partition(">>>>\n")
        cases[name] = (space, message.strip("\n"))
    return cases


BROKEN = read_broken()


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_what_does_not_fit_the_data_is_one_message(tmp_path, case):
    text, message = BROKEN[case]
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        check_with_data(load_space(path), IMAGES if case.startswith("image") else DATA)
    assert str(caught.value) == message.replace("FILE", str(path)).replace("FOLDER", str(tmp_path))


GOOD = [
    batches("60"),
    batches("{int: [1, 60]}"),
    objective("val/loss/family", "min"),
    objective("val/hierarchical_distance", "min"),
    objective("val/top5_accuracy/genus"),
    objective("null"),
    f"{batches()}model: {{backbone: {{kind: identity}}}}\nweighting: {{kind: gradnorm}}\n",
    f"{batches()}weighting: {{kind: gradnorm, at: last_layer}}\n",
    f"{batches()}weighting: {{kind: gradnorm, at: backbone, exclude: {{names: [bias]}}}}\n",
    f"{BASE}train: {{batch_size: 5, accumulation: 10}}\nweighting: {{kind: gradnorm}}\n",
    f"{BASE}train: {{batch_size: 5, accumulation: 10}}\nweighting: {{kind: uncertainty}}\n",
    f"{batches()}weighting: {{kind: fixed, weights: {{genus: {{uniform: [1, 2]}}}}}}\n",
    f"{BASE}train: {{batch_size: 16, precision: bf16}}\n",
    f"{BASE}train: {{batch_size: 16, precision: fp16, device: cuda}}\nsearch: {{gpus_per_worker: 1}}\n",
    # precision and device go together in each branch, so the combination of the two does not occur
    f"{BASE}train: {{choice: [{{batch_size: 16, device: cpu}}, {{batch_size: 16, precision: fp16}}]}}\n"
    "search: {gpus_per_worker: 1}\n",
    f"{BASE}train: {{batch_size: 16, epochs: 1}}\nsearch: {{scheduler: {{kind: asha}}}}\n",
    f"{BASE}train: {{batch_size: 16, epochs: 3}}\nsearch: {{scheduler: {{kind: median, grace_epochs: 3}}}}\n",
]


GOOD_WITH_IMAGES = [
    f"{batches()}model:\n  backbone:\n    {{kind: timm, name: test_resnet, image_size: 32, frozen: true, "
    "hidden: [4]}\n"
    "weighting: {kind: gradnorm, at: last_layer}\n",
    f"{batches()}model:\n  backbone:\n    kind: timm\n    name: test_vit\n"
    "    image_size: {choice: [32, 64]}\n"
    "    augment: {crop_scale: [0.5, 1.0], flip: 0.5, erasing: 0.1}\n"
    "optimizer: {kind: sgd, layer_decay: {uniform: [0.5, 1.0]}}\n",
]


@pytest.mark.parametrize("text", GOOD_WITH_IMAGES)
def test_what_fits_images_passes(text):
    state = torch.get_rng_state()
    check_with_data(parse_space(text), IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", GOOD)
def test_what_fits_passes(text):
    space = parse_space(text)
    check_with_data(space, DATA)


def test_a_remote_cluster_may_have_gpus_that_this_machine_lacks(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    text = f"{BASE}train: {{batch_size: 16, precision: fp16}}\n"
    check_with_data(parse_space(text), DATA)
    with pytest.raises(InputError):
        check_with_data(parse_space(text + WORKERS), DATA)


def test_several_problems_are_listed_in_the_order_of_the_file():
    text = f"{BASE}search: {{objective: {{metric: val/loss/order, mode: min}}}}\ntrain: {{batch_size: 99}}\n"
    with pytest.raises(InputError) as caught:
        check_with_data(parse_space(text), DATA)
    assert str(caught.value) == (
        "search.objective.metric: the data has no level 'order'\n  allowed: family, genus\n"
        "train.batch_size: a batch of 99 rows is larger than the training split of 60; "
        "allowed: a whole number of at least 1 and at most 60"
    )


@pytest.mark.parametrize(("counts", "split"), [((0, 1, 1), "train"), ((60, 0, 1), "val")])
def test_splits_without_rows(counts, split):
    with pytest.raises(InputError, match=f"no row is in the {split} split"):
        check_with_data(parse_space(batches()), dataset(*counts))


def test_a_config_is_checked_for_this_machine(monkeypatch):
    config = parse_space(f"{BASE}train: {{batch_size: 60, precision: fp16}}\n").defaults()
    with pytest.raises(InputError) as caught:
        check_with_data(config, DATA)
    assert str(caught.value) == (
        "train.precision: 'fp16' needs a GPU, and the workers have none\n  allowed: fp32, bf16"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_with_data(config, DATA)
    with pytest.raises(InputError, match="a batch of 60 rows is larger than the training split of 59"):
        check_with_data(config, dataset(train=59, val=0, test=0))


def test_the_metrics_that_can_be_optimised_are_those_that_validation_gives():
    evaluation = Evaluation(DATA.taxonomy, [torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
    assert set(objective_metrics(LEVELS)) == set(evaluation.compute("val"))


WARNED = {
    "mix: {kind: mixup}": [],
    "mix: {kind: mixup, level: genus}": [],
    "mix: {kind: none}": [],
    "mix:\n  kind: mixup\n  level: {choice: [genus, family]}": [
        "mix.level (line 6): rows of one family but of different genus are mixed: their targets are "
        "mixtures; genus keeps them certain"
    ],
    "mix: {kind: mixup, exclude_unknown: false}": [
        "mix.exclude_unknown (line 4): rows with unknown labels are mixed: their targets are known in part; "
        "true leaves them out"
    ],
}


def test_random_features_are_said():
    frozen = "model: {backbone: {kind: timm, name: test_resnet, frozen: true}}\n"
    (warning,) = warnings_with_data(parse_space(f"{batches()}{frozen}"), IMAGES)
    assert warning.startswith("model.backbone.frozen (line 4): a frozen backbone with neither")
    given = frozen.replace("frozen: true", "frozen: true, weights: w.pth")
    assert warnings_with_data(parse_space(f"{batches()}{given}"), IMAGES) == []


@pytest.mark.parametrize("text", WARNED)
def test_what_is_seldom_meant_is_said(text):
    data = dataset()
    data.labels[3, 1] = -1
    assert warnings_with_data(parse_space(f"{batches()}{text}\n"), data) == WARNED[text]


def test_no_warning_of_unknown_labels_where_there_are_none():
    space = parse_space(f"{batches()}mix: {{kind: mixup, exclude_unknown: false}}\n")
    assert warnings_with_data(space, DATA) == []

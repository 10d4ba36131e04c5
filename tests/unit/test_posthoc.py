"""`hiertune decode` on the folder of a finished search."""

import json
import shutil

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.cli import main
from hiertune.config import ConditionalHeadConfig, DataConfig, IdentityConfig, ModelConfig, TrialConfig
from hiertune.decoding import AS_TRAINED, ValidationLogits, best_of, try_rules
from hiertune.export import load_model, save_model
from hiertune.models import build_model

LEVELS = ("family", "genus")
TAXONOMY = Taxonomy.from_parents(LEVELS, [[-1] * 3, [0, 0, 1, 1, 1, 2, 2]])
HEAD = ConditionalHeadConfig(temperature=3.0)


def metrics_of(run):
    """Of every rule, from what the folder holds."""
    logits = ValidationLogits.load(run / "trials" / "0004" / "val_logits.safetensors", TAXONOMY)
    return try_rules(logits, TAXONOMY, HEAD)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trial 4 has won. Its logits are noisy, so that rules differ."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "run"
    random = np.random.default_rng(0)
    labels = torch.from_numpy(TAXONOMY.ancestors("genus")[random.integers(0, 7, 200)].copy())
    base = {
        level: torch.from_numpy(random.normal(size=(200, size))).float()
        + 1.5 * torch.nn.functional.one_hot(labels[:, column], size)
        for column, (level, size) in enumerate(zip(LEVELS, TAXONOMY.num_classes, strict=True))
    }
    seen = tuple(torch.ones(size, dtype=torch.bool) for size in TAXONOMY.num_classes)
    ValidationLogits(base, labels, seen).save(folder / "trials" / "0004" / "val_logits.safetensors")
    summary = {
        "objective": {"metric": "val/accuracy/genus", "mode": "max", "value": 0.5},
        "winner": {"trial": 4, "metrics": {}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    config = TrialConfig(
        data=DataConfig(path="d.h5"), model=ModelConfig(backbone=IdentityConfig(), head=HEAD)
    )
    model = build_model(config.model, TAXONOMY, (4,), (torch.zeros(4), torch.ones(4)))
    save_model(folder / "model", model, config, TAXONOMY, None, (4,), None)
    return folder


def decode(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["decode", *map(str, arguments)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    return ended.value.code, printed.out + printed.err


def lines_of(shown):
    """The cells of each line of a table, by single spaces."""
    return [" ".join(line.replace("│", " ").replace("┃", " ").split()) for line in shown.splitlines()]


def test_every_rule_is_shown_with_its_metrics_and_the_best_is_marked(run, capsys):
    code, shown = decode(capsys, run, "--all")
    assert code == 0
    tried = metrics_of(run)
    best = best_of(tried, "val/accuracy/genus", "max")
    assert best.rule != AS_TRAINED
    assert lines_of(shown)[:2] == [
        "On the validation split, best first by val/accuracy/genus",
        "rule genus chain distance",
    ]
    assert lines_of(shown)[3:] == rows_of(sorted(tried, key=lambda t: -t.metrics["val/accuracy/genus"]), best)
    assert lines_of(shown)[3].startswith("★ ")
    assert load_model(run / "model").rule == AS_TRAINED, "nothing is changed"


def rows_of(ranked, best, names=("accuracy/genus", "chain_accuracy", "average_distance")):
    values = [" ".join(f"{each.metrics[f'val/{name}']:.4f}" for name in names) for each in ranked]
    return [
        f"{'★ ' if each is best else ''}{each.rule.short} {row}"
        for each, row in zip(ranked, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("metric", "sign", "columns"),
    [
        ("accuracy/genus", -1, ("accuracy/genus", "chain_accuracy", "average_distance")),
        ("average_distance", 1, ("average_distance", "accuracy/genus", "chain_accuracy")),
    ],
)
def test_the_best_are_shown_and_as_trained(run, capsys, metric, sign, columns):
    tried = metrics_of(run)
    best = best_of(tried, f"val/{metric}", "max" if sign < 0 else "min")
    ranked = sorted(tried, key=lambda each: sign * each.metrics[f"val/{metric}"])
    place = [each.rule for each in ranked].index(AS_TRAINED)
    assert place >= 8 or metric == "accuracy/genus", "the other metric has it among the best"
    lines = lines_of(decode(capsys, run, "--metric", f"val/{metric}")[1])
    shown = ranked[:8] if place < 8 else [*ranked[:8], tried[0]]
    assert lines[3:-1] == rows_of(shown, best, columns)
    assert lines[-1] == f"{len(shown)} of {len(tried)} rules; --all shows every one"


@pytest.mark.parametrize("metric", ["accuracy/genus", "accuracy_seen/genus"])
def test_no_row_is_wrapped_at_80_columns(run, capsys, monkeypatch, metric):
    monkeypatch.setenv("COLUMNS", "80")
    _, shown = decode(capsys, run, "--all", "--metric", f"val/{metric}")
    assert max(map(len, shown.splitlines())) <= 80
    tried = metrics_of(run)
    columns = dict.fromkeys([metric, "accuracy/genus", "chain_accuracy", "average_distance"])
    expected = rows_of(tried, best_of(tried, f"val/{metric}", "max"), columns)
    assert len({each.rule.short for each in tried}) == len(tried), "short names differ, too"
    assert set(expected) <= set(lines_of(shown))


@pytest.mark.parametrize(
    ("metric", "mode"), [("val/accuracy/family", "max"), ("val/average_distance", "min")]
)
def test_the_best_rule_by_another_metric_is_saved(run, capsys, metric, mode):
    code, shown = decode(capsys, run, "--metric", metric, "--save")
    best = best_of(metrics_of(run), metric, mode)
    assert code == 0
    assert f"now names so: {best.rule}" in " ".join(shown.split())
    assert metric.removeprefix("val/") in shown
    assert load_model(run / "model").rule == best.rule


def test_folders_and_metrics_that_cannot_be_used(run, capsys, tmp_path):
    def refused(*arguments):
        code, shown = decode(capsys, *arguments)
        assert code == 2
        return " ".join(shown.split())

    assert f"there is no search of this name: {tmp_path}/nowhere" in refused(tmp_path / "nowhere")
    said = refused(run, "--metric", "val/loss")
    assert "--metric: 'val/loss' is not decided by how logits become names" in said
    assert "val/accuracy/genus" in said
    shutil.rmtree(run / "trials")
    assert "the winner's validation logits were not kept" in refused(run)
    (run / "summary.json").write_text("{")
    assert "summary.json: can't be read" in refused(run)
    good = {"objective": {"metric": "val/accuracy/genus", "mode": "max"}, "winner": {"trial": 4}}
    for summary, key in [
        ({}, "objective.metric"),
        ([], "objective.metric"),
        (good | {"objective": {"metric": "a", "mode": 1}}, "objective.mode"),
        (good | {"objective": "x"}, "objective.metric"),
        (good | {"winner": {"trial": "x"}}, "winner.trial"),
        (good | {"winner": None}, "winner.trial"),
    ]:
        (run / "summary.json").write_text(json.dumps(summary))
        assert f"summary.json: {key}: is missing, or of another kind" in refused(run)

"""Which rule the search chooses for its winner, or why none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import HierarchicalSoftmaxConfig, MaskUnknownConfig, ModelConfig
from hiertune.decoding import AS_TRAINED, ValidationLogits, best_of, refinement, try_rules
from hiertune.search import decoding
from hiertune.search.decoding import choose_rule, keeps_logits
from hiertune.search.ledger import TrialRecord
from hiertune.search.outputs import RunFolder
from hiertune.search.results import decoding_line
from hiertune.search.summary import _decoding
from hiertune.search.winner import Contender

TAXONOMY = Taxonomy.from_parents(["family", "genus"], [[-1] * 3, [0, 0, 1, 1, 1, 2, 2]])
BEST = TrialRecord(3, "completed", {}, 0.5)
CONFIG = SimpleNamespace(model=ModelConfig(head=HierarchicalSoftmaxConfig()), unknown=MaskUnknownConfig())


@pytest.fixture
def plan(tmp_path):
    return SimpleNamespace(
        config=SimpleNamespace(search=SimpleNamespace(decode=True)),
        data=SimpleNamespace(taxonomy=TAXONOMY, labels=None, rows=lambda *splits: np.arange(100)),
        folder=RunFolder(tmp_path),
        metric="val/chain_accuracy",
        mode="max",
    )


@pytest.fixture
def logits(plan):
    generator = torch.Generator().manual_seed(0)
    base = {level: torch.randn(100, n, generator=generator) for level, n in (("family", 3), ("genus", 7))}
    labels = torch.from_numpy(TAXONOMY.ancestors("genus")[base["genus"].argmax(1).numpy()].copy())
    seen = tuple(torch.ones(n, dtype=torch.bool) for n in TAXONOMY.num_classes)
    found = ValidationLogits(base, labels, seen)
    found.save(plan.folder.logits(3))
    return found


def test_the_best_rule_by_the_objective(plan, logits):
    tried = try_rules(logits, TAXONOMY, CONFIG.model.head)
    best = best_of(tried, "val/chain_accuracy", "max")
    choice = choose_rule(plan, BEST, CONFIG)
    assert choice.rule == best.rule != AS_TRAINED
    assert (choice.before, choice.after) == (tried[0].metrics, best.metrics)
    assert choice.after["val/chain_accuracy"] > choice.before["val/chain_accuracy"]
    told = _decoding(choice, Contender("", {"test/chain_accuracy": 0.25}, np.zeros((1, 2))))
    assert told["test"] == {"test/chain_accuracy": 0.25}
    assert told["rule"] == best.rule.model_dump(mode="json")
    values = (f"{metrics['val/chain_accuracy']:.4f}" for metrics in (choice.before, choice.after))
    assert decoding_line(told, plan.metric) == (
        f"decoded: {best.rule} (val/chain_accuracy {' -> '.join(values)}; best of 30 rules)"
    )


def test_as_trained_where_nothing_is_better(plan, logits):
    refined = refinement(CONFIG.model.head, TAXONOMY)(logits.base)
    labels = torch.stack([values.argmax(1) for values in refined.values()], 1)
    ValidationLogits(logits.base, labels, logits.seen).save(plan.folder.logits(3))
    plan.metric = "val/partial_chain_accuracy"
    choice = choose_rule(plan, BEST, CONFIG)
    assert choice.rule == AS_TRAINED
    assert choice.before == choice.after
    told = _decoding(choice, Contender("", {}, np.zeros((1, 2))))
    assert decoding_line(told, plan.metric) == (
        "decoding as trained: none of 30 rules betters its val/partial_chain_accuracy of 1.0000"
    )


def reason(plan):
    choice = choose_rule(plan, BEST, CONFIG)
    assert choice.rule is None
    told = _decoding(choice, None)
    assert told == {"rule": None, "name": "as trained", "reason": choice.reason}
    assert decoding_line(told, plan.metric) == f"decoding as trained: {choice.reason}"
    return choice.reason


def test_a_loss_chooses_no_rule(plan, logits):
    plan.metric, plan.mode = "val/loss", "min"
    assert keeps_logits(plan), "`hiertune decode` may choose by another metric"
    assert reason(plan) == "'val/loss' is not decided by how logits become names"


def test_logits_that_are_too_large_are_not_kept(plan, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_BYTES", 100 * 10 * 4)
    assert keeps_logits(plan)
    monkeypatch.setattr(decoding, "MOST_BYTES", 100 * 10 * 4 - 1)
    assert not keeps_logits(plan)
    assert reason(plan).startswith("the validation logits are not kept: ")


def test_no_rule_where_there_are_no_logits_or_no_wish(plan):
    assert reason(plan) == "there are no validation logits of trial 3"
    plan.config.search.decode = False
    assert not keeps_logits(plan)
    assert reason(plan) == "search.decode is off"

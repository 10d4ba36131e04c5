"""The winner, trained once more and measured on the test split, beside controls treated the same way."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import scipy.stats

from hiertune.config import (
    CrossEntropyConfig,
    EqualConfig,
    LinearHeadConfig,
    TrialConfig,
    WorkerGroupConfig,
)
from hiertune.data import HierarchicalDataset
from hiertune.data.nearest import nearest_neighbour_predictions
from hiertune.decoding import AS_TRAINED, DecodingRule
from hiertune.metrics.predictions import prediction_metrics
from hiertune.search.messages import Failed, Finished, Job
from hiertune.search.pool import WorkerPool
from hiertune.space import Space
from hiertune.taxonomy import Taxonomy
from hiertune.train.unknown import with_unknown

DECODED = "winner_decoded"
"""Label of the winner's model with its logits decoded by the chosen rule."""


@dataclass(frozen=True)
class Contender:
    """One method on the test split."""

    label: str
    metrics: dict[str, float]
    predictions: np.ndarray
    """int64 [test rows, L]"""


@dataclass(frozen=True)
class Comparison:
    """Winner against one control on the test rows whose finest class has training examples."""

    rows: int
    difference: float | None
    """Accuracy of the winner minus the control's; like all that follows, None of fewer than two rows."""
    low: float | None
    high: float | None
    """95% interval of the difference, paired by row (normal approximation)."""
    p_value: float | None
    """Exact McNemar test: how often equal methods would differ this much."""


def flat_control(space: Space) -> TrialConfig:
    """The space's plain defaults, without hierarchy: independent linear heads, plain cross-entropy."""
    defaults = space.defaults()
    model = defaults.model.model_copy(update={"head": LinearHeadConfig()})
    return defaults.model_copy(
        update={"model": model, "loss": CrossEntropyConfig(), "weighting": EqualConfig()}
    )


def measure(
    pool: WorkerPool,
    data: HierarchicalDataset,
    configs: dict[str, TrialConfig],
    folders: dict[str, str],
    fit_on: tuple[str, ...],
    nearest: bool,
    rules: Mapping[str, Mapping[str, DecodingRule]],
    faults: WorkerGroupConfig,
) -> dict[str, Contender]:
    """Train every config on `fit_on` and read the test split; plus the nearest neighbour, if asked.

    `rules` gives a config further contenders, by their labels: the same model, its logits decoded by that
    rule. Raises RuntimeError with the reason when a training fails.
    """
    jobs = {
        label: Job(
            label,
            config,
            folders[label],
            fit_on=fit_on,
            validate_on=(),
            test_on=("test",),
            rules=tuple(rule.model_dump(mode="json") for rule in (AS_TRAINED, *_of(label, rules).values())),
            export=True,
            max_retries=faults.max_retries,
            hang_timeout=faults.hang_timeout,
        )
        for label, config in configs.items()
    }
    threads = ThreadPoolExecutor(max_workers=len(jobs) + 1)
    try:
        endings = {label: threads.submit(pool.run, job) for label, job in jobs.items()}
        neighbour = threads.submit(_nearest_neighbour, data, fit_on) if nearest else None
        contenders = {
            contender.label: contender
            for label, future in endings.items()
            for contender in _contenders(
                label, configs[label], future.result(), data, fit_on, _of(label, rules)
            )
        }
        if neighbour is not None:
            contenders["nearest_neighbour"] = neighbour.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a training
    return contenders


def compare(
    winner: Contender, control: Contender, data: HierarchicalDataset, fit_on: tuple[str, ...]
) -> Comparison:
    """Paired by test row, at the finest level."""
    truth = data.labels[data.rows("test"), -1]
    seen = np.unique(data.labels[data.rows(*fit_on), -1])
    kept = (truth >= 0) & np.isin(truth, seen)
    if kept.sum() < 2:
        return Comparison(int(kept.sum()), None, None, None, None)
    right = winner.predictions[kept, -1] == truth[kept]
    control_right = control.predictions[kept, -1] == truth[kept]
    difference = right.astype(float) - control_right
    spread = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    gained, lost = int((right & ~control_right).sum()), int((~right & control_right).sum())
    p_value = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    mean = float(difference.mean())
    return Comparison(len(difference), mean, mean - float(spread), mean + float(spread), float(p_value))


def is_features(data: HierarchicalDataset) -> bool:
    return len(data.inputs.shape) == 2


def _nearest_neighbour(data: HierarchicalDataset, fit_on: tuple[str, ...]) -> Contender:
    train, test = data.rows(*fit_on), data.rows("test")
    predictions = nearest_neighbour_predictions(
        data.inputs.rows(train), data.labels[train], data.inputs.rows(test)
    )
    return _judged("nearest_neighbour", predictions, data.taxonomy, data, fit_on)


def _of(label: str, rules: Mapping[str, Mapping[str, DecodingRule]]) -> Mapping[str, DecodingRule]:
    return rules.get(label, {})


def _contenders(
    label: str,
    config: TrialConfig,
    ending: Finished | Failed,
    data: HierarchicalDataset,
    fit_on: tuple[str, ...],
    rules: Mapping[str, DecodingRule],
) -> list[Contender]:
    """A trained model as it was measured, then as each rule decodes it."""
    if isinstance(ending, Failed):
        raise RuntimeError(f"training of {label} failed: {ending.reason}")
    metrics = {name: value for name, value in ending.outcome.metrics.items() if name.startswith("test/")}
    taxonomy, _ = with_unknown(config.unknown, data)
    as_trained, *decoded = ending.outcome.predictions
    return [
        Contender(label, metrics, as_trained),
        *(
            _judged(name, predictions, taxonomy, data, fit_on)
            for name, predictions in zip(rules, decoded, strict=True)
        ),
    ]


def _judged(
    label: str,
    predictions: np.ndarray,
    taxonomy: Taxonomy,
    data: HierarchicalDataset,
    fit_on: tuple[str, ...],
) -> Contender:
    """`taxonomy` is that of the predictions: it may have classes for "unknown", which are always wrong."""
    labels, train_labels = data.labels[data.rows("test")], data.labels[data.rows(*fit_on)]
    metrics = prediction_metrics(predictions, labels, taxonomy, train_labels, prefix="test")
    return Contender(label, metrics, predictions)

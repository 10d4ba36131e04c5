"""Trains one config: run -> epoch -> step. The steps are in `trial.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from hiertune.config import TrialConfig
from hiertune.data import HierarchicalDataset
from hiertune.decoding import DecodingRule
from hiertune.models import HierarchicalClassifier
from hiertune.train.checkpoint import Checkpoint, CheckpointClock
from hiertune.train.result import Decision, EpochResult, TrialOutcome
from hiertune.train.settings import pick_device, trial_settings
from hiertune.train.trial import Trial

Report = Callable[[EpochResult], Decision]


def run_trial(
    config: TrialConfig,
    data: HierarchicalDataset,
    report: Report,
    *,
    beat: Callable[[], None] = lambda: None,
    fit_on: tuple[str, ...] = ("train",),
    validate_on: tuple[str, ...] = ("val",),
    test_on: tuple[str, ...] = (),
    checkpoint: str | Path | None = None,
    resume: bool = True,
    rules: Sequence[DecodingRule] = (),
    keep_logits: str | Path | None = None,
    finish: Callable[[HierarchicalClassifier], None] | None = None,
) -> TrialOutcome:
    """Train one trial; every worker of the process group (if there is one) calls this alike.

    After each epoch all workers call `report` with the same result, and must get the same decision;
    what it answers to the last epoch changes nothing. `test_on` is measured once, at the end, and its
    rows are named by each of `rules`.
    `beat` is called for every batch that is trained or evaluated: who counts can tell a hang from hard work.
    `finish` is called on the first worker with the trained model, in evaluation mode.

    With a `checkpoint` path or URI the first worker writes there after an epoch's report, if it is worth the
    time (`CheckpointClock`) or the trial is stopped; not after the last epoch. `resume` goes on from it:
    bit-identical to a run without a break, from the epoch after the checkpoint, which may have been
    reported before. A checkpoint that can't be written (a full disk) is done without, which is noted once.

    With a `keep_logits` path or URI the validation split's base logits at the last epoch are written there
    before that epoch is reported (`hiertune.decoding.ValidationLogits`).

    Raises, on all workers together: TrialFailed if a loss is not finite; InputError for a split
    without rows, or a config that this data or machine cannot follow. The process group stays usable.
    """
    for splits in (fit_on, validate_on, test_on):
        data.require_rows(*splits)
    device = pick_device(config.train)
    with trial_settings(config.train, device), ExitStack() as stack:
        trial = Trial(config, data, fit_on, device, beat)
        clock = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint)
            if resume:
                trial.resume(saved)
            if trial.workers.first:
                clock = stack.enter_context(CheckpointClock(saved))
        while True:
            result = _run_epoch(trial, validate_on, keep_logits)
            stop = report(result) is Decision.STOP
            if result.last:
                break
            if clock is not None:
                if stop or clock.due():
                    clock.save(trial.state(), wait=stop)
                trial.notes += clock.notes()
            if stop:
                break
        tested: dict[str, float] = {}
        predictions: tuple[np.ndarray, ...] = ()
        if test_on:
            tested, predictions = trial.evaluate_and_name("test", data.rows(*test_on), rules)
        if finish is not None and trial.workers.first:
            finish(trial.model.eval())
        return TrialOutcome(trial.epoch, not result.last, result.metrics | tested, predictions)


def _run_epoch(trial: Trial, validate_on: tuple[str, ...], keep_logits: str | Path | None) -> EpochResult:
    start, waited = time.perf_counter(), trial.seconds_waited
    metrics = trial.train_epoch()
    last = trial.epoch == trial.config.train.epochs
    if validate_on:
        rows = trial.data.rows(*validate_on)
        if keep_logits is not None and last:
            metrics |= trial.evaluate_and_keep(rows, keep_logits)
        else:
            metrics |= trial.evaluate("val", rows)
    notes, trial.notes = trial.notes, ()
    took = [time.perf_counter() - start, trial.seconds_waited - waited]
    sums = trial.workers.sum(torch.tensor(took, dtype=torch.float64, device=trial.device))
    seconds, input_seconds = (sums / trial.workers.size).tolist()
    return EpochResult(
        trial.epoch,
        metrics,
        seconds,
        trial.steps,
        last=last,
        input_seconds=input_seconds,
        notes=notes,
    )

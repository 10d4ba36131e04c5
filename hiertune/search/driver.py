"""One search, from a checked plan to the measured winner."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from hiertune.config import TrialConfig
from hiertune.decoding import CRM
from hiertune.report import write_report
from hiertune.search import cluster
from hiertune.search.capacity import GroupShape, groups_that_fit
from hiertune.search.decoding import Choice, choose_rule, keeps_logits
from hiertune.search.display import Display
from hiertune.search.interrupt import Interruption
from hiertune.search.ledger import Ledger, TrialRecord
from hiertune.search.listeners import Checkpoints, Curves, Listeners, Log, TrackingListener
from hiertune.search.messages import Job
from hiertune.search.outputs import RunFolder, write_summary, write_trials
from hiertune.search.plan import SearchPlan
from hiertune.search.pool import WorkerPool
from hiertune.search.results import delivery_line, print_results
from hiertune.search.searcher import LedgerSearcher
from hiertune.search.strategies import build_sampler, build_scheduler
from hiertune.search.summary import summarise
from hiertune.search.trainable import TrialActor
from hiertune.search.winner import DECODED, Contender, flat_control, is_features, measure
from hiertune.space import dump_config, flatten
from hiertune.tracking import Tracker, display_uri

logger = logging.getLogger(__name__)

_DELIVERY_PATIENCE_S = 60.0


class SearchFailed(Exception):
    """The search can't come to a result. What it learned so far is kept."""


class SearchInterrupted(Exception):
    """The user stopped the search. It can be resumed."""


def run_search(plan: SearchPlan, console: Console) -> dict[str, Any]:
    """Run or resume a search, measure its winner, and write `runs/<name>/`. Returns the summary.

    Raises:
        SearchFailed: workers could not be started, or no trial came to an end.
        SearchInterrupted: Ctrl-C or SIGTERM.
    """
    begun = time.monotonic()
    folder = plan.folder
    if not plan.resume:
        folder.create(plan.space.text)
    with _logging_to(folder.log):
        for text in plan.warnings:
            logger.warning("%s", text)
        ledger = Ledger.open(folder.ledger, plan.config.name, plan.mode, resume=plan.resume)
        finished = _finished_summary(plan, ledger)
        if finished is not None:
            print_results(console, plan, ledger.records(), finished)
            return finished
        tracker = Tracker.start(
            folder.root,
            plan.tracking_uri,
            plan.config.tracking.experiment,
            plan.config.name,
            resume=plan.resume,
        )
        display = Display(
            console, plan.trials, plan.metric, plan.mode, lambda: delivery_line(tracker.status())
        )
        checkpoints = Checkpoints(folder, plan.mode, ledger.ended())
        listeners = Listeners([Log(), Curves(folder.curves), TrackingListener(tracker), checkpoints, display])
        with _tracked(plan, tracker):
            with display, _cluster(display), _pool(plan) as pool:
                display.resumed(ledger.ended())
                best = _find_best(plan, ledger, pool, listeners, tracker)
                config = plan.space.resolve(best.params)
                folder.best.write_text(dump_config(plan.located(config)), encoding="utf-8")
                display.say("choosing how the winner's logits become names")
                decoding = choose_rule(plan, best, config)
                with Interruption(at_once=True):
                    contenders = _measure_winner(plan, pool, config, decoding, display)
            checkpoints.sweep()
            seconds = time.monotonic() - begun
            summary = summarise(plan, ledger.records(), best, contenders, decoding, seconds)
            _track_winner(tracker, folder, summary)
        delivery = tracker.close(_DELIVERY_PATIENCE_S)
        summary["tracking"] = {"uri": display_uri(plan.tracking_uri), **asdict(delivery)}
        write_summary(folder.summary, summary)
        write_report(folder.root)
    print_results(console, plan, ledger.records(), summary)
    return summary


def _finished_summary(plan: SearchPlan, ledger: Ledger) -> dict[str, Any] | None:
    """The summary on disk, if it is of all the trials that are wanted: then there is nothing to do."""
    ended = len(ledger.ended())
    if ended < plan.trials or not plan.folder.summary.exists():
        return None
    summary = json.loads(plan.folder.summary.read_text(encoding="utf-8"))
    return summary if sum(summary["trials"].values()) == ended else None


@contextlib.contextmanager
def _tracked(plan: SearchPlan, tracker: Tracker) -> Iterator[None]:
    """The search's own run in MLflow, ended as the search ends."""
    params = flatten(plan.config.search)
    tracker.search_started(params | {"objective.metric": plan.metric, "data": plan.data.source})
    tracker.artifact(None, plan.folder.space)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SearchInterrupted | KeyboardInterrupt)
        tracker.search_ended("interrupted" if stopped else "failed")
        tracker.close(_DELIVERY_PATIENCE_S)
        raise
    tracker.search_ended("completed")


@contextlib.contextmanager
def _cluster(display: Display) -> Iterator[None]:
    display.say("starting Ray")
    cluster.connect()
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _pool(plan: SearchPlan) -> Iterator[WorkerPool]:
    search = plan.config.search
    nodes = cluster.node_resources()
    shape = GroupShape.of(search, nodes)
    fit = groups_that_fit(shape, nodes)
    size = min(search.max_concurrent or fit, fit, plan.trials)
    with WorkerPool(size, shape, plan.folder.ray, search.worker_group.recycle_after) as pool:
        yield pool


def _find_best(
    plan: SearchPlan,
    ledger: Ledger,
    pool: WorkerPool,
    listeners: Listeners,
    tracker: Tracker,
) -> TrialRecord:
    """Run the trials that are left. Whatever comes, `trials.csv` then says how far the search got."""
    remaining = plan.trials - len(ledger.ended())
    try:
        with Interruption() as interruption:
            if remaining > 0:
                _run_trials(plan, ledger, pool, listeners, interruption, remaining)
    finally:
        records = ledger.records()
        write_trials(plan.folder.trials, records)
        for record in records:
            if record.state == "running":
                tracker.trial_ended(record.number, "interrupted")
    if interruption.asked:
        raise SearchInterrupted
    best = ledger.best()
    if best is None:
        raise SearchFailed(_why_nothing_won(records))
    return best


def _run_trials(
    plan: SearchPlan,
    ledger: Ledger,
    pool: WorkerPool,
    listeners: Listeners,
    interruption: Interruption,
    remaining: int,
) -> None:
    """Let Tune run the trials that are left; the ledger has them when this returns."""
    search = plan.config.search
    keep = keeps_logits(plan)
    # A resumed search draws on: with the old seed it would propose its first trials again.
    ledger.study.sampler = build_sampler(search.sampler, search.seed + len(ledger.records()))

    def make_job(number: int, config: TrialConfig) -> Job:
        return Job(
            f"trial-{number}",
            plan.located(config),
            str(plan.folder.trial(number)),
            keep_logits=str(plan.folder.logits(number)) if keep else None,
            max_retries=search.worker_group.max_retries,
            hang_timeout=search.worker_group.hang_timeout,
        )

    searcher = LedgerSearcher(
        ledger,
        plan.space.suggest,
        make_job,
        pool.broker_name,
        plan.metric,
        plan.mode,
        listeners,
        interrupted=lambda: interruption.asked,
    )
    tune.Tuner(
        # The worker groups hold the CPUs and GPUs. Tune insists on a request: one byte of memory.
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([{"memory": 1}])),
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            search_alg=searcher,
            scheduler=build_scheduler(search.scheduler, plan.space.max_epochs),
            num_samples=remaining,
            max_concurrent_trials=pool.size,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(plan.folder.ray),
            stop=interruption,
            verbose=0,
            # A trial's checkpoint is its job's; Tune's would be one more file and event per trial.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()


def _measure_winner(
    plan: SearchPlan, pool: WorkerPool, config: TrialConfig, decoding: Choice, display: Display
) -> dict[str, Contender]:
    display.say("measuring the winner and its controls on the test split")
    search = plan.config.search
    configs = {"winner": plan.located(config)}
    folders = {"winner": plan.folder.root}
    if search.controls:
        configs["flat"] = plan.located(flat_control(plan.space))
        folders["flat"] = plan.folder.root / "controls" / "flat"
    nearest = search.controls and is_features(plan.data)
    rules = {"flat": {"flat_crm": CRM}} if search.decode else {}
    if decoding.rule is not None:
        rules["winner"] = {DECODED: decoding.rule}
    try:
        return measure(pool, plan.data, configs, folders, plan.fit_on, nearest, rules)
    except RuntimeError as error:
        raise SearchFailed(str(error)) from error


def _why_nothing_won(records: list[TrialRecord]) -> str:
    """In one line, by the most frequent reason."""
    reasons = Counter(record.reason or record.state for record in records)
    if not reasons:
        return "no trial was run"
    reason, count = reasons.most_common(1)[0]
    return f"no trial was completed; {count} of {len(records)}: {reason}"


def _track_winner(tracker: Tracker, folder: RunFolder, summary: dict[str, Any]) -> None:
    """The winner's numbers and files, on the search's own run."""
    tracker.log(None, 0, summary["winner"]["metrics"])
    if (decoding := summary["winner"]["decoding"])["rule"] is not None:
        tracker.log(None, 0, {f"decoded/{name}": value for name, value in decoding["test"].items()})
    for label, control in summary["controls"].items():
        tracker.log(None, 0, {f"control/{label}/{name}": value for name, value in control["metrics"].items()})
    tracker.artifact(None, folder.best)
    tracker.artifact(None, folder.model)
    tracker.artifact(None, folder.trials)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Ray's and Optuna's messages go to the search's log, not between the lines of the display."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # After the trials Tune misses the files of its own loggers, and says so for each trial.
    handler.addFilter(lambda record: record.name != "ray.tune.analysis.experiment_analysis")
    loggers = [logging.getLogger(name) for name in ("hiertune", "ray", "optuna")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    logging.getLogger("hiertune").setLevel(logging.INFO)
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        handler.close()

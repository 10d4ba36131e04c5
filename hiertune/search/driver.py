"""One search, from a checked plan to the measured winner."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.tune import TuneError
from rich.console import Console
from rich.markup import escape

from hiertune._summary import missing_in, read_summary
from hiertune.config import TrialConfig
from hiertune.decoding import CRM
from hiertune.errors import InputError
from hiertune.report import write_report
from hiertune.search import cluster
from hiertune.search.budget import Budget, Ending
from hiertune.search.capacity import GroupShape
from hiertune.search.credentials import kept_from_ray
from hiertune.search.decoding import Choice, choose_rule, keeps_logits
from hiertune.search.display import Display, redraws
from hiertune.search.failures import FailureStreak
from hiertune.search.interrupt import Interruption, SearchInterrupted, Skipped
from hiertune.search.ledger import Ledger, LedgerLost, TrialRecord
from hiertune.search.lifeline import Lifeline, attempt
from hiertune.search.listeners import Checkpoints, Curves, Listeners, Log, TrackingListener
from hiertune.search.messages import Failed
from hiertune.search.mirror import Mirror, fetch_folder
from hiertune.search.outputs import RunFolder, count_states, state_of, write_summary, write_trials
from hiertune.search.plan import SearchPlan
from hiertune.search.pool import WorkerPool
from hiertune.search.results import (
    delivered_line,
    delivery_line,
    extension,
    print_results,
    progress_line,
    resume_command,
    switched,
)
from hiertune.search.resume import open_ledger
from hiertune.search.session import Session
from hiertune.search.stop import write_command
from hiertune.search.summary import summarise
from hiertune.search.trials import run_trials, trial_job
from hiertune.search.winner import DECODED, Contender, flat_control, is_features, measure
from hiertune.space import dump_config, flatten
from hiertune.tracking import Delivery, Tracker, display_uri

logger = logging.getLogger(__name__)

_DELIVERY_PATIENCE_S = 10.0
"""How long the end of a search waits for an MLflow that takes nothing. A server that is started again is
back in less; a longer outage is not worth the user's time, as one command delivers the rest later."""
_LAST_POINTS_S = 2.0
"""How long delivery may take when the search is to stop at once."""


class SearchFailed(Exception):
    """The search can't come to a result. What it learned so far is kept."""


def run_search(
    plan: SearchPlan,
    console: Console,
    interruption: Interruption | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Run or resume a search, measure its winner, and write `runs/<name>/`. Returns the summary.

    `command` begins this process anew where Ray dies under it; without one the process then ends.

    Raises:
        SearchFailed: workers could not be started, or no trial came to an end.
        SearchInterrupted: by `interruption`, after the current epochs.
        KeyboardInterrupt: by `interruption`, at once.
    """
    begun = time.monotonic()
    interruption = interruption or Interruption()
    interruption.check()
    folder = plan.folder
    with (
        _mirrored(folder, console, interruption) as mirror,
        _logging_to(folder.log),
        open_ledger(plan, console) as ledger,
        interruption.watching(folder.request),
    ):
        earlier = ledger.used().seconds  # of sessions before this one
        for text in plan.warnings:
            logger.warning("%s", text)
        if mirror is not None:
            ledger.told = mirror.told
        again = resume_command(plan)
        write_command(folder, again)
        interruption.last_words = f"stopped at once; go on with:\n  {again}\n"
        budget = Budget(plan.config.search, plan.trials, plan.mode, ledger.ended())
        finished = _finished_summary(plan, ledger, budget)
        missing = [] if finished is None else missing_in(finished, plan.config.search)
        if finished is not None and not missing:
            print_results(console, plan, ledger.records(), finished)
            return finished
        if not _has_trials_left(ledger, budget):
            _best_of(plan, ledger, budget)  # or fail before Ray is started
        tracker = Tracker.start(
            folder.root,
            plan.tracking_uri,
            plan.config.tracking.experiment,
            plan.config.name,
            resume=plan.resume,
        )
        tracker.reconcile(ledger.ended())
        display = Display(
            console,
            plan.trials,
            plan.metric,
            plan.mode,
            lambda: delivery_line(tracker.status()),
            ledger.waits,
        )
        # Not of those outside: in another space they may count, and go on, again.
        checkpoints = Checkpoints(mirror or folder, plan.mode, ledger.ended())
        lifeline = Lifeline(command, again, cluster.own_ray(), lambda: interruption.asked)
        listeners = Listeners(
            [Log(), Curves(folder.curves), TrackingListener(tracker), checkpoints, display, lifeline]
        )
        if plan.resume:
            progress = progress_line(ledger.records(), plan.trials, _has_trials_left(ledger, budget))
            display.note(f"resuming {plan.config.name}: {progress}")
        if missing:
            display.note(f"measured once more, since {switched(missing, plan.config.search)}")
        with _tracked(plan, tracker, interruption, console):
            with (
                display,
                _cluster(plan, display, lifeline, interruption),
                _pool(plan, ledger, display, lifeline) as pool,
            ):
                display.resumed(ledger.ended())
                if _has_trials_left(ledger, budget):
                    _run_all(plan, ledger, pool, budget, listeners, display, tracker, interruption)
                best = _best_of(plan, ledger, budget)
                config = plan.space.resolve(best.params)
                folder.best.write_text(dump_config(plan.located(config)), encoding="utf-8")
                display.say("choosing how the winner's logits become names")
                folder.fetch_logits(best.number)
                if keeps_logits(plan) and not folder.logits(best.number).exists():
                    _make_logits(plan, pool, best.number, config, display)
                decoding = choose_rule(plan, best, config)
                contenders = _measure_winner(plan, pool, config, decoding, display)
            checkpoints.sweep()
            seconds = earlier + time.monotonic() - begun
            ending, used = _ending(ledger, budget), ledger.used()
            summary = summarise(plan, ledger.records(), best, contenders, decoding, seconds, ending, used)
            _track_winner(tracker, folder, summary)
            _write_summary(plan, summary, tracker.status())  # whole, whatever becomes of the delivery
            write_report(folder.root)
        _write_summary(plan, summary, _deliver(tracker, interruption, console))
    print_results(console, plan, ledger.records(), summary)
    return summary


def _finished_summary(plan: SearchPlan, ledger: Ledger, budget: Budget) -> dict[str, Any] | None:
    """The summary on disk, if it is of all the trials that are wanted, and of the best of them."""
    best = ledger.best()
    if _has_trials_left(ledger, budget) or best is None or not plan.folder.summary.exists():
        return None
    summary = read_summary(plan.folder.summary)
    same = summary["trials"] == count_states(ledger.records()) and summary["winner"]["trial"] == best.number
    return summary if same else None


def _has_trials_left(ledger: Ledger, budget: Budget) -> bool:
    ending = budget.ending(ledger.used())
    return ending is None or (ending.by == "patience" and ledger.has_interrupted)


def _ending(ledger: Ledger, budget: Budget) -> Ending:
    ending = budget.ending(ledger.used())
    assert ending is not None, "trials are left"
    return ending


def _write_summary(plan: SearchPlan, summary: dict[str, Any], delivery: Delivery) -> None:
    summary["tracking"] = {"uri": display_uri(plan.tracking_uri), **asdict(delivery)}
    write_summary(plan.folder.summary, summary)


@contextlib.contextmanager
def _mirrored(folder: RunFolder, console: Console, interruption: Interruption) -> Iterator[Mirror | None]:
    """The run folder's mirror in storage, if the search has any; complete as far as the store allows."""
    if folder.storage is None:
        yield None
        return

    def say(text: str) -> None:
        console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)

    try:
        mirror = Mirror(folder, say)
    except OSError as error:
        raise SearchFailed(f"{folder.storage} can't be written: {error}") from error
    mirror.when_overtaken = interruption.ask
    try:
        yield mirror
    finally:
        if missing := mirror.close(_DELIVERY_PATIENCE_S):
            say(f"not in storage yet: {', '.join(missing)}; the same command with --resume sends them")


@contextlib.contextmanager
def _tracked(
    plan: SearchPlan, tracker: Tracker, interruption: Interruption, console: Console
) -> Iterator[None]:
    """The search's own run in MLflow, ended as the search ends."""
    params = flatten(plan.config.search)
    tracker.search_started(params | {"objective.metric": plan.metric, "data": plan.data.source})
    tracker.artifact(None, plan.folder.space)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SearchInterrupted | KeyboardInterrupt)
        tracker.search_ended("interrupted" if stopped else "failed")
        delivery = _deliver(tracker, interruption, console)
        console.print(escape(delivered_line(delivery, plan.folder.root)), highlight=False, soft_wrap=True)
        raise
    tracker.search_ended("completed")


def _deliver(tracker: Tracker, interruption: Interruption, console: Console) -> Delivery:
    """What is tracked, as far as the user waits for it. The rest stays in the spool."""
    if interruption.at_once:
        return tracker.close(_LAST_POINTS_S, hurry=True)
    status = tracker.status()
    waiting = f"{delivery_line(status)}; Ctrl-C ends the waiting, and loses nothing"
    if status.since is not None and not redraws(console):
        console.print(escape(waiting), highlight=False, soft_wrap=True)
    try:
        with interruption.skippable(), console.status(escape(waiting)):
            return tracker.close(_DELIVERY_PATIENCE_S)
    except Skipped:
        return tracker.close(0.0)
    except KeyboardInterrupt:
        tracker.close(0.0)
        raise


@contextlib.contextmanager
def _cluster(
    plan: SearchPlan, display: Display, lifeline: Lifeline, interruption: Interruption
) -> Iterator[None]:
    display.say("starting Ray" if cluster.own_ray() else "joining the Ray cluster")
    try:
        lifeline.watch_start()
        _connect(plan, interruption)
        lifeline.watch()
        yield
    except cluster.Unreachable as error:
        raise SearchFailed(str(error)) from error
    except Exception:
        lifeline.check()
        raise
    finally:
        lifeline.close()
        if interruption.at_once:  # threads are inside Ray
            cluster.kill()
        else:
            cluster.disconnect()


def _connect(plan: SearchPlan, interruption: Interruption) -> None:
    try:
        cluster.connect(plan.config.search.wait_for_nodes if attempt() else 0.0)
    except SystemExit:  # so Ray itself answers SIGTERM while it starts
        interruption.install()
        signal.raise_signal(signal.SIGTERM)
    interruption.install()


@contextlib.contextmanager
def _pool(plan: SearchPlan, ledger: Ledger, display: Display, lifeline: Lifeline) -> Iterator[WorkerPool]:
    search = plan.config.search
    shape = GroupShape.of(search, cluster.node_resources())
    work = max(plan.trials - len(ledger.ended()), 2 if search.controls else 1)
    with WorkerPool(
        min(search.max_concurrent or work, work),
        shape,
        plan.folder.ray,
        search.worker_group.recycle_after,
        wait_for_nodes=search.wait_for_nodes,
        say=display.say,
        lifeline=lifeline,
    ) as pool:
        yield pool


def _run_all(
    plan: SearchPlan,
    ledger: Ledger,
    pool: WorkerPool,
    budget: Budget,
    listeners: Listeners,
    display: Display,
    tracker: Tracker,
    interruption: Interruption,
) -> None:
    """Run the trials that are left. Whatever comes, `trials.csv` then says how far the search got."""
    search = plan.config.search
    streak = FailureStreak(search.max_consecutive_failures)
    session = Session(ledger, budget, interruption, display, search.workers_per_trial, pool.halt, streak)
    try:
        display.say("starting worker groups")
        with interruption.finishing(), _kept(ledger), session:
            with kept_from_ray():
                run_trials(plan, ledger, pool, Listeners([listeners, session]), session)
            if session.halted:
                display.say("saving checkpoints")
                pool.settle()
    finally:
        records = ledger.records()
        try:
            write_trials(plan.folder.trials, records)
        except OSError:
            if ledger.lost is None:  # else one cause, such as a full disk, and the ledger tells it
                raise
        for record in records:
            if record.state == "running":
                tracker.trial_ended(record.number, "interrupted")
    if interruption.asked:
        progress = progress_line(records, plan.trials)
        interruption.stopped(f"{progress}; go on with:\n  {resume_command(plan)}")
    if streak.broken:
        raise SearchFailed(f"{streak.verdict}\nMend it, then go on: {resume_command(plan)}")


def _best_of(plan: SearchPlan, ledger: Ledger, budget: Budget) -> TrialRecord:
    """The winner of a search that has no trials left."""
    best = ledger.best()
    if best is None:
        raise SearchFailed(_why_nothing_won(plan, ledger.records(), _ending(ledger, budget)))
    return best


@contextlib.contextmanager
def _kept(ledger: Ledger) -> Iterator[None]:
    """A ledger that can't be written to ends the search. (Tune passes an exception on as it is, or as the
    text of its traceback, which the log keeps; or not.)"""
    try:
        yield
    except LedgerLost:
        pass
    except TuneError as error:
        if ledger.lost is None:
            logger.error("%s", error)
            cause = str(error).strip().splitlines() or [repr(error)]
            raise SearchFailed(f"{cause[-1]}; `--resume` goes on") from error
    if ledger.lost is not None:
        raise SearchFailed(f"{ledger.lost}; what it has is kept, and `--resume` goes on")


def _make_logits(
    plan: SearchPlan, pool: WorkerPool, number: int, config: TrialConfig, display: Display
) -> None:
    """Train a trial once more, which has kept no validation logits: decoding was off then."""
    display.say(f"training trial {number} once more, for its validation logits")
    ending = pool.run(trial_job(plan, number, config))
    if isinstance(ending, Failed):  # then there is no rule, and the summary says why
        logger.warning("trial %d could not be trained once more: %s", number, ending.reason)
    plan.folder.fetch_logits(number)


def _measure_winner(
    plan: SearchPlan, pool: WorkerPool, config: TrialConfig, decoding: Choice, display: Display
) -> dict[str, Contender]:
    display.say("measuring the winner and its controls on the test split")
    search = plan.config.search
    configs = {"winner": plan.located(config)}
    folders = {"winner": plan.folder.place()}
    if search.controls:
        configs["flat"] = plan.located(flat_control(plan.space))
        folders["flat"] = plan.folder.place("controls", "flat")
    nearest = search.controls and is_features(plan.data)
    rules = {"flat": {"flat_crm": CRM}} if search.decode else {}
    if decoding.rule is not None:
        rules["winner"] = {DECODED: decoding.rule}
    try:
        contenders = measure(
            pool, plan.data, configs, folders, plan.fit_on, nearest, rules, search.worker_group
        )
        if plan.folder.storage is not None:
            display.say("fetching the models from storage")
            for name in ("model", "controls"):
                fetch_folder(plan.folder.storage, name, plan.folder.root)
    except (RuntimeError, OSError) as error:
        raise SearchFailed(str(error)) from error
    return contenders


def _why_nothing_won(plan: SearchPlan, records: list[TrialRecord], ending: Ending) -> str:
    """In one line, by the most frequent reason; and what to do, where a budget is it."""
    if ending.cuts:
        progress, more = progress_line(records, plan.trials), extension(plan, ending)
        return f"no trial was completed: {ending.reason}; {progress}; go on with:\n  {more}"
    reasons = Counter(record.reason or state_of(record) for record in records)
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


class _LogFile(logging.FileHandler):
    """There from its first record on: a search that is refused leaves none. Of a full disk the ledger tells;
    here each record would raise, or print a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None: ...


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Ray's and Optuna's messages go to the search's log, not between the lines of the display; and so does
    the traceback of whatever ends the search."""
    handler = _LogFile(path, delay=True)
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
    except (InputError, SearchInterrupted):
        raise
    except Exception:  # the terminal has one line of it
        logging.getLogger(__name__).exception("the search failed")
        raise
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers
        with contextlib.suppress(OSError):
            handler.close()

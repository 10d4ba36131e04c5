"""What a driver can feed: thousands of trials on a thousand worker groups, simulated on two cores.

`_simulation.py` says what is real and what is stood in for. All times are CPU seconds of the driver's
thread, and those that this machine's disk takes to sync are said apart.
`scale.py [--quick] [--only NAME]` prints tables, and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import ray
from optuna.storages import JournalStorage
from ray.air.execution import FixedResourceManager
from ray.air.execution._internal import RayActorManager
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from _simulation import (
    ELSEWHERE,
    OTHER,
    Groups,
    Setting,
    Simulation,
    VirtualLoop,
    make_plan,
    metric_names,
)

from hiertune.config import TrialConfig
from hiertune.search import cluster, strategies
from hiertune.search.broker import Broker
from hiertune.search.display import Display
from hiertune.search.ledger import Ledger
from hiertune.search.listeners import Checkpoints, Curves, Log
from hiertune.search.messages import Job, Reported
from hiertune.search.searcher import LedgerSearcher
from hiertune.search.trainable import TrialActor
from hiertune.space import Space
from hiertune.tracking import Tracker
from hiertune.train.result import EpochResult, TrialOutcome

TPE = "{kind: tpe}"
RANDOM = "{kind: random}"

CASES = {
    "random": Setting(10_000, 1_000, sampler=RANDOM),
    "tpe": Setting(10_000, 1_000, sampler=TPE),
    "qmc": Setting(10_000, 1_000, sampler="{kind: qmc}"),
    "no scheduler": Setting(2_000, 1_000, scheduler="{kind: none}"),
    "median": Setting(2_000, 1_000, scheduler="{kind: median}"),
    "hyperband": Setting(2_000, 1_000, scheduler="{kind: hyperband}"),
    "terminal": Setting(2_000, 1_000, terminal=True),
    "10 values per epoch": Setting(2_000, 1_000, values=10),
}
_LISTENERS = ("trial_started", "trial_reported", "trial_ended")
_SCHEDULER = ("on_trial_result", "on_trial_complete", "on_trial_add", "choose_trial_to_run")
_SAMPLER = (
    "infer_relative_search_space",
    "sample_relative",
    "sample_independent",
    "before_trial",
    "after_trial",
)
_WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of everything: a look, not a result")
    parser.add_argument("--only", choices=[*CASES, "knee", "broker", "ray"], action="append")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure(Setting(**json.loads(options.setting)))))
        return
    tenth = 10 if options.quick else 1
    figures: dict[str, Any] = {}
    for name, setting in CASES.items():
        if options.only is None or name in options.only:
            setting = _smaller(setting, tenth)
            figures[name] = _in_new_process(setting)
            _print_case(name, setting, figures[name])
    if options.only is None or "knee" in options.only:
        figures["knee"] = knee(tenth)
    if options.only is None or "broker" in options.only:
        figures["broker"] = {groups: broker_messages(groups) for groups in (10, 100, 1_000 // tenth)}
    if options.only is None or "ray" in options.only:
        figures["ray"] = through_ray(tenth)
    print(json.dumps(figures), flush=True)


def _smaller(setting: Setting, tenth: int) -> Setting:
    return Setting(
        **{**asdict(setting), "trials": setting.trials // tenth, "groups": setting.groups // tenth}
    )


def _print_case(name: str, setting: Setting, found: dict[str, Any]) -> None:
    title = f"{name}: {setting.trials:,} trials on {setting.groups:,} groups, {setting.sampler}, "
    table = Table(title=title + setting.scheduler, title_justify="left")
    parts = [part for part in found["per_report_ms"] if part != "all"]
    parts = [part for part in parts if found["per_report_ms"][part][0] >= 0.005] + ["all"]
    table.add_column("CPU ms of the driver")
    for heading in ("a report", "median", "99%", "an ask", "an end"):
        table.add_column(heading, justify="right")
    for part in dict.fromkeys([*parts[:-1], *found["per_ask_ms"], "all"]):
        cells = [*found["per_report_ms"].get(part, [0, 0, 0])]
        cells += [found[key].get(part, [0])[0] for key in ("per_ask_ms", "per_end_ms")]
        table.add_row(part, *(f"{cell:.2f}" for cell in cells))
    console = Console(width=120)
    console.print(table)
    console.print({key: value for key, value in found.items() if not key.startswith("per_")})


def _in_new_process(setting: Setting) -> dict[str, Any]:
    """Memory counts from a fresh process."""
    command = [sys.executable, __file__, "--setting", json.dumps(asdict(setting))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ the driver's time


@dataclass
class Recorder:
    """What each step of Tune's loop cost, by what it did and by whose code it ran."""

    simulation: Simulation
    reports: list[dict[str, float]] = field(default_factory=list)
    asks: list[dict[str, float]] = field(default_factory=list)
    ends: list[dict[str, float]] = field(default_factory=list)
    others: list[dict[str, float]] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0

    def patches(self) -> contextlib.ExitStack:
        """Meters around every part, for as long as the stack is open."""
        stack = contextlib.ExitStack()
        sampler = type(strategies.build_sampler(self.simulation.plan.config.search.sampler, 0))
        scheduler = type(strategies.build_scheduler(self.simulation.plan.config.search.scheduler, 16))
        for part, owner, names in (
            ("scheduler", scheduler, _SCHEDULER),
            ("sampler", sampler, _SAMPLER),
            ("searcher", LedgerSearcher, ("suggest", "on_trial_result", "on_trial_complete")),
            ("config", Space, ("suggest",)),
            ("ledger", Ledger, ("next_trial", "begin", "report", "tell")),
            ("ledger", JournalStorage, _WRITES),
            ("spool", Tracker, ("trial_started", "log", "trial_ended")),
            ("curves", Curves, _LISTENERS),
            ("display", Display, _LISTENERS),
            ("log", Log, _LISTENERS),
            ("checkpoints", Checkpoints, _LISTENERS),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, self._metered(getattr(owner, name), part)))
        for name, rows in (
            ("_maybe_update_trial_queue", self.asks),
            ("stop_trial", self.ends),
            ("step", None),
        ):
            function = getattr(TuneController, name)
            stack.enter_context(mock.patch.object(TuneController, name, self._recorded(function, rows)))
        train = TuneController._on_training_result
        stack.enter_context(mock.patch.object(TuneController, "_on_training_result", self._noticed(train)))
        return stack

    def _metered(self, function: Callable, part: str) -> Callable:
        def metered(*args, **kwargs):
            with self.simulation.meter.part(part):
                return function(*args, **kwargs)

        return metered

    def _noticed(self, function: Callable) -> Callable:
        def noticed(*args, **kwargs):
            self._reported = True
            return function(*args, **kwargs)

        return noticed

    def _recorded(self, function: Callable, rows: list[dict[str, float]] | None) -> Callable:
        """Meters calls of `function` and notes each; a step's row leaves out what rows of others hold."""
        meter = self.simulation.meter

        def recorded(*args, **kwargs):
            if not self.begun:
                self.begun = time.perf_counter()
            outer = rows is None
            if outer:
                self._reported, self._inner = False, defaultdict(float)
            with meter.part("tune"):
                meter.own()
                before = dict(meter.seconds)
                result = function(*args, **kwargs)
                meter.own()
                spent = {part: meter.seconds[part] - before.get(part, 0.0) for part in meter.seconds}
            spent.pop(ELSEWHERE, None)
            spent.pop(OTHER, None)
            if outer:
                row = {part: seconds - self._inner[part] for part, seconds in spent.items()}
                (self.reports if self._reported else self.others).append(row)
                self.ended = time.perf_counter()
            else:
                for part, seconds in spent.items():
                    self._inner[part] += seconds
                if rows is self.ends or spent.get("sampler") or spent.get("config"):
                    rows.append(spent)
                if rows is self.ends and len(rows) % 100 == 0:
                    self.memory.append((len(rows), _resident()))
            return result

        return recorded


def measure(setting: Setting) -> dict[str, Any]:
    """Simulate `setting` and sum up what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(setting, Path(folder))
        recorder = Recorder(simulation)
        start = time.perf_counter()
        with recorder.patches():
            simulation.run()
        end = time.perf_counter()
        plan = simulation.plan
        journal, runs = plan.folder.ledger, plan.folder
        reopened = time.perf_counter()
        ledger = Ledger.open(journal, plan.config.name, plan.mode, resume=True)
        records = ledger.records()
        reopened = time.perf_counter() - reopened
        states = defaultdict(int)
        for record in records:
            states[record.state] += 1
        return {
            "states": dict(states),
            "reports": simulation.groups.reports,
            "epochs": sum(record.epochs for record in records),
            "per_report_ms": _split(recorder.reports),
            "per_ask_ms": _split(recorder.asks),
            "per_end_ms": _split(recorder.ends),
            "other_steps_ms_per_trial": {
                part: seconds * 1e3 / len(records) for part, seconds in _sums(recorder.others).items()
            },
            "ask_ms_at": _at(recorder.asks),
            "end_ms_at": _at(recorder.ends),
            "memory_kib_per_trial": _growth(recorder.memory),
            "resident_mib": round(_resident() / 2**20),
            "journal_kib_per_trial": journal.stat().st_size / 2**10 / len(records),
            "curves_kib_per_trial": runs.curves.stat().st_size / 2**10 / len(records),
            "spool_kib_per_trial": (runs.root / "tracking.jsonl").stat().st_size / 2**10 / len(records),
            "reopen_s": round(reopened, 2),
            "wall_s": round(end - start, 1),
            "before_first_step_s": round(recorder.begun - start, 1),
            "after_last_step_s": round(end - recorder.ended, 1),
            "virtual_hours": simulation.loop.time() / 3600,
            "groups_busy": simulation.groups.busy / (simulation.loop.time() * setting.groups),
            "waited": simulation.groups.waited / max(1e-9, simulation.groups.busy + simulation.groups.waited),
        }


# ---------------------------------------------------------------------------------------- the knee


def knee(tenth: int = 1) -> dict[str, dict[str, float]]:
    """Share of their time that groups wait for answers, where the driver's time counts, by epoch length."""
    found: dict[str, dict[str, float]] = {}
    for sampler in (RANDOM, TPE):
        for seconds in (2.0, 5.0, 15.0, 60.0):
            setting = Setting(2_000, 500, sampler=sampler, epoch_seconds=seconds, charge=True)
            result = _in_new_process(_smaller(setting, tenth))
            row = {key: round(result[key], 3) for key in ("waited", "groups_busy")}
            found[f"{sampler} {seconds:g} s"] = row
            print(f"500 groups, {sampler}, epochs of {seconds:g} s: {row}", flush=True)
    return found


# ------------------------------------------------------------------------------------- the broker


class _Counted:
    """A broker that counts the calls it gets."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._broker, name)


def broker_messages(groups: int, ranks: int = 2, jobs_per_group: int = 4) -> dict[str, float]:
    """Calls per second of one core that the broker takes, in-process: `groups` of `ranks` workers, each
    group with a submitter that follows one trial after another."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(groups * jobs_per_group, groups, ranks=ranks, epochs=8)
        plan = make_plan(setting, Path(folder))
    loop = VirtualLoop()
    broker = _Counted(Broker())
    crew = Groups(setting, broker, loop)  # type: ignore[arg-type]
    config = plan.space.defaults()

    async def submit(index: int) -> None:
        for number in range(jobs_per_group):
            job = Job(f"trial-{index}-{number}", config, folder)
            await broker.submit(job)
            after = 0
            while isinstance(event := await broker.advance(job.id, after), Reported):
                after = event.result.epoch

    async def all_jobs() -> None:
        await asyncio.gather(*(submit(index) for index in range(groups)))

    crew.start()
    begun = time.thread_time()
    loop.run_until_complete(all_jobs())
    spent = time.thread_time() - begun
    crew.end()
    found = {"calls": broker.calls, "calls_per_second": round(broker.calls / spent)}
    print(f"broker in-process, {groups} groups of {ranks}: {found}", flush=True)
    return found


# ------------------------------------------------------------------------------- through real Ray


def through_ray(tenth: int = 1) -> dict[str, Any]:
    """What Ray itself adds: calls of the broker's actor, Tune's wait for a thousand actors, a trial actor."""
    with tempfile.TemporaryDirectory() as folder:
        cluster.connect()
        try:
            found = {
                "broker": _broker_actor(Path(folder), groups=200 // tenth),
                "wait_ms": {waiting: _wait_ms(waiting) for waiting in (10, 100, 1_000 // tenth)},
            }
        finally:
            ray.shutdown()
    print(f"through Ray: {found}", flush=True)
    return found


def _broker_actor(folder: Path, groups: int) -> dict[str, float]:
    """The CPU seconds of the broker's process per call, with two processes of clients."""
    broker: Any = ray.remote(Broker).options(num_cpus=0, max_concurrency=10_000, name="broker").remote()
    config = make_plan(Setting(1, 1, epochs=8), folder).space.defaults()
    clients = [ray.remote(_Clients).options(num_cpus=0, max_concurrency=10).remote(broker) for _ in range(2)]
    process = psutil.Process(ray.get(broker.__ray_call__.remote(lambda _: os.getpid())))
    trial = ray.remote(TrialActor).options(num_cpus=0)
    options = {"broker": "broker", "job": Job("a trial", config, str(folder)), "metric": "val/accuracy/genus"}
    actor = trial.remote(config=options)
    ray.get(actor.__ray_ready__.remote())
    memory = psutil.Process(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))).memory_full_info().uss
    ray.get(actor.stop.remote())
    begun, spent = time.perf_counter(), sum(process.cpu_times()[:2])
    calls = sum(
        ray.get([client.run.remote(f"client-{i}", groups // 2, config) for i, client in enumerate(clients)])
    )
    wall, spent = time.perf_counter() - begun, sum(process.cpu_times()[:2]) - spent
    return {
        "calls": calls,
        "calls_per_second_of_cpu": round(calls / spent),
        "calls_per_second_here": round(calls / wall),
        "trial_actor_mib": round(memory / 2**20),
    }


class _Clients:
    """In its own process: groups of two workers that train in no time, and the submitters of their jobs."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self._calls = 0

    async def _ask(self, method: str, *args: Any) -> Any:
        self._calls += 1
        return await getattr(self._broker, method).remote(*args)

    async def _worker(self, group: str, rank: int) -> None:
        await self._ask("open_generation", group, group)
        job = await self._ask("take", group, group, rank, 0)
        for epoch in range(1, job.config.train.epochs + 1):
            last = epoch == job.config.train.epochs
            result = EpochResult(epoch, dict.fromkeys(metric_names(44), 0.5), 1.0, epoch, last)
            await self._ask("report", group, group, rank, 0, result)
        if rank == 0:
            await self._ask("finish", group, group, 0, TrialOutcome(epoch, False, result.metrics))

    async def _submitter(self, name: str, config: TrialConfig) -> None:
        await self._ask("submit", Job(name, config, "/nowhere"))
        after = 0
        while isinstance(event := await self._ask("advance", name, after), Reported):
            after = event.result.epoch

    async def run(self, name: str, groups: int, config: TrialConfig) -> int:
        workers = [self._worker(f"{name}-{group}", rank) for group in range(groups) for rank in range(2)]
        submitters = [self._submitter(f"{name}-trial-{index}", config) for index in range(groups)]
        await asyncio.gather(*workers, *submitters)
        return self._calls


class _Sleeper:
    async def work(self, seconds: float) -> dict[str, float]:
        await asyncio.sleep(seconds)
        return {}


def _wait_ms(waiting: int, events: int = 300) -> float:
    """CPU milliseconds of the driver's thread per event, with so many trials at work at once: what Tune's
    RayActorManager takes to find the next answer among them, and to ask the next question."""
    actor: Any = ray.remote(_Sleeper).options(num_cpus=0, max_concurrency=2_000).remote()
    manager = RayActorManager(FixedResourceManager())
    left = events

    def ask(_: object = None) -> None:
        nonlocal left
        left -= 1
        future = actor.work.remote(random.uniform(1.0, 2.0))
        manager._actor_task_events.track_future(future, on_result=ask)

    for _ in range(waiting):
        ask()
    left = events
    manager.next()
    begun, spent = events - left, time.thread_time()
    while left > 0:
        manager.next()
    return round((time.thread_time() - spent) * 1e3 / (events - begun), 3)


# -------------------------------------------------------------------------------------- summing up


def _sums(rows: list[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for part, seconds in row.items():
            sums[part] += seconds
    return dict(sums)


def _split(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Milliseconds of each part and of all: mean, median, 99th percentile."""
    parts = sorted({part for row in rows for part in row})
    columns = {part: np.array([row.get(part, 0.0) for row in rows]) * 1e3 for part in parts}
    columns["all"] = np.sum(list(columns.values()), axis=0)
    return {
        part: [round(float(value), 4) for value in (np.mean(x), np.median(x), np.quantile(x, 0.99))]
        for part, x in columns.items()
        if np.any(x > 0)
    }


def _at(rows: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Mean milliseconds around the n-th trial, by part."""
    found = {}
    for place in (100, 1_000, 3_000, 10_000):
        near = rows[max(0, place - max(50, place // 20)) : place]
        if len(rows) >= place:
            found[place] = {
                part: round(seconds * 1e3 / len(near), 3) for part, seconds in _sums(near).items()
            }
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _growth(memory: list[tuple[int, int]]) -> float:
    """KiB per trial, by least squares over the second half."""
    late = memory[len(memory) // 2 :]
    if len(late) < 2:
        return float("nan")
    slope, _ = np.polyfit([trials for trials, _ in late], [size for _, size in late], 1)
    return float(slope) / 2**10


if __name__ == "__main__":
    main()

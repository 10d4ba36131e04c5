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
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from _simulation import ELSEWHERE, OTHER, Groups, Setting, Simulation, VirtualLoop  # noqa: E402

from hiertune.search import strategies  # noqa: E402
from hiertune.search.broker import Broker  # noqa: E402
from hiertune.search.display import Display  # noqa: E402
from hiertune.search.ledger import Ledger  # noqa: E402
from hiertune.search.listeners import Checkpoints, Curves, Log  # noqa: E402
from hiertune.search.searcher import LedgerSearcher  # noqa: E402
from hiertune.space import Space  # noqa: E402
from hiertune.tracking import Tracker  # noqa: E402

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
        figures["broker"] = {
            groups: broker_messages(groups) for groups in (10, 100, 1_000 // tenth)
        }
    if options.only is None or "ray" in options.only:
        figures["ray"] = through_ray(tenth)
    print(json.dumps(figures), flush=True)


def _smaller(setting: Setting, tenth: int) -> Setting:
    return Setting(
        **{**asdict(setting), "trials": setting.trials // tenth, "groups": setting.groups // tenth}
    )


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

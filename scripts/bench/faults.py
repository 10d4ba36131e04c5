"""Kills at random, and what they cost: nothing told is lost, nothing is told twice, nothing is left behind.

`faults.py driver [--kills 50]`: SIGKILL of the driver at random instants of searches of 20 trials, each
resumed every time, until so many kills are spent.
`faults.py parts [--kills 50]`: SIGKILL of a random worker, Train controller, trial actor, broker, raylet
or Ray head process (GCS) of a running search.
`faults.py resume [--trials 1000]`: seconds from the command to the first new trial of a search with so
many finished ones.
Everything is real: processes, Ray, gloo, the ledger, MLflow on SQLite. `--seed` repeats the instants up to
the machine's own jitter. Each prints a table, and as its last line one JSON object of figures and targets.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optuna
import psutil
from _bench import Figure, show
from _books import Audit, audit, newest_study
from optuna.trial import TrialState

from hiertune import Taxonomy
from hiertune.data import write_dataset

TRIALS, EPOCHS, METRIC = 20, 12, "val/accuracy/genus"
SPACE = f"""
name: faults
data: {{path: data.h5}}
model:
  backbone: {{kind: mlp, hidden: [16], dropout: 0.2}}
  head: {{choice: [{{kind: linear}}, {{kind: conditional, temperature: {{loguniform: [0.2, 5.0]}}}}]}}
loss: {{kind: taxonomy_smoothing, alpha: {{uniform: [0.0, 0.4]}}}}
optimizer: {{kind: adamw, lr: {{loguniform: [1.0e-3, 1.0e-1]}}}}
train: {{epochs: {EPOCHS}, batch_size: 20}}
search:
  workers_per_trial: 2
  scheduler: {{kind: asha, grace_epochs: 4}}
  controls: false
"""
LONGEST_S = 600  # of one session of a search
HEADER_BYTES = 100  # at most, of curves.csv
ORPHANS_S = 120  # Ray's two agents take 60 to 90 s to notice that their raylet is gone
KINDS = {
    "worker": ("ray::RayTrainWorker",),
    "controller": ("ray::TrainController",),
    "trial actor": ("ray::TrialActor", "ray::ResourceTrainable"),  # while it waits, and while it works
    "broker": ("ray::Broker",),
    "raylet": ("raylet",),
    "head": ("gcs_server",),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["driver", "parts", "resume"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        prepare(folder)
        rng = random.Random(options.seed)
        if options.what == "driver":
            show_books("the driver killed", kill_drivers(folder, options.kills, rng, Books(TRIALS)), 0)
        elif options.what == "parts":
            show_books("parts of it killed", kill_parts(folder, options.kills, rng, Books(TRIALS)))
        else:
            show_resume(folder, options.trials)


def prepare(folder: Path) -> None:
    """The space, and 600 rows around the centres of 8 genera in 4 families and 2 domains."""
    rng = np.random.default_rng(0)
    lineages = [(f"d{i // 4}", f"f{i // 2}", f"g{i}") for i in rng.integers(0, 8, 600)]
    taxonomy = Taxonomy.from_lineages(lineages, ["domain", "family", "genus"])
    labels = taxonomy.encode(lineages)
    inputs = rng.normal(size=(8, 20))[labels[:, -1]] + 2 * rng.normal(size=(600, 20))
    ids = [f"row{i}" for i in range(600)]
    write_dataset(folder / "data.h5", inputs.astype(np.float32), labels, taxonomy, ids)
    (folder / "space.yaml").write_text(SPACE)


@dataclass
class Books:
    """All searches of one benchmark together."""

    trials: int
    """Of each search."""
    searches: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    orphans: list[psutil.Process] = field(default_factory=list)
    """What killed drivers had started, but for deliveries, which may finish their work."""
    audits: list[Audit] = field(default_factory=list)

    def add(self, name: str, result: Audit) -> None:
        self.searches += 1
        self.audits.append(result)
        result.expect(result.trials == self.trials, f"there are {result.trials} trials, not {self.trials}")
        for problem in result.problems:
            print(f"{name}: {problem}", flush=True)


# ------------------------------------------------------------------------------- the driver is killed


def kill_drivers(
    folder: Path, kills: int, rng: random.Random, books: Books, undisturbed_s: float = 0.0
) -> Books:
    """Searches one after another; their sessions are killed, while there are kills left, at any instant
    of the time that an undisturbed one takes. By default the first search is left alone, to tell that."""
    while books.kills.total() < kills or undisturbed_s == 0.0:
        name, resume = f"search-{books.searches}", False
        while True:
            spend = undisturbed_s > 0 and books.kills.total() < kills and rng.random() < 0.85
            instant = rng.uniform(0.0, undisturbed_s) if spend else LONGEST_S
            begun = time.monotonic()
            ended = session(folder, name, resume, instant, books)
            resume = (folder / "runs" / name / "ledger.log").exists()
            if ended:
                break
        undisturbed_s = undisturbed_s or time.monotonic() - begun
        books.add(name, audit(folder / "runs" / name, METRIC, f"sqlite:///{folder}/runs/mlflow.db"))
        print(f"{name}: {books.kills.total()} kills so far", flush=True)
    return books


def session(folder: Path, name: str, resume: bool, kill_after: float, books: Books) -> bool:
    """Run the search; SIGKILL its driver after so many seconds. Whether it came to its end before."""
    books.sessions += 1
    process = start(folder, name, resume, books.trials)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        offspring = psutil.Process(process.pid).children(recursive=True)
        books.orphans += [each for each in offspring if "hiertune.tracking" not in command(each)]
        process.kill()
        process.wait()
        books.kills["driver"] += 1
        return False
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}; see {log_of(folder, name)}")
    return True


# --------------------------------------------------------------------------------- parts are killed


def kill_parts(folder: Path, kills: int, rng: random.Random, books: Books) -> Books:
    """Searches one after another, each of which loses a random process every few seconds."""
    while books.kills.total() < kills:
        name, resume = f"parts-{books.searches}", False
        while True:
            books.sessions += 1
            process = start(folder, name, resume, books.trials)
            curves = folder / "runs" / name / "curves.csv"
            for kind in shots(process, curves, rng, kills - books.kills.total()):
                books.kills[kind] += 1
            process.wait(LONGEST_S)
            if process.returncode == 0:
                break
            if process.returncode != 1 and process.returncode >= 0:
                raise SystemExit(f"{name} ended with {process.returncode}; see {log_of(folder, name)}")
            resume = (folder / "runs" / name / "ledger.log").exists()
        books.add(name, audit(folder / "runs" / name, METRIC, f"sqlite:///{folder}/runs/mlflow.db"))
        print(f"{name}: {dict(books.kills)} so far", flush=True)
    return books


def shots(driver: subprocess.Popen, curves: Path, rng: random.Random, most: int) -> Iterator[str]:
    """Kill parts of a running search until it ends, each at a random time after it has trained again; yields
    the kind of each. (Killed before, it would only start and start.)"""
    for _ in range(most):
        size = max(HEADER_BYTES, curves.stat().st_size if curves.exists() else 0)
        deadline = time.monotonic() + LONGEST_S
        while not curves.exists() or curves.stat().st_size <= size:
            if driver.poll() is not None or time.monotonic() > deadline:
                return
            time.sleep(0.05)
        try:
            driver.wait(rng.uniform(0.0, 5.0))
            return
        except subprocess.TimeoutExpired:
            pass
        targets = parts_of(driver.pid)
        if not targets:
            continue
        kind = rng.choice(sorted(targets))
        try:
            os.kill(rng.choice(targets[kind]), signal.SIGKILL)
        except ProcessLookupError:
            continue
        yield kind


def parts_of(pid: int) -> dict[str, list[int]]:
    """The processes of a search by what they are."""
    found: dict[str, list[int]] = {}
    for process in psutil.Process(pid).children(recursive=True):
        line = command(process)
        for kind, marks in KINDS.items():
            if line.startswith(marks) or Path(line.split(" ")[0]).name in marks:
                found.setdefault(kind, []).append(process.pid)
    return found


# ---------------------------------------------------------------------------------- a long search resumed


def show_resume(folder: Path, trials: int) -> None:
    """A search of two trials, its ledger filled up with copies of them, and one trial more."""
    run = folder / "runs" / "long"
    if start(folder, "long", resume=False, trials=2).wait(LONGEST_S):
        raise SystemExit(f"the search failed; see {log_of(folder, 'long')}")
    fill(run / "ledger.log", trials)
    begun = time.monotonic()
    process = start(folder, "long", resume=True, trials=trials + 1)
    started = reported = None
    while reported is None and time.monotonic() - begun < LONGEST_S and process.poll() is None:
        time.sleep(0.05)
        if started is None and f"trial {trials} started" in (run / "search.log").read_text():
            started = time.monotonic() - begun
        if started is not None and f"\n{trials},1," in (run / "curves.csv").read_text():
            reported = time.monotonic() - begun
    process.send_signal(signal.SIGTERM)
    process.wait(LONGEST_S)
    if started is None or reported is None:
        raise SystemExit(f"trial {trials} did not start; see {log_of(folder, 'long')}")
    show(
        f"a search with {trials} finished trials resumed",
        [
            Figure("first new trial asked", started, 20, unit="s"),
            Figure("its first epoch reported", reported, unit="s"),
        ],
    )


def fill(journal: Path, trials: int) -> None:
    """Add copies of the finished trials, each with its learning curve, until there are `trials`."""
    study = newest_study(journal)
    rng = random.Random(0)
    pattern = list(study.trials)
    study.add_trials(
        optuna.trial.create_trial(
            state=TrialState.COMPLETE,
            params=copy.params | {"loss.alpha": rng.uniform(0.0, 0.4)},
            distributions=copy.distributions,
            user_attrs=copy.user_attrs,
            intermediate_values=copy.intermediate_values,
            value=copy.value if copy.value is not None else 0.0,
        )
        for copy in (pattern[number % len(pattern)] for number in range(len(pattern), trials))
    )


# ---------------------------------------------------------------------------------------- plumbing


def start(folder: Path, name: str, resume: bool, trials: int) -> subprocess.Popen:
    words = [sys.executable, "-m", "hiertune", "search", "space.yaml", "--name", name]
    words += ["--trials", str(trials), *(["--resume"] if resume else [])]
    with log_of(folder, name).open("ab") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=output)


def log_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.out"


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def show_books(title: str, books: Books, most_failed: int | None = None) -> None:
    problems = sum(len(each.problems) for each in books.audits)
    kills = ", ".join(f"{count} {kind}" for kind, count in sorted(books.kills.items()))
    failed = sum(each.failed for each in books.audits)
    ended = sum(each.completed + each.pruned for each in books.audits) + failed
    total = books.trials * books.searches
    _, left = psutil.wait_procs(books.orphans, timeout=ORPHANS_S)
    again = sum(each.trained_again for each in books.audits)  # at most one for each kill
    show(
        f"{books.searches} searches of {books.trials} trials, {title} {books.kills.total()} times ({kills})",
        [
            Figure("kills", books.kills.total(), unit=""),
            Figure("trials lost", total - ended, 0, unit=""),
            Figure("trials failed", failed, most_failed, unit=""),
            Figure("trials told twice", sum(each.told_twice for each in books.audits), 0, unit=""),
            Figure("trials too many", sum(each.trials for each in books.audits) - total, 0, unit=""),
            Figure("disagreements of ledger, tables and MLflow", problems, 0, unit=""),
            Figure("points in MLflow", sum(each.points for each in books.audits), unit=""),
            Figure("epochs", sum(each.epochs for each in books.audits), unit=""),
            Figure("epochs trained again", again, books.kills.total(), unit=""),
            Figure("starts by hand", books.sessions, unit=""),
            Figure("processes left behind", len(left), 0, unit=""),
        ],
    )


if __name__ == "__main__":
    main()

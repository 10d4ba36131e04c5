"""Trials per hour of a whole search: hiertune against the same trials run the plain way.

hiertune's time is from the start of its worker groups to the end of the last trial. The plain way
(a TorchTrainer started inside a Tune function) runs a sample of those very trials, evenly spread over the
search, each for as many epochs as it got there.
`search_throughput.py [--quick] [--space FILE]` prints a table, and as its last line one JSON object:
{"figures": {...}, "targets": {...}}.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _bench import Figure, show
from _plain import PlainTrial, seconds_of_plain_trials
from rich.console import Console

from hiertune.search.driver import run_search
from hiertune.search.ledger import Ledger
from hiertune.search.plan import SearchPlan, plan_search

QUICKSTART = Path(__file__).resolve().parents[2] / "search_spaces" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small sample: a look, not a result")
    parser.add_argument("--space", type=Path, default=QUICKSTART)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_search(options.space, Path(folder) / "runs")
        begun = time.time()
        run_search(plan, Console(quiet=True))
        ledger = Ledger.open(plan.folder.ledger, plan.config.name, plan.mode, resume=True)
        seconds = max(trial.datetime_complete.timestamp() for trial in ledger.study.trials) - begun
        plain = _plain(plan, ledger, 3 if options.quick else 6, folder)
    ours, theirs = plan.trials / seconds * 3600, 3600 / statistics.mean(plain)
    show(
        f"{plan.trials} trials of {options.space.name}, {plan.config.search.workers_per_trial} workers each",
        [
            Figure("hiertune", ours, better="above", unit="trials/h"),
            Figure(f"plain way ({len(plain)} of these trials)", theirs, better="above", unit="trials/h"),
            Figure("search throughput: hiertune / plain", ours / theirs, 5, better="above"),
        ],
    )


def _plain(plan: SearchPlan, ledger: Ledger, sample: int, folder: str) -> list[float]:
    records = [record for record in ledger.records() if record.state in ("completed", "pruned")]
    # By epochs trained, so that the sample has short and long trials in the search's own proportion.
    records.sort(key=lambda record: (record.epochs, record.number))
    places = [(2 * i + 1) * len(records) // (2 * sample) for i in range(sample)]
    trials = [
        PlainTrial(plan.located(plan.space.resolve(records[i].params)), records[i].epochs) for i in places
    ]
    return seconds_of_plain_trials(trials, plan.config.search.workers_per_trial, folder)


if __name__ == "__main__":
    main()

"""What one more trial costs: hiertune's warm worker groups against a TorchTrainer per trial.

A trial is three trivial epochs with two workers. Both sides run one trial at a time on the Ray that
this script starts. `trial_overhead.py [--quick]` prints a table, and as its last line one JSON object:
{"figures": {...}, "targets": {...}}.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
from _bench import Figure, show
from _plain import PlainTrial, seconds_of_plain_trials
from rich.console import Console

from hiertune import Taxonomy
from hiertune.data import write_dataset
from hiertune.search.driver import run_search
from hiertune.search.ledger import Ledger
from hiertune.search.plan import SearchPlan, plan_search

SPACE = """
name: overhead
data: {path: data.h5}
model: {backbone: {kind: mlp, hidden: [16]}}
optimizer: {kind: adamw, lr: {loguniform: [1e-4, 1e-1]}}
train: {epochs: 3, batch_size: 50}
search:
  trials: TRIALS
  workers_per_trial: 2
  max_concurrent: 1
  sampler: {kind: random}
  scheduler: {kind: none}
  refit: false
  controls: false
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer trials: a look, not a result")
    options = parser.parse_args()
    warm_trials, plain_trials = (20, 2) if options.quick else (60, 5)
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(Path(folder), warm_trials)
        run_search(plan, Console(quiet=True))
        warm = _seconds_between_trials(plan)
        plain = _plain(plan, plain_trials, folder)
    show(
        "three trivial epochs, 2 workers, one trial at a time",
        [
            Figure("seconds per further trial, warm worker group", statistics.median(warm), unit="s"),
            Figure("the same, mean", statistics.mean(warm), unit="s"),
            Figure("seconds per trial, TorchTrainer in a Tune function", statistics.median(plain), unit="s"),
            Figure(
                "trial overhead: plain / hiertune",
                statistics.median(plain) / statistics.mean(warm),
                20,
                better="above",
            ),
        ],
    )


def _plan(folder: Path, trials: int) -> SearchPlan:
    rng = np.random.default_rng(0)
    lineages = [(f"f{i // 2}", f"g{i}") for i in rng.integers(0, 8, 400)]
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = rng.normal(size=(400, 20)).astype(np.float32)
    write_dataset(
        folder / "data.h5", inputs, taxonomy.encode(lineages), taxonomy, [f"row{i}" for i in range(400)]
    )
    space = folder / "space.yaml"
    space.write_text(SPACE.replace("TRIALS", str(trials)))
    return plan_search(space, folder / "runs")


def _seconds_between_trials(plan: SearchPlan) -> list[float]:
    """From the end of one trial to the end of the next; the first one, which starts the group, is out."""
    ledger = Ledger.open(plan.folder.ledger, plan.config.name, plan.mode, resume=True)
    ends = sorted(trial.datetime_complete.timestamp() for trial in ledger.study.trials)
    return [later - earlier for earlier, later in itertools.pairwise(ends)]


def _plain(plan: SearchPlan, trials: int, folder: str) -> list[float]:
    config = plan.located(plan.space.defaults())
    return seconds_of_plain_trials([PlainTrial(config, 3)] * trials, workers=2, storage=folder)


if __name__ == "__main__":
    main()

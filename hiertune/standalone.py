"""`hiertune train`: one config, trained in this process without Ray or MLflow."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hiertune._text import visible
from hiertune.check import check_with_data, warnings_with_data
from hiertune.data import open_dataset
from hiertune.errors import InputError
from hiertune.export import save_trained
from hiertune.space import load_config, located
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult, TrialOutcome


def train_config(file: Path, out: Path, *, refit: bool, console: Console) -> TrialOutcome:
    """Train the config in `file`; `out` gets the model, `metrics.json`, and a checkpoint on the way.

    `refit` trains on train + validation and measures the test split, else validation is measured
    every epoch. An interrupted training goes on from its checkpoint. Raises InputError, also when
    `out` holds a trained model already.
    """
    config = located(load_config(file), file.parent)
    if (out / "metrics.json").exists():
        raise InputError(f"there is a trained model in {out} already", allowed="another --out")
    data = open_dataset(config.data)
    check_with_data(config, data)
    for text in warnings_with_data(config, data):
        console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("epochs", total=config.train.epochs)

        def report(result: EpochResult) -> Decision:
            bar.update(task, completed=result.epoch)
            for note in result.notes:
                console.print(escape(note), highlight=False)
            finest = f"val/accuracy/{data.levels[-1]}"
            shown = {name: result.metrics.get(name) for name in ("train/loss", "val/loss", finest)}
            text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if value is not None)
            console.print(f"epoch {result.epoch:>3}  {text}", highlight=False)
            return Decision.CONTINUE

        outcome = run_trial(
            config,
            data,
            report,
            fit_on=("train", "val") if refit else ("train",),
            validate_on=() if refit else ("val",),
            test_on=("test",) if refit else (),
            checkpoint=out / "checkpoint",
            finish=lambda model: save_trained(out / "model", model, config, data),
        )
    (out / "metrics.json").write_text(json.dumps(outcome.metrics, indent=2) + "\n", encoding="utf-8")
    text = f"the model is in {out / 'model'}, its metrics in {out / 'metrics.json'}"
    console.print(escape(visible(text)), highlight=False, soft_wrap=True)
    return outcome

"""`OPTIMIZER`, `LR_SCHEDULER` and `TRAIN` as the sections `optimizer`, `schedule` and `train`."""

from __future__ import annotations

from typing import Any

from hiertune.linnaeus.context import TOTAL_STEPS, Context
from hiertune.linnaeus.settings import Settings, number_of


def optimisation_section(context: Context) -> dict[str, Any]:
    settings = context.settings
    lr = _learning_rate(context)
    return {
        "optimizer": _optimizer(settings, lr),
        "schedule": _schedule(context, lr),
        "train": _train(context),
    }


def _learning_rate(context: Context) -> float:
    """Linnaeus scales BASE_LR by the rows of a step over REFERENCE_BS."""
    settings = context.settings
    base = settings.number("LR_SCHEDULER.BASE_LR", 1e-4)
    reference = settings.number("LR_SCHEDULER.REFERENCE_BS", 512)
    if reference <= 0:
        raise settings.refuse("LR_SCHEDULER.REFERENCE_BS", f"{reference} is out of range", "a number above 0")
    settings.carry("LR_SCHEDULER.BASE_LR", "optimizer.lr")
    settings.carry("LR_SCHEDULER.REFERENCE_BS", "optimizer.lr")
    rows = context.batch_size * context.accumulation
    context.checks.append(
        f"train.batch_size and optimizer.lr: for one process, {rows} rows per step; with N GPUs in Linnaeus"
        " multiply both by N"
    )
    return float(f"{base * rows / reference:.12g}")


def _optimizer(settings: Settings, lr: float) -> dict[str, Any]:
    name = settings.text("OPTIMIZER.NAME", "adamw").lower()
    decay = settings.number("OPTIMIZER.WEIGHT_DECAY", 0.05)
    settings.carry("OPTIMIZER.WEIGHT_DECAY", "optimizer.weight_decay")
    if name == "sgd":
        settings.carry("OPTIMIZER.NAME", "optimizer.kind")
        settings.carry("OPTIMIZER.MOMENTUM", "optimizer.momentum")
        settings.drop("OPTIMIZER.BETAS", "sgd has none")
        momentum = settings.number("OPTIMIZER.MOMENTUM", 0.9)
        return {"kind": "sgd", "lr": lr, "momentum": momentum, "weight_decay": decay}
    if name == "adamw":
        settings.carry("OPTIMIZER.NAME", "optimizer.kind")
    else:
        settings.drop("OPTIMIZER.NAME", f"hiertune has no optimiser '{name}': adamw is used")
    betas = settings.sequence("OPTIMIZER.BETAS", [0.9, 0.999], number_of, "a list of two or three numbers")
    if len(betas) not in (2, 3):
        raise settings.refuse(
            "OPTIMIZER.BETAS", f"got {len(betas)} numbers", "a list of two or three numbers"
        )
    settings.carry("OPTIMIZER.BETAS", "optimizer.betas")
    settings.drop("OPTIMIZER.MOMENTUM", "adamw has none")
    return {"kind": "adamw", "lr": lr, "weight_decay": decay, "betas": betas[:2]}


def _schedule(context: Context, lr: float) -> dict[str, Any]:
    settings = context.settings
    name = settings.choice("LR_SCHEDULER.NAME", "cosine", ("cosine", "step", "linear", "wsd"))
    if name == "cosine":
        settings.carry("LR_SCHEDULER.NAME", "schedule.kind")
    else:
        settings.drop("LR_SCHEDULER.NAME", f"hiertune has no schedule '{name}': cosine is used")
    lowest = settings.number("LR_SCHEDULER.MIN_LR", 1e-5)
    settings.carry("LR_SCHEDULER.MIN_LR", "schedule.final")
    final = float(f"{min(lowest / lr, 1.0):.12g}") if lr > 0 else 0.0
    if 0 < lr <= lowest:
        context.checks.append(
            "schedule.final: 1.0, so that the rate stays as it is after the warm-up: LR_SCHEDULER.MIN_LR"
            f" ({lowest:g}) is not below the rate for one process ({lr:g})"
        )
    warmup = _warmup(context)
    if context.facts is not None:
        settings.drop(TOTAL_STEPS, "the data and train.epochs say it")
    elif settings.whole(TOTAL_STEPS, 0):
        settings.carry(TOTAL_STEPS, "the shares that steps become")
    else:
        settings.drop(TOTAL_STEPS, "is not given")
    return {"kind": "cosine", "warmup": warmup, "final": final}


def _warmup(context: Context) -> float:
    settings = context.settings
    fraction, steps, epochs = (f"LR_SCHEDULER.WARMUP_{name}" for name in ("FRACTION", "STEPS", "EPOCHS"))
    wanted = {
        fraction: settings.number(fraction, 0.0),
        steps: settings.whole(steps, 0),
        epochs: settings.number(epochs, 5.0),
    }
    used = next((key for key, value in wanted.items() if value > 0), epochs)
    for key in wanted:
        if key != used:
            settings.drop(key, f"{used} says it" if wanted[used] > 0 else "is 0: no warm-up")
    share: float | None = wanted[used]
    if used == steps:
        share = context.share_of(wanted[steps])
    elif used == epochs:
        share = wanted[epochs] / context.epochs
    if share is None:
        settings.drop(
            steps, "the length of the training is not known: give --data or LR_SCHEDULER.TOTAL_STEPS"
        )
        context.checks.append("schedule.warmup: 0.05, because the share of WARMUP_STEPS is not known")
        return 0.05
    settings.carry(used, "schedule.warmup")
    return float(f"{min(max(share, 0.0), 1.0):.12g}")


def _train(context: Context) -> dict[str, Any]:
    settings = context.settings
    levels = {"O0": "fp32", "O1": "fp16", "O2": "fp16", "O3": "fp16"}
    amp = settings.choice("TRAIN.AMP_OPT_LEVEL", "O1", levels)
    clip = settings.number("TRAIN.CLIP_GRAD", 0.0 if settings.has("TRAIN.CLIP_GRAD") else 5.0)
    carried = {
        "TRAIN.EPOCHS": "epochs",
        "DATA.BATCH_SIZE": "batch_size",
        "TRAIN.ACCUMULATION_STEPS": "accumulation",
        "TRAIN.CLIP_GRAD": "grad_clip",
        "TRAIN.AMP_OPT_LEVEL": "precision",
        "MISC.SEED": "seed",
    }
    for key, ours in carried.items():
        settings.carry(key, f"train.{ours}")
    if levels[amp] == "fp16":
        context.checks.append("train.precision: fp16 needs a GPU; bf16 and fp32 run anywhere")
    return {
        "epochs": context.epochs,
        "batch_size": context.batch_size,
        "accumulation": context.accumulation,
        "seed": settings.whole("MISC.SEED", 42),
        "grad_clip": max(clip, 0.0),
        "precision": levels[amp],
    }

"""What a training step costs: against a bare loop, and against the same mathematics done densely.

Two questions, each answered by epochs that alternate with the other side's within one trial:

- Does `run_trial` slow down what a person would write by hand with the same model, loss and data?
- How much faster is the whole step (smoothing, hierarchical softmax, GradNorm every 10 steps) than
  with `[C, C]` target matrices, 0/1 matrices of links, a pass over all levels per level, and a forward
  per level for GradNorm? Both sides use the same optimiser and see the same rows; that
  their losses agree is checked.

One compute thread per process. `--quick`: fewer rounds, smaller sizes for the dense side.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _bench import Figure, show
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hiertune.config import (
    CosineConfig,
    DataConfig,
    EqualConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    MLPConfig,
    ModelConfig,
    TaxonomySmoothingConfig,
    TrainConfig,
    TrialConfig,
)
from hiertune.data import HierarchicalDataset, MemoryInputs
from hiertune.gradnorm import update_weights
from hiertune.losses import TaxonomySmoothing, build_losses, level_losses
from hiertune.models import build_model
from hiertune.taxonomy import Taxonomy
from hiertune.train.batches import BatchPlan
from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult
from hiertune.train.workers import Workers

SIX_LEVELS = (2, 30, 60, 130, 280, 1239)
FOUR_LEVELS = (60, 400, 2500, 10000)
SMOOTHING = TaxonomySmoothingConfig()
GRADNORM = GradNormConfig(interval=10)

Epoch = Callable[[int], float]
"""Trains the given epoch (from 1) and returns its mean loss."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rounds, steps = (5, 30) if quick else (15, 60)
    figures = [
        Figure(f"run_trial against a bare loop, {workers} worker(s), steps/s", of_bare, 0.95, "above")
        for workers in (1, 2)
        for of_bare in [against_bare(workers, rounds, steps)]
    ]
    for name, sizes, batch_size, target in (
        ("1239 classes on 6 levels, batch 64", SIX_LEVELS, 64, None),
        ("1239 classes on 6 levels, batch 256", SIX_LEVELS, 256, 2.0),
        ("10000 classes on 4 levels, batch 256", FOUR_LEVELS, 256, 4.0),
    ):
        speed = against_dense(sizes, batch_size, rounds=3 if quick else 7, steps=10 if quick else 20)
        figures.append(Figure(f"whole step against dense, {name}, steps/s", speed, target, "above"))
    show("Training steps (higher is better)", figures)


# ----------------------------------------------------------------------------- against a bare loop


def against_bare(workers: int, rounds: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        if workers == 1:
            return _bare_worker(0, 1, folder, rounds, steps)
        mp.spawn(_bare_worker, (workers, folder, rounds, steps), nprocs=workers)
        return float(Path(folder, "ratio").read_text())


def _bare_worker(rank: int, workers: int, folder: str, rounds: int, steps: int) -> float:
    torch.set_num_threads(1)
    if workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=workers)
    data = make_data(SIX_LEVELS, features=4096, rows=128 * steps)
    config = make_config(hidden=[512], batch_size=128, epochs=rounds + 1, model={}, weighting=EqualConfig())
    ratio = alternate(config, data, bare_loop(config, data))
    if rank == 0:
        Path(folder, "ratio").write_text(str(ratio))
    if workers > 1:
        dist.destroy_process_group()
    return ratio


def bare_loop(config: TrialConfig, data: HierarchicalDataset) -> Epoch:
    """The loop that one writes by hand: no schedule, no validation, no checks, nothing measured."""
    torch.manual_seed(config.train.seed)
    workers = Workers.current()
    inputs, labels = data.inputs.rows(np.arange(len(data))), torch.from_numpy(data.labels)
    model: nn.Module = build_model(config.model, data.taxonomy, data.inputs.shape[1:], None)
    if workers.size > 1:
        model = DistributedDataParallel(model)
    losses = build_losses(config.loss, data.taxonomy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    no_weights = [None] * data.taxonomy.num_levels

    def epoch(number: int) -> float:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(number))
        for rows in order.split(config.train.batch_size):
            known = (labels.index_select(0, rows) >= 0).sum(0).float()
            mine = rows.tensor_split(workers.size)[workers.rank]
            logits = model(inputs.index_select(0, mine))
            of_levels = level_losses(losses, logits, labels.index_select(0, mine), known, no_weights)
            loss = torch.stack(of_levels).sum() * workers.size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    return epoch


# ------------------------------------------------------------------------ against dense mathematics


def against_dense(sizes: tuple[int, ...], batch_size: int, rounds: int, steps: int) -> float:
    data = make_data(sizes, features=2080, rows=batch_size * steps)
    config = make_config(
        hidden=[1024, 512],
        batch_size=batch_size,
        epochs=rounds + 1,
        model={"head": HierarchicalSoftmaxConfig()},
        weighting=GRADNORM,
    )
    return alternate(config, data, dense_loop(config, data), same_losses=True)


def dense_loop(config: TrialConfig, data: HierarchicalDataset) -> Epoch:
    """The same steps as `run_trial` makes, written down from the formulas as published code does it: every
    level's head makes its own pass over all levels."""
    torch.manual_seed(config.train.seed)
    inputs, labels = data.inputs.rows(np.arange(len(data))), torch.from_numpy(data.labels)
    model = build_model(config.model, data.taxonomy, data.inputs.shape[1:], None)
    matrices = [
        TaxonomySmoothing(data.taxonomy, level, SMOOTHING.alpha, SMOOTHING.beta).target_matrix().float()
        for level in data.levels
    ]
    links = [dense_links(parents, size) for parents, size in _pairs(data.taxonomy)]
    linears = [model.head.linear[level] for level in data.levels]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
    )
    plan = BatchPlan(data.inputs, np.arange(len(data)), config.train.batch_size, config.train.seed)
    weights = torch.ones(len(linears))
    initial: Tensor | None = None
    done = 0

    def pass_for(features: Tensor, level: int) -> Tensor:
        logits = [linears[0](features)]
        for linear, link in zip(linears[1:], links, strict=True):
            logits.append(linear(features) + torch.log(logits[-1].softmax(1) @ link + 1e-10))
        return logits[level]

    def loss_of(logits: Tensor, level: int, y: Tensor) -> Tensor:
        known = y >= 0
        per_row = -(matrices[level][y.clamp(min=0)] * logits.log_softmax(1)).sum(1)
        return (per_row * known).sum() / known.sum().clamp(min=1)

    def norm_of(x: Tensor, level: int, y: Tensor) -> Tensor:
        features = model.backbone(x)
        loss = loss_of([linear(features) for linear in linears][level], level, y)
        return torch.autograd.grad(loss, features)[0].norm()

    def epoch(number: int) -> float:
        nonlocal weights, initial, done
        total = torch.zeros(())
        for step in plan.epoch(number):
            rows = torch.from_numpy(step.passes[0].rows)
            x, y = inputs[rows], labels[rows].unbind(1)
            features = model.backbone(x)
            losses = torch.stack([loss_of(pass_for(features, i), i, y[i]) for i in range(len(y))])
            old_weights = weights
            if done % GRADNORM.interval == 0:
                norms = torch.stack([norm_of(x, i, y[i]) for i in range(len(y))])
                initial = losses.detach() if initial is None else initial
                rule = (norms, losses.detach(), initial, GRADNORM.alpha, GRADNORM.lr)
                weights = update_weights(weights, *rule)
            optimizer.zero_grad()
            losses.dot(old_weights).backward()
            optimizer.step()
            total += losses.detach().sum()
            done += 1
        return total.item() / plan.steps_per_epoch

    return epoch


def dense_links(parents: np.ndarray, size: int) -> Tensor:
    links = torch.zeros(size, len(parents))
    links[torch.tensor(parents), torch.arange(len(parents))] = 1.0
    return links


def _pairs(taxonomy: Taxonomy) -> list[tuple[np.ndarray, int]]:
    return list(zip(taxonomy.parents[1:], taxonomy.num_classes[:-1], strict=True))


# ----------------------------------------------------------------------------------------- shared


def alternate(
    config: TrialConfig, data: HierarchicalDataset, other: Epoch, *, same_losses: bool = False
) -> float:
    """Median over epochs of (seconds of the other loop / seconds of run_trial); the first is not counted."""
    ratios = []

    def report(result: EpochResult) -> Decision:
        start = time.perf_counter()
        loss = other(result.epoch)
        ratios.append((time.perf_counter() - start) / result.seconds)
        if same_losses and result.epoch == 1:  # later on, rounding errors have had time to grow
            np.testing.assert_allclose(result.metrics["train/loss"], loss, rtol=1e-4)
        return Decision.CONTINUE

    run_trial(config, data, report, validate_on=())
    return statistics.median(ratios[1:])


def make_config(*, hidden: list[int], batch_size: int, epochs: int, model: dict, weighting) -> TrialConfig:
    return TrialConfig(
        data=DataConfig(path="synthetic"),
        model=ModelConfig(backbone=MLPConfig(hidden=hidden, standardize=False), **model),
        loss=SMOOTHING,
        weighting=weighting,
        schedule=CosineConfig(warmup=0.0, final=1.0),  # a constant rate, worked out each step all the same
        train=TrainConfig(epochs=epochs, batch_size=batch_size, device="cpu"),
    )


def make_data(sizes: tuple[int, ...], features: int, rows: int) -> HierarchicalDataset:
    """Random inputs and labels of a random tree in which some classes are large; all rows train."""
    random = np.random.default_rng(0)
    parents = [np.full(sizes[0], -1)]
    for above, size in itertools.pairwise(sizes):
        some_large = np.sort((random.random(size) ** 2 * above).astype(np.int64))
        parents.append(some_large)
    taxonomy = Taxonomy.from_parents([f"level{i}" for i in range(len(sizes))], parents)
    labels = taxonomy.ancestors(-1)[random.integers(0, sizes[-1], rows)]
    inputs = torch.from_numpy(random.standard_normal((rows, features), dtype=np.float32))
    ids = np.arange(rows).astype(str).astype(object)
    return HierarchicalDataset(MemoryInputs(inputs), labels, ids, np.zeros(rows, np.int8), taxonomy)


if __name__ == "__main__":
    main()

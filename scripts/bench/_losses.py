"""Taxonomy smoothing against torch's own smoothed cross-entropy, and what building and holding it costs."""

from __future__ import annotations

import pickle
import statistics
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from _bench import Figure, ratio, seconds

from hiertune import Taxonomy
from hiertune.losses import TaxonomySmoothing

ALPHA = 0.1
FEATURES = 512
TREES = {
    "1k": (8, 40, 250, 1000),
    "10k": (60, 400, 2500, 10_000),
    "10k_deep": (12, 60, 300, 900, 2500, 6000, 10_000),
    "100k": (300, 3000, 20_000, 100_000),
}


def run(quick: bool) -> list[Figure]:
    """One thread is assumed; about 2 minutes, 15 s when `quick`."""
    torch.manual_seed(0)
    figures = []
    for name, sizes in TREES.items():
        loss = TaxonomySmoothing(random_tree(sizes), -1, alpha=ALPHA)
        rounds = (3 if quick else 7) if name == "100k" else (7 if quick else 21)
        for batch in (64,) if quick else (64, 256):
            case = f"{name}/batch{batch}"
            figures.append(Figure(f"smoothing/loss/{case}", _loss_alone(loss, batch, rounds), 3.0))
            figures.append(
                Figure(f"smoothing/linear_and_loss/{case}", _with_linear(loss, batch, rounds), 1.3)
            )
    held = TaxonomySmoothing(random_tree(TREES["100k"]), -1).state_bytes()
    return [
        *figures,
        Figure("smoothing/build/10k", 1e3 * _build_seconds(TREES["10k"]), 10.0, unit="ms"),
        Figure("smoothing/build/10k_deep", 1e3 * _build_seconds(TREES["10k_deep"]), 10.0, unit="ms"),
        Figure("smoothing/held/100k", held / 1e6, 20.0, unit="MB"),
        *_taxonomy_figures(TREES["100k"]),
    ]


def random_tree(sizes: tuple[int, ...], seed: int = 0) -> Taxonomy:
    """A tree in which every class has at least one child, in no order; `sizes` coarse -> fine."""
    generator = np.random.default_rng(seed)
    parents = [np.full(sizes[0], -1)]
    for above, size in pairwise(sizes):
        every_parent = np.concatenate([np.arange(above), generator.integers(0, above, size - above)])
        parents.append(generator.permutation(every_parent))
    return Taxonomy.from_parents([f"level{i}" for i in range(len(sizes))], parents)


def _loss_alone(loss: TaxonomySmoothing, batch: int, rounds: int) -> float:
    logits = torch.randn(batch, loss.num_classes, requires_grad=True)
    return _against_torch(loss, lambda: logits, [logits], batch, rounds)


def _with_linear(loss: TaxonomySmoothing, batch: int, rounds: int) -> float:
    features = torch.randn(batch, FEATURES, requires_grad=True)
    linear = torch.nn.Linear(FEATURES, loss.num_classes)
    return _against_torch(loss, lambda: linear(features), [features, *linear.parameters()], batch, rounds)


def _against_torch(
    loss: TaxonomySmoothing,
    make_logits: Callable[[], torch.Tensor],
    leaves: list[torch.Tensor],
    batch: int,
    rounds: int,
) -> float:
    """Forward and backward to `leaves`: time of ours / of `F.cross_entropy(label_smoothing=...)`."""
    targets = torch.randint(loss.num_classes, (batch,))

    def ours() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(make_logits(), targets).mean().backward()

    def torchs() -> None:
        for leaf in leaves:
            leaf.grad = None
        F.cross_entropy(make_logits(), targets, label_smoothing=ALPHA).backward()

    return ratio(ours, torchs, rounds=rounds)


def _build_seconds(sizes: tuple[int, ...]) -> float:
    """Of the loss, from a taxonomy that has cached nothing yet."""
    stored = pickle.dumps(random_tree(sizes))
    taxonomies = [pickle.loads(stored) for _ in range(9)]  # nosec B301 - made in the line above
    return statistics.median(seconds(lambda t=t: TaxonomySmoothing(t, -1)) for t in taxonomies)


def _taxonomy_figures(sizes: tuple[int, ...]) -> list[Figure]:
    taxonomy = random_tree(sizes)
    ancestors = taxonomy.ancestors(-1).tolist()
    rows = [[names[i] for names, i in zip(taxonomy.names, row, strict=True)] for row in ancestors]

    def from_parents() -> None:
        Taxonomy.from_parents(taxonomy.levels, taxonomy.parents, taxonomy.names)

    def from_lineages() -> None:
        Taxonomy.from_lineages(rows, taxonomy.levels)

    return [
        Figure(
            f"taxonomy/{build.__name__}/100k",
            statistics.median(seconds(build) for _ in range(5)),
            1.0,
            unit="s",
        )
        for build in (from_parents, from_lineages)
    ]

"""Heads: all levels, forward and backward, against one plain linear layer per level, and one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from _bench import Figure, ratio
from _losses import random_tree
from torch import Tensor, nn

from hiertune.models import HierarchicalHead

FEATURES = 512
CASES = (((2, 30, 60, 130, 280, 1239), 1.5), ((60, 400, 2500, 10_000), 1.3))
HEADS = {
    "hierarchical_softmax": {"kind": "hierarchical_softmax"},
    "conditional_gumbel": {"kind": "conditional", "routing": "gumbel", "temperature": 2.0},
}
PATH_CASES = ((8, 40, 250, 1000), (60, 400, 2500, 10_000))
PATH_TARGET = 1.4


def run(quick: bool) -> list[Figure]:
    """One thread is assumed; about 90 s, 15 s when `quick`."""
    figures = []
    for sizes, target in CASES:
        for batch in (64,) if quick else (64, 256):
            for name, settings in HEADS.items():
                value = _against_linears(sizes, batch, settings, rounds=7 if quick else 21)
                figures.append(Figure(f"heads/{name}/{sizes[-1]}_classes/batch{batch}", value, target))
    return [*figures, *_path_figures(quick)]


def _path_figures(quick: bool) -> list[Figure]:
    """What normalising among siblings costs."""
    figures = []
    for sizes in PATH_CASES:
        for batch in (64,) if quick else (64, 256):
            value = _path_against_prior(sizes, batch, rounds=7 if quick else 21)
            name = f"heads/path_softmax_to_hierarchical_softmax/{sizes[-1]}_classes/batch{batch}"
            figures.append(Figure(name, value, PATH_TARGET))
    return figures


def _against_linears(sizes: tuple[int, ...], batch: int, settings: dict, rounds: int) -> float:
    torch.manual_seed(0)
    head = HierarchicalHead(FEATURES, random_tree(sizes), **settings)
    plain = nn.ModuleList(nn.Linear(FEATURES, size) for size in sizes)
    features = torch.randn(batch, FEATURES, requires_grad=True)
    gradients = [torch.randn(batch, size) for size in sizes]
    return ratio(
        _pass(lambda: list(head(features).values()), features, gradients, head),
        _pass(lambda: [layer(features) for layer in plain], features, gradients, plain),
        rounds=rounds,
        round_seconds=0.05,
    )


def _path_against_prior(sizes: tuple[int, ...], batch: int, rounds: int) -> float:
    torch.manual_seed(0)
    taxonomy = random_tree(sizes)
    features = torch.randn(batch, FEATURES, requires_grad=True)
    gradients = [torch.randn(batch, size) for size in sizes]

    def one_pass(kind: str) -> Callable[[], None]:
        head = HierarchicalHead(FEATURES, taxonomy, kind)
        return _pass(lambda: list(head(features).values()), features, gradients, head)

    return ratio(
        one_pass("path_softmax"), one_pass("hierarchical_softmax"), rounds=rounds, round_seconds=0.05
    )


def _pass(
    forward: Callable[[], list[Tensor]],
    features: Tensor,
    gradients: Sequence[Tensor],
    module: nn.Module,
) -> Callable[[], None]:
    def run_once() -> None:
        module.zero_grad()
        features.grad = None
        torch.autograd.backward(forward(), gradients)

    return run_once

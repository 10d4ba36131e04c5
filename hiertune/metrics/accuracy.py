"""Metrics of one pass over a split.

Shapes: B batch, L levels, C_l classes at level l.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hiertune.metrics.predictions import PredictionCounter, share
from hiertune.taxonomy import Taxonomy

_TOP = 5


class Evaluation:
    """Adds up batches; `state` may be summed over ranks before `compute`.

    `seen[l]` is a bool tensor `[C_l]`: the classes with a training row (`seen_classes`).
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        seen: Sequence[Tensor],
        device: torch.device | str = "cpu",
        outcomes: Sequence[int] = (),
    ) -> None:
        """`outcomes`: levels whose last logit, beyond the taxonomy's classes, says "unknown"."""
        self._levels = taxonomy.levels
        self._sizes = torch.tensor(taxonomy.num_classes, device=device)
        self._outcomes = list(outcomes)
        self._counter = PredictionCounter(taxonomy, seen, device)
        size = 3 * (len(self._levels) + len(self._outcomes)) + self._counter.size
        self.state = torch.zeros(size, dtype=torch.float64, device=device)
        """All sums. Adding up the states of several ranks gives the state of all their rows."""

    def known(self, labels: Tensor) -> Tensor:
        """Classes `[B, L]` of logits as labels: -1 for what says "unknown"."""
        return labels.masked_fill(labels >= self._sizes, -1) if self._outcomes else labels

    @torch.no_grad()
    def add(self, logits: Mapping[str, Tensor], labels: Tensor, loss_sums: Sequence[Tensor]) -> None:
        """One batch: logits `[B, C_l]` per level, labels `[B, L]` (-1 unknown).

        `loss_sums[l]` is the scalar sum of the level's losses over the rows with a known label.
        """
        best = [_best(logits[level]) for level in self._levels]
        known = labels >= 0
        top = [(classes == column[:, None]).any(1) for classes, column in zip(best, labels.T, strict=True)]
        predictions = self.known(torch.stack([classes[:, 0] for classes in best], 1))
        unknown, said = ~known[:, self._outcomes], predictions[:, self._outcomes] < 0
        self.state += torch.cat(
            [
                torch.stack([unknown, said, unknown & said]).sum(1).flatten().double(),
                torch.stack(list(loss_sums)).double(),
                known.sum(0).double(),
                (known & torch.stack(top, 1)).sum(0).double(),
                self._counter.sums(predictions, labels),
            ]
        )

    def compute(self, prefix: str) -> dict[str, float]:
        """Metrics by name: `<prefix>/<metric>[/<level>]`. A share of no rows at all is 0.0.

        - `loss/<level>`: mean over rows known there; `loss`: their sum over levels, each weighing 1
          whatever it weighs in training, so that trials compare;
        - `accuracy/<level>`, `top5_accuracy/<level>`; `accuracy_seen/<level>` leaves out rows whose
          class has no training row;
        - `chain_accuracy`, `partial_chain_accuracy`: see `hiertune.metrics.chain`;
        - `hierarchical_distance`: over mistakes at the finest level, the mean number of ranks that the
          answer does not share with the label; `average_distance`: the same over all rows known there,
          0 for right answers, which is what conditional risk minimisation makes small;
        - where a level can say "unknown": `unknown_recall/<level>`, the share of rows with an unknown label
          of which it is said, and `unknown_precision/<level>`, the share of those of which it is said
          that have one. To say it of a known row is a mistake, in all other metrics too.
        """
        count = len(self._outcomes)
        unknown, values = self.state[: 3 * count].view(3, count).tolist(), self.state[3 * count :].tolist()
        count = len(self._levels)
        losses, known, top = (values[i * count : (i + 1) * count] for i in range(3))
        metrics = {"loss": 0.0}
        for level, name in enumerate(self._levels):
            metrics[f"loss/{name}"] = share(losses[level], known[level])
            metrics[f"top5_accuracy/{name}"] = share(top[level], known[level])
            metrics["loss"] += metrics[f"loss/{name}"]
        metrics |= self._counter.shares(values[3 * count :])
        for level, rows, said, both in zip(self._outcomes, *unknown, strict=True):
            metrics[f"unknown_recall/{self._levels[level]}"] = share(both, rows)
            metrics[f"unknown_precision/{self._levels[level]}"] = share(both, said)
        return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _best(logits: Tensor) -> Tensor:
    """The classes with the highest logits, best first: `[B, 5]`, or all where there are fewer."""
    return logits.topk(min(_TOP, logits.shape[1]), dim=1).indices

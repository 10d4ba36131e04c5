"""From the logits of all levels to one class per level: rules that are chosen after training.

Where routing and temperature act at prediction time only, nothing has to be trained again to tune them:
the base logits of the validation split are enough.

Shapes: N rows, L levels (coarse -> fine), C_l classes at level l, C classes at the finest level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from hiertune.config import (
    ConditionalHeadConfig,
    Config,
    HeadConfig,
    HierarchicalSoftmaxConfig,
    LevelHeadConfig,
    LinearHeadConfig,
    PathSoftmaxConfig,
    Positive,
)
from hiertune.errors import InputError
from hiertune.metrics.predictions import PredictionCounter
from hiertune.models import Refinement, settings_by_level
from hiertune.storage import LocalFolder
from hiertune.taxonomy import Taxonomy

Logits = Mapping[str, Tensor]
"""Per level `[N, C_l]`."""
Refine = Callable[[Logits], dict[str, Tensor]]
"""Base logits to refined logits, as a head does it in evaluation."""

_BLOCK_ELEMENTS = 2**23
"""Logits of the largest level that are decoded at once."""

# ----------------------------------------------------------------------------------------- rules


class DecodingRule(Config):
    """How logits become names. The default is to name as trained."""

    kind: Literal["argmax", "crm"] = "argmax"
    """`argmax`: the most probable class of each level by itself. `crm`, conditional risk minimisation: the
    finest class whose expected hierarchical distance to the truth is smallest, and its ancestors."""
    temperature: Positive = 1.0
    """Divides the finest level's refined logits before `crm` takes them for probabilities."""
    head: LevelHeadConfig | None = None
    """Refines the base logits; by default the model's own head does, as trained."""

    def __str__(self) -> str:
        if self.kind == "argmax" and self.head is None:
            return "as trained"
        name = "argmax" if self.kind == "argmax" else f"conditional risk{_at(self.temperature)}"
        return name if self.head is None else f"{name}, {_routing(self.head)}"

    @property
    def short(self) -> str:
        """The same in fewer letters, for tables."""
        name = str(self).replace(" at T=", " T=").replace("conditional risk", "risk")
        return name.removesuffix(" head")


AS_TRAINED = DecodingRule()
CRM = DecodingRule(kind="crm")

_HEADS: tuple[LevelHeadConfig, ...] = (
    LinearHeadConfig(),
    HierarchicalSoftmaxConfig(),
    ConditionalHeadConfig(temperature=0.5),
    ConditionalHeadConfig(temperature=2.0),
    ConditionalHeadConfig(routing="hard"),
    PathSoftmaxConfig(),
)
_TEMPERATURES = (0.25, 0.5, 1.0, 2.0)


def rules_for(trained: HeadConfig) -> list[DecodingRule]:
    """The rules to try for a model with this head; as trained comes first.

    With the head as trained and with each of six others: argmax, and conditional risk minimisation at
    four temperatures.
    """
    own = trained.model_copy(update={"bias": True})  # refinement knows no bias
    return [
        rule
        for head in (None, *_HEADS)
        if head != own
        for rule in (
            DecodingRule(head=head),
            *(DecodingRule(kind="crm", temperature=each, head=head) for each in _TEMPERATURES),
        )
    ]


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f" at T={temperature:g}"


def _routing(head: LevelHeadConfig) -> str:
    if not isinstance(head, ConditionalHeadConfig):
        return f"{head.kind.replace('_', ' ')} head"
    at = "" if head.routing == "hard" else _at(head.temperature)
    return f"{head.routing} routing{at}"


# ---------------------------------------------------------------------------------------- decoding


class Decoder:
    """Applies one rule. `trained` is the model's own refinement."""

    def __init__(
        self,
        taxonomy: Taxonomy,
        rule: DecodingRule,
        trained: Refine,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rule = rule
        self.refine = trained if rule.head is None else refinement(rule.head, taxonomy, device)
        self._levels = taxonomy.levels
        self._ancestors = torch.tensor(taxonomy.ancestors(-1), device=device)
        self._shared_ranks = SharedRanks(taxonomy, device)

    def __call__(self, base: Logits, trained: Logits | None = None) -> Tensor:
        """Labels int64 `[N, L]` from base logits; `trained`: what the model made of them, if at hand."""
        if trained is not None and self.rule.head is None:
            return self.name(trained)
        return self.name(self.refine(base))

    @torch.no_grad()
    def name(self, refined: Logits) -> Tensor:
        """Labels int64 `[N, L]` from logits that `refine` has refined."""
        own = torch.stack([refined[level].max(1).indices for level in self._levels], 1)
        if self.rule.kind == "argmax":
            return own
        probabilities = (refined[self._levels[-1]] / self.rule.temperature).softmax(1)
        paths = self._ancestors[self._shared_ranks(probabilities).max(1).indices]
        return torch.where(paths >= 0, paths, own)


class SharedRanks:
    """How many ranks each class of the finest level is expected to share with the truth.

    The hierarchical distance is the number of ranks that are not shared, so the class that shares most
    has the least conditional risk sum_j D(k, j) p(j) (Karthik et al., "No Cost Likelihood Manipulation at
    Test Time for Making Better Mistakes in Deep Networks", ICLR 2021). A class shares a rank with all that
    lies under its ancestor there: probabilities are added up the tree, and the sums down again, O(nodes)
    per row; neither D nor any other [C, C] matrix is built.
    """

    def __init__(self, taxonomy: Taxonomy, device: torch.device | str = "cpu") -> None:
        self._parents, self._ranks = [], []
        for position, parents in enumerate(taxonomy.parents):
            above = taxonomy.num_classes[position - 1] if position else 0
            linked = parents >= 0
            # classes without a parent point one past the end; who shares such a class shares all above it
            self._parents.append(torch.tensor(np.where(linked, parents, above), device=device))
            self._ranks.append(torch.tensor(np.where(linked, 1, position + 1), device=device))

    def __call__(self, probabilities: Tensor) -> Tensor:
        """`[N, C]` from the finest level's probabilities `[N, C]`; within 0 and L."""
        masses = [probabilities]
        for parents, above in zip(self._parents[:0:-1], self._parents[-2::-1], strict=True):
            mass = probabilities.new_zeros(len(probabilities), len(above) + 1)
            masses.append(mass.index_add_(1, parents, masses[-1])[:, :-1])
        shared = probabilities.new_zeros(len(probabilities), 0)
        for parents, ranks, mass in zip(self._parents, self._ranks, reversed(masses), strict=True):
            shared = F.pad(shared, (0, 1)).index_select(1, parents) + mass * ranks
        return shared


def refinement(head: HeadConfig, taxonomy: Taxonomy, device: torch.device | str = "cpu") -> Refine:
    """What a head of this kind does to base logits once it is trained; its layers play no part."""
    settings = settings_by_level(taxonomy.levels, **head.model_dump())
    return Refinement(taxonomy, settings).to(device).eval()


# ------------------------------------------------------------------------------ validation logits


@dataclass(frozen=True)
class ValidationLogits:
    """What a trained model says of the validation split, and all that is needed to judge it."""

    base: dict[str, Tensor]
    """float32 `[N, C_l]` per level: logits before refinement."""
    labels: Tensor
    """int64 `[N, L]`; -1 is unknown."""
    seen: tuple[Tensor, ...]
    """Per level bool `[C_l]`: classes with a training row."""

    def save(self, path: Path) -> None:
        """Write `encode()` to a file, which appears when it is complete."""
        LocalFolder(path.parent).write_bytes(path.name, self.encode())

    def encode(self) -> bytes:
        """The content of one safetensors file."""
        tensors = {f"base/{level}": logits.cpu().contiguous() for level, logits in self.base.items()}
        for level, seen in zip(self.base, self.seen, strict=True):
            tensors[f"seen/{level}"] = seen.cpu()
        return safetensors.torch.save({**tensors, "labels": self.labels.cpu().contiguous()})

    @classmethod
    def load(cls, path: Path, taxonomy: Taxonomy) -> ValidationLogits:
        """Read what `save` wrote. InputError if it is missing, damaged or of another taxonomy."""
        try:
            tensors = safetensors.torch.load_file(path)
            base = {level: tensors[f"base/{level}"] for level in taxonomy.levels}
            seen = tuple(tensors[f"seen/{level}"] for level in taxonomy.levels)
            found = cls(base, tensors["labels"], seen)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            raise InputError(f"can't be read as validation logits: {error}", file=path) from error
        shapes = [tuple(logits.shape) for logits in base.values()]
        sizes = taxonomy.num_classes
        if shapes != [(len(found.labels), size) for size in sizes] or not found._fits(sizes):
            raise InputError("holds validation logits of another taxonomy", file=path)
        return found

    def _fits(self, sizes: Sequence[int]) -> bool:
        """Whether types, shapes and labels are those of levels of so many classes."""
        labels = self.labels
        typed = all(logits.dtype == torch.float32 for logits in self.base.values())
        seen = all(
            each.dtype == torch.bool and each.shape == (size,)
            for each, size in zip(self.seen, sizes, strict=True)
        )
        if not typed or not seen or labels.dtype != torch.int64 or labels.shape[1:] != (len(sizes),):
            return False
        return bool(((labels >= -1) & (labels < torch.tensor(sizes))).all())


MOST_BYTES = 256 * 2**20


def logits_bytes(rows: int, taxonomy: Taxonomy) -> int:
    """What the base logits of so many rows take; those above `MOST_BYTES` are not kept."""
    return 4 * rows * taxonomy.num_nodes


# ---------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Tried:
    """A rule, and the metrics of the labels that it gives (`val/...`)."""

    rule: DecodingRule
    metrics: dict[str, float]


def try_rules(logits: ValidationLogits, taxonomy: Taxonomy, head: HeadConfig) -> list[Tried]:
    """The validation metrics of all rules for a model with this head; as trained comes first."""
    trained = refinement(head, taxonomy)
    counter = PredictionCounter(taxonomy, logits.seen)
    rows = max(1, _BLOCK_ELEMENTS // max(taxonomy.num_classes))
    tried = []
    for _, same_head in itertools.groupby(rules_for(head), lambda rule: rule.head):
        decoders = [Decoder(taxonomy, rule, trained) for rule in same_head]
        sums = [torch.zeros(counter.size, dtype=torch.float64) for _ in decoders]
        for base, labels in _blocks(logits, rows):
            refined = decoders[0].refine(base)
            for decoder, total in zip(decoders, sums, strict=True):
                total += counter.sums(decoder.name(refined), labels)
        for decoder, total in zip(decoders, sums, strict=True):
            shares = counter.shares(total.tolist())
            tried.append(Tried(decoder.rule, {f"val/{name}": value for name, value in shares.items()}))
    return tried


def best_of(tried: Sequence[Tried], metric: str, mode: Literal["max", "min"]) -> Tried:
    """The rule with the best `metric`; of equals the first, so that as trained stays if nothing is better.

    InputError for a metric that labels alone don't decide, such as a loss.
    """
    if metric not in tried[0].metrics:
        raise InputError(
            f"{metric!r} is not decided by how logits become names", allowed=", ".join(tried[0].metrics)
        )
    return (max if mode == "max" else min)(tried, key=lambda each: each.metrics[metric])


def _blocks(logits: ValidationLogits, rows: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    for first in range(0, len(logits.labels), rows):
        block = slice(first, first + rows)
        yield {level: values[block] for level, values in logits.base.items()}, logits.labels[block]

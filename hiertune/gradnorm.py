"""Weights of the levels' losses: equal, fixed, or balanced by GradNorm.

GradNorm (Chen et al., ICML 2018) wants every task's weighted gradient to be equally large, but larger
for tasks that learn slowly. Shapes: T tasks (one per level), B batch, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hiertune.config import EqualConfig, FixedConfig, GradNormConfig, WeightingConfig
from hiertune.errors import InputError
from hiertune.models.classifier import HierarchicalClassifier

_SMALLEST_SHARE = 1e-6  # a weight that reached 0 could never rise again

# ------------------------------------------------------------------------------------ the rule


def update_weights(
    weights: Tensor | Sequence[float],
    grad_norms: Tensor | Sequence[float],
    losses: Tensor | Sequence[float],
    initial_losses: Tensor | Sequence[float],
    alpha: float,
    lr: float,
) -> Tensor:
    """One step of GradNorm: new weights `[T]` that sum to T. Pure; all arguments but the last two are `[T]`.

    `grad_norms` are norms n_i of the *unweighted* losses' gradients. The paper wants w_i n_i to equal
    target_i = mean_j(w_j n_j) * rate_i ** alpha, where rate_i is the share of the initial loss that is
    left, over its mean. It descends on the difference; this goes the share `lr` of the way in log space:
    w_i <- w_i * (target_i / (w_i n_i)) ** lr. So a task with a large gradient loses weight, a slow one
    gains. Tasks whose weight, norm or losses are 0 or not finite keep their weight.
    """
    given = torch.as_tensor(weights)
    old, *measured = (
        torch.as_tensor(values, dtype=torch.float64, device=given.device)
        for values in (given, grad_norms, losses, initial_losses)
    )
    old = old * (len(old) / old.sum())
    active = _active(old, *measured)
    norms, now, initial = (values[active] for values in measured)
    # logarithms of the new weights but for the factors common to all, which the scaling to sum T removes
    shares = (1 - lr) * old[active].log() + lr * (alpha * (now.log() - initial.log()) - norms.log())
    mass = old[active].sum()
    moved = (mass * shares.softmax(0)).clamp_min(_SMALLEST_SHARE * mass)
    new = old.masked_scatter(active, moved * (mass / moved.sum()))
    return new.to(given.dtype if given.is_floating_point() else torch.get_default_dtype())


def balance(
    weights: Tensor, grad_norms: Tensor, losses: Tensor, initial_losses: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Rates and targets as in `update_weights`, `[T]` float64; nan for tasks that keep their weight."""
    active = _active(weights, grad_norms, losses, initial_losses)
    left = torch.where(active, losses / initial_losses, torch.nan)
    rates = left / left.nanmean()
    mean_norm = torch.where(active, weights * grad_norms, torch.nan).nanmean()
    return rates, mean_norm * rates**alpha


def _active(*terms: Tensor) -> Tensor:
    return torch.stack([(term > 0) & term.isfinite() for term in terms]).all(0)


# ------------------------------------------------------------------------------------ weightings


class Weighting:
    """Weights of the levels' losses, the same on every rank. These stay as they are; subclasses learn them.

    The training loop asks `wants_update(step)` with the number of optimiser steps done so far, and
    calls `update` after that step's (last) forward and before its backward.
    """

    def __init__(self, levels: Sequence[str], weights: Tensor) -> None:
        self.levels = tuple(levels)
        self.weights = weights
        """`[T]` float32, coarse -> fine, summing to T."""

    def wants_update(self, step: int) -> bool:
        return False

    def update(
        self,
        model: HierarchicalClassifier,
        losses: Sequence[Tensor],
        known_counts: Tensor,
        base_losses: Callable[[], Sequence[Tensor]],
    ) -> None:
        """Learn from the forward that `model` (not its DDP wrapper) still holds; every rank must call it.

        `losses` are T scalars with their graph, each the sum over this rank's rows over the number of
        known labels in the *global* batch, `known_counts` `[T]`, so that they sum to the global mean
        over ranks. A list, not one stacked tensor, whose graph would join all heads. `base_losses`
        gives the same losses of `model.base_logits`; it is called only if they are needed.
        """

    def report(self) -> dict[str, float]:
        """What to log: `weight/<level>`, and what a subclass measured in its last update."""
        return _named("weight", self.levels, self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"].to(self.weights.device)


class Equal(Weighting):
    """Every level weighs 1."""

    def __init__(self, levels: Sequence[str], device: torch.device | str = "cpu") -> None:
        super().__init__(levels, torch.ones(len(levels), device=device))


class Fixed(Weighting):
    """Given weights, 0 for levels left out, scaled to sum to the number of levels."""

    def __init__(
        self, config: FixedConfig, levels: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        """Raises InputError for a weight of a level that does not exist."""
        for level in config.weights:
            if level not in levels:
                raise InputError(
                    f"there is no level {level!r}", key="weighting.weights", allowed=", ".join(levels)
                )
        weights = torch.tensor([config.weights.get(level, 0.0) for level in levels], dtype=torch.float64)
        weights *= len(weights) / weights.sum()
        super().__init__(levels, weights.to(device, torch.float32))


class GradNorm(Weighting):
    """Weights by the paper's rule, from gradients of the one forward that training makes anyway.

    `at: features` measures each level's gradient with respect to the shared features `[B, D]` (over all
    rows of the global batch), a near and cheap proxy of the whole backbone's; `at: last_layer` the
    gradient of the last shared layer's weight, the paper's choice. Gradients are returned, not
    accumulated: `.grad` is never touched and no DDP hook fires. Squared norms (at the last layer:
    gradients) and losses are summed over ranks, so weights are the same on all ranks and for any
    number of them.

    `linear_heads` takes the gradients of the losses of the head's base logits; rates of training
    always follow the losses that are trained. A level without a known label in the global batch is
    skipped on all ranks and keeps its weight; its initial loss is that of the first update that
    sees it.

    Losses are measured unscaled (before any loss scaler) and unweighted. To keep half-precision
    gradients of a mean from underflowing, they are taken of the loss times a power of two about the
    size of the batch, which is divided out again without rounding.
    """

    def __init__(
        self, config: GradNormConfig, levels: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(levels, torch.ones(len(levels), device=device))
        self.config = config
        unknown = torch.full((len(levels),), torch.nan, dtype=torch.float64, device=device)
        self._initial_losses = unknown
        self._measured = {"grad_norm": unknown, "target": unknown, "rate": unknown}

    def wants_update(self, step: int) -> bool:
        return step % self.config.interval == 0

    def update(
        self,
        model: HierarchicalClassifier,
        losses: Sequence[Tensor],
        known_counts: Tensor,
        base_losses: Callable[[], Sequence[Tensor]],
    ) -> None:
        """See `Weighting.update`. Raises InputError for `last_layer` and a backbone without parameters."""
        differentiated = base_losses() if self.config.linear_heads and model.head.refines else losses
        norms = self._grad_norms(model, differentiated, known_counts.tolist())
        now = _sum_over_ranks(torch.stack([loss.detach().double() for loss in losses]))
        first = self._initial_losses.isnan() & _active(known_counts, now)
        self._initial_losses = torch.where(first, now, self._initial_losses)
        rule = (norms, now, self._initial_losses, self.config.alpha)
        rates, targets = balance(self.weights.double(), *rule)
        self._measured = {"grad_norm": norms, "target": targets, "rate": rates}
        self.weights = update_weights(self.weights, *rule, self.config.lr)

    def report(self) -> dict[str, float]:
        """Adds of the last update `grad_norm/`, `target/` and `rate/<level>`, for the levels that took part.

        `grad_norm` is unweighted; the rule moves weight times `grad_norm` towards `target`.
        """
        named = super().report()
        for name, values in self._measured.items():
            named |= _named(name, self.levels, values)
        return named

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"initial_losses": self._initial_losses, "measured": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.weights.device
        self._initial_losses = state["initial_losses"].to(device)
        self._measured = {name: values.to(device) for name, values in state["measured"].items()}

    def _grad_norms(
        self, model: HierarchicalClassifier, losses: Sequence[Tensor], known_counts: Sequence[float]
    ) -> Tensor:
        """Norm of each loss's gradient over the global batch, `[T]` float64; nan for levels not known."""
        at_features = self.config.at == "features"
        norms = torch.full_like(self._initial_losses, torch.nan)
        for position, (loss, count) in enumerate(zip(losses, known_counts, strict=True)):
            if count > 0:
                scale = 2.0 ** math.ceil(math.log2(count))
                if at_features:
                    gradient = _feature_gradient(model, loss, scale)
                else:
                    gradient = _sum_over_ranks(_last_layer_gradient(model, loss, scale))
                norms[position] = torch.linalg.vector_norm(gradient, dtype=torch.float64) / scale
        if at_features:  # a row is on one rank only, so squares add up
            norms = _sum_over_ranks(norms.square()).sqrt()
        return norms


def build_weighting(
    config: WeightingConfig, levels: Sequence[str], device: torch.device | str = "cpu"
) -> Weighting:
    """The weighting of `config` for `levels` (coarse -> fine); its tensors live on `device`."""
    match config:
        case EqualConfig():
            return Equal(levels, device)
        case FixedConfig():
            return Fixed(config, levels, device)
        case GradNormConfig():
            return GradNorm(config, levels, device)


# ------------------------------------------------------------------------------------ measuring


def _feature_gradient(model: HierarchicalClassifier, loss: Tensor, scale: float) -> Tensor:
    """Gradient `[B, D]` of `scale * loss` at the features, by way of the base logits.

    The head is linear in the features, so the last link of the chain rule needs no graph: the
    features may be the inputs themselves (identity backbone).
    """
    assert model.base_logits is not None, "the model must still hold its forward"
    levels, logits = zip(*model.base_logits.items(), strict=True)
    gradients = zip(levels, _gradients(loss, logits, scale), strict=True)
    with torch.autocast(loss.device.type, enabled=False):
        return model.head.input_gradient({level: g for level, g in gradients if g is not None})


def _last_layer_gradient(model: HierarchicalClassifier, loss: Tensor, scale: float) -> Tensor:
    weight = model.last_shared_weight
    if weight is None:
        raise InputError(
            "the backbone has no layer with weights, so gradients cannot be measured at its last one",
            key="weighting.at",
            allowed="features, or another model.backbone",
        )
    (gradient,) = _gradients(loss, (weight,), scale)
    assert gradient is not None, "every level's loss depends on the shared layers"
    return gradient


def _gradients(loss: Tensor, inputs: Sequence[Tensor], scale: float) -> Sequence[Tensor | None]:
    """Gradients of `scale * loss`; None for inputs without part in it. The graph is kept."""
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(
            loss, inputs, torch.full_like(loss, scale), retain_graph=True, allow_unused=True
        )


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _named(name: str, levels: Sequence[str], values: Tensor) -> dict[str, float]:
    """`name/<level>` for every finite value."""
    pairs = zip(levels, values.tolist(), strict=True)
    return {f"{name}/{level}": value for level, value in pairs if math.isfinite(value)}

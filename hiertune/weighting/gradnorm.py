"""GradNorm: weights from the norms of the levels' gradients (Chen et al., ICML 2018).

Every task's weighted gradient shall be equally large, but larger for tasks that learn slowly.
Shapes: T tasks (one per level), B batch, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hiertune.config import ExcludeConfig, GradNormConfig
from hiertune.errors import InputError
from hiertune.models.classifier import HierarchicalClassifier
from hiertune.weighting.base import Weighting, named, ones, sum_over_ranks, sum_to_count

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
    old = sum_to_count(old)
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


def initial_weights(
    method: Literal["equal", "inverse_density", "class_complexity"],
    labels: npt.NDArray[np.int64],
    num_classes: Sequence[int],
) -> Tensor:
    """Weights `[T]` float32 before the first update, summing to T. Source: Linnaeus, as documented.

    `labels` `[N, T]` are those of the training rows, -1 unknown. A level's density is the share of rows
    with a known label.

    - `equal`: 1
    - `inverse_density`: 1 / density; a level that no row knows gets the mean of the others
    - `class_complexity`: that times log(classes) / log(most classes of a level); levels of a single
      class, which would get 0 for good, the smallest weight of the others; equal if all are such
    """
    raw = np.ones(len(num_classes))
    complexity = np.log(num_classes)
    density = (labels >= 0).sum(0) / max(len(labels), 1)
    known, rich = density > 0, complexity > 0
    if method == "equal" or not known.any() or (method == "class_complexity" and not rich.any()):
        return torch.ones(len(raw))
    raw[known] = 1 / density[known]
    raw[~known] = raw[known].mean()
    if method == "class_complexity":
        raw *= complexity / complexity.max()
        raw[~rich] = raw[rich].min()
    return sum_to_count(torch.from_numpy(raw)).float()


# ------------------------------------------------------------------------------------- weighting


class GradNorm(Weighting):
    """Weights by the paper's rule, from gradients of the one forward that training makes anyway.

    `at: features` measures each level's gradient with respect to the shared features `[B, D]` (over all
    rows of the global batch), a near and cheap proxy of the whole backbone's; `at: last_layer` the
    gradient of the last shared layer's weight, the paper's choice; `at: backbone` that of all its
    trainable parameters. Gradients are returned, not accumulated: `.grad` is never touched and no DDP
    hook fires. Squared norms (of parameters: gradients) and losses are summed over ranks, and with
    `accumulate` over the passes of a step, so weights are the same on all ranks, for any number of them,
    and then for any number of passes.

    `linear_heads` takes the gradients of the losses of the head's base logits; rates of training
    always follow the losses that are trained. A level without a known label in the global batch is
    skipped on all ranks and keeps its weight; its initial loss is that of the first update that
    sees it.

    Losses are measured unscaled (before any loss scaler) and unweighted. To keep half-precision
    gradients of a mean from underflowing, they are taken of the loss times a power of two about the
    size of the batch, which is divided out again without rounding.
    """

    def __init__(
        self,
        config: GradNormConfig,
        levels: Sequence[str],
        device: torch.device | str = "cpu",
        initial: Tensor | None = None,
    ) -> None:
        """`initial`: weights `[T]` before the first update, summing to T; by default ones."""
        super().__init__(levels, ones(levels, device) if initial is None else initial.to(device))
        self.config = config
        self.whole_step = config.accumulate
        unknown = torch.full((len(levels),), torch.nan, dtype=torch.float64, device=device)
        self._initial_losses = unknown
        self._measured = {"grad_norm": unknown, "target": unknown, "rate": unknown}
        self._sums = _Sums(torch.zeros_like(unknown))

    def wants_update(self, step: int) -> bool:
        """First after `warmup_steps` steps, then every `interval` steps."""
        since = step - self.config.warmup_steps
        return since >= 0 and since % self.config.interval == 0

    def update(
        self,
        model: HierarchicalClassifier,
        losses: Sequence[Tensor],
        known_counts: Tensor,
        base_losses: Callable[[], Sequence[Tensor]],
        last: bool = True,
    ) -> None:
        """See `Weighting.update`. Raises InputError where `measured_parameters` does."""
        differentiated = base_losses() if self.config.linear_heads and model.head.refines else losses
        self._sums.losses = self._sums.losses + torch.stack([loss.detach().double() for loss in losses])
        if self.config.at == "features":
            self._add_features(model, differentiated, known_counts.tolist())
        else:
            self._add_parameters(model, differentiated, known_counts.tolist(), last)
        if last:
            self._learn(known_counts)

    def report(self) -> dict[str, float]:
        """Adds of the last update `grad_norm/`, `target/` and `rate/<level>`, for the levels that took part.

        `grad_norm` is unweighted; the rule moves weight times `grad_norm` towards `target`.
        """
        entries = super().report()
        for name, values in self._measured.items():
            entries |= named(name, self.levels, values)
        return entries

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"initial_losses": self._initial_losses, "measured": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = self.weights.device
        self._initial_losses = state["initial_losses"].to(device)
        self._measured = {name: values.to(device) for name, values in state["measured"].items()}

    def _add_features(
        self, model: HierarchicalClassifier, losses: Sequence[Tensor], known_counts: Sequence[float]
    ) -> None:
        """A row is in one pass on one rank only, so squared norms add up."""
        squares = torch.zeros_like(self._sums.losses)
        for position, loss, scale in _known(losses, known_counts):
            norm = torch.linalg.vector_norm(_feature_gradient(model, loss, scale), dtype=torch.float64)
            squares[position] = (norm / scale).square()
        self._sums.squares = self._sums.squares + squares

    def _add_parameters(
        self,
        model: HierarchicalClassifier,
        losses: Sequence[Tensor],
        known_counts: Sequence[float],
        last: bool,
    ) -> None:
        """Gradients add up, and only their sum has the norm that is wanted: one is kept per level until
        the last pass of a step, where each is summed over ranks and dropped."""
        parameters = measured_parameters(model.backbone, self.config)
        squares = torch.zeros_like(self._sums.losses)
        for position, loss, scale in _known(losses, known_counts):
            gradient = _flat(_gradients(loss, parameters, scale), parameters)
            before = self._sums.gradients.pop(position, None)
            if before is not None:
                gradient = gradient + before
            if last:
                norm = torch.linalg.vector_norm(sum_over_ranks(gradient), dtype=torch.float64)
                squares[position] = (norm / scale).square()
            else:
                self._sums.gradients[position] = gradient
        self._sums.squares = squares

    def _learn(self, known_counts: Tensor) -> None:
        sums, self._sums = self._sums, _Sums(torch.zeros_like(self._sums.losses))
        if self.config.at == "features":
            sum_over_ranks(sums.squares)
        now = sum_over_ranks(sums.losses)
        norms = torch.where(known_counts > 0, sums.squares.sqrt(), torch.nan)
        first = self._initial_losses.isnan() & _active(known_counts, now)
        self._initial_losses = torch.where(first, now, self._initial_losses)
        rule = (norms, now, self._initial_losses, self.config.alpha)
        rates, targets = balance(self.weights.double(), *rule)
        self._measured = {"grad_norm": norms, "target": targets, "rate": rates}
        self.weights = update_weights(self.weights, *rule, self.config.lr)


class _Sums:
    """What one rank measured in the passes of a step so far."""

    def __init__(self, zeros: Tensor) -> None:
        self.losses = zeros
        """`[T]`"""
        self.squares = zeros
        """Squared norms of the gradients `[T]`."""
        self.gradients: dict[int, Tensor] = {}
        """Of parameters, flat and scaled, by the level's position."""


# ------------------------------------------------------------------------------------- measuring


def measured_parameters(backbone: nn.Module, config: GradNormConfig) -> list[nn.Parameter]:
    """The parameters whose gradients are measured: all trainable ones that `exclude` does not match.

    With `last_layer` the last weight among them: `backbone.last_shared_weight` or, where that is
    excluded, the nearest one registered before it with two dimensions or more. Raises InputError if
    nothing is left.
    """
    shared = [owned for owned in _owned_parameters(backbone) if owned[1].requires_grad]
    if config.at == "last_layer":
        last = backbone.last_shared_weight
        ends = [index for index, (_, parameter, _) in enumerate(shared) if parameter is last]
        shared = [*filter(_is_weight, shared[: ends[0]]), shared[ends[0]]] if ends else []
    if not shared:
        raise InputError(
            f"the backbone has no {'layer with weights' if config.at == 'last_layer' else 'parameters'} to "
            "train, so no gradients can be measured there",
            key="weighting.at",
            allowed="features, or another model.backbone",
        )
    kept = [parameter for name, parameter, owner in shared if not _excluded(name, owner, config.exclude)]
    if not kept:
        names = [name for name, _, _ in shared]
        some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise InputError(
            "nothing is left to measure gradients at",
            key="weighting.exclude",
            allowed=f"what leaves one or more of {some}",
        )
    return kept[-1:] if config.at == "last_layer" else kept


def _owned_parameters(backbone: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Dotted name, parameter and owning module, each parameter once, in the order of registration."""
    owners = dict(backbone.named_modules())
    for name, parameter in backbone.named_parameters():
        yield name, parameter, owners[name.rpartition(".")[0]]


def _is_weight(owned: tuple[str, nn.Parameter, nn.Module]) -> bool:
    name, parameter, _ = owned
    return name.rpartition(".")[2] == "weight" and parameter.ndim >= 2


def _excluded(name: str, owner: nn.Module, exclude: ExcludeConfig) -> bool:
    """A type matches its subclasses too: several workers replace batch norms by ones that synchronise."""
    return (
        any(f".{part}." in f".{name}." for part in exclude.names)
        or any(re.search(pattern, name) for pattern in exclude.patterns)
        or any(kind.__name__ in exclude.types for kind in type(owner).__mro__)
    )


def _known(losses: Sequence[Tensor], known_counts: Sequence[float]) -> Iterator[tuple[int, Tensor, float]]:
    """Position, loss, and the power of two that is about its number of rows, of the levels with any."""
    for position, (loss, count) in enumerate(zip(losses, known_counts, strict=True)):
        if count > 0:
            yield position, loss, 2.0 ** math.ceil(math.log2(count))


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


def _gradients(loss: Tensor, inputs: Sequence[Tensor], scale: float) -> Sequence[Tensor | None]:
    """Gradients of `scale * loss`; None for inputs without part in it. The graph is kept."""
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(
            loss, inputs, torch.full_like(loss, scale), retain_graph=True, allow_unused=True
        )


def _flat(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor:
    """All gradients as one vector, zeros for None; no copy of a single one."""
    parts = [
        torch.zeros_like(tensor).flatten() if gradient is None else gradient.flatten()
        for gradient, tensor in zip(gradients, inputs, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

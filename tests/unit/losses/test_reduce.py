"""The reducer against a loop over rows."""

from __future__ import annotations

import pytest
import torch

from hiertune import Taxonomy
from hiertune.losses import CrossEntropy, TaxonomySmoothing, level_losses

TAXONOMY = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 0, 1], [0, 1, 1, 2, 2]])
LABELS = torch.tensor([[0, 0, 0], [0, 1, -1], [-1, -1, -1], [1, -1, 3], [-1, 2, 4]])
WEIGHTS = [torch.tensor([0.5, 2.0]), None, torch.tensor([1.0, 3.0, 0.25, 4.0, 0.0])]


def losses() -> list[torch.nn.Module]:
    return [CrossEntropy(), TaxonomySmoothing(TAXONOMY, "b", alpha=0.2), CrossEntropy(0.1)]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        level: torch.randn(len(LABELS), size, generator=generator, dtype=torch.float64, requires_grad=True)
        for level, size in zip(TAXONOMY.levels, TAXONOMY.num_classes, strict=True)
    }


@pytest.mark.parametrize("weights", [WEIGHTS, [None] * 3])
def test_equals_a_loop_over_rows(weights):
    logits, counts = batch(), torch.tensor([7.0, 9.0, 11.0])  # of a larger, global batch
    reduced = level_losses(losses(), logits, LABELS, counts, weights)
    assert isinstance(reduced, list)
    for level, (loss, of_level) in enumerate(zip(losses(), logits.values(), strict=True)):
        total = torch.zeros((), dtype=torch.float64)
        for row, label in enumerate(LABELS[:, level].tolist()):
            if label >= 0:
                weight = 1.0 if weights[level] is None else weights[level][label].item()
                total = total + weight * loss(of_level[row : row + 1], LABELS[row : row + 1, level])[0]
        torch.testing.assert_close(reduced[level], total / counts[level])
        gradients = torch.autograd.grad(
            [reduced[level], total / counts[level]], of_level, [torch.ones(()), -torch.ones(())]
        )
        torch.testing.assert_close(gradients[0], torch.zeros_like(of_level), rtol=0, atol=1e-12)


def test_unknown_rows_have_no_gradient():
    logits = batch()
    reduced = level_losses(losses(), logits, LABELS, (LABELS >= 0).sum(0).double(), WEIGHTS)
    for level, of_level in enumerate(logits.values()):
        (gradient,) = torch.autograd.grad(reduced[level], of_level)
        unknown = LABELS[:, level] < 0
        assert torch.equal(gradient[unknown], torch.zeros_like(gradient[unknown]))
        weighs = torch.ones(len(LABELS)) if WEIGHTS[level] is None else WEIGHTS[level][LABELS[:, level]]
        assert ((gradient.abs().sum(1) > 0) == (~unknown & (weighs > 0))).all()


def test_a_level_without_a_known_label_gives_zero_and_zero_gradients():
    labels = LABELS.clone()
    labels[:, 1] = -1
    logits = batch()
    reduced = level_losses(losses(), logits, labels, (labels >= 0).sum(0).double(), WEIGHTS)
    assert reduced[1].item() == 0.0
    assert reduced[0].item() > 0
    (gradient,) = torch.autograd.grad(reduced[1], logits["b"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_row_with_loss_zero_still_counts():
    logits = {"a": torch.tensor([[100.0, 0.0], [0.0, 0.0]], dtype=torch.float64)}
    (reduced,) = level_losses([CrossEntropy()], logits, torch.tensor([[0], [0]]), torch.tensor([2.0]), [None])
    torch.testing.assert_close(reduced, torch.tensor(2.0).log().double() / 2)


def test_losses_of_two_halves_of_a_batch_add_up():
    logits, counts = batch(), (LABELS >= 0).sum(0).double()
    whole = level_losses(losses(), logits, LABELS, counts, WEIGHTS)
    halves = [
        level_losses(losses(), {k: z[rows] for k, z in logits.items()}, LABELS[rows], counts, WEIGHTS)
        for rows in (slice(0, 2), slice(2, 5))
    ]
    for level in range(3):
        torch.testing.assert_close(halves[0][level] + halves[1][level], whole[level])


def test_each_level_reaches_only_its_own_logits():
    logits = batch()
    reduced = level_losses(losses(), logits, LABELS, torch.ones(3), [None] * 3)
    gradients = torch.autograd.grad(reduced[1], list(logits.values()), allow_unused=True)
    assert gradients[0] is None
    assert gradients[2] is None

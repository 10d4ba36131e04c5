"""Every knob of the `loss` section reaches the loss it is for."""

from __future__ import annotations

import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import CrossEntropyConfig, TaxonomySmoothingConfig
from hiertune.losses import CrossEntropy, TaxonomySmoothing, build_losses

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 0, 1, -1]])


def test_cross_entropy():
    built = build_losses(CrossEntropyConfig(smoothing=0.25), TAXONOMY)
    assert [type(loss) for loss in built] == [CrossEntropy, CrossEntropy]
    assert [loss.smoothing for loss in built] == [0.25, 0.25]


@pytest.mark.parametrize("roots", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_taxonomy_smoothing(roots, fallback):
    config = TaxonomySmoothingConfig(alpha=0.3, beta=0.7, uniform_roots=roots, fallback_to_uniform=fallback)
    built = build_losses(config, TAXONOMY)
    for level, loss in zip(TAXONOMY.levels, built, strict=True):
        expected = TaxonomySmoothing(TAXONOMY, level, 0.3, 0.7, roots, fallback)
        assert torch.equal(loss.target_matrix(), expected.target_matrix())
    assert torch.equal(built[0].target_matrix(), torch.eye(2).double()) == (not fallback)

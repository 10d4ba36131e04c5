"""Every knob of the `loss` section reaches the loss it is for."""

from __future__ import annotations

import pytest
import torch

from hiertune import Taxonomy
from hiertune.config import CrossEntropyConfig, LevelSmoothingConfig, TaxonomySmoothingConfig
from hiertune.losses import CrossEntropy, TaxonomySmoothing, build_losses

TAXONOMY = Taxonomy.from_parents(["a", "b"], [[-1, -1], [0, 0, 1, -1]])
DEEP = Taxonomy.from_parents(["a", "b", "c"], [[-1, -1], [0, 0, 1], [0, 0, 1, 2, 2]])


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


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_levels_take_what_they_do_not_set_from_all(share):
    levels = {
        "a": LevelSmoothingConfig(enabled=False, alpha=0.9),
        "c": LevelSmoothingConfig(alpha=0.0, beta=5.0),
    }
    config = TaxonomySmoothingConfig(alpha=0.3, beta=0.7, clade_share=share, levels=levels)
    top, middle, leaf = build_losses(config, DEEP)
    assert isinstance(top, CrossEntropy)
    assert top.smoothing == 0.0
    assert (middle.alpha, middle.beta, middle.clade_share) == (0.3, 0.7, share)
    assert (leaf.alpha, leaf.beta, leaf.clade_share) == (0.0, 5.0, share)  # a zero is a value, not "unset"
    expected = TaxonomySmoothing(DEEP, "b", 0.3, 0.7, clade_share=share)
    assert torch.equal(middle.target_matrix(), expected.target_matrix())

    one_knob = TaxonomySmoothingConfig(alpha=0.3, beta=0.7, levels={"c": LevelSmoothingConfig(beta=5.0)})
    leaf = build_losses(one_knob, DEEP)[2]
    assert torch.equal(leaf.target_matrix(), TaxonomySmoothing(DEEP, "c", 0.3, 5.0).target_matrix())

"""Weights that nothing changes."""

import pytest

from hiertune.config import FixedConfig
from hiertune.errors import InputError
from hiertune.weighting import Fixed

LEVELS = ("a", "b", "c")


def test_fixed_weights_are_scaled_and_left_out_levels_weigh_nothing():
    weighting = Fixed(FixedConfig(weights={"c": 6.0, "a": 2.0}), LEVELS)
    assert weighting.weights.tolist() == [0.75, 0.0, 2.25]
    with pytest.raises(InputError, match=r"weighting\.weights.*'genus'\n.*a, b, c"):
        Fixed(FixedConfig(weights={"genus": 1.0}), LEVELS)

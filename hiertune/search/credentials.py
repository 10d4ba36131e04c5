"""Keeps credentials where they are: in the environment of the processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ray.tune.execution import class_cache


@contextlib.contextmanager
def kept_from_ray() -> Iterator[None]:
    """Ray Tune passes AWS keys on to its trial actors, by a runtime env that Ray's logs and dashboard show.

    Trial actors need none; and worker groups, which Ray Train starts, inherit the environment of their node.
    """
    passed_on = class_cache.ENV_VARS_TO_PROPAGATE
    secrets = {name for name in passed_on if name.startswith("AWS_")}
    passed_on -= secrets
    try:
        yield
    finally:
        passed_on |= secrets

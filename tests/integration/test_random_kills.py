"""The driver killed at random instants, in short; `scripts/bench/faults.py` does so fifty times."""

import random

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_search_whose_driver_is_killed_loses_nothing_and_tells_nothing_twice(bench_module, tmp_path):
    faults = bench_module("faults")
    faults.prepare(tmp_path)
    books = faults.kill_drivers(tmp_path, 2, random.Random(4), faults.Books(trials=6), undisturbed_s=30.0)
    assert books.kills["driver"] == 2
    # Ray's two agents take more than a minute to notice that their raylet is gone.
    assert [name for name in map(faults.command, books.orphans) if name and "Agent" not in name] == []
    for audit in books.audits:
        assert audit.problems == []
        assert audit.trials == audit.completed + audit.pruned == 6
        assert audit.told_twice == 0
        assert audit.points > 6 * 4 * 20

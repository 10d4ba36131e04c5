"""Every space that ships: its checks, its sampling, and a trial of it under real workers."""

from pathlib import Path

import optuna
import pytest
import yaml

from hiertune.search.capacity import GroupShape
from hiertune.search.messages import Finished, Job
from hiertune.search.plan import plan_search
from hiertune.search.pool import WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SPACES = sorted(Path("search_spaces").rglob("*.yaml"))


@pytest.fixture(scope="module")
def pool(ray_session, tmp_path_factory):
    with WorkerPool(1, GroupShape(1, 1.0, 0.0), tmp_path_factory.mktemp("ray")) as pool:
        yield pool


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_a_trial_of_a_space_that_ships_is_trained_and_tested(pool, tmp_path, path):
    space = yaml.safe_load(path.read_text())
    space["train"] |= {"epochs": 1}
    space["search"]["scheduler"] = {"kind": "none"}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    plan = plan_search(tmp_path / "space.yaml", tmp_path / "runs")
    sampled = plan.space.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask())
    job = Job(path.stem, plan.located(sampled), str(tmp_path / "trial"), test_on=("test",))
    ending = pool.run(job)
    assert isinstance(ending, Finished), ending
    assert 0 < ending.outcome.metrics[plan.metric] <= 1
    assert 0 < ending.outcome.metrics["test/accuracy/genus"] <= 1


def test_the_spaces_that_the_readme_names_ship():
    assert {path.name for path in SPACES} >= {"quickstart.yaml", "linnaeus.yaml", "everything.yaml"}

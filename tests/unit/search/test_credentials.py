import json

from ray import tune
from ray.tune.execution.class_cache import _ActorClassCache

from hiertune.search.credentials import kept_from_ray

SECRET = "hunter2-secret"


def environment_of_actors():
    remote = _ActorClassCache().get(type("Actor", (tune.Trainable,), {}))
    return json.dumps(remote._default_options["runtime_env"])


def test_keys_are_not_passed_on_to_trial_actors(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    assert SECRET in environment_of_actors(), "else Ray has mended it, and this module can go"
    with kept_from_ray():
        assert SECRET not in environment_of_actors()
        assert "RAY_TRAIN_V2_ENABLED" in environment_of_actors()
    assert SECRET in environment_of_actors(), "nothing is left behind"

"""How Ray is started here, as far as that can be said without starting it."""

import os
import stat
import threading

import pytest
import ray
from ray._private import ray_constants

from hiertune.search import cluster


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ADDRESS",
        cluster._NO_CLUSTER,
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_made_for_the_user_alone(home):
    cluster.protect_token()
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert int(token.read_text(), 16) > 0
    text = token.read_text()
    token.chmod(0o644)
    cluster.protect_token()
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == (text, 0o600)


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"])
def test_a_token_of_the_user_s_own_is_left_alone(home, monkeypatch, name):
    monkeypatch.setenv(name, "disabled")
    cluster.protect_token()
    assert not (home / ".ray").exists()


def test_the_switch_to_loopback_is_put_back(home, monkeypatch):
    before = ray_constants.ENABLE_RAY_CLUSTER
    with cluster._on_loopback():
        assert os.environ[cluster._NO_CLUSTER] == "0"
        assert ray_constants.ENABLE_RAY_CLUSTER is False
    assert cluster._NO_CLUSTER not in os.environ
    assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert cluster.is_local()
    monkeypatch.setenv(cluster._NO_CLUSTER, "1")
    with cluster._on_loopback():
        assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert not cluster.is_local()
    monkeypatch.delenv(cluster._NO_CLUSTER)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not cluster.is_local()


def test_ray_is_not_taken_down_under_a_thread_that_calls_it(monkeypatch):
    taken_down = []
    monkeypatch.setattr(ray, "shutdown", lambda: taken_down.append(True))
    answered = threading.Event()
    caller = cluster.thread(answered.wait)
    caller.start()
    cluster.disconnect(patience_s=0.05)
    assert cluster.is_in_use()
    assert taken_down == []
    threading.Timer(0.2, answered.set).start()
    cluster.disconnect()
    assert not cluster.is_in_use()
    assert taken_down == [True]

"""How Ray is started here, as far as that can be said without starting it."""

import os
import stat
import threading

import pytest
import ray
from ray._private import ray_constants

from hiertune.search import cluster, look


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


@pytest.mark.parametrize("given", [None, ""])
def test_without_an_address_ray_is_started_here_whoever_has_begun_one_on_this_machine(
    home, monkeypatch, given
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    asked = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **options: asked.update(options))
    for name in cluster.ENVIRONMENT:
        monkeypatch.setenv(name, cluster.ENVIRONMENT[name])
    cluster.connect()
    assert cluster.own_ray()
    assert cluster.is_local()
    assert asked["address"] == "local", "else Ray joins the one that `ray start` has noted under /tmp/ray"
    assert asked["include_dashboard"] is False


def test_a_ray_that_does_not_start_is_told_in_a_line(home, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    for name in cluster.ENVIRONMENT:
        monkeypatch.setenv(name, cluster.ENVIRONMENT[name])

    def fail(**options):
        raise FileNotFoundError(2, "No such file or directory", "/proc/nowhere")

    monkeypatch.setattr(cluster.ray, "init", fail)
    with pytest.raises(cluster.Unreachable, match=r"does not start on this machine: .*nowhere.*--start-ray"):
        cluster.connect()
    (found,) = look.examine()
    assert found.status == "problem"
    assert found.what == "does not start: [Errno 2] No such file or directory: '/proc/nowhere'"

"""The MLflow server is killed in mid-search and comes back: MLflow then has every point once."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def test_a_server_that_is_gone_for_the_middle_half_of_a_search_misses_nothing(
    bench_module, tmp_path, hiertune
):
    outage = bench_module("_outage")
    server = outage.Server(tmp_path / "server").start().wait()
    try:
        outage.write_data(tmp_path)
        outage.search(tmp_path, "cut", 3, 60, server, None)
        # It may have ended before the server was back. What is delivered already stays as it is.
        synced = hiertune("track", "sync", "cut", capture_output=True)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        total = json.loads((tmp_path / "runs/cut/summary.json").read_text())["tracking"]["total"]
        assert f"{total} of {total} points delivered to {server.uri}" in synced.stdout
        found = outage.compare(tmp_path, "cut", server)
        assert found == {"expected": found["expected"], "there": found["expected"]}, "none open, none wrong"
        assert found["expected"] >= 3 * 60 * 10
    finally:
        server.kill()

"""A look at Ray for `hiertune doctor`: can it be started or joined, and what did dead searches leave?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import ray
from ray.exceptions import RayError

from hiertune.doctor.finding import Finding, ok, problem, warning
from hiertune.search import cluster

_CLOCKS_S = 1.0
"""Difference between the clocks of two nodes that is told."""
_ANSWER_S = 15
_MOST = 1000


def examine() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS") or None
    try:
        cluster.connect()
    except (cluster.Unreachable, RayError, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error.__cause__ or error).split())[:300]
        if address is None:
            advice = "see the logs under /tmp/ray/session_latest/logs"
            yield problem("ray", f"does not start: {text}", "every search runs in Ray", advice)
        else:
            why = "the search is to run there; Ray and Python must be of the same versions as here"
            yield problem(
                "ray", f"{address} can't be joined: {text}", why, "correct RAY_ADDRESS, or unset it"
            )
        return
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (sum(node["Resources"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        where = f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
        yield ok("ray", f"{ray.__version__}: {where}, {cpus:g} CPUs, {gpus:g} GPUs")
        if address is not None:
            yield from _nodes(nodes)
            yield from _left()
    finally:
        cluster.disconnect()


def _nodes(nodes: list[dict]) -> Iterator[Finding]:
    """Clocks and Pythons of all nodes, asked of a task on each."""
    ask = ray.remote(num_cpus=0, max_retries=0)(_here)
    asked = {
        node["NodeID"]: ask.options(
            scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=False
            )
        )
        for node in nodes
    }
    skews = {}
    for node in nodes:
        name = node["NodeManagerHostname"]
        try:
            ray.get(asked[node["NodeID"]].remote(), timeout=_ANSWER_S)  # starts a process there
            before = time.time()
            clock, python = ray.get(asked[node["NodeID"]].remote(), timeout=_ANSWER_S)
            skews[name] = clock - (before + time.time()) / 2
        except RayError as error:
            why, text = "workers would be placed there", " ".join(str(error).split())[:200]
            yield problem("nodes", f"{name} runs no tasks: {text}", why, "look at its raylet's log")
            continue
        if python[:2] != list(sys.version_info[:2]):
            found, here = ".".join(map(str, python)), ".".join(map(str, sys.version_info[:3]))
            why = "what one version pickles the other can't always read"
            yield problem(
                "nodes", f"{name} has Python {found}, not {here}", why, "use one image on all nodes"
            )
    far = {name: skew for name, skew in skews.items() if abs(skew) > _CLOCKS_S}
    for name, skew in far.items():
        why = "times of trials, heartbeats and points in MLflow would contradict each other"
        yield warning(
            "nodes", f"the clock of {name} is off by {skew:+.1f} s", why, "run an NTP service there"
        )
    if skews and not far:
        yield ok("nodes", f"clocks within {max(map(abs, skews.values())):.2f} s of this one")


def _here() -> tuple[float, list[int]]:
    return time.time(), list(sys.version_info[:3])


def _left() -> Iterator[Finding]:
    """Placement groups and actors whose job is gone."""
    from ray.util import state

    why = "they hold CPUs and GPUs that nobody uses"
    try:
        dead = {
            job.job_id for job in state.list_jobs(detail=True, limit=_MOST, timeout=_ANSWER_S) if job.end_time
        }
        groups = [
            group.placement_group_id
            for group in state.list_placement_groups(detail=True, limit=_MOST, timeout=_ANSWER_S)
            if group.state in ("CREATED", "PENDING") and group.creator_job_id in dead
        ]
        actors = [
            actor.actor_id
            for actor in state.list_actors(
                filters=[("state", "=", "ALIVE")], detail=True, limit=_MOST, timeout=_ANSWER_S
            )
            if actor.job_id in dead
        ]
    except (RayError, OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        why = "without it, stopped trials leave placement groups and actors behind"
        advice = "install ray[default] on the head node"
        yield problem("cluster", f"Ray's State API does not answer: {text}", why, advice)
        return
    for what, found, remove in (
        ("placement groups", groups, "ray.util.remove_placement_group"),
        ("actors", actors, "ray.kill"),
    ):
        if found:
            shown = ", ".join(found[:3])
            advice = f"end them with {remove}, or restart the cluster"
            yield warning("cluster", f"{len(found)} {what} of jobs that ended: {shown}", why, advice)
    if not groups and not actors:
        yield ok("cluster", "no placement groups or actors of jobs that ended")

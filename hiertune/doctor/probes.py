"""Checks that run in a process of their own: `python -m hiertune.doctor NAME ARGUMENTS`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from hiertune.doctor.finding import Finding, ok, problem, warning
from hiertune.errors import InputError


def examine_space(space: str, runs: str) -> Iterator[Finding]:
    """What `hiertune search` would refuse before it starts, and what it would warn of."""
    from hiertune.search.plan import plan_search

    file, folder = Path(space), Path(runs)
    try:
        plan = plan_search(file, folder, resume=None, dry_run=True, probe=False)
    except InputError as error:
        said, _, allowed = str(error).partition("\n  allowed: ")
        yield problem("space", said, "the search would not start", allowed or "correct the file")
        return
    for text in plan.warnings:
        yield warning("space", text, "it can be searched, but is seldom meant", "see whether it is")
    data = plan.data
    began = "; a search of this name was begun: --resume goes on with it" if plan.resume else ""
    yield ok("space", f"{plan.trials} trials for {plan.metric}{began}")
    yield ok("data", f"{data.source}: {len(data):,} rows, {len(data.levels)} levels")


def examine_torch() -> Iterator[Finding]:
    """A process group of two processes, and what torch sees of GPUs."""
    import torch

    yield from _gpus(torch)
    yield _gloo()


def _gpus(torch) -> Iterator[Finding]:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if driver:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            why, advice = "trials would be trained on CPUs", "install the build of torch for this driver"
            yield warning("gpu", f"torch sees no GPU ({built}), but there is a driver", why, advice)
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not torch.distributed.is_nccl_available():
        why = "workers on GPUs talk through NCCL"
        yield problem("gpu", "torch is built without NCCL", why, "install another build of torch")
        return
    import socket

    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "").lstrip("^=")
    known = [name for _, name in socket.if_nameindex()]
    if wanted and not any(name.startswith(part) for part in wanted.split(",") for name in known):
        why = "NCCL finds no such interface"
        yield problem("gpu", f"NCCL_SOCKET_IFNAME={wanted}", why, f"one of {', '.join(sorted(known))}")
        return
    version = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok("gpu", f"{len(names)} x {names[0]}, NCCL {version}")


def _gloo() -> Finding:
    """Two processes add two numbers, as the workers of a trial do; all on loopback."""
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    child = os.fork()  # before any thread of torch's: it is imported, but has computed nothing
    try:
        total = _add_up(1 if child else 2, 0 if child else 1, port, listener)
    except Exception as error:  # noqa: BLE001 - whatever gloo says is the finding
        if child == 0:
            os._exit(1)
        text = next(iter(str(error).splitlines()), type(error).__name__)
        why = "the workers of a trial that has several talk through gloo"
        advice = "see that the host name resolves (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo"
        return problem("gloo", f"two processes can't talk to each other: {text[:300]}", why, advice)
    if child == 0:
        os._exit(0 if total == 3 else 1)
    os.waitpid(child, 0)
    assert total == 3
    return ok("gloo", "two processes have added up")


def _add_up(number: int, rank: int, port: int, listener) -> float:
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=15)
    # the store on the socket given: by itself it would listen on all interfaces
    fd = listener.detach() if rank == 0 else listener.close() or None
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, limit, False, master_listen_fd=fd)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    value = torch.tensor([float(number)])
    dist.all_reduce(value)
    dist.barrier()
    dist.destroy_process_group()
    return float(value)


def examine_ray(runs: str) -> Iterator[Finding]:
    """Joins the cluster of RAY_ADDRESS, or starts Ray here; looks at its nodes and at what is left there."""
    from hiertune.search import look

    yield from look.examine()


PROBES: dict[str, Callable[..., Iterator[Finding]]] = {
    "space": examine_space,
    "torch": examine_torch,
    "ray": examine_ray,
}

"""What is global to a process and decides what a trial computes: set for the trial, then put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hiertune.config import TrainConfig
from hiertune.errors import InputError


def pick_device(config: TrainConfig) -> torch.device:
    """`auto` is the current CUDA device if there is one. InputError for what the machine cannot do."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here", key="train.device", allowed="auto, cpu")
    if config.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if config.precision == "fp16":
        raise InputError(
            "fp16 needs a GPU, and this trial runs on the CPU", key="train.precision", allowed="fp32, bf16"
        )
    return torch.device("cpu")


@contextmanager
def trial_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, default dtype, matmul precision, determinism and random state of one trial.

    Whatever ran in the process before has no influence, and what runs after finds everything as it
    was. Algorithms are deterministic on the CPU; on a GPU, where that is slow or not to be had,
    results may differ in their last bits.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        try:
            torch.set_num_threads(config.threads)
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            torch.use_deterministic_algorithms(device.type == "cpu")
            _fill_new_memory(False)  # it would write every tensor twice
            torch.manual_seed(config.seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            _fill_new_memory(fill)


def _fill_new_memory(wanted: bool) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = wanted  # type: ignore[attr-defined]

"""Batch normalisation over the whole batch of all workers, on any device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a batch norm inside `model`, as it is set to train, normalises by the batch."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def synchronize_batch_norms(model: nn.Module) -> None:
    """Make every batch norm inside `model` normalise by the rows of all workers, in place.

    Parameters, buffers and their names stay. `torch.nn.SyncBatchNorm` does this on GPUs only. All workers
    must run the same forward and backward passes, but any of them may hold no rows.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            kind: Any = type(module)
            module.__class__ = _synchronized(kind)


@cache
def _synchronized(kind: type) -> Any:
    return type(f"Synchronized{kind.__name__}", (_OverWorkers, kind), {})


class _OverWorkers(_BatchNorm):
    """Any batch norm on `[B, C, ...]`, where B is the sum over workers."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        others = [dim for dim in range(x.ndim) if dim != 1]
        channels = (-1, *[1] * (x.ndim - 2))
        values = wide.new_tensor([float(x.numel() // x.shape[1])])  # of each channel
        values, total = _SumOverWorkers.apply(torch.cat([values, wide.sum(others)])).tensor_split([1])
        mean = total / values
        deviations = wide - mean.view(channels)
        variance = _SumOverWorkers.apply(deviations.square().sum(others)) / values
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * values / (values - 1))
        normalized = deviations * torch.rsqrt(variance + self.eps).view(channels)
        if self.affine:
            normalized = normalized * self.weight.view(channels) + self.bias.view(channels)
        normalized = normalized.to(x.dtype)
        for module in self.children():  # of timm's norms: dropout and activation
            normalized = module(normalized)
        return normalized

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        batches = self.get_buffer("num_batches_tracked").add_(1)
        share = 1 / float(batches) if self.momentum is None else self.momentum
        self.get_buffer("running_mean").lerp_(mean, share)
        self.get_buffer("running_var").lerp_(unbiased_variance, share)


class _SumOverWorkers(torch.autograd.Function):
    """The sum of every worker's tensor; its gradient is the sum of every worker's gradient."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        total = gradient.clone()
        dist.all_reduce(total)
        return total

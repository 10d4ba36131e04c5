"""Batch normalisation over the whole batch of all workers, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.BatchNorm1d) for module in model.modules())


def synchronize_batch_norms(model: nn.Module) -> None:
    """Make every batch norm inside `model` normalise by the rows of all workers, in place.

    `torch.nn.SyncBatchNorm` does this on GPUs only. All workers must run the same forward and
    backward passes, but any of them may hold no rows.
    """
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm1d):
            setattr(model, name, _Synchronized.like(child))
        else:
            synchronize_batch_norms(child)


class _Synchronized(nn.BatchNorm1d):
    """`nn.BatchNorm1d` on `[B, D]`, where B is the sum over workers; same parameters and buffers."""

    @classmethod
    def like(cls, norm: nn.BatchNorm1d) -> _Synchronized:
        new = cls(norm.num_features, norm.eps, norm.momentum).to(norm.weight.device)
        new.load_state_dict(norm.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        rows = _SumOverWorkers.apply(wide.new_tensor([float(x.shape[0])]))
        mean = _SumOverWorkers.apply(wide.sum(0)) / rows
        variance = _SumOverWorkers.apply((wide - mean).square().sum(0)) / rows
        self._track(mean.detach(), variance.detach() * rows / (rows - 1))
        return ((wide - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.momentum is not None
        self.get_buffer("running_mean").lerp_(mean, self.momentum)
        self.get_buffer("running_var").lerp_(unbiased_variance, self.momentum)
        self.get_buffer("num_batches_tracked").add_(1)


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

"""Which parameters the training loss does not reach: DDP waits for their gradients in vain."""

from __future__ import annotations

import torch
from torch import Tensor

from hiertune.models import MLP, HierarchicalClassifier, Identity

_NAMES_IN_NOTE = 3


def may_leave_unused(model: HierarchicalClassifier) -> bool:
    """Whether it is worth a look: our own backbones use all their parameters."""
    return not isinstance(model.backbone, MLP | Identity)


def unused_parameters(model: HierarchicalClassifier, inputs: Tensor) -> list[str]:
    """Names of the trainable parameters without a part in the logits of any level.

    One forward of `inputs` `[B, ...]`, in the mode that the model is in, finds them. Batch-norm
    statistics, random states and gradients are afterwards what they were.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = [buffer.clone() for buffer in model.buffers()]
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        total = sum(logits.sum() for logits in model(inputs).values())
        gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    model.release()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]


def note_on(unused: list[str]) -> str:
    some = ", ".join(unused[:_NAMES_IN_NOTE]) + (", ..." if len(unused) > _NAMES_IN_NOTE else "")
    count = "1 parameter" if len(unused) == 1 else f"{len(unused)} parameters"
    return f"find_unused_parameters is on: the training loss does not reach {count} ({some})"

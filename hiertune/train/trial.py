"""Everything that one trial owns, and its epochs and steps.

Shapes: B rows of this worker in one forward pass, L levels, C_l classes of level l, S steps of an epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hiertune.config import TrialConfig
from hiertune.data import HierarchicalDataset
from hiertune.decoding import Decoder, DecodingRule, ValidationLogits
from hiertune.errors import InputError
from hiertune.losses import MixedLabels, build_losses, class_weights, level_losses
from hiertune.metrics import Evaluation, seen_classes
from hiertune.models.timm_backbone import TimmBackbone
from hiertune.storage import Folder
from hiertune.train.batches import FIRST_WORKER, Pass, Step, random_stream
from hiertune.train.build import (
    augmentation_of,
    autocast,
    check_batches,
    distribute,
    inputs_of,
    model_of,
    plan_of,
)
from hiertune.train.checkpoint import Checkpoint, decode_checkpoint
from hiertune.train.feed import Feed
from hiertune.train.logits import Collector, LabelCollector, LogitCollector
from hiertune.train.optim import build_optimizer, learning_rate_factor, parameter_groups, set_learning_rate
from hiertune.train.result import TrialFailed
from hiertune.train.unknown import outcome_levels, with_unknown
from hiertune.train.unused import may_leave_unused, note_on, unused_parameters
from hiertune.train.workers import Workers
from hiertune.weighting import build_weighting

FINITE_CHECK_STEPS = 50
"""How often within an epoch all workers look whether the loss is still finite."""

_EVALUATION_ROWS = 1024
_EVALUATION_ELEMENTS = 2**23
"""An evaluation batch has at most so many rows, and so many logits at the largest level."""
_EVALUATION_IMAGES = 32
"""Of images at most so many, or twice the rows that a worker trains on at once."""


_BODY = "backbone.body."


@dataclass(frozen=True)
class Targets:
    """What one forward pass should say."""

    labels: Tensor
    """int64 [B, L], -1 for what counts for nothing."""
    mixed: MixedLabels | None


class Trial:
    """Model, optimiser, weighting and data order of one trial, on one of its workers.

    Make it within `trial_settings`. The model's initial weights follow from the seed alone; the order
    of rows and the random numbers of dropout from seed, epoch (and rank), so that no generator's
    state outlives an epoch.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: HierarchicalDataset,
        fit_on: tuple[str, ...],
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        train = config.train
        self.config, self.data, self.fit_on, self.device = config, data, fit_on, device
        self.workers = Workers.current()
        self.epoch = 0
        """Epochs done."""
        self.steps = 0
        """Optimiser steps done."""

        taxonomy, self._labels = with_unknown(config.unknown, data)
        rows = data.rows(*fit_on)
        labels = data.labels[rows]
        self._augmentation = augmentation_of(config)
        with self.workers.together():  # weights and features come from files, which one may fail to read
            self.model = model_of(config, data, taxonomy, fit_on).to(device)
            inputs = inputs_of(config, data, self.model, device)
        self._feed = Feed(inputs, self._labels, device, beat)
        self.plan = plan_of(config, data, inputs, rows, self._augmentation)
        check_batches(self.model, self.plan, self.workers)

        self._losses = build_losses(config.loss, taxonomy).to(device)
        weights = class_weights(config.loss.class_weights, labels, taxonomy)
        self._class_weights = [None if weight is None else weight.to(device) for weight in weights]
        self._weighting = build_weighting(
            config.weighting, data.taxonomy, labels, self.model.backbone, device
        )
        self._seen = seen_classes(labels, data.taxonomy)
        self._outcomes = outcome_levels(config.unknown, data)

        unused = self._unused_parameters()
        self.notes: tuple[str, ...] = (note_on(unused),) if unused else ()
        """What is worth a line in the log, until it was said."""
        self._network = distribute(self.model, self.workers, find_unused=bool(unused))
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(config.optimizer, parameter_groups(self.model, config.optimizer))
        self._scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.model.head.progress = self.plan.progress(0)

    @property
    def seconds_waited(self) -> float:
        """Wall time in which this worker waited for batches, in all."""
        return self._feed.seconds_waited

    # ------------------------------------------------------------------------------- training

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training rows; its metrics, the same on all workers. Raises TrialFailed."""
        self.epoch += 1
        seed = self.config.train.seed
        torch.manual_seed(random_stream(seed, self.epoch, FIRST_WORKER + self.workers.rank))
        steps = self.plan.epoch(self.epoch)
        counts = self._known_counts(steps)
        losses = torch.zeros_like(counts)  # [S, L]: this worker's share of each step's loss
        batches = self._batches([each.shard(self.workers) for step in steps for each in step.passes])
        self._network.train()
        for number, step in enumerate(steps):
            self._train_step(step, islice(batches, len(step.passes)), counts[number], losses[number])
            if (number + 1) % FINITE_CHECK_STEPS == 0:
                self._check_finite(losses[: number + 1])
        self._check_finite(losses)
        return self._training_metrics(losses, counts)

    def _batches(self, passes: Sequence[Pass]) -> Iterator[tuple[Tensor, Targets]]:
        """What each pass trains on: inputs `[B, ...]`, mixed where it says so, and their targets."""
        augment = self._augmentation.of_epoch(self.epoch) if self._augmentation else None
        batches = self._feed.batches((each.reads for each in passes), augment)
        for each, (inputs, labels) in zip(passes, batches, strict=True):
            if each.hidden is not None:
                labels = labels.masked_fill(torch.from_numpy(each.hidden).to(self.device), -1)
            mixed = None
            if each.mix is not None:
                inputs = each.mix.inputs(inputs)
                labels, mixed = each.mix.labels(labels)
            yield inputs, Targets(labels, mixed)

    def _train_step(
        self, step: Step, batches: Iterator[tuple[Tensor, Targets]], counts: Tensor, losses: Tensor
    ) -> None:
        """One optimiser step. `counts` [L]: known labels of the whole step; adds its loss to `losses` [L].

        A new weight counts from the next step on, so that all passes of a step weigh alike.
        """
        self.model.head.progress = self.plan.progress(self.steps)
        wants_update = self._weighting.wants_update(self.steps)
        weights = self._weighting.weights * self.workers.size  # DDP averages, but the losses are sums
        for number, (inputs, targets) in enumerate(batches, start=1):
            last = number == len(step.passes)
            with self._gradient_sync(last):
                of_levels = self._forward(inputs, targets, counts)
                if wants_update and (last or self._weighting.whole_step):
                    self._update_weights(of_levels, targets, step, counts, last)
                stacked = torch.stack(of_levels)
                self._scaler.scale(stacked @ weights).backward()
            losses += stacked.detach()
        self._weighting.after_step(losses, counts)
        self._update_parameters()
        self.model.release()

    def _forward(self, inputs: Tensor, targets: Targets, counts: Tensor) -> list[Tensor]:
        with autocast(self.config.train, self.device):
            logits = self._network(inputs)
        return self._level_losses(logits, targets, counts)

    def _level_losses(self, logits: dict[str, Tensor], targets: Targets, counts: Tensor) -> list[Tensor]:
        return level_losses(self._losses, logits, targets.labels, counts, self._class_weights, targets.mixed)

    def _update_weights(
        self, losses: Sequence[Tensor], targets: Targets, step: Step, counts: Tensor, last: bool
    ) -> None:
        """Let the weighting measure a pass as part of the whole step, or the last one as a batch of its own.

        `losses` are means over the step's known labels, `counts` [L].
        """
        if len(step.passes) > 1 and not self._weighting.whole_step:
            (of_pass,) = self._known_counts([Step(step.passes[-1:])])
            shares = counts / torch.where(of_pass > 0, of_pass, 1.0)
            losses = [loss * share for loss, share in zip(losses, shares, strict=True)]
            counts = of_pass

        def base_losses() -> list[Tensor]:
            assert self.model.base_logits is not None
            return self._level_losses(self.model.base_logits, targets, counts)

        self._weighting.update(self.model, losses, counts, base_losses, last)

    def _update_parameters(self) -> None:
        factor = learning_rate_factor(self.config.schedule, self.steps, self.plan.total_steps)
        set_learning_rate(self._optimizer, self.config.optimizer.lr * factor)
        if self.config.train.grad_clip > 0:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._parameters, self.config.train.grad_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.steps += 1

    def _gradient_sync(self, wanted: bool) -> AbstractContextManager:
        if wanted or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        return self._network.no_sync()

    def _unused_parameters(self) -> list[str]:
        """Parameters that keep DDP waiting; a forward pass on two rows finds them."""
        if self.workers.size == 1 or not may_leave_unused(self.model):
            return []
        ((inputs, _),) = self._feed.batches([self.plan.rows[:2]])
        return unused_parameters(self.model, inputs)

    def _known_counts(self, steps: Sequence[Step]) -> Tensor:
        """Labels that count in each step over all workers, float32 [S, L]; every worker has all labels."""
        counts = np.stack([step.known(self._labels) for step in steps])
        return torch.from_numpy(counts).to(self.device, torch.float32)

    def _check_finite(self, losses: Tensor) -> None:
        bad = ~losses.isfinite().all(1)
        never = torch.tensor(len(losses), device=self.device)
        first = self.workers.least(torch.where(bad.any(), bad.int().argmax(), never)).item()
        if first < len(losses):
            step = (self.epoch - 1) * self.plan.steps_per_epoch + int(first) + 1
            raise TrialFailed(f"train/loss is not finite at epoch {self.epoch}, step {step}")

    def _training_metrics(self, losses: Tensor, counts: Tensor) -> dict[str, float]:
        known = counts.double().sum(0)
        sums = self.workers.sum((losses.double() * counts).sum(0))
        means = torch.where(known > 0, sums / known, 0.0)
        of_levels = means.tolist()
        names = [f"train/loss/{level}" for level in self.data.levels]
        metrics = {
            "train/loss": sum(of_levels),
            **dict(zip(names, of_levels, strict=True)),
            "lr": self._optimizer.param_groups[-1]["lr"],  # of the heads
            **self._weighting.report(),
        }
        self._weighting.after_epoch(means)  # for the weights of the next one
        return metrics

    # ----------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, split: str, rows: np.ndarray, collector: Collector | None = None) -> dict[str, float]:
        """Metrics `<split>/...` on `rows`, exact and the same on all workers. Raises TrialFailed.

        The loss is that of training without class and level weights.
        """
        evaluation = Evaluation(self.data.taxonomy, self._seen, self.device, self._outcomes)
        ones = torch.ones(len(self.data.levels), device=self.device)
        no_weights = [None] * len(self.data.levels)
        size = min(_EVALUATION_ROWS, max(1, _EVALUATION_ELEMENTS // max(self.data.taxonomy.num_classes)))
        if len(self.plan.inputs.shape) == 4:  # activations of images take far more room than their logits
            size = min(size, max(_EVALUATION_IMAGES, 2 * self.plan.batch_size // self.workers.size))
        shard = Pass(rows).shard(self.workers).rows
        self.model.eval()
        for inputs, labels in self._feed.batches(shard[i : i + size] for i in range(0, len(shard), size)):
            labels = evaluation.known(labels)
            with autocast(self.config.train, self.device):
                logits = self.model(inputs)
            sums = level_losses(self._losses, logits, labels, ones, no_weights)
            evaluation.add(logits, labels, sums)
            if collector is not None and self.model.base_logits is not None:
                collector.add(self.model.base_logits, logits)
        self.model.release()
        self.workers.sum(evaluation.state)
        metrics = evaluation.compute(split)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrialFailed(f"{name} is {value} at epoch {self.epoch}")
        return metrics

    def evaluate_and_keep(self, rows: np.ndarray, address: str | Path) -> dict[str, float]:
        """`evaluate` on validation rows; the first worker writes their base logits to `address`.

        Where they can't be written they are not kept, and a note says so.
        """
        shard = Pass(np.arange(len(rows))).shard(self.workers).rows
        taxonomy = self.model.head.taxonomy
        collector = LogitCollector(taxonomy, len(rows), shard, self.device)
        metrics = self.evaluate("val", rows, collector)
        base = collector.gather(self.workers)
        if self.workers.first:
            seen = seen_classes(self.data.labels[self.plan.rows], taxonomy)
            folder, name = Folder.of_file(address)
            content = ValidationLogits(base, torch.tensor(self.data.labels[rows]), tuple(seen)).encode()
            try:
                folder.write_bytes(name, content)
            except OSError as error:  # they choose how the winner's logits become names, no more
                self.notes += (f"the validation logits could not be saved: {error.strerror or error}",)
        return metrics

    def evaluate_and_name(
        self, split: str, rows: np.ndarray, rules: Sequence[DecodingRule]
    ) -> tuple[dict[str, float], tuple[np.ndarray, ...]]:
        """`evaluate`, and by each rule the labels of `rows`, int64 [N, L]."""
        head, shard = self.model.head, Pass(np.arange(len(rows))).shard(self.workers).rows
        decoders = [Decoder(head.taxonomy, rule, head.refine, self.device) for rule in rules]
        collector = LabelCollector(decoders, len(self.data.levels), len(rows), shard)
        metrics = self.evaluate(split, rows, collector)
        return metrics, collector.gather(self.workers, self.device)

    # ---------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on; tensors and plain values."""
        return {
            "trial": self._identity,
            "epoch": self.epoch,
            "steps": self.steps,
            "model": {name: value for name, value in self.model.state_dict().items() if self._changes(name)},
            "optimizer": self._optimizer.state_dict(),
            "weighting": self._weighting.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from the checkpoint, as the first worker sees it; without one, from the start.

        InputError if it is of another trial.
        """
        found, damage = checkpoint.read() if self.workers.first else (None, None)
        if damage is not None:
            self.notes += (damage,)
        payload = self.workers.from_first(found, self.device)
        if payload is None:
            return
        try:
            state = decode_checkpoint(payload)
        except InputError as error:
            raise InputError(error.problem, file=str(checkpoint), allowed=error.allowed) from error
        if state.get("trial") != self._identity:
            raise InputError(
                "this checkpoint is of another config, data set or choice of splits",
                file=str(checkpoint),
                allowed="the folder of this very trial, or an empty one",
            )
        self.epoch, self.steps = state["epoch"], state["steps"]
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        assert not unexpected
        assert not any(map(self._changes, missing))
        self._optimizer.load_state_dict(state["optimizer"])
        self._weighting.load_state_dict(state["weighting"])
        self._scaler.load_state_dict(state["scaler"])
        self.model.head.progress = self.plan.progress(self.steps - 1)

    def _changes(self, name: str) -> bool:
        """Whether training changes this entry of the model's state: a frozen body is as it was built."""
        backbone = self.model.backbone
        return not (isinstance(backbone, TimmBackbone) and backbone.frozen and name.startswith(_BODY))

    @cached_property
    def _identity(self) -> str:
        """What decides the numbers of this trial. Where its data and its backbone's weights lie does not."""
        config = self.config.model_dump(mode="json", exclude={"data"})
        if (weights := config["model"]["backbone"].get("weights")) is not None:
            config["model"]["backbone"]["weights"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
        text = f"{json.dumps(config)} {self.data.fingerprint} {self.fit_on}"
        return hashlib.sha256(text.encode()).hexdigest()

"""What one trial and one search are made of: frozen, typed trees with every default in one place.

A *config* has no distributions left in it (`space.py` resolves those). A choice between parts is a
union told apart by `kind`. Rules that concern one value stand beside that value; rules that need
the data (level names, row counts) are in `hiertune.check`.

Nothing here imports torch: a space file is checked before anything heavy is loaded.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Config(BaseModel):
    """Base of every section: frozen, strict about unknown keys, documented by field docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


# ---------------------------------------------------------------------------------------- data


class KmerConfig(Config):
    """How sequences become features: counts of every word of `k` letters."""

    k: Annotated[int, Field(ge=1, le=8)] = 6
    """Word length; there are 4**k features."""
    transform: Literal["counts", "frequency", "sqrt", "presence"] = "sqrt"
    """`frequency` sums to one; `sqrt` is its square root (so has unit length); `presence` is 0/1."""


class DataConfig(Config):
    path: str
    """An HDF5 file in hiertune's format, or `builtin:NAME` (there is `builtin:rrna16s`)."""
    kmer: KmerConfig = KmerConfig()
    """Only for built-in sequence data: how the features are made on first use."""
    in_memory: Literal["auto", "always", "never"] = "auto"
    """`auto` reads the inputs into memory when they take less than a quarter of what is free."""


# --------------------------------------------------------------------------------------- model


class MLPConfig(Config):
    kind: Literal["mlp"] = "mlp"
    hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [512]
    """Width of each hidden layer; the last one is the feature width."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout after every hidden layer."""
    input_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the inputs."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    norm: Literal["none", "layer", "batch"] = "none"
    """Normalisation before each activation; `batch` synchronises statistics over workers."""
    feature_length: NonNegative = 0.0
    """Scale every row's features to this Euclidean length; 0 leaves them as they are."""
    standardize: bool = True
    """Shift and scale every input by its mean and deviation over the training rows."""


class IdentityConfig(Config):
    kind: Literal["identity"] = "identity"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the inputs."""
    standardize: bool = True
    """Shift and scale every input by its mean and deviation over the training rows."""


BackboneConfig = Annotated[MLPConfig | IdentityConfig, Field(discriminator="kind")]


class LinearHeadConfig(Config):
    kind: Literal["linear"] = "linear"
    bias: bool = True


class HierarchicalSoftmaxConfig(Config):
    kind: Literal["hierarchical_softmax"] = "hierarchical_softmax"
    bias: bool = True
    floor: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-10
    """Added to the parent's probability before its logarithm: no class is ever ruled out."""


class ConditionalHeadConfig(Config):
    kind: Literal["conditional"] = "conditional"
    routing: Literal["soft", "hard", "gumbel"] = "soft"
    """`hard` takes the parent's argmax in evaluation only; `gumbel` samples in training only."""
    temperature: Positive = 1.0
    """Divides the parent's logits in routing; has no effect on `hard` in evaluation."""
    bias: bool = True
    floor: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-10
    """Added to the parent's probability before its logarithm: no class is ever ruled out."""


HeadConfig = Annotated[
    LinearHeadConfig | HierarchicalSoftmaxConfig | ConditionalHeadConfig, Field(discriminator="kind")
]


class ModelConfig(Config):
    backbone: BackboneConfig = MLPConfig()
    head: HeadConfig = LinearHeadConfig()


# ---------------------------------------------------------------------------------------- loss


class ClassWeightsConfig(Config):
    """Weights against imbalance, from the training rows' class counts, applied exactly once."""

    method: Literal["none", "smoothing", "capping", "exponential", "logarithmic"] = "none"
    """`smoothing` total/(n+s); `capping` min(total/n, cap); `exponential` base**(total/n) with
    total/n capped; `logarithmic` 1/(1+log_base(ratio*(base-1)+1)). Weights then average one over
    the training rows."""
    smoothing: Positive = 0.1
    cap: Positive = 20.0
    base: Annotated[float, Field(gt=1.0)] = 10.0


class CrossEntropyConfig(Config):
    kind: Literal["cross_entropy"] = "cross_entropy"
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Mass that leaves the true class, spread evenly over the others: s/(C-1) each."""
    class_weights: ClassWeightsConfig = ClassWeightsConfig()


class TaxonomySmoothingConfig(Config):
    kind: Literal["taxonomy_smoothing"] = "taxonomy_smoothing"
    alpha: Fraction = 0.1
    """Mass that leaves the true class."""
    beta: NonNegative = 1.0
    """How fast it falls with the distance in the taxonomy: exp(-beta * distance)."""
    uniform_roots: bool = True
    """Classes without a parent spread their mass evenly over all others."""
    fallback_to_uniform: bool = True
    """Levels where no class has a parent are smoothed evenly; off: not at all."""
    class_weights: ClassWeightsConfig = ClassWeightsConfig()


LossConfig = Annotated[CrossEntropyConfig | TaxonomySmoothingConfig, Field(discriminator="kind")]


class EqualConfig(Config):
    kind: Literal["equal"] = "equal"


class FixedConfig(Config):
    kind: Literal["fixed"] = "fixed"
    weights: dict[str, NonNegative]
    """Weight of each level by name; a level left out weighs 0. Scaled to sum to the number of levels."""

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weight > 0 for weight in weights.values()):
            raise ValueError("at least one level must have a weight above 0")
        return weights


class GradNormConfig(Config):
    kind: Literal["gradnorm"] = "gradnorm"
    alpha: NonNegative = 1.5
    """How strongly slow levels are pulled up (the paper's asymmetry)."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the way to the balanced weights that one update goes, in log space."""
    interval: PositiveInt = 10
    """Optimiser steps between updates."""
    at: Literal["features", "last_layer"] = "features"
    """Where gradients are measured: at the shared features, or at the last shared layer's weight."""
    linear_heads: bool = True
    """Measure the plain linear logits, before any refinement by the head."""


WeightingConfig = Annotated[EqualConfig | FixedConfig | GradNormConfig, Field(discriminator="kind")]

# ---------------------------------------------------------------------------------- optimisation


class AdamWConfig(Config):
    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)

    @field_validator("betas", mode="before")
    @classmethod
    def _from_list(cls, betas):
        return tuple(betas) if isinstance(betas, list) else betas


class SGDConfig(Config):
    kind: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self):
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


OptimizerConfig = Annotated[AdamWConfig | SGDConfig, Field(discriminator="kind")]


class ConstantConfig(Config):
    kind: Literal["constant"] = "constant"
    warmup: Fraction = 0.0
    """Share of all steps in which the learning rate rises linearly from near zero."""


class CosineConfig(Config):
    kind: Literal["cosine"] = "cosine"
    warmup: Fraction = 0.05
    """Share of all steps in which the learning rate rises linearly from near zero."""
    final: Fraction = 0.01
    """Learning rate at the end, as a share of the peak."""


ScheduleConfig = Annotated[ConstantConfig | CosineConfig, Field(discriminator="kind")]


class TrainConfig(Config):
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128
    """Rows per optimiser step and forward pass over all workers together (times `accumulation`)."""
    accumulation: PositiveInt = 1
    """Forward passes per optimiser step."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    grad_clip: NonNegative = 0.0
    """Largest norm of all gradients together; 0 is no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 run under autocast; fp16 needs a GPU and scales the loss."""
    threads: PositiveInt = 1
    """Compute threads per worker. On CPU one is the fastest way to use a core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class TrialConfig(Config):
    """Everything that decides what one trial computes."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = CrossEntropyConfig()
    weighting: WeightingConfig = EqualConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    train: TrainConfig = TrainConfig()


# -------------------------------------------------------------------------------------- search


class ObjectiveConfig(Config):
    metric: str | None = None
    """`val/<metric>[/<level>]`, for example `val/accuracy/genus`; by default the finest level's accuracy."""
    mode: Literal["max", "min"] = "max"

    @field_validator("metric")
    @classmethod
    def _on_validation(cls, metric: str | None) -> str | None:
        if metric is not None and metric.startswith("test/"):
            raise ValueError("the test split is read once, at the end; search on a val/ metric")
        return metric


class TPEConfig(Config):
    kind: Literal["tpe"] = "tpe"
    startup_trials: PositiveInt = 10
    """Random trials before the model of good settings is used."""


class RandomConfig(Config):
    kind: Literal["random"] = "random"


class GridConfig(Config):
    kind: Literal["grid"] = "grid"


class GPConfig(Config):
    kind: Literal["gp"] = "gp"
    startup_trials: PositiveInt = 10


class CMAESConfig(Config):
    kind: Literal["cmaes"] = "cmaes"
    startup_trials: PositiveInt = 1


class QMCConfig(Config):
    kind: Literal["qmc"] = "qmc"
    sequence: Literal["sobol", "halton"] = "sobol"


SamplerConfig = Annotated[
    TPEConfig | RandomConfig | GridConfig | GPConfig | CMAESConfig | QMCConfig, Field(discriminator="kind")
]


class NoSchedulerConfig(Config):
    kind: Literal["none"] = "none"


class ASHAConfig(Config):
    kind: Literal["asha"] = "asha"
    grace_epochs: PositiveInt = 2
    """No trial is stopped before this epoch."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """At each rung the best 1/reduction_factor go on."""


class MedianConfig(Config):
    kind: Literal["median"] = "median"
    grace_epochs: PositiveInt = 2
    min_trials: PositiveInt = 3
    """Trials that must have reached an epoch before their median stops others."""


class HyperbandConfig(Config):
    kind: Literal["hyperband"] = "hyperband"
    reduction_factor: Annotated[int, Field(ge=2)] = 3


SchedulerConfig = Annotated[
    NoSchedulerConfig | ASHAConfig | MedianConfig | HyperbandConfig, Field(discriminator="kind")
]


class WorkerGroupConfig(Config):
    recycle_after: PositiveInt | None = None
    """Trials after which a worker group is replaced; 1 gives every trial fresh processes."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often one trial may lose its workers and go on from its checkpoint."""


class SearchSection(Config):
    objective: ObjectiveConfig = ObjectiveConfig()
    trials: PositiveInt = 32
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the sampler; each trial's own seed is `train.seed`."""
    sampler: SamplerConfig = TPEConfig()
    scheduler: SchedulerConfig = ASHAConfig()
    workers_per_trial: PositiveInt = 1
    """DDP processes that train one trial."""
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative | None = None
    """By default 1 where the cluster has GPUs, else 0; a fraction shares a GPU."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many worker groups as the cluster can hold."""
    refit: bool = True
    """Train the winner once more on train + validation before the test split is read."""
    controls: bool = True
    """Measure the winner beside the space's defaults with flat cross-entropy, and a nearest neighbour."""
    worker_group: WorkerGroupConfig = WorkerGroupConfig()


class TrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else SQLite under the runs folder."""
    experiment: str = "hiertune"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class SearchConfig(Config):
    """The parts of a space file that are not searched."""

    name: str
    """Name of the run folder: letters, digits, dot, dash and underscore."""
    search: SearchSection = SearchSection()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be letters, digits, '.', '-' or '_', and start with a letter or digit")
        return name

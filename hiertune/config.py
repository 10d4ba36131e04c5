"""What one trial and one search are made of: frozen, typed trees with every default in one place.

A *config* has no distributions left in it (`space.py` resolves those). A choice between parts is a
union told apart by `kind`. Rules that concern one value stand beside that value; rules that need
the data (level names, row counts) are in `hiertune.check`.

Nothing here imports torch: a space file is checked before anything heavy is loaded.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from hiertune._text import without_password

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: object) -> object:
    """Seconds, from a number of them or from `90s`, `30m`, `2h`, `1.5d`; anything else is an error."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("must be seconds, or a number with a unit: 90s, 30m, 2h, 1.5d")
        return float(match[1]) * _UNIT_SECONDS[match[2]]
    return value


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    Field(gt=0.0, allow_inf_nan=False),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": f"^{_DURATION.pattern}$"},
            ]
        }
    ),
]
"""A length of time in seconds."""


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


class AugmentConfig(Config):
    """Random changes of training images; what a row gets depends on seed, epoch and row alone."""

    crop_scale: tuple[Fraction, Fraction] = (1.0, 1.0)
    """Bounds of the share of the image's area that is cut out, at 3:4 to 4:3 of its width to its height,
    and resized; [1, 1] cuts nothing."""
    flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    color_jitter: NonNegative = 0.0
    """Strength of random changes of brightness, contrast and saturation."""
    policy: Literal["none", "rand_augment", "trivial_augment", "auto_augment"] = "none"
    """A policy of torchvision's, with its own defaults."""
    erasing: Fraction = 0.0
    """Probability of erasing a random rectangle."""

    @field_validator("crop_scale", mode="before")
    @classmethod
    def _from_list(cls, bounds):
        return tuple(bounds) if isinstance(bounds, list) else bounds

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError("must be two numbers above 0, the smaller one first")
        return bounds


class TimmConfig(Config):
    kind: Literal["timm"] = "timm"
    name: str
    """A model of timm's (`timm.list_models()`), such as `resnet18` or `vit_small_patch16_224.dino`."""
    pretrained: bool = False
    """Start from the weights that timm has for this name: from its cache, or downloaded."""
    weights: str | None = None
    """Start from the weights in this file (.safetensors, or .pth of tensors only; a relative path starts
    in the folder of the space file), instead of timm's. A classifier in it is left out."""
    image_size: PositiveInt | None = None
    """Height and width that images are resized to; by default what the model was trained with."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the pooled features, and after each of the `hidden` layers."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of skipping a residual branch, where the model has such."""
    frozen: bool = False
    """Train only what follows the backbone. Without augmentation and cutmix its features are computed once
    per data set, and all trials of a search train on them (mixup then mixes features, not images)."""
    hidden: list[PositiveInt] = []
    """Widths of further layers (linear, ReLU, dropout) between the pooled features and the heads."""
    feature_length: NonNegative = 0.0
    """Scale every row's features to this Euclidean length; 0 leaves them as they are."""
    channels_last: bool = True
    """Memory format of the images: the faster one for convolutions."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_source_of_weights(self):
        if self.pretrained and self.weights is not None:
            raise ValueError("weights come from timm (pretrained) or from a file (weights), not both")
        return self


class IdentityConfig(Config):
    kind: Literal["identity"] = "identity"
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the inputs."""
    standardize: bool = True
    """Shift and scale every input by its mean and deviation over the training rows."""


BackboneConfig = Annotated[MLPConfig | IdentityConfig | TimmConfig, Field(discriminator="kind")]


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
    final_temperature: Positive | None = None
    """Temperature at the end of training, in evaluation after it, and in the exported model, where it is
    to change; by default it stays."""
    temperature_schedule: Literal["linear", "cosine", "exponential"] = "exponential"
    """How the temperature goes from `temperature` to `final_temperature` over all steps."""
    bias: bool = True
    floor: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-10
    """Added to the parent's probability before its logarithm: no class is ever ruled out."""


class PathSoftmaxConfig(Config):
    kind: Literal["path_softmax"] = "path_softmax"
    """Normalised among siblings: a class's probability is the product along its path."""
    bias: bool = True


LevelHeadConfig = Annotated[
    LinearHeadConfig | HierarchicalSoftmaxConfig | ConditionalHeadConfig | PathSoftmaxConfig,
    Field(discriminator="kind"),
]


class MixedHeadConfig(Config):
    kind: Literal["mixed"] = "mixed"
    """Levels differ in how they refine their logits."""
    default: LevelHeadConfig = HierarchicalSoftmaxConfig()
    """The head of every level that `levels` does not name."""
    levels: dict[str, LevelHeadConfig]
    """The head of single levels, by name."""


HeadConfig = Annotated[
    LinearHeadConfig
    | HierarchicalSoftmaxConfig
    | ConditionalHeadConfig
    | PathSoftmaxConfig
    | MixedHeadConfig,
    Field(discriminator="kind"),
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


class LevelSmoothingConfig(Config):
    """What differs at one level."""

    enabled: bool = True
    """Off: plain cross-entropy at this level."""
    alpha: Fraction | None = None
    """By default that of all levels."""
    beta: NonNegative | None = None
    """By default that of all levels."""


class TaxonomySmoothingConfig(Config):
    kind: Literal["taxonomy_smoothing"] = "taxonomy_smoothing"
    alpha: Fraction = 0.1
    """Mass that leaves the true class."""
    beta: NonNegative = 1.0
    """How fast it falls with the distance in the taxonomy: exp(-beta * distance)."""
    uniform_roots: bool = True
    """Classes without a parent spread their mass evenly over all others. As they have no relatives, they do
    so either way: the switch is there for Linnaeus' sake, and changes nothing."""
    fallback_to_uniform: bool = True
    """Levels where no class has a parent are smoothed evenly; off: not at all."""
    clade_share: Fraction = 1.0
    """Share of `alpha` that stays among classes under the same top-level class; the rest goes evenly to all
    others (partial subtree weighting, for forests of several root clades)."""
    levels: dict[str, LevelSmoothingConfig] = {}
    """What differs at single levels, by name."""
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


class ExcludeConfig(Config):
    """Parameters that GradNorm's norm leaves out: those that any entry matches."""

    names: list[str] = []
    """Whole parts of a parameter's dotted name, such as `layers.0` or `bias`: `head` is not `multihead`."""
    patterns: list[str] = []
    """Regular expressions, searched in the name."""
    types: list[str] = []
    """Classes of the module that owns the parameter, or classes it derives from, such as `LayerNorm`."""

    @field_validator("patterns")
    @classmethod
    def _valid_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class GradNormConfig(Config):
    kind: Literal["gradnorm"] = "gradnorm"
    alpha: NonNegative = 1.5
    """How strongly slow levels are pulled up (the paper's asymmetry)."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the way to the balanced weights that one update goes, in log space."""
    interval: PositiveInt = 10
    """Optimiser steps between updates; no fewer than `train.accumulation`, as Linnaeus has it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps before the first update, from which `interval` then counts."""
    accumulate: bool = False
    """Measure over all forward passes of a step (see `train.accumulation`), not over the last one."""
    initial_weights: Literal["equal", "inverse_density", "class_complexity"] = "equal"
    """Before the first update: 1; 1 / share of training rows with a known label; or that times
    log(classes) / log(most classes of a level). Scaled to sum to the number of levels."""
    at: Literal["features", "last_layer", "backbone"] = "features"
    """Where gradients are measured: at the shared features, at the last shared layer's weight (the paper's
    choice), or at all parameters of the backbone (one backward pass through it per level)."""
    exclude: ExcludeConfig = ExcludeConfig()
    """Parameters left out, with `last_layer` (the last one that is not) and `backbone`."""
    linear_heads: bool = True
    """Measure the plain linear logits, before any refinement by the head."""

    @model_validator(mode="after")
    def _exclude_needs_parameters(self):
        if self.at == "features" and self.exclude != ExcludeConfig():
            raise ValueError("exclude leaves parameters out, and at: features measures none")
        return self


class UncertaintyConfig(Config):
    kind: Literal["uncertainty"] = "uncertainty"
    """Learned from each level's loss: exp(-s) * loss + s / 2 (Kendall et al., CVPR 2018). The weights
    exp(-s) start at 1 and, alone among all kinds, are not scaled to sum to the number of levels."""
    lr: Positive = 0.01
    """Learning rate of every `s` (Adam)."""


class DWAConfig(Config):
    kind: Literal["dwa"] = "dwa"
    """From how fast each level's loss fell over the last two epochs (Liu et al., CVPR 2019)."""
    temperature: Positive = 2.0
    """Above 1 evens the weights out."""


WeightingConfig = Annotated[
    EqualConfig | FixedConfig | GradNormConfig | UncertaintyConfig | DWAConfig, Field(discriminator="kind")
]

# ----------------------------------------------------------------------- mixing, unknown labels


class ConstantProbability(Config):
    kind: Literal["constant"] = "constant"
    value: Fraction = 1.0


class _Ramp(Config):
    start: Fraction
    end: Fraction
    begin: Fraction = 0.0
    """Share of the training at which it leaves `start`."""
    until: Fraction = 1.0
    """Share of the training at which it reaches `end`."""

    @model_validator(mode="after")
    def _in_order(self):
        if self.begin > self.until:
            raise ValueError(f"begin ({self.begin}) must not be above until ({self.until})")
        return self


class LinearProbability(_Ramp):
    kind: Literal["linear"] = "linear"


class CosineProbability(_Ramp):
    kind: Literal["cosine"] = "cosine"


ProbabilityConfig = Annotated[
    ConstantProbability | LinearProbability | CosineProbability, Field(discriminator="kind")
]


class NoMixConfig(Config):
    kind: Literal["none"] = "none"


class _MixConfig(Config):
    level: str | None = None
    """Only rows of one class of this level are mixed; by default the finest, where labels stay certain."""
    probability: ProbabilityConfig = ConstantProbability()
    """Of mixing a batch."""
    min_group_size: Annotated[int, Field(ge=2)] = 4
    """Rows of classes with fewer training rows are trained as they are."""
    exclude_unknown: bool = True
    """Rows with an unknown label at any level are trained as they are."""


class MixupConfig(_MixConfig):
    kind: Literal["mixup"] = "mixup"
    """Blend two rows (Zhang et al., 2018)."""
    alpha: Positive = 1.0
    """The share of a row is drawn from Beta(alpha, alpha), once per batch."""


class CutmixConfig(_MixConfig):
    kind: Literal["cutmix"] = "cutmix"
    """Paste a rectangle of one image into another (Yun et al., 2019)."""
    alpha: Positive = 1.0
    """The area that stays is drawn from Beta(alpha, alpha), once per batch."""


class MixupOrCutmixConfig(_MixConfig):
    kind: Literal["mixup_or_cutmix"] = "mixup_or_cutmix"
    """One of the two for each batch."""
    mixup_alpha: Positive = 1.0
    cutmix_alpha: Positive = 1.0
    cutmix_share: Fraction = 0.5
    """Probability of cutmix."""


MixConfig = Annotated[
    NoMixConfig | MixupConfig | CutmixConfig | MixupOrCutmixConfig, Field(discriminator="kind")
]


class MaskUnknownConfig(Config):
    kind: Literal["mask"] = "mask"
    """Unknown labels count for nothing: a level's loss is the mean over its known labels."""


class UnknownOutcomeConfig(Config):
    kind: Literal["outcome"] = "outcome"
    """Levels with unknown labels get one more outcome, "unknown", to be predicted like a class. To say it of
    a known row is a mistake in all metrics, of which accuracy and distance look at known rows only."""
    levels: list[str] | None = None
    """Which levels; by default all that have unknown labels in training."""
    masked: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training, from its start, in which unknown labels count for nothing (phase one)."""
    probability: ProbabilityConfig = ConstantProbability()
    """Of counting an unknown label, after that."""


UnknownConfig = Annotated[MaskUnknownConfig | UnknownOutcomeConfig, Field(discriminator="kind")]

# ---------------------------------------------------------------------------------- optimisation


class AdamWConfig(Config):
    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of each layer of a timm backbone, as a share of that of the layer after it. What follows
    the backbone has the full rate."""

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
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of each layer of a timm backbone, as a share of that of the layer after it. What follows
    the backbone has the full rate."""

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
    """Compute threads per worker, and threads that augment images. On CPU one is the fastest way to use a
    core; with a GPU, as many as it has cores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class TrialConfig(Config):
    """Everything that decides what one trial computes."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = CrossEntropyConfig()
    weighting: WeightingConfig = EqualConfig()
    mix: MixConfig = NoMixConfig()
    unknown: UnknownConfig = MaskUnknownConfig()
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
    considered_trials: Annotated[int, Field(ge=100)] = 1000
    """The model is made of the newest so many trials that have ended, the 25 best of all, and those that run.
    The time to ask for a trial grows with their number."""


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
    """At each rung of a bracket the best 1/reduction_factor go on, once all its trials are there. With 3 and
    20 epochs a round of brackets has 9 trials (compared after 2 and 6 epochs), 5 (after 6), and 3 (never)."""


SchedulerConfig = Annotated[
    NoSchedulerConfig | ASHAConfig | MedianConfig | HyperbandConfig, Field(discriminator="kind")
]


class WorkerGroupConfig(Config):
    recycle_after: PositiveInt | None = None
    """Trials after which a worker group is replaced; 1 gives every trial fresh processes."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """How often one trial goes on from its checkpoint after a fault that another try can mend: a worker
    that was killed, crashed or ran out of memory, a node that was lost, a hang."""
    hang_timeout: Duration = 1800.0
    """Workers that train no batch for so long hang: they are replaced, and the trial is tried again.
    Opening the data and loading a model count, so let it be longer than those take."""


class SearchSection(Config):
    objective: ObjectiveConfig = ObjectiveConfig()
    trials: PositiveInt = 32
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the sampler; each trial's own seed is `train.seed`."""
    time_budget: Duration | None = None
    """Wall time for the trials, over all sessions of the search: seconds, or `90m`, `12h`, `2d`. Then
    running trials end their epoch and stay resumable, and the winner is measured."""
    worker_hours: Positive | None = None
    """Hours of training, summed over all workers and sessions; when they are spent, as for `time_budget`."""
    patience: PositiveInt | None = None
    """Begin no more trials when so many in a row have ended without bettering the objective."""
    max_consecutive_failures: PositiveInt = 10
    """The search fails when so many trials in a row fail for one cause."""
    sampler: SamplerConfig = TPEConfig()
    scheduler: SchedulerConfig = ASHAConfig()
    workers_per_trial: PositiveInt = 1
    """DDP processes that train one trial."""
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative | None = None
    """By default 1 where the cluster has GPUs, else 0; a fraction shares a GPU."""
    placement: Literal["pack", "spread"] = "pack"
    """The workers of a trial on as few nodes as possible, or on as many."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; by default as many worker groups as the cluster can hold. A cluster that scales
    itself is asked for room for so many; by default for as many as there are trials."""
    wait_for_nodes: Duration = 600.0
    """How long a search waits while the cluster has no room for one worker group, or is away; then it stops,
    and can be resumed."""
    refit: bool = True
    """Train the winner once more on train + validation before the test split is read."""
    controls: bool = True
    """Measure the winner beside the space's defaults with flat cross-entropy, and a nearest neighbour."""
    decode: bool = True
    """After the search, choose how the winner's logits are turned into names, on validation logits."""
    worker_group: WorkerGroupConfig = WorkerGroupConfig()

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("a share of a GPU is below 1; more than one GPU must be a whole number")
        return gpus


class TrackingConfig(Config):
    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, else SQLite under the runs folder. Logins come
    from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    experiment: str = "hiertune"

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and ("***" in uri or without_password(uri) != uri):
            raise ValueError(
                "holds a password: give the whole address in MLFLOW_TRACKING_URI, or a server's login in "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class SearchConfig(Config):
    """The parts of a space file that are not searched."""

    name: str
    """Name of the run folder: letters, digits, dot, dash and underscore."""
    storage: str | None = None
    """Where checkpoints, outputs and the model are kept as well as in the run folder: `s3://bucket/folder`,
    or any other place that pyarrow's filesystems know. By default HIERTUNE_STORAGE, else the run folder
    is all there is. Credentials come from the environment."""
    ledger: str | None = None
    """Database of the record of all trials, as an SQLAlchemy URL without password:
    `postgresql+psycopg://user@host/database`. By default HIERTUNE_LEDGER, else a journal file in the
    run folder. Passwords come from the environment (PGPASSWORD, ~/.pgpass)."""
    search: SearchSection = SearchSection()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("must be letters, digits, '.', '-' or '_', and start with a letter or digit")
        return name

"""Every key that Linnaeus documents, in its default settings or its pages, and why some are not carried over.

A line is a section, the keys in it, and the reason; without one, `convert` decides about them. `*` is
any one name (a task, a group), `**` anything below.
"""

from __future__ import annotations

from functools import cache

_META = "hiertune trains on one input per row: metadata beside the image are not read"
_MODEL = "part of Linnaeus' own models: hiertune trains those of timm, see model.backbone"
_OWN_INPUTS = "hiertune reads its own HDF5 format: see data.path"
_LOADER = "hiertune feeds batches in its own way, the same for any number of workers"
_VALIDATION = "hiertune validates after every epoch"
_LOGGING = "hiertune logs every epoch, and tracks with MLflow"
_DEBUG = "there are no debugging switches"
_FOLDERS = "folders are options of the command line"
_GROUPS = "there is one optimiser for all parameters (see layer_decay of optimizer for timm's layers)"
_AUGMENT = "torchvision's own settings are used"
_DDP = "hiertune sets up DistributedDataParallel by itself"

_TABLE: tuple[tuple[str, str, str | None], ...] = (
    ("EXPERIMENT", "NAME", None),
    ("EXPERIMENT", "PROJECT GROUP TAGS NOTES CODE_VERSION", "a name is all that hiertune's runs have"),
    ("EXPERIMENT.WANDB", "ENABLED RESUME KEY RUN_ID", "hiertune tracks with MLflow: see tracking.uri"),
    ("EXPERIMENT", "LOG_LEVEL_MAIN LOG_LEVEL_H5DATA LOG_LEVEL_VALIDATION", _LOGGING),
    (
        "METRICS",
        "USE_GPU DEBUG_COMPARE TAXA_SUBSETS RARITY_PERCENTILES",
        "hiertune's metrics have no such switch",
    ),
    ("METRICS", "TRACK_NULL_VS_NON_NULL NULL_VS_NON_NULL_TASKS", "hiertune's metrics have no such switch"),
    ("METRICS.TAXALIGN", "ENABLED COMPUTE_INTERVAL", "deprecated in Linnaeus"),
    (
        "METRICS",
        "STEP_INTERVAL STEP_FRACTION CONSOLE_INTERVAL CONSOLE_FRACTION WANDB_INTERVAL WANDB_FRACTION"
        " LR_INTERVAL LR_FRACTION PIPELINE_INTERVAL PIPELINE_FRACTION",
        _LOGGING,
    ),
    (
        "SCHEDULE.METRICS",
        "STEP_INTERVAL STEP_FRACTION CONSOLE_INTERVAL CONSOLE_FRACTION WANDB_INTERVAL WANDB_FRACTION"
        " LR_INTERVAL LR_FRACTION PIPELINE_INTERVAL PIPELINE_FRACTION",
        _LOGGING,
    ),
    ("CHECKPOINT", "KEEP_TOP_N KEEP_LAST_N SAVE_FREQ", "hiertune keeps the checkpoints it needs by itself"),
    (
        "SCHEDULE.CHECKPOINT",
        "INTERVAL_EPOCHS INTERVAL_STEPS INTERVAL_FRACTION KEEP_TOP_N KEEP_LAST_N",
        "hiertune keeps the checkpoints it needs by itself",
    ),
    ("ENV", "TACC SCRATCH SCENARIO YAML_OVERRIDES", _FOLDERS),
    ("ENV.INPUT", "BASE_DIR CACHE_DIR", _FOLDERS),
    ("ENV.INPUT.BUCKET", "REMOTE BUCKET APP_KEY_ID APP_KEY ENABLED", _FOLDERS),
    ("ENV.OUTPUT", "BASE_DIR", _FOLDERS),
    ("ENV.OUTPUT.BUCKET", "REMOTE BUCKET APP_KEY_ID APP_KEY ENABLED", _FOLDERS),
    ("ENV.OUTPUT.DIRS", "EXP_BASE CHECKPOINTS METADATA LOGS ASSETS CONFIGS", _FOLDERS),
    # ------------------------------------------------------------------------------------ data
    ("DATA", "TASK_KEYS_H5 BATCH_SIZE IMG_SIZE", None),
    ("DATA.PARTIAL", "LEVELS", None),
    ("DATA.SAMPLER", "TYPE", None),
    (
        "DATA.SAMPLER",
        "GROUPED_MODE",
        "batches have no groups: the partners of a mix are read beside the batch",
    ),
    ("DATA", "USE_VECTORIZED_PROCESSOR PIN_MEMORY NUM_WORKERS SIMULATE_HPC IO_DELAY", _LOADER),
    ("DATA", "BATCH_SIZE_VAL", "hiertune sizes evaluation batches by itself"),
    (
        "DATA.AUTOBATCH",
        "ENABLED TARGET_MEMORY_FRACTION MAX_BATCH_SIZE MIN_BATCH_SIZE STEPS_PER_TRIAL LOG_LEVEL ENABLED_VAL"
        " TARGET_MEMORY_FRACTION_VAL MAX_BATCH_SIZE_VAL MIN_BATCH_SIZE_VAL STEPS_PER_TRIAL_VAL LOG_LEVEL_VAL",
        "the batch size decides what is learned, so it is never changed to fit: see train.batch_size",
    ),
    ("DATA", "DATASET_NAME", _OWN_INPUTS),
    ("DATA.DATASET", "NAME VERSION CLADE", _OWN_INPUTS),
    ("DATA.OUT_OF_REGION", "INCLUDE", "choose rows when you make hiertune's file"),
    ("DATA", "UPWARD_MAJOR_CHECK", "choose rows when you make hiertune's file"),
    ("DATA.META", "**", _META),
    ("DATA.DATASET_META", "**", _META),
    (
        "DATA.H5",
        "LABELS_PATH TRAIN_LABELS_PATH VAL_LABELS_PATH IMAGES_PATH TRAIN_IMAGES_PATH VAL_IMAGES_PATH",
        _OWN_INPUTS,
    ),
    ("DATA.H5", "TRAIN_VAL_SPLIT_RATIO TRAIN_VAL_SPLIT_SEED", "the split is part of hiertune's file"),
    ("DATA.HYBRID", "**", _OWN_INPUTS),
    (
        "DATA.PREFETCH",
        "MEM_CACHE_SIZE BATCH_CONCURRENCY MAX_PROCESSED_BATCHES NUM_IO_THREADS NUM_PREPROCESS_THREADS"
        " SLEEP_TIME MONITOR_INTERVAL MONITOR_ENABLED",
        _LOADER,
    ),
    # --------------------------------------------------------------------------- augmentation
    ("AUG.AUTOAUG", "POLICY COLOR_JITTER", None),
    ("AUG.RANDOM_ERASE", "PROB", None),
    ("AUG.RANDOM_ERASE", "MODE COUNT MAX_COUNT AREA_RANGE ASPECT_RATIO", _AUGMENT),
    ("AUG", "PIPELINE_DEVICE SINGLE_AUG_DEVICE USE_OPENCV", "where images are changed has no switch"),
    ("AUG.GPU_COMPILE", "ENABLED BACKEND MODE", "where images are changed has no switch"),
    ("AUG.SELECTIVE_MIXING", "USE_TRITON_KERNEL", "where images are changed has no switch"),
    # ---------------------------------------------------------------------------------- model
    ("MODEL", "LABEL_SMOOTHING DROP_RATE DROP_PATH_RATE IMG_SIZE", None),
    ("MODEL.CLASSIFICATION.HEADS.*", "TYPE ROUTING_STRATEGY TEMPERATURE USE_BIAS", None),
    (
        "MODEL.CLASSIFICATION.HEADS.*",
        "IN_FEATURES OUT_FEATURES",
        "follows from the backbone and the taxonomy",
    ),
    (
        "MODEL.CLASSIFICATION.HEADS.*",
        "HIDDEN_DIM USE_HARD_ROUTING ROUTING_TEMPERATURE",
        "Linnaeus does not read it: see ROUTING_STRATEGY and TEMPERATURE",
    ),
    (
        "MODEL",
        "TYPE NAME PRETRAINED PRETRAINED_SOURCE PRETRAINED_CONVNEXT PRETRAINED_ROPEVIT NUM_CLASSES"
        " ATTN_DROP_RATE ONLY_LAST_CLS EXTRA_TOKEN_NUM META_DIMS IN_CHANS USE_FLASH_ATTN",
        _MODEL,
    ),
    ("MODEL", "FIND_UNUSED_PARAMETERS", _DDP),
    ("MODEL.CONVNEXT_STAGES", "DEPTHS DIMS LAYER_SCALE_INIT_VALUE", _MODEL),
    ("MODEL.ROPE_STAGES", "DEPTHS DIMS NUM_HEADS MLP_RATIO ROPE_THETA ROPE_MIXED", _MODEL),
    ("MODEL.DINOV3", "**", _MODEL),
    ("MODEL.FEATURE_RESOLVER", "TYPE PROJECTION_INIT_MATRIX PARAMETERS.projection_dim", _MODEL),
    ("MODEL.ATTENTION_MECHANISM.HIERARCHICAL_ATTENTION", "**", _MODEL),
    ("MODEL.AGGREGATION", "TYPE PARAMETERS.NORM_LAYER PARAMETERS.ACTIVATION", _MODEL),
    ("MODEL.AGGREGATION.PARAMETERS", "in_channels out_channels kernel_size bias", _MODEL),
    ("MODEL.NORMALIZATION", "CONV_NORM_LAYER ATTENTION_NORM_LAYER ACTIVATION_LAYER", _MODEL),
    ("MODEL.OTHER_COMPONENTS", "DOWNSAMPLE_LAYERS", _MODEL),
    # ----------------------------------------------------------------------------------- loss
    ("LOSS.TASK_SPECIFIC.TRAIN", "FUNCS", None),
    (
        "LOSS.TASK_SPECIFIC.VAL",
        "FUNCS",
        "val/loss is that of training without weights, val/accuracy and the other metrics depend on no loss",
    ),
    (
        "LOSS.GRAD_WEIGHTING.TASK",
        "TYPE ALPHA UPDATE_INTERVAL INIT_STRATEGY INIT_WEIGHTS GRADNORM_ENABLED GRADNORM_WARMUP_STEPS"
        " GRADNORM_ACCUM_STEPS USE_LINEAR_HEADS_FOR_GRADNORM_REFORWARD",
        None,
    ),
    ("LOSS.GRAD_WEIGHTING.TASK", "EXCLUDE_PATTERNS", "Linnaeus does not read it: see EXCLUDE_CONFIG"),
    ("LOSS.GRAD_WEIGHTING.TASK", "ZERO_AUX_INFO", _META),
    (
        "LOSS.GRAD_WEIGHTING.TASK.EXCLUDE_CONFIG",
        "TYPE FILTERS PATTERNS MATCH_TYPE LAYER_TYPES FILTER EXCEPT DIMENSIONS NAME_PATTERNS STAGES",
        None,
    ),
    ("LOSS.GRAD_WEIGHTING.CLASS", "TRAIN METHOD SMOOTHING_FACTOR CAP BASE LOG_BASE", None),
    ("LOSS.GRAD_WEIGHTING.CLASS", "VAL", "hiertune measures val/loss without class weights"),
    ("LOSS.GRAD_WEIGHTING.SUBSET", "**", "not implemented in Linnaeus"),
    ("LOSS.GRAD_WEIGHTING.TAXALIGN", "**", "deprecated in Linnaeus"),
    (
        "LOSS.TAXONOMY_SMOOTHING",
        "ENABLED ALPHA BETA UNIFORM_ROOTS FALLBACK_TO_UNIFORM PARTIAL_SUBTREE_WEIGHTING",
        None,
    ),
    # ------------------------------------------------------------------------------- training
    ("TRAIN", "EPOCHS CLIP_GRAD ACCUMULATION_STEPS PHASE1_MASK_NULL_LOSS AMP_OPT_LEVEL", None),
    ("TRAIN", "START_EPOCH AUTO_RESUME", "hiertune goes on from its own checkpoints"),
    (
        "TRAIN",
        "ALLOW_WANDB_VAL_CHANGE PRESERVE_CHECKPOINT_SCHEDULE",
        "hiertune goes on from its own checkpoints",
    ),
    (
        "TRAIN.GRADIENT_CHECKPOINTING",
        "ENABLED_NORMAL_STEPS ENABLED_GRADNORM_STEPS",
        "there is no gradient checkpointing: take a smaller batch and train.accumulation",
    ),
    (
        "TRAIN.EARLY_STOP",
        "ACTIVE METRIC MAX_STEPS PATIENCE_STEPS MIN_DELTA MAX_LOSS MIN_LR MAX_GRAD_NORM",
        "a search stops bad trials: see search.scheduler",
    ),
    (
        "VAL",
        "CROP VAL_INTERVAL MASK_META_TEST MASK_META_VAL_INTERVAL DISABLE_AUGMENTATIONS",
        _VALIDATION,
    ),
    ("OPTIMIZER", "NAME BETAS MOMENTUM WEIGHT_DECAY", None),
    ("OPTIMIZER", "EPS", "torch's 1e-8 is used"),
    ("OPTIMIZER", "ALPHA T_ALPHA_BETA3", "there is no AdEMAMix"),
    (
        "OPTIMIZER.MUON",
        "MOMENTUM NESTEROV NS_STEPS USE_DISTRIBUTED STRICT APPLY_SCALING",
        "there is no Muon",
    ),
    ("OPTIMIZER.PARAMETER_GROUPS", "**", _GROUPS),
    (
        "LR_SCHEDULER",
        "NAME BASE_LR REFERENCE_BS MIN_LR WARMUP_EPOCHS WARMUP_FRACTION WARMUP_STEPS TOTAL_STEPS",
        None,
    ),
    ("LR_SCHEDULER", "REFERENCE_LR", "Linnaeus only logs it: see BASE_LR"),
    ("LR_SCHEDULER", "WARMUP_LR", "the learning rate rises from near zero"),
    (
        "LR_SCHEDULER",
        "DECAY_STEPS DECAY_FRACTION DECAY_RATE STABLE_DURATION_FRACTION DECAY_DURATION_FRACTION DECAY_TYPE",
        "hiertune's schedules are constant and cosine",
    ),
    ("LR_SCHEDULER.PARAMETER_GROUPS", "**", _GROUPS),
    # ------------------------------------------------------------------------------ schedules
    (
        "SCHEDULE.META_MASKING",
        "ENABLED START_PROB END_PROB END_STEPS END_FRACTION",
        _META,
    ),
    (
        "SCHEDULE.META_MASKING.PARTIAL",
        "ENABLED START_STEPS START_FRACTION END_STEPS END_FRACTION START_PROB END_PROB PROB_END_STEPS"
        " PROB_END_FRACTION WHITELIST WEIGHTS",
        _META,
    ),
    (
        "SCHEDULE.NULL_MASKING",
        "ENABLED START_PROB END_PROB END_STEPS END_FRACTION START_EPOCH END_EPOCH",
        None,
    ),
    *(
        line
        for section in ("SCHEDULE.MIX", "SCHEDULE.MIXUP")
        for line in (
            (section, "ENABLED ALPHA GROUP_LEVELS MIN_GROUP_SIZE EXCLUDE_NULL_SAMPLES NULL_TASK_KEYS", None),
            (section, "SWITCH_PROB MIXUP.ENABLED MIXUP.ALPHA CUTMIX.ENABLED CUTMIX.ALPHA", None),
            (f"{section}.PROB", "ENABLED TYPE START_PROB END_PROB END_STEPS END_FRACTION", None),
            (f"{section}.PROB_SCHEDULE", "ENABLED TYPE START_PROB END_PROB END_STEPS END_FRACTION", None),
            (
                section,
                "LEVEL_SWITCH_EPOCHS LEVEL_SWITCH_STEPS",
                "the level does not change, in Linnaeus neither",
            ),
            (section, "CUTMIX.MINMAX", "the pasted area follows Beta(alpha, alpha) alone"),
            (section, "CHUNK_BOUNDS", _META),
            (section, "USE_GPU", "where images are changed has no switch"),
        )
    ),
    (
        "SCHEDULE.VALIDATION",
        "INTERVAL_EPOCHS INTERVAL_STEPS INTERVAL_FRACTION",
        _VALIDATION,
    ),
    (
        "SCHEDULE.VALIDATION",
        "MASK_META_INTERVAL_EPOCHS MASK_META_INTERVAL_STEPS MASK_META_INTERVAL_FRACTION",
        _META,
    ),
    (
        "SCHEDULE.VALIDATION.PARTIAL_MASK_META",
        "ENABLED INTERVAL_EPOCHS INTERVAL_STEPS INTERVAL_FRACTION WHITELIST",
        _META,
    ),
    (
        "SCHEDULE.VALIDATION.FINAL_EPOCH",
        "EXHAUSTIVE_PARTIAL_META_VALIDATION EXHAUSTIVE_META_COMPONENTS",
        _META,
    ),
    ("MISC", "SEED", None),
    ("MISC", "OUTPUT SAVE_FREQ PRINT_FREQ PIPELINE_METRICS_FREQ", _LOGGING),
    ("DISTRIBUTED", "BACKEND", _DDP),
    (
        "DISTRIBUTED.DDP",
        "bucket_cap_mb static_graph find_unused_parameters gradient_as_bucket_view check_reduction_size",
        _DDP,
    ),
    ("DEBUG", "**", _DEBUG),
    ("", "LOADING_FROM_CHECKPOINT", "a flag that Linnaeus sets by itself"),
)

SECTIONS_WITH_FROM = ("METRICS", "ENV", "DATA", "AUG", "LOSS", "TRAIN", "VAL", "OPTIMIZER", "LR_SCHEDULER")
"""Sections whose key FROM names a file to take them from."""


@cache
def known_keys() -> dict[str, str | None]:
    """Every known key and why it is not carried over; None where `convert` decides. May hold `*` and `**`."""
    return {
        f"{section}.{name}".removeprefix("."): reason
        for section, names, reason in _TABLE
        for name in names.split()
    }


@cache
def find_key(key: str) -> str | None:
    """The known key, or the pattern among them, that `key` is; None if there is none."""
    keys = known_keys()
    if key in keys:
        return key
    parts = key.split(".")
    return next((pattern for pattern in keys if "*" in pattern and _fits(pattern.split("."), parts)), None)


@cache
def is_section(key: str) -> bool:
    """Whether known keys stand below `key`."""
    parts = key.split(".")
    for known in known_keys():
        pattern = known.split(".")
        above = pattern[: len(parts)]
        if len(pattern) > len(parts) and _fits(above, parts):
            return True
    return False


def _fits(pattern: list[str], parts: list[str]) -> bool:
    for index, name in enumerate(pattern):
        if name == "**":
            return len(parts) > index
        if index >= len(parts) or (name != "*" and name != parts[index]):
            return False
    return len(pattern) == len(parts)

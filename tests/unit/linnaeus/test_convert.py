"""Experiments of Linnaeus become the configs that their documentation describes; no key is forgotten."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.config import LevelSmoothingConfig, TrialConfig
from hiertune.errors import InputError
from hiertune.linnaeus import DataFacts, import_experiment
from hiertune.linnaeus.keys import SECTIONS_WITH_FROM, known_keys
from hiertune.space import load_config, load_space

DEFAULTS = {  # what Linnaeus' own default settings mean
    "data": {"path": "data.h5"},
    "model": {
        "backbone": {
            "kind": "timm",
            "name": "resnet50",
            "augment": {"policy": "auto_augment", "color_jitter": 0.4, "erasing": 0.25},
        },
        "head": {"kind": "linear"},
    },
    "loss": {"kind": "cross_entropy"},
    "weighting": {
        "kind": "gradnorm",
        "interval": 100,
        "initial_weights": "inverse_density",
        "at": "backbone",
    },
    "mix": {
        "kind": "mixup",
        "level": "taxa_L40",
        "probability": {"kind": "constant", "value": 0.2},
        "exclude_unknown": False,
    },
    "unknown": {"kind": "mask"},
    "optimizer": {"kind": "adamw", "lr": 1.25e-5, "weight_decay": 0.05},
    "schedule": {"kind": "cosine", "warmup": 5 / 300, "final": 0.8},
    "train": {"epochs": 300, "batch_size": 64, "seed": 42, "grad_clip": 5.0, "precision": "fp16"},
}


def imported(tmp_path, text, **options):
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    result = import_experiment(file, **options)
    written = tmp_path / "config.yaml"
    written.write_text(result.yaml())
    assert load_config(written) == result.config
    return result


def config_of(tmp_path, text, **options):
    return imported(tmp_path, text, **options).config


def defaults_with(**sections):
    return TrialConfig.model_validate(DEFAULTS | sections)


def reasons(result):
    return {outcome.key: outcome.reason for outcome in result.outcomes if outcome.to is None}


def about(values):
    """The same with shares rounded as the importer rounds them."""
    return pytest.approx(values, rel=1e-9)


# ------------------------------------------------------------------------- whole experiments


def test_what_is_left_out_has_the_default_of_linnaeus(tmp_path):
    config = config_of(tmp_path, "EXPERIMENT: {NAME: x}\n")
    assert config.schedule.warmup == about(5 / 300)
    expected = defaults_with(schedule={"kind": "cosine", "warmup": config.schedule.warmup, "final": 0.8})
    assert config == expected


STATIC = """
EXPERIMENT: {NAME: 'birds, first try', TAGS: [a]}
MODEL:
  TYPE: mFormerV1
  DROP_PATH_RATE: 0.01
  DROP_RATE: 0.2
  IMG_SIZE: 384
  CLASSIFICATION:
    HEADS:
      taxa_L10: {TYPE: ConditionalClassifier, ROUTING_STRATEGY: gumbel, TEMPERATURE: 0.5, USE_BIAS: True}
      taxa_L20: {TYPE: ConditionalClassifier, ROUTING_STRATEGY: gumbel, TEMPERATURE: 0.5, USE_BIAS: True}
      taxa_L30: {TYPE: HierarchicalSoftmax, USE_BIAS: False}
DATA:
  BATCH_SIZE: 96
  IMG_SIZE: 384
  TASK_KEYS_H5: [taxa_L10, taxa_L20, taxa_L30]
  PARTIAL: {LEVELS: True}
TRAIN: {EPOCHS: 40, AMP_OPT_LEVEL: O0, ACCUMULATION_STEPS: 4, CLIP_GRAD: 10.0, PHASE1_MASK_NULL_LOSS: True}
AUG: {AUTOAUG: {POLICY: none, COLOR_JITTER: 0.1}, RANDOM_ERASE: {PROB: 0.0}}
LOSS:
  TASK_SPECIFIC:
    TRAIN: {FUNCS: [TaxonomyAwareLabelSmoothing, LabelSmoothingCrossEntropy, CrossEntropyLoss]}
  TAXONOMY_SMOOTHING: {ENABLED: [True, True, True], ALPHA: 0.2, BETA: 2.0, UNIFORM_ROOTS: False}
  GRAD_WEIGHTING:
    TASK: {TYPE: static, INIT_WEIGHTS: [0.5, 1.0, 1.5], GRADNORM_ENABLED: False}
    CLASS: {TRAIN: True, METHOD: [capping, capping, capping], CAP: [10.0, 10.0, 10.0]}
OPTIMIZER: {NAME: sgd, MOMENTUM: 0.8, WEIGHT_DECAY: 0.01}
LR_SCHEDULER: {NAME: cosine, REFERENCE_BS: 512, BASE_LR: 0.04, MIN_LR: 0.0003, WARMUP_FRACTION: 0.1}
SCHEDULE:
  MIX:
    GROUP_LEVELS: [taxa_L10]
    PROB: {ENABLED: True, START_PROB: 0.7, END_PROB: 0.01, END_FRACTION: 0.85, END_STEPS: 0}
    MIXUP: {ENABLED: True, ALPHA: 0.8}
    CUTMIX: {ENABLED: True, ALPHA: 1.5}
    SWITCH_PROB: 0.7
    MIN_GROUP_SIZE: 1
    EXCLUDE_NULL_SAMPLES: True
MISC: {SEED: 3}
"""


def test_an_experiment_with_fixed_weights_and_both_mixes(tmp_path):
    result = imported(tmp_path, STATIC, names=["order", "genus", "species"])
    conditional = {"kind": "conditional", "routing": "gumbel", "temperature": 0.5}
    assert result.name == "birds-first-try"
    assert result.config == TrialConfig.model_validate(
        {
            "data": {"path": "data.h5"},
            "model": {
                "backbone": {
                    "kind": "timm",
                    "name": "resnet50",
                    "image_size": 384,
                    "dropout": 0.2,
                    "drop_path": 0.01,
                    "augment": {"color_jitter": 0.1},
                },
                "head": {
                    "kind": "mixed",
                    "default": conditional,
                    "levels": {"order": {"kind": "hierarchical_softmax", "bias": False}},
                },
            },
            "loss": {
                "kind": "taxonomy_smoothing",
                "alpha": 0.2,
                "beta": 2.0,
                "uniform_roots": False,
                "levels": {"order": {"enabled": False}, "genus": {"alpha": 0.1, "beta": 0.0}},
                "class_weights": {"method": "capping", "cap": 10.0},
            },
            "weighting": {"kind": "fixed", "weights": {"order": 1.5, "genus": 1.0, "species": 0.5}},
            "mix": {
                "kind": "mixup_or_cutmix",
                "level": "species",
                "probability": {"kind": "linear", "start": 0.7, "end": 0.01, "until": 0.85},
                "min_group_size": 2,
                "mixup_alpha": 0.8,
                "cutmix_alpha": 1.5,
                "cutmix_share": 0.7,
            },
            "unknown": {"kind": "mask"},
            "optimizer": {"kind": "sgd", "lr": 0.03, "momentum": 0.8, "weight_decay": 0.01},
            "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.01},
            "train": {"epochs": 40, "batch_size": 96, "accumulation": 4, "seed": 3, "grad_clip": 10.0},
        }
    )
    assert reasons(result) == {
        "EXPERIMENT.TAGS": "a name is all that hiertune's runs have",
        "MODEL.TYPE": "part of Linnaeus' own models: hiertune trains those of timm, see model.backbone",
        "SCHEDULE.MIX.PROB.END_STEPS": "SCHEDULE.MIX.PROB.END_FRACTION says it",
    }


GRADNORM = """
DATA: {TASK_KEYS_H5: [taxa_L10, taxa_L20], PARTIAL: {LEVELS: True}, SAMPLER: {TYPE: standard}}
MODEL:
  CLASSIFICATION:
    HEADS: {taxa_L10: {TYPE: HierarchicalSoftmax}, taxa_L20: {TYPE: HierarchicalSoftmax}}
LOSS:
  TASK_SPECIFIC: {TRAIN: {FUNCS: TaxonomyAwareLabelSmoothing}}
  TAXONOMY_SMOOTHING: {PARTIAL_SUBTREE_WEIGHTING: True, FALLBACK_TO_UNIFORM: False}
  GRAD_WEIGHTING:
    TASK:
      TYPE: gradnorm
      GRADNORM_ENABLED: True
      ALPHA: 0.5
      UPDATE_INTERVAL: 50
      GRADNORM_WARMUP_STEPS: 2000
      GRADNORM_ACCUM_STEPS: 2
      INIT_STRATEGY: class_complexity
      USE_LINEAR_HEADS_FOR_GRADNORM_REFORWARD: False
      EXCLUDE_CONFIG:
        TYPE: or
        FILTERS:
          - {TYPE: name, PATTERNS: [head, meta_]}
          - {TYPE: name, MATCH_TYPE: startswith, PATTERNS: ['stem.']}
          - {TYPE: name, MATCH_TYPE: endswith, PATTERNS: ['.bias']}
          - {TYPE: name, MATCH_TYPE: regex, PATTERNS: ['blocks\\.[01]\\.']}
          - {TYPE: or, FILTERS: [{TYPE: layer_type, LAYER_TYPES: [LayerNorm]}]}
SCHEDULE:
  NULL_MASKING: {ENABLED: True, START_PROB: 0.0, END_PROB: 0.9, END_STEPS: 15000}
LR_SCHEDULER: {TOTAL_STEPS: 60000, WARMUP_STEPS: 3000, WARMUP_EPOCHS: 0, BASE_LR: 8e-4, MIN_LR: 0}
TRAIN: {AMP_OPT_LEVEL: O0, CLIP_GRAD: None}
"""


def test_an_experiment_with_gradnorm_and_unknown_labels(tmp_path):
    assert config_of(tmp_path, GRADNORM) == defaults_with(
        model=DEFAULTS["model"] | {"head": {"kind": "hierarchical_softmax"}},
        loss={"kind": "taxonomy_smoothing", "clade_share": 0.9, "fallback_to_uniform": False},
        weighting={
            "kind": "gradnorm",
            "alpha": 0.5,
            "interval": 50,
            "warmup_steps": 2000,
            "accumulate": True,
            "initial_weights": "class_complexity",
            "at": "backbone",
            "exclude": {
                "names": ["head"],
                "patterns": ["meta_", r"^stem\.", r"\.bias$", r"blocks\.[01]\."],
                "types": ["LayerNorm"],
            },
            "linear_heads": False,
        },
        mix={"kind": "none"},
        unknown={
            "kind": "outcome",
            "probability": {"kind": "linear", "start": 0.0, "end": 0.9, "until": 0.25},
        },
        optimizer={"kind": "adamw", "lr": 1e-4, "weight_decay": 0.05},
        schedule={"kind": "cosine", "warmup": 0.05, "final": 0.0},
        train={"epochs": 300, "batch_size": 64, "seed": 42},
    )


DOCUMENTED_MIXUP = """
SCHEDULE:
  MIXUP:
    GROUP_LEVELS: ['taxa_L10']
    EXCLUDE_NULL_SAMPLES: True
    ENABLED: True
    PROB_SCHEDULE: {TYPE: TYPE_, START_PROB: 0.8, END_PROB: 0.2}
    ALPHA: 0.4
"""


@pytest.mark.parametrize(
    ("kind", "probability"),
    [
        ("linear", {"kind": "linear", "start": 0.8, "end": 0.2}),
        ("cosine", {"kind": "cosine", "start": 0.8, "end": 0.2}),
        ("constant", {"kind": "constant", "value": 0.8}),
    ],
)
def test_mixup_as_the_documentation_spells_it(tmp_path, kind, probability):
    config = config_of(tmp_path, DOCUMENTED_MIXUP.replace("TYPE_", kind))
    assert config.mix.model_dump() == {
        "kind": "mixup",
        "level": "taxa_L10",
        "probability": defaults_with(
            mix={"kind": "mixup", "probability": probability}
        ).mix.probability.model_dump(),
        "min_group_size": 4,
        "exclude_unknown": True,
        "alpha": 0.4,
    }


# -------------------------------------------------------------------------------- single keys

ONE_KEY = {
    "plain losses": ("LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: CrossEntropyLoss}}}", "loss.smoothing", 0.0),
    "even smoothing": (
        "{LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: LabelSmoothingCrossEntropy}}},"
        " MODEL: {LABEL_SMOOTHING: 0.3}}",
        "loss.smoothing",
        0.3,
    ),
    "even smoothing by default": (
        "LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: LabelSmoothingCrossEntropy}}}",
        "loss.smoothing",
        0.1,
    ),
    "exponential": ("LOSS: {GRAD_WEIGHTING: {CLASS: {METHOD: exponential}}}", "loss.class_weights.base", 2.0),
    "logarithmic": (
        "LOSS: {GRAD_WEIGHTING: {CLASS: {METHOD: logarithmic, LOG_BASE: 5}}}",
        "loss.class_weights.base",
        5.0,
    ),
    "smoothing of counts": (
        "LOSS: {GRAD_WEIGHTING: {CLASS: {METHOD: smoothing, SMOOTHING_FACTOR: 2.0}}}",
        "loss.class_weights.smoothing",
        2.0,
    ),
    "class weights off": (
        "LOSS: {GRAD_WEIGHTING: {CLASS: {METHOD: smoothing, TRAIN: False}}}",
        "loss.class_weights.method",
        "none",
    ),
    "levels with different class weights": (
        "LOSS: {GRAD_WEIGHTING: {CLASS: {METHOD: [smoothing, capping, none, none]}}}",
        "loss.class_weights.method",
        "none",
    ),
    "static without weights": ("LOSS: {GRAD_WEIGHTING: {TASK: {TYPE: static}}}", "weighting.kind", "equal"),
    "gradnorm off": ("LOSS: {GRAD_WEIGHTING: {TASK: {GRADNORM_ENABLED: off}}}", "weighting.kind", "equal"),
    "no accumulation": ("TRAIN: {ACCUMULATION_STEPS: 0}", "train.accumulation", 1),
    "no mixup at all": ("SCHEDULE: {MIX: {MIXUP: {ENABLED: False}}}", "mix.kind", "none"),
    "no probability": ("SCHEDULE: {MIX: {PROB: {ENABLED: False}}}", "mix.kind", "none"),
    "mixing off": ("SCHEDULE: {MIXUP: {ENABLED: False}}", "mix.kind", "none"),
    "only cutmix": (
        "SCHEDULE: {MIX: {MIXUP: {ENABLED: False}, CUTMIX: {ENABLED: True, ALPHA: 0.7}}}",
        "mix.alpha",
        0.7,
    ),
    "steps of unknown share": ("SCHEDULE: {MIX: {PROB: {END_STEPS: 5000}}}", "mix.probability.until", 1.0),
    "nulls masked": ("TRAIN: {PHASE1_MASK_NULL_LOSS: True}", "unknown.kind", "mask"),
    "nulls count": ("DATA: {PARTIAL: {LEVELS: True}}", "unknown.probability.value", 1.0),
    "nulls by epochs": (
        "{DATA: {PARTIAL: {LEVELS: True}}, TRAIN: {EPOCHS: 200},"
        " SCHEDULE: {NULL_MASKING: {ENABLED: True, START_EPOCH: 50, END_EPOCH: 100}}}",
        "unknown.probability.until",
        0.5,
    ),
    "nulls from an epoch on": (
        "{DATA: {PARTIAL: {LEVELS: True}}, TRAIN: {EPOCHS: 200},"
        " SCHEDULE: {NULL_MASKING: {ENABLED: True, START_EPOCH: 50, END_EPOCH: 100}}}",
        "unknown.probability.begin",
        0.25,
    ),
    "nulls at once": (
        "{DATA: {PARTIAL: {LEVELS: True}},"
        " SCHEDULE: {NULL_MASKING: {ENABLED: True, END_STEPS: 0, END_PROB: 0.7}}}",
        "unknown.probability.value",
        0.7,
    ),
    "three betas": ("OPTIMIZER: {BETAS: '(0.8, 0.99, 0.9999)'}", "optimizer.betas", (0.8, 0.99)),
    "another optimiser": ("OPTIMIZER: {NAME: muon}", "optimizer.kind", "adamw"),
    "no policy": ("AUG: {AUTOAUG: {POLICY: None}}", "model.backbone.augment.policy", "none"),
    "no clipping": ("TRAIN: {CLIP_GRAD: 0}", "train.grad_clip", 0.0),
    "warm-up by epochs": (
        "{TRAIN: {EPOCHS: 40}, LR_SCHEDULER: {WARMUP_EPOCHS: 10}}",
        "schedule.warmup",
        0.25,
    ),
    "a lowest rate above the peak": ("LR_SCHEDULER: {BASE_LR: 1e-5, MIN_LR: 1e-5}", "schedule.final", 1.0),
    "smoothing not enabled at one level": (
        "LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: TaxonomyAwareLabelSmoothing}},"
        " TAXONOMY_SMOOTHING: {ENABLED: [True, True, True, False]}}",
        "loss.levels",
        {"taxa_L40": LevelSmoothingConfig(enabled=False)},
    ),
    "no warm-up": ("LR_SCHEDULER: {WARMUP_EPOCHS: 0}", "schedule.warmup", 0.0),
    "yes for true": ("SCHEDULE: {MIX: {EXCLUDE_NULL_SAMPLES: yes}}", "mix.exclude_unknown", True),
    "numbers as text": ("LR_SCHEDULER: {BASE_LR: '8e-4'}", "optimizer.lr", 1e-4),
}


@pytest.mark.parametrize("case", ONE_KEY)
def test_one_key(tmp_path, case):
    text, path, expected = ONE_KEY[case]
    value = config_of(tmp_path, text)
    for name in path.split("."):
        value = getattr(value, name)
    assert value == expected


def test_a_filter_that_cannot_be_said_is_not_carried_over(tmp_path):
    text = (
        "LOSS: {GRAD_WEIGHTING: {TASK: {EXCLUDE_CONFIG: {TYPE: not, FILTER: {TYPE: name, PATTERNS: [a]}}}}}"
    )
    result = imported(tmp_path, text)
    assert result.config.weighting.exclude.model_dump() == {"names": [], "patterns": [], "types": []}
    section = "LOSS.GRAD_WEIGHTING.TASK.EXCLUDE_CONFIG"
    reason = "hiertune's weighting.exclude cannot express a filter of type 'not'"
    assert reasons(result) == {f"{section}.TYPE": reason, f"{section}.FILTER": reason}


def test_two_spellings_of_one_key(tmp_path):
    text = "SCHEDULE: {MIX: {GROUP_LEVELS: [taxa_L20]}, MIXUP: {GROUP_LEVELS: [taxa_L10]}}"
    result = imported(tmp_path, text)
    assert result.config.mix.level == "taxa_L20"
    assert reasons(result) == {"SCHEDULE.MIXUP.GROUP_LEVELS": "SCHEDULE.MIX.GROUP_LEVELS says it"}


def test_the_data_set_gives_its_path_kind_levels_and_length(tmp_path):
    facts = DataFacts("/data/x.h5", ("family", "genus"), images=False, train_rows=1000)
    text = """
DATA: {TASK_KEYS_H5: [taxa_L20, taxa_L30], BATCH_SIZE: 100, IMG_SIZE: 384}
TRAIN: {EPOCHS: 10, ACCUMULATION_STEPS: 3}
MODEL: {DROP_RATE: 0.5}
AUG: {RANDOM_ERASE: {PROB: 0.5}}
SCHEDULE: {MIX: {GROUP_LEVELS: [taxa_L20], PROB: {END_STEPS: 10}, CUTMIX: {ENABLED: True}}}
"""
    result = imported(tmp_path, text, names=["family", "genus"], facts=facts)
    config = result.config
    assert config.data.path == "/data/x.h5"
    assert config.model.backbone.model_dump() == {
        "kind": "mlp",
        "hidden": [512],
        "dropout": 0.5,
        "input_dropout": 0.0,
        "activation": "relu",
        "norm": "none",
        "feature_length": 0.0,
        "standardize": True,
    }
    assert config.mix.kind == "mixup"
    assert config.mix.level == "genus"
    assert config.mix.probability.until == 10 / 40  # ten passes are four steps, ten times
    for key in ("DATA.IMG_SIZE", "AUG.RANDOM_ERASE.PROB", "SCHEDULE.MIX.CUTMIX.ENABLED"):
        assert reasons(result)[key] == "the rows of the data are no images"


def test_the_result_can_be_made_a_space(tmp_path):
    result = imported(tmp_path, "EXPERIMENT: {NAME: '../odd name'}\n")
    (tmp_path / "space.yaml").write_text(result.yaml().replace("alpha: 1.5", "alpha: {uniform: [0.0, 3.0]}"))
    space = load_space(tmp_path / "space.yaml")
    assert space.config.name == result.name == "odd-name"
    assert [parameter.key for parameter in space.parameters] == ["weighting.alpha"]


@pytest.mark.parametrize(
    ("name", "expected"), [("'9'", "9"), ("2024", "2024"), ("...", "experiment"), ("a b", "a-b")]
)
def test_any_name_becomes_one_that_a_space_may_have(tmp_path, name, expected):
    assert imported(tmp_path, f"EXPERIMENT:\n  NAME: {name}\n").name == expected


# ------------------------------------------------------------------------------- the account


def test_the_account_names_place_and_reason(tmp_path):
    train = "TRAIN:\n  EPOCHS: 3\n  ACUMULATION_STEPS: 3\n  EARLY_STOP: {ACTIVE: True}\n"
    text = f"{train}MODEL:\n  TYPE: mFormerV0\n"
    result = imported(tmp_path, text)
    file = tmp_path / "experiment.yaml"
    assert result.counts == "1 key carried over, 2 not, 1 unknown"
    assert result.yaml().startswith(f"# From the Linnaeus experiment experiment.yaml: {result.counts}.\n")
    lines = result.account().splitlines()
    assert lines[:8] == [
        f"{file}: {result.counts}",
        "",
        "not carried over:",
        f"  {file}:4: TRAIN.EARLY_STOP.ACTIVE: a search stops bad trials: see search.scheduler",
        f"  {file}:6: MODEL.TYPE: part of Linnaeus' own models: hiertune trains those of timm,"
        " see model.backbone",
        "",
        "unknown:",
        f"  {file}:3: TRAIN.ACUMULATION_STEPS: Linnaeus documents no such key"
        " (did you mean 'TRAIN.ACCUMULATION_STEPS'?)",
    ]
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles[1:] == ["not carried over:", "unknown:", "to be checked:", "what will differ:"]
    assert any(line.startswith("  model.backbone.name: resnet50 stands in") for line in lines)


def test_what_differs_is_said_only_where_it_applies(tmp_path):
    plain = """
DATA: {PARTIAL: {LEVELS: True}, SAMPLER: {TYPE: standard}}
TRAIN: {PHASE1_MASK_NULL_LOSS: True}
AUG: {AUTOAUG: {POLICY: none}}
LOSS: {GRAD_WEIGHTING: {TASK: {TYPE: static}}}
"""
    assert imported(tmp_path, plain).differs == ()
    assert "paper" in " ".join(imported(tmp_path, plain.replace("static", "gradnorm")).differs)
    assert "square" in " ".join(imported(tmp_path, plain.replace("standard", "grouped")).differs)


def checks_of(tmp_path, text, **options):
    checks = imported(tmp_path, text, **options).checks
    return [check for check in checks if check.startswith(("shares", "schedule.final"))]


def test_a_constant_rate_is_to_be_checked(tmp_path):
    rates = "TRAIN: {EPOCHS: 40}\nLR_SCHEDULER: {BASE_LR: 8e-5, MIN_LR: LOWEST}\n"
    said = "schedule.final: 1.0, so that the rate stays as it is after the warm-up: LR_SCHEDULER.MIN_LR"
    for lowest, shown in (("1e-5", "1e-05"), ("2e-5", "2e-05")):
        text = rates.replace("LOWEST", lowest)
        assert config_of(tmp_path, text).schedule.final == 1.0
        rest = f"({shown}) is not below the rate for one process (1e-05)"
        assert checks_of(tmp_path, text) == [f"{said} {rest}"]
    assert checks_of(tmp_path, rates.replace("LOWEST", "9e-6")) == []


TOTAL = (
    "shares of the training: of LR_SCHEDULER.TOTAL_STEPS (60000), which Linnaeus itself replaces by what"
    " TRAIN.EPOCHS and the data make; --data says it"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LR_SCHEDULER: {TOTAL_STEPS: 60000, WARMUP_STEPS: 3000, BASE_LR: 1.0}", [TOTAL]),
        ("SCHEDULE: {MIX: {PROB: {END_STEPS: 30000}}}\nLR_SCHEDULER: {TOTAL_STEPS: 60000}", [TOTAL]),
        ("LR_SCHEDULER: {TOTAL_STEPS: 60000, WARMUP_FRACTION: 0.1}", []),
        ("LR_SCHEDULER: {TOTAL_STEPS: 0, WARMUP_STEPS: 3000}", []),
    ],
)
def test_shares_of_total_steps_are_to_be_checked(tmp_path, text, expected):
    assert checks_of(tmp_path, text) == expected


def test_the_data_say_how_many_steps_there_are(tmp_path):
    text = "{TRAIN: {EPOCHS: 10}, LR_SCHEDULER: {TOTAL_STEPS: 60000, WARMUP_STEPS: 25}}"
    names = ("a", "b", "c", "d")
    facts = DataFacts("data.h5", names, False, train_rows=64 * 10)
    result = imported(tmp_path, text, names=names, facts=facts)
    assert result.config.schedule.warmup == 0.25
    assert [check for check in result.checks if "shares" in check] == []


def test_no_total_steps_are_none_given(tmp_path):
    result = imported(tmp_path, "LR_SCHEDULER: {TOTAL_STEPS: 0, WARMUP_STEPS: 3000}")
    assert result.config.schedule.warmup == 0.05
    assert reasons(result)["LR_SCHEDULER.TOTAL_STEPS"] == "is not given"
    assert "schedule.warmup: 0.05, because the share of WARMUP_STEPS is not known" in result.checks


# -------------------------------------------------------------------------------- bad values

BAD = {
    "a text for a number": (
        "TRAIN:\n  EPOCHS: many\n",
        2,
        "TRAIN.EPOCHS: got the text 'many'",
        "a whole number",
    ),
    "a fraction": ("TRAIN:\n  EPOCHS: 2.5\n", 2, "TRAIN.EPOCHS: got 2.5", "a whole number"),
    "a number for a switch": (
        "DATA:\n  PARTIAL:\n    LEVELS: 3\n",
        3,
        "DATA.PARTIAL.LEVELS: got 3",
        "true or false",
    ),
    "less than no steps": (
        "LR_SCHEDULER:\n  TOTAL_STEPS: -1\n",
        2,
        "LR_SCHEDULER.TOTAL_STEPS: -1 is out of range",
        "of at least 1, or 0 for none",
    ),
    "no epochs": ("TRAIN:\n  EPOCHS: 0\n", 2, "TRAIN.EPOCHS: 0 is out of range", "of at least 1"),
    "an unknown head": (
        "MODEL: {CLASSIFICATION: {HEADS: {\n taxa_L10: {TYPE: Softmax}}}}\n",
        2,
        "MODEL.CLASSIFICATION.HEADS.taxa_L10.TYPE: got the text 'Softmax'",
        "Linear, Conv1d, HierarchicalSoftmax, ConditionalClassifier",
    ),
    "a temperature of 0": (
        "MODEL: {CLASSIFICATION: {HEADS: {taxa_L10: {TYPE: ConditionalClassifier,\n  TEMPERATURE: 0}}}}\n",
        2,
        "HEADS.taxa_L10.TEMPERATURE: 0.0 is out of range",
        "above 0",
    ),
    "an unknown loss": (
        "LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: [Hinge, Hinge, Hinge, Hinge]}}}\n",
        1,
        "LOSS.TASK_SPECIFIC.TRAIN.FUNCS: got ['Hinge'",
        "TaxonomyAwareLabelSmoothing, or a list of 4",
    ),
    "too few entries": (
        "LOSS: {TASK_SPECIFIC: {TRAIN: {FUNCS: [CrossEntropyLoss]}}}\n",
        1,
        "LOSS.TASK_SPECIFIC.TRAIN.FUNCS: got ['CrossEntropyLoss']",
        "a list of 4 (one per entry of DATA.TASK_KEYS_H5)",
    ),
    "too few weights": (
        "LOSS: {GRAD_WEIGHTING: {TASK: {TYPE: static, INIT_WEIGHTS: [1.0]}}}\n",
        1,
        "INIT_WEIGHTS: got 1 numbers",
        "4, one per level",
    ),
    "no weight above 0": (
        "LOSS: {GRAD_WEIGHTING: {TASK: {TYPE: static, INIT_WEIGHTS: [0, 0, 0, 0]}}}\n",
        1,
        "LOSS.GRAD_WEIGHTING.TASK.INIT_WEIGHTS: at least one level must have a weight above 0",
        None,
    ),
    "out of hiertune's range": (
        "LOSS:\n  TASK_SPECIFIC: {TRAIN: {FUNCS: TaxonomyAwareLabelSmoothing}}\n"
        "  TAXONOMY_SMOOTHING:\n    ALPHA: 1.5\n",
        4,
        "LOSS.TAXONOMY_SMOOTHING.ALPHA: 1.5 is out of range",
        "of at least 0 and at most 1",
    ),
    "a share above 1": (
        "SCHEDULE: {MIX: {PROB: {END_FRACTION: 2.0}}}\n",
        1,
        "SCHEDULE.MIX.PROB.END_FRACTION: 2.0 is out of range",
        "at most 1",
    ),
    "a wrong beta": (
        "OPTIMIZER:\n  BETAS: [0.9, 3]\n",
        2,
        "OPTIMIZER.BETAS: 3.0 is out of range",
        "below 1",
    ),
    "coarse to fine": (
        "DATA:\n  TASK_KEYS_H5: [taxa_L20, taxa_L10]\n",
        2,
        "DATA.TASK_KEYS_H5: got [taxa_L20, taxa_L10]",
        "fine to coarse",
    ),
    "a level twice": (
        "DATA:\n  TASK_KEYS_H5: [a, a]\n",
        2,
        "DATA.TASK_KEYS_H5: must name each level once",
        None,
    ),
    "no such level": (
        "SCHEDULE: {MIX: {GROUP_LEVELS: [taxa_L5]}}\n",
        1,
        "SCHEDULE.MIX.GROUP_LEVELS: the experiment has no level 'taxa_L5'",
        "taxa_L10, taxa_L20, taxa_L30, taxa_L40",
    ),
    "epochs the wrong way round": (
        "{DATA: {PARTIAL: {LEVELS: True}},\n"
        "SCHEDULE: {NULL_MASKING: {ENABLED: True, START_EPOCH: 9, END_EPOCH: 3}}}\n",
        2,
        "SCHEDULE.NULL_MASKING.END_EPOCH: lies before SCHEDULE.NULL_MASKING.START_EPOCH",
        None,
    ),
    "a filter without a type": (
        "LOSS: {GRAD_WEIGHTING: {TASK: {EXCLUDE_CONFIG: {FILTERS: [{PATTERNS: [head]}]}}}}\n",
        1,
        "EXCLUDE_CONFIG.FILTERS: got [a mapping",
        "a list of filters, each with a TYPE",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_refused_with_its_place(tmp_path, case):
    text, line, problem, allowed = BAD[case]
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        import_experiment(file)
    error = caught.value
    assert (error.file, error.line) == (str(file), line)
    assert problem in f"{error.key}: {error.problem}"
    assert allowed is None or allowed in error.allowed


def test_names_must_fit_the_levels(tmp_path):
    with pytest.raises(InputError, match="--names: got genus, species") as caught:
        imported(tmp_path, "EXPERIMENT: {NAME: x}", names=["genus", "species"])
    assert caught.value.allowed.startswith("4 different names, coarse to fine, for taxa_L40, taxa_L30")


def test_the_data_must_have_the_levels(tmp_path):
    facts = DataFacts("x.h5", ("order", "family", "genus", "species"), images=True, train_rows=10)
    with pytest.raises(InputError, match="has the levels order, family") as caught:
        imported(tmp_path, "EXPERIMENT: {NAME: x}", facts=facts)
    assert caught.value.allowed == "--names order,family,genus,species"


# ---------------------------------------------------------------------------- any set of keys

_TASKS = ["taxa_L10", "taxa_L20", "taxa_L30", "taxa_L40"]
_PROBABILITY = st.floats(0, 1, allow_nan=False).map(lambda value: round(value, 4))
_SWITCH = st.booleans()


def _per_task(item):
    return item | st.lists(item, min_size=4, max_size=4)


_VALUES = {
    "EXPERIMENT.NAME": st.text("aZ9 é/._-", max_size=8),
    "DATA.TASK_KEYS_H5": st.just(_TASKS),
    "DATA.BATCH_SIZE": st.integers(1, 999),
    "DATA.IMG_SIZE": st.sampled_from([64, 224]),
    "MODEL.IMG_SIZE": st.sampled_from([64, 224]),
    "DATA.SAMPLER.TYPE": st.sampled_from(["grouped", "standard"]),
    "AUG.AUTOAUG.POLICY": st.sampled_from(["original", "v0r", "none"]),
    "MODEL.LABEL_SMOOTHING": st.sampled_from([0.0, 0.2]),
    "MODEL.DROP_RATE": st.sampled_from([0.0, 0.2]),
    "MODEL.DROP_PATH_RATE": st.sampled_from([0.0, 0.2]),
    "TYPE": st.sampled_from(["Linear", "HierarchicalSoftmax", "ConditionalClassifier"]),
    "ROUTING_STRATEGY": st.sampled_from(["soft", "hard", "gumbel"]),
    "TEMPERATURE": st.sampled_from([0.5, 1]),
    "USE_BIAS": _SWITCH,
    "FUNCS": _per_task(
        st.sampled_from(["TaxonomyAwareLabelSmoothing", "LabelSmoothingCrossEntropy", "CrossEntropyLoss"])
    ),
    "LOSS.GRAD_WEIGHTING.TASK.TYPE": st.sampled_from(["static", "gradnorm"]),
    "INIT_STRATEGY": st.sampled_from(["inverse_density", "class_complexity"]),
    "INIT_WEIGHTS": st.sampled_from([[], [1, 2, 3, 4.5]]),
    "UPDATE_INTERVAL": st.integers(1, 100),
    "EXCLUDE_CONFIG.TYPE": st.sampled_from(["or", "name", "and"]),
    "FILTERS": st.sampled_from([[], [{"TYPE": "name", "PATTERNS": ["head"]}], [{"TYPE": "dimension"}]]),
    "FILTER": st.just({"TYPE": "name", "PATTERNS": ["head"]}),
    "EXCEPT": st.just({"TYPE": "name", "PATTERNS": ["head"]}),
    "PATTERNS": st.just(["a.b"]),
    "LAYER_TYPES": st.just(["LayerNorm"]),
    "METHOD": _per_task(st.sampled_from(["none", "smoothing", "capping", "exponential", "logarithmic"])),
    "SMOOTHING_FACTOR": _per_task(st.sampled_from([0.1, 2])),
    "CAP": _per_task(st.sampled_from([5, 10.5])),
    "BASE": _per_task(st.sampled_from([2, 10.5])),
    "LOG_BASE": _per_task(st.sampled_from([2, 10.5])),
    "LOSS.TAXONOMY_SMOOTHING.ENABLED": st.lists(_SWITCH, min_size=4, max_size=4),
    "AMP_OPT_LEVEL": st.sampled_from(["O0", "O1"]),
    "OPTIMIZER.NAME": st.sampled_from(["adamw", "sgd", "muon"]),
    "OPTIMIZER.MOMENTUM": st.sampled_from([0, 0.8]),
    "BETAS": st.sampled_from([[0.9, 0.99], [0.9, 0.99, 0.999]]),
    "LR_SCHEDULER.NAME": st.sampled_from(["cosine", "step", "linear", "wsd"]),
    "REFERENCE_BS": st.sampled_from([256, 512]),
    "BASE_LR": st.sampled_from([1e-4, 0.1]),
    "MIN_LR": st.sampled_from([0, 1e-5]),
    "START_EPOCH": st.sampled_from([0, 5]),
    "END_EPOCH": st.sampled_from([5, 900]),
    "TOTAL_STEPS": st.integers(0, 10**6),
    "GROUP_LEVELS": st.sampled_from([["taxa_L10"], ["taxa_L20", "taxa_L10"]]),
    "NULL_TASK_KEYS": st.sampled_from([_TASKS, ["taxa_L10"], None]),
    "PROB.TYPE": st.sampled_from(["constant", "linear", "cosine"]),
    "PROB_SCHEDULE.TYPE": st.sampled_from(["constant", "linear", "cosine"]),
    "END_FRACTION": _PROBABILITY | st.none(),
    "WARMUP_FRACTION": _PROBABILITY | st.none(),
    "WARMUP_EPOCHS": st.sampled_from([0, 2.5]),
    "EPOCHS": st.integers(5, 500),
    "ACCUMULATION_STEPS": st.integers(0, 9),
    "CLIP_GRAD": st.sampled_from([None, 0, 5.0]),
    "ALPHA": st.sampled_from([0.1, 1]),
    "BETA": st.sampled_from([0, 2.5]),
}
_SWITCHES = ("ENABLED", "LEVELS", "TRAIN", "REFORWARD", "LOSS", "SAMPLES", "ROOTS", "UNIFORM", "WEIGHTING")
_COUNTS = ("STEPS", "SIZE", "SEED")


def _value_of(key):
    if known_keys()[key] is not None:
        return st.just([7, "text", [1, 2], None, True][len(key) % 5])
    names = [name for name in _VALUES if f".{key}".endswith(f".{name}")]
    if names:
        return _VALUES[max(names, key=len)]
    if key.endswith(_SWITCHES):
        return _SWITCH
    return st.integers(0, 20000) if key.endswith(_COUNTS) else _PROBABILITY


def _written(key):
    return key.replace("HEADS.*", "HEADS.taxa_L20").replace("**", "ANY.THING")


_CASES = {_written(key): _value_of(key) for key in known_keys()}
_CASES |= {key.replace("taxa_L20", "taxa_L99"): value for key, value in _CASES.items() if "taxa_L20" in key}
_CASES |= {
    "BASE": st.just([""]),
    "MODEL.BASE": st.just([]),
    **{f"{section}.FROM": st.just("") for section in SECTIONS_WITH_FROM},
}
_UNKNOWN = ["TRAIN.EPOCH", "FOO", "LOSS.GRAD_WEIGHTING.TASK.GAMMA"]
_CASES |= {key: st.just(1) for key in _UNKNOWN}


def _nested(flat):
    tree = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


@given(st.randoms(use_true_random=False), st.sets(st.sampled_from(sorted(_CASES)), max_size=60), st.data())
@settings(max_examples=25, deadline=None)
def test_any_keys_make_a_valid_config_and_each_is_accounted_for_once(tmp_path_factory, random, some, data):
    keys = sorted(set(_CASES) - some if random.random() < 0.3 else some or {"FOO"})
    values = data.draw(st.fixed_dictionaries({key: _CASES[key] for key in keys}))
    _check_account(tmp_path_factory.mktemp("x"), values)


def _check_account(folder: Path, flat):
    result = imported(folder, json.dumps(_nested(flat)))  # JSON is YAML
    assert sorted(outcome.key for outcome in result.outcomes) == sorted(flat)
    assert {outcome.key for outcome in result.outcomes if outcome.unknown} == set(_UNKNOWN) & set(flat)
    assert all(outcome.to is None or outcome.reason is None for outcome in result.outcomes)

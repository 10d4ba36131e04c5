"""Space files: what they say, what is wrong with them, and what comes out of them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError
from pathlib import Path

import jsonschema
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.config import FixedConfig, LevelSmoothingConfig, TrialConfig
from hiertune.errors import InputError
from hiertune.space import (
    Mismatch,
    Range,
    Space,
    dump_config,
    flatten,
    json_schema,
    load_config,
    load_space,
    located,
    parse_space,
)

SEARCH_SPACES = Path(__file__).parents[2] / "search_spaces"

SPACE = """\
name: rrna16s
data: {path: builtin:rrna16s}            # or an .h5 file
model:
  backbone: {kind: mlp, hidden: [512], dropout: {uniform: [0.0, 0.5]}}
  head:
    choice:
      - {kind: linear}
      - {kind: hierarchical_softmax}
      - kind: conditional
        routing: {choice: [soft, hard, gumbel]}
        temperature: {loguniform: [0.2, 5.0]}
loss:
  kind: taxonomy_smoothing
  alpha: {uniform: [0.0, 0.4]}
  beta: {loguniform: [0.1, 10.0]}
weighting:
  choice:
    - {kind: equal}
    - {kind: gradnorm, alpha: {uniform: [0.0, 3.0]}, interval: {logint: [1, 100]}}
optimizer: {kind: adamw, lr: {loguniform: [1e-4, 1e-2]}}
train: {epochs: 20, batch_size: {int: [64, 128]}, seed: 0, grad_clip: {quniform: [0, 1, 0.3]}}
search:
  objective: {metric: val/accuracy/genus, mode: max}
  trials: 32
  sampler: {kind: tpe}
  scheduler: {kind: asha}
  workers_per_trial: 2
tracking: {uri: null}                    # null: sqlite under runs/
"""
BASE = "name: t\ndata: {path: x.h5}\n"

BRANCHES = (
    BASE
    + """\
model:
  backbone:
    choice:
      - {kind: mlp, dropout: {uniform: [0.0, 0.5]}, standardize: {choice: [true, false]}}
      - {kind: identity, dropout: {uniform: [0.0, 0.9]}, standardize: {choice: [true, false]}}
  head: {kind: conditional, temperature: {choice: [1.0, {loguniform: [0.1, 10.0]}]}}
loss:
  kind: taxonomy_smoothing
  class_weights:
    choice: [{method: none}, {method: capping, cap: 5.0}, {method: capping, cap: {int: [2, 3]}}]
"""
)

PER_LEVEL = (
    BASE
    + """\
model: {head: {kind: conditional, final_temperature: {loguniform: [0.1, 1]}}}
loss:
  kind: taxonomy_smoothing
  alpha: 0.2
  beta: {loguniform: [0.1, 10.0]}
  clade_share: {uniform: [0.5, 1]}
  levels:
    family: {enabled: {choice: [true, false]}, beta: null}
    genus: {alpha: {uniform: [0, 0.4]}, beta: {choice: [null, {loguniform: [0.1, 10]}]}}
"""
)


def samples(space: Space, count: int) -> list[tuple[dict, TrialConfig]]:
    """Parameters and configs of random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(count):
        trial = study.ask()
        config = space.suggest(trial)
        found.append((dict(trial.params), config))
    return found


@pytest.fixture(autouse=True)
def _quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


# ------------------------------------------------------------------------------ what a file says


def test_the_searched_parameters_of_a_space():
    space = parse_space(SPACE)
    listed = [(p.name, str(p.distribution), p.condition, p.line) for p in space.parameters]
    assert listed == [
        ("model.backbone.dropout", "uniform: [0.0, 0.5]", "", 4),
        ("model.head", "choice: [linear, hierarchical_softmax, conditional]", "", 5),
        ("model.head.routing", "choice: [soft, hard, gumbel]", "model.head = conditional", 10),
        ("model.head.temperature", "loguniform: [0.2, 5.0]", "model.head = conditional", 11),
        ("loss.alpha", "uniform: [0.0, 0.4]", "", 14),
        ("loss.beta", "loguniform: [0.1, 10.0]", "", 15),
        ("weighting", "choice: [equal, gradnorm]", "", 16),
        ("weighting.alpha", "uniform: [0.0, 3.0]", "weighting = gradnorm", 19),
        ("weighting.interval", "logint: [1, 100]", "weighting = gradnorm", 19),
        ("optimizer.lr", "loguniform: [0.0001, 0.01]", "", 20),
        ("train.batch_size", "int: [64, 128]", "", 21),
        ("train.grad_clip", "quniform: [0.0, 1.0, 0.3]", "", 21),
    ]
    assert space.config.name == "rrna16s"
    assert space.config.search.workers_per_trial == 2
    assert space.config.tracking.uri is None
    assert space.fixed["train"] == {"epochs": 20, "seed": 0}
    assert space.fixed["model"] == {"backbone": {"kind": "mlp", "hidden": [512]}}
    assert space.max_epochs == 20


def test_defaults_are_first_choices_and_middles():
    defaults = parse_space(SPACE).defaults()
    assert defaults.model.backbone.dropout == 0.25
    assert defaults.model.head.kind == "linear"
    assert defaults.loss.alpha == 0.2
    assert defaults.loss.beta == 1.0
    assert defaults.weighting.kind == "equal"
    assert defaults.optimizer.lr == 1e-3
    assert defaults.train.batch_size == 96
    assert defaults.train.grad_clip == 0.3


@pytest.mark.parametrize(
    ("dist", "ends", "middle", "count"),
    [
        (Range("uniform", 0.0, 0.5), (0.0, 0.5), 0.25, float("inf")),
        (Range("loguniform", 0.01, 100.0), (0.01, 100.0), 1.0, float("inf")),
        (Range("uniform", 2.0, 2.0), (2.0, 2.0), 2.0, float("inf")),
        (Range("int", 1, 4), (1, 4), 2, 4),
        (Range("logint", 1, 10000), (1, 10000), 100, 10000),
        (Range("quniform", 0.0, 1.0, 0.3), (0.0, 0.9), 0.3, 4),
        (Range("quniform", 0.1, 0.3, 0.1), (0.1, 0.3), 0.2, 3),
    ],
)
def test_ranges(dist, ends, middle, count):
    assert dist.ends() == ends
    assert dist.representative() == middle
    assert dist.count == count
    if count < float("inf"):
        values = list(dist.values())
        assert len(values) == count
        assert (values[0], values[-1]) == ends
        assert [dist.accept(value) for value in values] == values
    assert all(dist.accept(end) == end for end in ends)
    for wrong in (ends[0] - 0.05, ends[1] + 0.05, "1", True, None, float("nan")):
        with pytest.raises(ValueError):  # noqa: PT011
            dist.accept(wrong)


def test_steps_are_exact_decimals():
    values = list(Range("quniform", 0.0, 1.0, 0.1).values())
    assert values == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    with pytest.raises(ValueError):  # noqa: PT011
        Range("quniform", 0.0, 1.0, 0.1).accept(0.15)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+1.5e+2", 150.0),
        ("3", 3.0),
        ("0x10", 16.0),
        ("0o17", 15.0),
        ("010", 10.0),
        ("-0", 0.0),
    ],
)
def test_numbers_are_read_as_yaml_1_2_has_it(text, value):
    clip = parse_space(f"{BASE}train: {{grad_clip: {text}}}").defaults().train.grad_clip
    assert clip == value
    assert isinstance(clip, float)


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "1_000", "1:30", "2024-01-01", "0b1", "<<"])
def test_words_that_yaml_1_1_converts_stay_text(word):
    assert parse_space(f"name: t\ndata: {{path: {word}}}").defaults().data.path == word


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_only_true_and_false_are_booleans(word):
    assert (
        parse_space(f"{BASE}optimizer: {{kind: sgd, nesterov: {word}}}").defaults().optimizer.nesterov is True
    )


def test_level_names_that_look_like_other_things():
    text = f"{BASE}weighting: {{kind: fixed, weights: {{1: 2, on: 1, null: 3, choice: 4, a.b: 5}}}}"
    assert parse_space(text).defaults().weighting.weights == {
        "1": 2.0,
        "on": 1.0,
        "null": 3.0,
        "choice": 4.0,
        "a.b": 5.0,
    }


def test_no_config_key_is_named_like_a_distribution():
    """Else a list under that key would be taken for one."""
    schema = TrialConfig.model_json_schema()
    keys = {key for model in schema["$defs"].values() for key in model["properties"]}
    assert not keys & {"uniform", "loguniform", "quniform", "int", "logint", "choice", "normal"}


def test_lines_of_keys():
    space = parse_space(SPACE)
    assert space.line_of("search.objective.metric") == 23
    assert space.line_of("model.head.temperature") == 11  # inside a branch
    assert space.line_of("search.refit") == 22  # not written: its section
    assert space.line_of("schedule.warmup") == 1  # nor that
    space = parse_space(f"{BASE}optimizer:\n  betas:\n  - 0.9\n  - 0.99\n  kind: adamw")
    assert space.line_of("optimizer.betas[1]") == 6
    assert space.line_of("optimizer.betas[2]") == 4


# ------------------------------------------------------------------------------------------ names


def test_names_tell_branches_apart_only_where_they_must():
    space = parse_space(BRANCHES)
    assert [(p.name, p.key, p.condition) for p in space.parameters] == [
        ("model.backbone", "model.backbone", ""),
        ("model.backbone[mlp].dropout", "model.backbone.dropout", "model.backbone = mlp"),
        ("model.backbone.standardize", "model.backbone.standardize", "model.backbone = mlp"),
        ("model.backbone[identity].dropout", "model.backbone.dropout", "model.backbone = identity"),
        ("model.backbone.standardize", "model.backbone.standardize", "model.backbone = identity"),
        ("model.head.temperature", "model.head.temperature", ""),
        (
            "model.head.temperature[loguniform]",
            "model.head.temperature",
            "model.head.temperature = loguniform",
        ),
        ("loss.class_weights", "loss.class_weights", ""),
        ("loss.class_weights.cap", "loss.class_weights.cap", "loss.class_weights = method=capping"),
    ]


def test_equal_distributions_of_exclusive_branches_share_their_names():
    entry = "dropout: {choice: [0.0, {uniform: [0.1, 0.5]}]}"
    text = f"{BASE}model: {{backbone: {{choice: [{{kind: mlp, {entry}}}, {{kind: identity, {entry}}}]}}}}"
    assert [p.name for p in parse_space(text).parameters] == [
        "model.backbone",
        *["model.backbone.dropout", "model.backbone.dropout[uniform]"] * 2,
    ]


def test_a_choice_in_a_choice_never_shares_its_name():
    inner = "{choice: [{choice: [1, 2]}, 3]}"
    space = parse_space(f"{BASE}train: {{batch_size: {{choice: [{inner}, 3]}}}}")
    labels = {p.name: p.distribution.labels for p in space.parameters}
    assert labels == {
        "train.batch_size": ("choice", 3),
        "train.batch_size[choice]": ("choice", 3),
        "train.batch_size[choice][choice]": (1, 2),
    }
    taken = {"train.batch_size": "choice", "train.batch_size[choice]": 3}
    assert space.resolve(taken).train.batch_size == 3


def test_knobs_of_single_levels_are_searched_like_any_other():
    space = parse_space(PER_LEVEL)
    assert [(p.name, str(p.distribution)) for p in space.parameters] == [
        ("model.head.final_temperature", "loguniform: [0.1, 1.0]"),
        ("loss.beta", "loguniform: [0.1, 10.0]"),
        ("loss.clade_share", "uniform: [0.5, 1.0]"),
        ("loss.levels.family.enabled", "choice: [true, false]"),
        ("loss.levels.genus.alpha", "uniform: [0.0, 0.4]"),
        ("loss.levels.genus.beta", "choice: [null, loguniform]"),
        ("loss.levels.genus.beta[loguniform]", "loguniform: [0.1, 10.0]"),
    ]
    assert space.defaults().loss.levels == {
        "family": LevelSmoothingConfig(),
        "genus": LevelSmoothingConfig(alpha=0.2),
    }
    resolved = space.resolve(
        {
            "model.head.final_temperature": 0.5,
            "loss.beta": 3.0,
            "loss.clade_share": 0.75,
            "loss.levels.family.enabled": False,
            "loss.levels.genus.alpha": 0.0,
            "loss.levels.genus.beta": "loguniform",
            "loss.levels.genus.beta[loguniform]": 7.0,
        }
    )
    assert (resolved.loss.alpha, resolved.loss.beta, resolved.loss.clade_share) == (0.2, 3.0, 0.75)
    assert resolved.loss.levels == {
        "family": LevelSmoothingConfig(enabled=False),
        "genus": LevelSmoothingConfig(alpha=0.0, beta=7.0),
    }


@pytest.mark.parametrize(
    ("entries", "labels"),
    [
        ("[{kind: linear}, {kind: conditional}]", ("linear", "conditional")),
        ("[{kind: linear}, {kind: linear, bias: false}]", ("linear#0", "linear#1")),
        ("[{kind: {choice: [linear]}}, {kind: linear}]", ("branch", "linear")),
        (
            "[{kind: conditional, temperature: {choice: [1, {uniform: [2, 3]}, {uniform: [4, 5]}]}}]",
            ("conditional",),
        ),
        ("[{choice: [{kind: linear}]}, {kind: conditional}]", ("choice", "conditional")),
    ],
)
def test_labels_of_branches(entries, labels):
    (parameter, *_) = parse_space(f"{BASE}model: {{head: {{choice: {entries}}}}}").parameters
    assert parameter.distribution.labels == labels


def test_labels_of_lists_and_scalars():
    hidden = "{choice: [[512], [512, 256], [{int: [1, 2]}, 3], [{int: [1, 2]}, 4]]}"
    model = f"model: {{backbone: {{kind: mlp, hidden: {hidden}}}}}\n"
    space = parse_space(f"{BASE}{model}train: {{grad_clip: {{choice: [0, 1.5]}}}}")
    assert [p.distribution.labels for p in space.parameters if p.distribution.name == "choice"] == [
        ("[512]", "512-256", "list#2", "list#3"),
        (0, 1.5),
    ]
    # two lists hold the same range at the same place: one name, since no trial has both
    assert {p.name for p in space.parameters if p.distribution.name == "int"} == {"model.backbone.hidden[0]"}
    resolved = space.resolve(
        {"model.backbone.hidden": "list#3", "model.backbone.hidden[0]": 2, "train.grad_clip": 0}
    )
    assert resolved.model.backbone.hidden == [2, 4]


# --------------------------------------------------------------------------------- from trials


@pytest.mark.parametrize("text", [SPACE, BRANCHES, PER_LEVEL], ids=["space", "branches", "per level"])
def test_sampled_configs_are_valid_and_come_back_from_their_parameters(text):
    space = parse_space(text)
    found = samples(space, 200)
    for params, config in found:
        assert TrialConfig.model_validate(config.model_dump()) == config
        assert space.resolve(params) == config
        assert space.resolve(json.loads(json.dumps(params))) == config
        assert space.suggest(optuna.trial.FixedTrial(params)) == config
    assert len({dump_config(config) for _, config in found}) > 100


class Recorder:
    """An Optuna trial that takes the first label of each choice but `pick`, and the low end of each range."""

    def __init__(self, **pick) -> None:
        self.pick = pick
        self.asked: list[tuple] = []

    def suggest_float(self, name, low, high, *, step=None, log=False):
        self.asked.append((name, "float", low, high, step, log))
        return low

    def suggest_int(self, name, low, high, *, step=1, log=False):
        self.asked.append((name, "int", low, high, step, log))
        return low

    def suggest_categorical(self, name, choices):
        self.asked.append((name, *choices))
        return self.pick.get(name, choices[0])


def test_what_optuna_is_asked():
    trial = Recorder(weighting="gradnorm")
    parse_space(SPACE).suggest(trial)
    assert trial.asked == [
        ("model.backbone.dropout", "float", 0.0, 0.5, None, False),
        ("model.head", "linear", "hierarchical_softmax", "conditional"),
        ("loss.alpha", "float", 0.0, 0.4, None, False),
        ("loss.beta", "float", 0.1, 10.0, None, True),
        ("weighting", "equal", "gradnorm"),
        ("weighting.alpha", "float", 0.0, 3.0, None, False),
        ("weighting.interval", "int", 1, 100, 1, True),
        ("optimizer.lr", "float", 1e-4, 1e-2, None, True),
        ("train.batch_size", "int", 64, 128, 1, False),
        ("train.grad_clip", "float", 0.0, 0.9, 0.3, False),
    ]


def test_values_reach_their_places():
    params = {
        "model.backbone.dropout": 0.1,
        "model.head": "conditional",
        "model.head.routing": "gumbel",
        "model.head.temperature": 0.5,
        "loss.alpha": 0.3,
        "loss.beta": 2.0,
        "weighting": "gradnorm",
        "weighting.alpha": 0.7,
        "weighting.interval": 5,
        "optimizer.lr": 0.002,
        "train.batch_size": 100,
        "train.grad_clip": 0.6,
    }
    config = parse_space(SPACE).resolve(params)
    assert (config.model.head.routing, config.model.head.temperature) == ("gumbel", 0.5)
    assert (config.weighting.alpha, config.weighting.interval) == (0.7, 5)
    assert (config.loss.alpha, config.loss.beta, config.optimizer.lr) == (0.3, 2.0, 0.002)
    assert (config.train.batch_size, config.train.grad_clip) == (100, 0.6)


def test_a_parameter_exists_only_in_the_branch_that_uses_it():
    space = parse_space(BRANCHES)
    for params, _ in samples(space, 60):
        taken = {
            parameter.name
            for parameter in space.parameters
            if all(params.get(name) == label for name, label in parameter.conditions)
        }
        assert set(params) == taken
        assert ("model.backbone[mlp].dropout" in params) == (params["model.backbone"] == "mlp")
        assert ("model.head.temperature[loguniform]" in params) == (
            params["model.head.temperature"] == "loguniform"
        )


def test_the_tpe_sampler_takes_a_conditional_space_without_a_warning():
    space = parse_space(BRANCHES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=0, n_startup_trials=5
        )
        study = optuna.create_study(sampler=sampler)
        for _ in range(30):
            trial = study.ask()
            study.tell(trial, space.suggest(trial).model.backbone.dropout)
    assert len(study.trials) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss.alpha": 0.5}, "loss.alpha: 0.5 is not in uniform: [0.0, 0.4]"),
        ({"loss.alpha": "x"}, "loss.alpha: 'x' is not in uniform: [0.0, 0.4]"),
        (
            {"model.head": "cubic"},
            "model.head: 'cubic' is not in choice: [linear, hierarchical_softmax, conditional]",
        ),
        ({"loss.gamma": 1}, "loss.gamma: the space has no such parameter in the branches taken"),
        (
            {"model.head.routing": "soft"},
            "model.head.routing: the space has no such parameter in the branches taken",
        ),
        ({"loss.alpha": None}, "loss.alpha: null is not in uniform: [0.0, 0.4]"),
        ({"model.head": "conditional"}, "model.head.routing: the parameter has no value"),
    ],
)
def test_parameters_that_are_not_of_the_space(change, message):
    space = parse_space(SPACE)
    params = next(params for params, config in samples(space, 20) if config.model.head.kind == "linear")
    with pytest.raises(InputError) as caught:
        space.resolve({**params, **change})
    assert str(caught.value) == message


def test_a_space_pickles_and_is_frozen():
    space = parse_space(SPACE)
    again = pickle.loads(pickle.dumps(space))
    assert again == space
    ((params, config),) = samples(space, 1)
    assert pickle.loads(pickle.dumps(space.suggest))(optuna.trial.FixedTrial(params)) == config
    with pytest.raises(FrozenInstanceError):
        space.text = ""


def test_trees_are_equal_for_files_that_search_the_same():
    moved = "# a comment\n\n" + SPACE.replace("trials: 32", "trials: 64")
    assert parse_space(moved).tree == parse_space(SPACE).tree
    assert parse_space(SPACE.replace("5.0]", "6.0]")).tree != parse_space(SPACE).tree


# -------------------------------------------------------------------------------------- corners


def test_corners_hold_every_branch_and_both_ends_of_every_range():
    configs = [corner.config for corner in parse_space(SPACE).corners()]
    assert configs[0] == parse_space(SPACE).defaults()
    conditional = [config.model.head for config in configs if config.model.head.kind == "conditional"]
    gradnorm = [config.weighting for config in configs if config.weighting.kind == "gradnorm"]
    assert {config.model.head.kind for config in configs} == {"linear", "hierarchical_softmax", "conditional"}
    assert {head.routing for head in conditional} == {"soft", "hard", "gumbel"}
    assert {0.2, 5.0} <= {head.temperature for head in conditional}
    assert {0.0, 3.0} <= {weighting.alpha for weighting in gradnorm}
    assert {1, 100} <= {weighting.interval for weighting in gradnorm}
    assert {0.0, 0.5} <= {config.model.backbone.dropout for config in configs}
    assert {0.0, 0.4} <= {config.loss.alpha for config in configs}
    assert {64, 128} <= {config.train.batch_size for config in configs}
    assert {0.0, 0.9} <= {config.train.grad_clip for config in configs}


def test_the_number_of_corners_does_not_explode():
    def section(name: str, kind: str, *keys: str) -> str:
        branches = [f"{{kind: {kind}, {key}: {{choice: [0.1, 0.2, 0.3]}}}}" for key in keys]
        return f"{name}: {{choice: [{', '.join(branches)}]}}\n"

    loss = section("loss", "taxonomy_smoothing", "alpha", "beta")
    schedule = section("schedule", "cosine", "warmup", "final")
    optimizer = section("optimizer", "adamw", "lr", "weight_decay")
    space = parse_space(BASE + loss + schedule + optimizer)
    assert space.size() == 6**3
    # the defaults, 3 * 2 branches and 6 * 3 entries one by one, and 3 pairs of sections with 2 * 2 branches
    assert len(list(space.corners())) == 1 + 6 + 18 + 12


def test_long_choices_stay_quick_to_check():
    entries = ", ".join(map(str, range(1000)))
    text = f"{BASE}train: {{seed: {{choice: [{entries}]}}, grad_clip: {{choice: [{entries}]}}}}"
    assert len(list(parse_space(text).corners())) == 1 + 2 * 1000 + 8 * 8
    with pytest.raises(InputError) as caught:
        parse_space(f"{BASE}train: {{seed: {{choice: [{entries}, 1000]}}}}")
    assert str(caught.value) == "train.seed: choice: more than 1,000 entries: use a range"


def test_two_values_that_only_together_break_a_rule_are_found():
    text = (
        f"{BASE}optimizer: {{kind: sgd, momentum: {{choice: [0.9, 0]}}, nesterov: {{choice: [false, true]}}}}"
    )
    with pytest.raises(InputError) as caught:
        parse_space(text)
    assert str(caught.value) == "optimizer: nesterov needs a momentum above 0"
    assert caught.value.line == 3


def test_all_data_sections():
    space = parse_space(
        "name: t\ndata: {choice: [{path: a.h5}, {path: 'builtin:x', kmer: {k: {int: [4, 5]}}}]}"
    )
    assert [(data.path, data.kmer.k) for data in space.data_configs()] == [
        ("a.h5", 6),
        ("builtin:x", 4),
        ("builtin:x", 5),
    ]


# ------------------------------------------------------------------------------------- the grid

GRID = (
    BASE
    + """\
model:
  head:
    choice:
      - {kind: linear}
      - {kind: conditional, routing: {choice: [soft, hard]}, temperature: {quniform: [0.5, 1.0, 0.25]}}
train: {batch_size: {int: [7, 8]}}
search: {sampler: {kind: grid}}
"""
)


def test_the_grid_has_every_config_once():
    space = parse_space(GRID)
    points = list(space.grid())
    assert space.size() == len(points) == (1 + 2 * 3) * 2
    assert points[:3] == [
        {"model.head": "linear", "train.batch_size": 7},
        {"model.head": "linear", "train.batch_size": 8},
        {
            "model.head": "conditional",
            "model.head.routing": "soft",
            "model.head.temperature": 0.5,
            "train.batch_size": 7,
        },
    ]
    assert len({dump_config(space.resolve(point)) for point in points}) == len(points)


def test_the_size_of_a_huge_space():
    many = "{logint: [1, 1000000000]}"
    weights = f"weighting: {{kind: fixed, weights: {{{', '.join(f'l{i}: {many}' for i in range(40))}}}}}\n"
    assert parse_space(BASE + weights).size() == 10**360  # more than a float can hold
    assert parse_space(f"{BASE}{weights}train: {{grad_clip: {{uniform: [0, 1]}}}}").size() == float("inf")


def test_a_space_without_parameters_is_one_config():
    space = parse_space(BASE)
    assert (space.size(), list(space.grid()), space.parameters) == (1, [{}], ())


def test_a_grid_over_a_continuous_range_is_an_error():
    message = (
        "optimizer.lr: loguniform: [0.0001, 0.01] is continuous: a grid cannot try all its values\n"
        "  allowed: quniform, int, logint or choice; or another sampler"
    )
    text = f"{BASE}optimizer: {{kind: adamw, lr: {{loguniform: [1e-4, 1e-2]}}}}\n"
    space = parse_space(text)
    assert space.size() == float("inf")
    for act in (space.require_finite, lambda: next(space.grid()), lambda: parse_space(text + GRID[-32:])):
        with pytest.raises(InputError) as caught:
            act()
        assert str(caught.value) == message
        assert caught.value.line == 3


# --------------------------------------------------------------------------------------- configs


def test_a_dumped_config_is_read_back_unchanged(tmp_path):
    for _, config in samples(parse_space(SPACE), 20) + samples(parse_space(BRANCHES), 20):
        path = tmp_path / "best.yaml"
        path.write_text(f"name: best\n{dump_config(config)}", encoding="utf-8")
        assert load_config(path) == config


@pytest.mark.parametrize(
    "text", ["1e-4", "yes", "null", "~", "0x1F", "", " a ", "ä/ö: #", "!!x", "&a", "*a", "-\n?"]
)
def test_dumped_text_stays_text(tmp_path, text):
    weights = FixedConfig(weights={text: 1e-10, "a.b": 1e22, "other": 3})
    config = TrialConfig.model_validate({"data": {"path": text}, "weighting": weights})
    path = tmp_path / "best.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_dumped_config_is_readable():
    text = dump_config(parse_space(SPACE).defaults())
    assert "model:\n  backbone:\n    kind: mlp\n    hidden: [512]\n    dropout: 0.25\n" in text
    assert "  betas: [0.9, 0.999]\n" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SPACE,
            "FILE:4: model.backbone.dropout: 'uniform' is a distribution, but a config is fixed: "
            "give this file to `hiertune search`",
        ),
        (
            f"{BASE}search: {{trials: 3}}",
            "FILE:3: search: is part of a space, not of a config: give this file to `hiertune search`\n"
            "  allowed: name, data, model, loss, weighting, mix, unknown, optimizer, schedule, train",
        ),
        (
            f"{BASE}train: {{epochs: 0}}",
            "FILE:3: train.epochs: 0 is out of range\n  allowed: a whole number above 0",
        ),
        ("name: x\ndata: {}", "FILE:2: data.path: is required, but missing\n  allowed: text"),
    ],
)
def test_what_is_no_config(tmp_path, text, message):
    path = tmp_path / "best.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value) == message.replace("FILE", str(path))


def test_flat_values_by_key_path():
    text = f"{BASE}weighting: {{kind: fixed, weights: {{genus: 2, a.b: 1}}}}\ntrain: {{epochs: 3}}"
    flat = flatten(parse_space(text).defaults())
    assert flat["weighting.weights.genus"] == 2.0
    assert flat["weighting.weights.a.b"] == 1.0
    assert flat["model.backbone.hidden"] == "[512]"
    assert flat["optimizer.betas"] == "[0.9, 0.999]"
    assert (flat["train.epochs"], flat["train.device"]) == (3, "auto")
    assert flat["model.backbone.standardize"] is True
    assert all(value is None or isinstance(value, bool | int | float | str) for value in flat.values())
    assert flatten(parse_space(SPACE).config)["search.sampler.kind"] == "tpe"


# ----------------------------------------------------------------------------------- broken files


def read_broken() -> dict[str, tuple[str, str]]:
    """By name: a file's text, and the whole message it must give (FILE stands for its path)."""
    cases = {
        "empty": ("", "FILE: is empty"),
        "control": (BASE + "# \x07", "FILE:3: is not valid YAML: the character U+0007 is not allowed"),
        "depth": (f"{BASE}a: {'[' * 40}\n", "FILE:3: nested more than 32 deep"),
        "digits": (f"{BASE}train: {{seed: {'9' * 5000}}}", "FILE:3: train.seed: is too large a number"),
    }
    for case in Path(__file__).with_name("broken_spaces.txt").read_text(encoding="utf-8").split("#### ")[1:]:
        name, _, rest = case.partition("\n")
        text, _, message = rest.partition(">>>>\n")
        cases[name] = (text, message.strip("\n"))
    return cases


BROKEN = read_broken()
NOT_IN_SCHEMA = "(a schema has no words for it)"


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_file_gives_one_readable_message(tmp_path, case):
    text, message = BROKEN[case]
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_space(path)
    expected = message.replace("FILE", str(path))
    assert str(caught.value) == expected
    assert str(pickle.loads(pickle.dumps(caught.value))) == expected


def test_what_is_allowed_can_be_said_of_every_key():
    from hiertune._problems import describe
    from hiertune._schema import plain_schema

    schema = plain_schema()
    sections = [schema, *schema["$defs"].values()]
    values = [value for section in sections for key, value in section["properties"].items() if key != "kind"]
    assert len(values) > 80
    assert all(describe(value) for value in values)


def test_at_most_ten_problems_are_put_into_words():
    keys = ", ".join(f"k{index:02}: 1" for index in range(13))
    with pytest.raises(InputError) as caught:
        parse_space(f"{BASE}train: {{{keys}}}")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("train.")] == [
        f"train.k{index:02}" for index in range(10)
    ]
    assert lines[-1] == "and 3 more"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"name: t\ndata: \xff\xfe", "FILE:2: is not UTF-8 text"),
        (b"\x89HDF\r\n\x1a\n", "FILE:1: is not UTF-8 text"),
        (b"name: t\n" * 50_000, "FILE: is larger than 256 KiB: not a YAML file of settings"),
    ],
)
def test_files_that_are_not_text(tmp_path, raw, message):
    path = tmp_path / "space.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        load_space(path)
    assert str(caught.value) == message.replace("FILE", str(path))


def test_files_that_cannot_be_read(tmp_path):
    for path, problem in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(InputError) as caught:
            load_space(path)
        assert str(caught.value) == f"{path}: cannot be read: {problem}"
    with pytest.raises(InputError, match="is not a file name"):
        load_space("a\0b")


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load_space(path).text == BASE
    assert load_space(path).folder == tmp_path


TOKENS = [
    "{",
    "}",
    "[",
    "]",
    ": ",
    ", ",
    "\n",
    "  ",
    "- ",
    "choice",
    "uniform",
    "kind: ",
    "null",
    "true",
    "0",
    "-1",
]
TOKENS += [
    "1e400",
    ".nan",
    "'",
    '"',
    "#",
    "&a ",
    "*a",
    "!!x ",
    "|",
    "? ",
    "\t",
    "\\",
    "\x00",
    "é",
    "---\n",
    "9" * 30,
]
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(["", *TOKENS]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([SPACE, BRANCHES, GRID]), st.lists(EDIT, min_size=1, max_size=4))
def test_a_damaged_file_gives_a_space_or_an_input_error(text, edits):
    for place, length, inserted in edits:
        start = int(place * len(text))
        text = text[:start] + inserted + text[start + length :]
    try:
        space = parse_space(text)
    except InputError as error:
        assert str(error)  # noqa: PT017
    else:
        assert isinstance(space.defaults(), TrialConfig)


# -------------------------------------------------------------------------------------- the schema


def yaml_tree(text: str):
    """A YAML text as plain values."""
    from hiertune._yaml import parse_yaml

    def plain(node):
        if isinstance(node.value, dict):
            return {key: plain(value) for key, value in node.value.items()}
        return [plain(item) for item in node.value] if isinstance(node.value, tuple) else node.value

    return plain(parse_yaml(text))


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))


def test_every_shipped_space_is_valid_and_passes_the_schema(validator):
    files = sorted(SEARCH_SPACES.rglob("*.yaml"))
    assert files
    for file in files:
        assert load_space(file).parameters
        validator.validate(yaml_tree(file.read_text(encoding="utf-8")))


INSIDE = (
    BASE
    + """\
model: {backbone: {kind: mlp, hidden: [{int: [1, 4]}, 3]}}
optimizer: {kind: adamw, betas: [0.9, {uniform: [0.9, 0.99]}]}
weighting: {kind: fixed, weights: {genus: {choice: [1, {uniform: [2, 3]}]}}}
"""
)


@pytest.mark.parametrize(
    "text",
    [SPACE, BRANCHES, PER_LEVEL, GRID, INSIDE],
    ids=["space", "branches", "per level", "grid", "inside"],
)
def test_the_schema_accepts_what_loads(validator, text):
    validator.validate(yaml_tree(text))
    for _, config in samples(parse_space(text), 5):
        validator.validate({"name": "t", **config.model_dump(mode="json")})


def test_the_schema_rejects_what_does_not_load(validator):
    missed = set()
    for case, (text, _) in BROKEN.items():
        try:
            tree = yaml_tree(text)
        except InputError:
            continue  # not even YAML
        if validator.is_valid(tree):
            missed.add(case)
    assert missed == {case for case in BROKEN if case.endswith(NOT_IN_SCHEMA)}


def test_the_schema_explains_every_described_key():
    schema = json_schema()
    sections = schema["$defs"]
    assert sections["GradNormConfig"]["properties"]["alpha"] == {
        "$ref": "#/$defs/GradNormConfig.alpha",
        "default": 1.5,
        "description": "How strongly slow levels are pulled up (the paper's asymmetry).",
    }
    ranges = [set(option["properties"]) for option in sections["GradNormConfig.alpha"]["anyOf"][1:]]
    assert ranges == [{"int"}, {"logint"}, {"uniform"}, {"loguniform"}, {"quniform"}, {"choice"}]
    assert "$ref" not in sections["SearchSection"]["properties"]["trials"]  # not searched


def test_an_optional_number_may_be_null_or_a_range_within_its_bounds(validator):
    def accepts(alpha: str, key: str = "alpha") -> bool:
        levels = f"{{genus: {{{key}: {alpha}}}}}"
        return validator.is_valid(yaml_tree(f"{BASE}loss: {{kind: taxonomy_smoothing, levels: {levels}}}"))

    for good in ("0.4", "null", "{uniform: [0, 0.4]}", "{loguniform: [0.1, 1]}", "{choice: [null, 0.1]}"):
        assert accepts(good), good
    for bad in ("1.5", "{uniform: [0, 1.5]}", "{uniform: [-1, 1]}", "{uniform: [0, null]}", "{choice: [x]}"):
        assert not accepts(bad), bad
    assert accepts("{uniform: [0, 50]}", "beta")

    def width(size: str) -> bool:
        backbone = f"{{kind: timm, name: resnet18, image_size: {size}}}"
        return validator.is_valid(yaml_tree(f"{BASE}model: {{backbone: {backbone}}}"))

    assert width("{int: [64, 128]}")
    assert not width("{uniform: [64, 128]}")  # whole numbers only
    assert not width("{int: [0, 128]}")


# ------------------------------------------------------------------------------------ the package


def test_linnaeus_searches_exactly_the_documented_knobs():
    names = {parameter.name for parameter in load_space(SEARCH_SPACES / "linnaeus.yaml").parameters}
    assert names == {
        "loss.alpha",
        "loss.beta",
        "model.head",
        "model.head.routing",
        "model.head.temperature",
        "weighting.alpha",
    }


def test_reading_a_space_imports_nothing_heavy():
    code = (
        "import sys; from hiertune.space import load_space; load_space(sys.argv[1]); "
        "print(sorted({'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    file = SEARCH_SPACES / "linnaeus.yaml"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_located_makes_the_paths_of_a_config_absolute(tmp_path):
    space = parse_space(
        "name: t\ndata: {path: x.h5}\nmodel: {backbone: {kind: timm, name: resnet18, weights: ../w.pth}}\n"
    )
    config = located(space.defaults(), tmp_path / "folder")
    assert config.data.path == str(tmp_path / "folder" / "x.h5")
    assert config.model.backbone.weights == str(tmp_path / "w.pth")
    assert located(config, tmp_path / "elsewhere") == config
    builtin = parse_space("name: t\ndata: {path: builtin:rrna16s}\n").defaults()
    assert located(builtin, tmp_path) == builtin


# ------------------------------------------------------------------------- from configs to parameters

AMBIGUOUS = (
    BASE
    + """\
model:
  backbone:
    choice:
      - {kind: mlp}
      - {kind: mlp, hidden: [256]}
      - {kind: mlp, hidden: [256], dropout: {uniform: [0.2, 0.5]}}
      - {kind: mlp, hidden: {choice: [[64], [64, 32]]}, dropout: {choice: [0.1, {uniform: [0.3, 0.4]}]}}
  head:
    choice: [{kind: linear}, {kind: conditional, routing: {choice: [soft, gumbel]}}, {kind: conditional}]
optimizer: {kind: adamw, lr: {choice: [{loguniform: [1e-4, 1e-3]}, {loguniform: [1e-2, 1e-1]}, 0.5]}}
train: {batch_size: {choice: [64, {int: [65, 70]}]}}
"""
)


@given(st.sampled_from([SPACE, BRANCHES, PER_LEVEL, AMBIGUOUS]), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_parameters_of_a_config_give_the_config(text, seed):
    space = SPACES.setdefault(text, parse_space(text))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    config = space.suggest(study.ask())
    assert space.resolve(space.params_of(config)) == config


SPACES: dict[str, Space] = {}


def test_parameters_of_a_config_are_those_that_it_was_made_of():
    for text in (SPACE, BRANCHES, PER_LEVEL):
        space = parse_space(text)
        for params, config in samples(space, 30):
            assert space.params_of(config) == params


WIDER = (
    SPACE.replace("[0.0, 0.5]", "[0.0, 0.9]")
    .replace("- {kind: linear}", "- {kind: conditional, alpha: 1}\n      - {kind: linear}")
    .replace("routing: {choice: [soft, hard, gumbel]}", "routing: {choice: [gumbel, soft, hard]}")
    .replace("- {kind: conditional, alpha: 1}\n      ", "")
    .replace("batch_size: {int: [64, 128]}", "batch_size: {choice: [{int: [64, 100]}, {int: [101, 512]}]}")
    .replace("epochs: 20", "epochs: {int: [10, 40]}")
)


def test_a_config_of_a_narrower_space_has_parameters_in_the_wider():
    space, wider = parse_space(SPACE), parse_space(WIDER)
    for params, config in samples(space, 30):
        found = wider.params_of(config)
        assert wider.resolve(found) == config
        assert found["train.epochs"] == 20
        assert found["train.batch_size"] == ("int#0" if params["train.batch_size"] <= 100 else "int#1")


@pytest.mark.parametrize(
    ("old", "new", "key", "reason"),
    [
        ("dropout: {uniform: [0.0, 0.5]}", "dropout: 0.1", "model.backbone.dropout", "is not 0.1"),
        ("hidden: [512]", "hidden: [256]", "model.backbone.hidden[0]", "512 is not 256"),
        ("hidden: [512]", "hidden: [512, 256]", "model.backbone.hidden", "is not of length 2"),
        ("kind: mlp, hidden: [512],", "kind: identity,", "model.backbone.kind", "'mlp' is not 'identity'"),
        (
            "alpha: {uniform: [0.0, 0.4]}",
            "alpha: {uniform: [0.9, 1.0]}",
            "loss.alpha",
            "is not in uniform: [0.9",
        ),
        ("seed: 0", "seed: 1", "train.seed", "0 is not 1"),
        ("seed: 0, ", "", None, None),
        ("kind: adamw, ", "kind: adamw, weight_decay: 0.5, ", "optimizer.weight_decay", "is not 0.5"),
        (", dropout: {uniform: [0.0, 0.5]}", "", "model.backbone.dropout", "is not 0.0"),
        (
            "batch_size: {int: [64, 128]}",
            "batch_size: {choice: [{int: [1, 9]}, 32]}",
            "train.batch_size",
            "choice",
        ),
        ("builtin:rrna16s}", "elsewhere.h5}", None, None),
        ("builtin:rrna16s}", "{choice: [a.h5, b.h5]}}", None, None),
    ],
)
def test_what_a_space_does_not_hold_is_said_with_its_first_key(old, new, key, reason):
    assert old in SPACE
    space, other = parse_space(SPACE), parse_space(SPACE.replace(old, new))
    config = samples(space, 1)[0][1]
    if key is None:
        found = other.resolve(other.params_of(config))
        data = config.data.model_copy(update={"path": found.data.path})
        assert found == config.model_copy(update={"data": data})
        return
    with pytest.raises(Mismatch) as raised:
        other.params_of(config)
    assert raised.value.key == key
    assert reason in raised.value.reason


def test_a_branch_that_is_gone_is_said_with_what_is_left():
    space = parse_space(SPACE)
    other = parse_space(SPACE.replace("      - {kind: hierarchical_softmax}\n", ""))
    for params, config in samples(space, 30):
        if params["model.head"] != "hierarchical_softmax":
            assert other.params_of(config) == params
            continue
        with pytest.raises(
            Mismatch, match=r"model.head: hierarchical_softmax is not in choice: \[linear, cond"
        ):
            other.params_of(config)


def test_inside_a_branch_the_key_is_named():
    other = parse_space(SPACE.replace("loguniform: [0.2, 5.0]", "loguniform: [6.0, 7.0]"))
    config = next(c for p, c in samples(parse_space(SPACE), 30) if p["model.head"] == "conditional")
    with pytest.raises(Mismatch, match=r"model.head.temperature: .* is not in loguniform: \[6.0, 7.0\]"):
        other.params_of(config)

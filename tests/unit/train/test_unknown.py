"""Unknown labels as an outcome of their own: in the taxonomy, in training, in the metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hiertune.config import (
    ConstantProbability,
    CosineProbability,
    CrossEntropyConfig,
    GradNormConfig,
    HierarchicalSoftmaxConfig,
    LinearProbability,
    MaskUnknownConfig,
    TaxonomySmoothingConfig,
    UnknownOutcomeConfig,
)
from hiertune.decoding import ValidationLogits, try_rules
from hiertune.export import load_model, save_trained
from hiertune.losses import build_losses, class_weights
from hiertune.metrics import Evaluation, seen_classes
from hiertune.train.loop import run_trial
from hiertune.train.probability import probability
from hiertune.train.result import Decision
from hiertune.train.unknown import UnknownLabels, outcome_levels, with_unknown


@pytest.fixture(scope="module")
def data(make_data):
    return make_data()


# --------------------------------------------------------------------------------- probabilities

RAMP = {"start": 0.2, "end": 1.0, "begin": 0.25, "until": 0.75}


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (ConstantProbability(value=0.3), [0.3] * 5),
        (LinearProbability(**RAMP), [0.2, 0.2, 0.6, 1.0, 1.0]),
        (CosineProbability(**RAMP), [0.2, 0.2, 0.6, 1.0, 1.0]),
        (LinearProbability(start=0.0, end=1.0, begin=0.5, until=0.5), [0.0, 0.0, 1.0, 1.0, 1.0]),
        (LinearProbability(start=1.0, end=0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
    ],
)
def test_probabilities_in_the_course_of_training(config, values):
    assert [probability(config, quarter / 4) for quarter in range(5)] == pytest.approx(values)


def test_a_cosine_leaves_and_arrives_slowly():
    config = CosineProbability(**RAMP)
    expected = 0.2 + 0.8 * (1 - np.cos(np.pi * 0.25)) / 2
    assert probability(config, 0.375) == pytest.approx(expected)
    assert probability(config, 0.375) < probability(LinearProbability(**RAMP), 0.375)


# -------------------------------------------------------------------------------------- taxonomy


def test_only_levels_with_unknown_training_labels_get_the_outcome(data):
    assert outcome_levels(MaskUnknownConfig(), data) == ()
    assert outcome_levels(UnknownOutcomeConfig(), data) == (0, 1, 2)
    assert outcome_levels(UnknownOutcomeConfig(levels=["genus"]), data) == (2,)
    known = data.labels.copy()
    known[data.rows("train"), 0] = 0
    complete = type(data)(data.inputs, known, data.ids, data.split, data.taxonomy)
    assert outcome_levels(UnknownOutcomeConfig(), complete) == (1, 2)


def test_the_outcome_is_the_last_class_of_its_level_and_has_no_parent(data):
    taxonomy, labels = with_unknown(UnknownOutcomeConfig(levels=["family", "genus"]), data)
    assert taxonomy.num_classes == (2, 5, 8)
    assert [names[-1] for names in taxonomy.names] == ["domain_1", "unknown", "unknown"]
    assert [int(parents[-1]) for parents in taxonomy.parents] == [-1, -1, -1]
    for level, size in ((1, 4), (2, 7)):
        assert np.array_equal(
            labels[:, level], np.where(data.labels[:, level] < 0, size, data.labels[:, level])
        )
    assert np.array_equal(labels[:, 0], data.labels[:, 0])
    same, given = with_unknown(MaskUnknownConfig(), data)
    assert same is data.taxonomy
    assert given is data.labels


def test_smoothing_gives_the_outcome_nothing_of_other_classes(data):
    taxonomy, _ = with_unknown(UnknownOutcomeConfig(), data)
    matrix = build_losses(TaxonomySmoothingConfig(alpha=0.3), taxonomy)[2].target_matrix()
    related = np.isfinite(taxonomy.distance_matrix(2)).sum(1) > 1
    assert related.tolist() == [True] * 5 + [False] * 3
    assert torch.all(matrix[related, -1] == 0)
    torch.testing.assert_close(matrix[-1, :-1], torch.full((7,), 0.3 / 7, dtype=torch.float64))
    assert matrix[-1, -1] == pytest.approx(0.7)


# --------------------------------------------------------------------------------------- schedule


def hidden_share(config, data, progress, seed=0):
    """Share of the unknown labels that are hidden, and whether any other is."""
    rows = np.arange(len(data))
    hidden = UnknownLabels(config, data).epoch(np.random.default_rng(seed))(rows, progress)
    if hidden is None:
        return 0.0
    assert not hidden[data.labels >= 0].any()
    return hidden[data.labels < 0].mean()


def test_two_phases_and_a_probability(make_data):
    data = make_data(train=4000)
    config = UnknownOutcomeConfig(
        masked=0.5, probability=LinearProbability(start=0.0, end=1.0, begin=0.5, until=1.0)
    )
    assert hidden_share(config, data, 0.0) == hidden_share(config, data, 0.49) == 1.0
    assert hidden_share(config, data, 0.75) == pytest.approx(0.5, abs=0.03)
    assert hidden_share(config, data, 1.0) == 0.0
    assert hidden_share(UnknownOutcomeConfig(), data, 0.0) == 0.0
    assert hidden_share(UnknownOutcomeConfig(masked=0.5), data, 0.5) == 0.0


def test_a_level_without_the_outcome_hides_nothing_of_its_own(data):
    config = UnknownOutcomeConfig(levels=["genus"], probability=ConstantProbability(value=0.0))
    hidden = UnknownLabels(config, data).epoch(np.random.default_rng(0))(np.arange(len(data)), 0.0)
    assert not hidden[:, :2].any()
    assert np.array_equal(hidden[:, 2], data.labels[:, 2] < 0)


# --------------------------------------------------------------------------------------- training


def test_phase_one_alone_trains_as_masking_does_but_for_the_extra_outcome(config, data, alone):
    """What is never counted has no say in the loss: the same as a class that never occurs."""
    never = UnknownOutcomeConfig(probability=ConstantProbability(value=0.0))
    record = alone(config(unknown=never), data)
    metrics = record["outcome"].metrics
    assert record["parameters"]["head.linear.layers.2.bias"].shape == (8,)
    assert metrics["val/unknown_recall/genus"] == 0.0
    masked = alone(config(), data)["outcome"].metrics
    assert set(metrics) - set(masked) == {
        f"val/unknown_{kind}/{level}" for kind in ("recall", "precision") for level in data.levels
    }


def test_the_loss_is_a_mean_whatever_share_of_the_unknown_labels_counts(config, data, alone):
    """All logits are 0 at the start, so each counted label costs log(outcomes), however many there are."""
    for counted in (0.0, 0.3, 1.0):
        unknown = UnknownOutcomeConfig(probability=ConstantProbability(value=counted))
        settings = config(unknown=unknown, epochs=1, batch_size=1000, accumulation=1)
        metrics = _from_zero(settings, data)
        for level, size in zip(data.levels, (3, 5, 8), strict=True):
            assert metrics[f"train/loss/{level}"] == pytest.approx(np.log(size), rel=1e-5)


def _from_zero(settings, data):
    """Training metrics of one epoch whose features and biases are zero at its start."""
    from hiertune.train.settings import trial_settings
    from hiertune.train.trial import Trial

    with trial_settings(settings.train, torch.device("cpu")):
        trial = Trial(settings, data, ("train",), torch.device("cpu"))
        for parameter in trial.model.parameters():
            parameter.data.zero_()
        return trial.train_epoch()


def test_the_outcome_is_learned(config, make_data, alone):
    """Rows of one cluster have no genus; those of the others do."""
    data = make_data(train=400, val=200)
    labels = data.taxonomy.ancestors("genus")[np.arange(len(data)) % 6].copy()
    inputs = 4.0 * torch.eye(6)[torch.arange(len(data)) % 6]
    labels[np.arange(len(data)) % 6 == 5, 2] = -1
    clusters = type(data)(type(data.inputs)(inputs), labels, data.ids, data.split, data.taxonomy)
    settings = config(
        unknown=UnknownOutcomeConfig(masked=0.5), head=HierarchicalSoftmaxConfig(), epochs=20, batch_size=20
    )
    record = alone(settings, clusters)
    first, last = record["reports"][8].metrics, record["outcome"].metrics
    assert first["val/unknown_recall/genus"] == 0.0, "phase one"
    assert last["val/unknown_recall/genus"] == last["val/unknown_precision/genus"] == 1.0
    assert last["val/accuracy/genus"] == 1.0
    assert "val/unknown_recall/family" not in last


def test_counts_and_densities_are_those_of_known_labels(config, data, alone):
    """What weighs classes and levels does not change with what unknown labels are trained as."""
    loss = CrossEntropyConfig(class_weights={"method": "capping"})
    weighting = GradNormConfig(interval=1000, warmup_steps=1000, initial_weights="inverse_density")
    never = UnknownOutcomeConfig(probability=ConstantProbability(value=0.0))
    found = [
        alone(config(unknown=unknown, loss=loss, weighting=weighting, epochs=1), data)["outcome"].metrics
        for unknown in (MaskUnknownConfig(), never)
    ]
    for level in data.levels:
        assert found[0][f"weight/{level}"] == found[1][f"weight/{level}"] != 1.0
    weights = class_weights(loss.class_weights, data.labels, with_unknown(never, data)[0])
    for weight, known in zip(
        weights, class_weights(loss.class_weights, data.labels, data.taxonomy), strict=True
    ):
        assert torch.equal(weight[:-1], known)
        assert weight[-1] == 1.0


def test_saying_unknown_of_a_known_row_is_a_mistake(data):
    seen = seen_classes(data.labels, data.taxonomy)
    evaluation = Evaluation(data.taxonomy, seen, outcomes=[2])
    logits = {"domain": torch.eye(2)[[0, 0, 0]], "family": torch.eye(4)[[0, 0, 0]]}
    logits["genus"] = torch.eye(8)[[7, 0, 7]]
    labels = evaluation.known(torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 7]]))
    assert labels.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, -1]]
    evaluation.add(logits, labels, [torch.zeros(())] * 3)
    metrics = evaluation.compute("val")
    assert metrics["val/accuracy/genus"] == 0.5
    assert metrics["val/chain_accuracy"] == 0.5
    assert metrics["val/partial_chain_accuracy"] == pytest.approx(2 / 3)
    assert metrics["val/hierarchical_distance"] == 3.0
    assert metrics["val/unknown_recall/genus"] == 1.0
    assert metrics["val/unknown_precision/genus"] == 0.5


def test_the_exported_model_says_unknown(config, data, tmp_path):
    settings = config(unknown=UnknownOutcomeConfig(levels=["genus"]), epochs=1)
    run_trial(
        settings,
        data,
        lambda result: Decision.CONTINUE,
        finish=lambda model: save_trained(tmp_path / "model", model, settings, data),
    )
    model = load_model(tmp_path / "model")
    assert model.taxonomy.names[2][-1] == "unknown"
    with torch.no_grad():
        model.model.head.linear["genus"].bias[-1] = 1e6
    prediction = model.predict(data.inputs.rows(np.arange(3)))
    assert [names[2] for names in prediction.names] == ["unknown"] * 3
    families = prediction.labels[:, 1]
    np.testing.assert_array_equal(prediction.paths[:, :2], data.taxonomy.ancestors("family")[families])
    assert prediction.paths[:, 2].tolist() == [-1] * 3
    assert prediction.path_names == [(*data.taxonomy.path("family", i), None) for i in families]


def test_the_logits_of_the_outcome_are_decoded_too(config, data, alone, tmp_path):
    """As trained, decoding gives the very metrics of the last epoch; no rule trips over the extra outcome."""
    settings = config(unknown=UnknownOutcomeConfig(), head=HierarchicalSoftmaxConfig())
    metrics = alone(settings, data, keep_logits=tmp_path / "logits")["outcome"].metrics
    taxonomy, _ = with_unknown(settings.unknown, data)
    tried = try_rules(ValidationLogits.load(tmp_path / "logits", taxonomy), taxonomy, settings.model.head)
    assert tried[0].metrics == {name: metrics[name] for name in tried[0].metrics}
    assert len(tried) > 20

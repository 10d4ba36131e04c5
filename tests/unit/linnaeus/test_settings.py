"""Files that include others, and where each key stands."""

import pytest

from hiertune.errors import InputError
from hiertune.linnaeus import import_experiment, read_settings
from hiertune.linnaeus.keys import find_key, is_section, known_keys


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "configs/experiments").mkdir(parents=True)
    (tmp_path / "configs/experiments/base.yaml").write_text(
        "TRAIN: {EPOCHS: 30, CLIP_GRAD: 1.0}\nLOSS:\n  TAXONOMY_SMOOTHING: {ALPHA: 0.3}\n"
    )
    (tmp_path / "configs/model.yaml").write_text("MODEL:\n  DROP_RATE: 0.3\n  DROP_PATH_RATE: 0.1\n")
    (tmp_path / "configs/bare.yaml").write_text("DROP_RATE: 0.4\n")
    return tmp_path


def written(folder, text):
    file = folder / "configs/experiments/x.yaml"
    file.write_text(text)
    return file


def values(settings):
    return {key: entry.value for key, entry in settings.entries.items()}


def test_a_base_is_read_from_its_folder_or_one_above_and_overridden(folder):
    file = written(
        folder,
        "BASE: [configs/experiments/base.yaml]\nTRAIN: {EPOCHS: 5}\n"
        "MODEL: {BASE: [configs/model.yaml], DROP_RATE: 0.5}\n",
    )
    settings = read_settings(file)
    assert values(settings) == {
        "TRAIN.EPOCHS": 5,
        "TRAIN.CLIP_GRAD": 1.0,
        "LOSS.TAXONOMY_SMOOTHING.ALPHA": 0.3,
        "MODEL.DROP_RATE": 0.5,
        "MODEL.DROP_PATH_RATE": 0.1,
    }
    places = {key: (entry.file.name, entry.line) for key, entry in settings.entries.items()}
    assert places["TRAIN.EPOCHS"] == ("x.yaml", 2)
    assert places["TRAIN.CLIP_GRAD"] == ("base.yaml", 1)
    assert places["MODEL.DROP_PATH_RATE"] == ("model.yaml", 3)
    outcomes = {outcome.key: outcome for outcome in import_experiment(file).outcomes}
    assert len(outcomes) == 7
    assert outcomes["BASE"].to == outcomes["MODEL.BASE"].to == "the keys of that file"


def test_a_file_may_be_the_section_alone(folder):
    settings = read_settings(written(folder, "MODEL: {BASE: ../bare.yaml}\nTRAIN: {FROM: ''}\n"))
    assert values(settings) == {"MODEL.DROP_RATE": 0.4}


def test_a_missing_base_is_said(folder):
    result = import_experiment(written(folder, "BASE: [a.yaml, base.yaml]\n"))
    base = next(outcome for outcome in result.outcomes if outcome.key == "BASE")
    assert base.reason == "there is no file a.yaml: its keys are missing here"
    assert result.config.train.epochs == 30


def test_a_file_that_includes_itself(folder):
    with pytest.raises(InputError, match="includes itself"):
        read_settings(written(folder, "BASE: [x.yaml]\n"))


def test_an_error_names_the_file_that_is_included(folder):
    (folder / "configs/experiments/base.yaml").write_text("TRAIN:\n  EPOCHS: many\n")
    with pytest.raises(InputError) as caught:
        import_experiment(written(folder, "BASE: [base.yaml]\n"))
    assert (caught.value.file, caught.value.line) == (str(folder / "configs/experiments/base.yaml"), 2)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("TRAIN: 3\n", 1, "TRAIN: got 3"),
        ("TRAIN:\n  EPOCHS: {A: 1}\n", 2, "TRAIN.EPOCHS: got a mapping with the key 'A'"),
        ("BASE:\n  - 3\n", 1, "BASE: got [3]"),
        ("A: 1\nA: 2\n", 2, "A: duplicate key (first on line 1)"),
    ],
)
def test_what_is_no_experiment(tmp_path, text, line, problem):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_settings(file)
    assert f"{file}:{line}: {problem}" in str(caught.value)


def test_empty_sections_and_texts_that_are_literals(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "EXPERIMENT:\nTRAIN: {}\nLR_SCHEDULER: {WARMUP_FRACTION: None}\nOPTIMIZER: {BETAS: '(0.9, 1)'}\n"
    )
    assert values(read_settings(file)) == {"LR_SCHEDULER.WARMUP_FRACTION": None, "OPTIMIZER.BETAS": (0.9, 1)}


def test_keys_are_found_by_name_or_pattern():
    assert find_key("TRAIN.EPOCHS") == "TRAIN.EPOCHS"
    assert find_key("MODEL.CLASSIFICATION.HEADS.taxa_L5.TYPE") == "MODEL.CLASSIFICATION.HEADS.*.TYPE"
    assert find_key("DATA.META.COMPONENTS.TEMPORAL.DIM") == "DATA.META.**"
    assert find_key("DATA.META") is None
    assert find_key("TRAIN.EPOCHS.X") is None
    assert find_key("TRAIN.EPOCH") is None
    assert is_section("MODEL.CLASSIFICATION.HEADS.taxa_L5")
    assert is_section("DATA.META")
    assert not is_section("TRAIN.EPOCHS")
    assert len(known_keys()) > 380

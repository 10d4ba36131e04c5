"""A model folder gives the same logits anywhere, and files become tables of names."""

import csv
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hiertune import export
from hiertune.cli import main
from hiertune.config import (
    ConditionalHeadConfig,
    DataConfig,
    HierarchicalSoftmaxConfig,
    IdentityConfig,
    KmerConfig,
    LinearHeadConfig,
    MixedHeadConfig,
    MLPConfig,
    ModelConfig,
    PathSoftmaxConfig,
    TrialConfig,
)
from hiertune.data import write_dataset
from hiertune.data.kmers import kmer_features
from hiertune.decoding import AS_TRAINED, Decoder, DecodingRule
from hiertune.errors import InputError
from hiertune.export import (
    export_winner,
    load_model,
    predict_file,
    read_head,
    save_decoding,
    save_model,
)
from hiertune.models import build_model
from hiertune.taxonomy import Taxonomy

LEVELS = ("domain", "type", "genus")
LINEAGES = [("A", "a", "x"), ("A", "b", "y"), ("B", "c", "z"), ("B", None, "w")]
TAXONOMY = Taxonomy.from_lineages(LINEAGES, LEVELS)
KMER = KmerConfig(k=2, transform="frequency")
FEATURES = 16

MODELS = {
    "mlp": ModelConfig(
        backbone=MLPConfig(hidden=[8, 5], dropout=0.5, norm="batch"),
        head=ConditionalHeadConfig(routing="gumbel", temperature=0.7),
    ),
    "mixed": ModelConfig(
        backbone=MLPConfig(hidden=[8]),
        head=MixedHeadConfig(
            levels={"genus": ConditionalHeadConfig(temperature=4.0, final_temperature=0.2)},
            default=PathSoftmaxConfig(bias=False),
        ),
    ),
    "identity": ModelConfig(backbone=IdentityConfig(dropout=0.3), head=LinearHeadConfig(bias=False)),
}


def make_model(config, shape=(FEATURES,)):
    torch.manual_seed(3)
    size = int(np.prod(shape))
    model = build_model(config, TAXONOMY, shape, (torch.randn(size), torch.rand(size) + 0.5))
    model.train()
    model(torch.randn(32, *shape))  # moves the running statistics away from their start
    return model.eval()


def inputs(rows=7, shape=(FEATURES,)):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(5))


def save(folder, name="mlp", kmer=KMER, metrics=None):
    model = make_model(MODELS[name])
    config = TrialConfig(data=DataConfig(path="d.h5"), model=MODELS[name])
    save_model(folder, model, config, TAXONOMY, metrics, (FEATURES,), kmer)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bit_identical_after_a_round_trip(tmp_path, name):
    model = save(tmp_path / "m", name)
    predictor = load_model(tmp_path / "m")
    x = inputs()
    with torch.inference_mode():
        expected, found = model(x), predictor.model(x)
    assert list(found) == list(LEVELS)
    for level in LEVELS:
        assert torch.equal(expected[level], found[level])
    assert predictor.taxonomy == TAXONOMY
    assert predictor.kmer == KMER
    assert not predictor.model.training


def test_images_round_trip(tmp_path):
    shape = (4, 3, 2)
    config = TrialConfig(data=DataConfig(path="d.h5"), model=MODELS["identity"])
    model = make_model(MODELS["identity"], shape)
    save_model(tmp_path, model, config, TAXONOMY, None, shape, None)
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))["genus"].argmax(1)
    assert load_model(tmp_path).predict(images).labels[:, 2].tolist() == expected.tolist()


def test_predictions_follow_the_refined_logits(tmp_path):
    model = save(tmp_path)
    predictor = load_model(tmp_path)
    x = inputs(7)
    prediction = predictor.predict(x.numpy(), batch_size=3)
    probabilities = predictor.probabilities(x, batch_size=3)
    with torch.inference_mode():
        logits = model(x)
    for column, level in enumerate(LEVELS):
        expected = logits[level].softmax(1).numpy()
        np.testing.assert_allclose(probabilities[level], expected, rtol=1e-5)
        assert prediction.labels[:, column].tolist() == expected.argmax(1).tolist()
        np.testing.assert_allclose(prediction.confidences[:, column], expected.max(1), rtol=1e-5)
    for row, labels in enumerate(prediction.labels):
        assert prediction.names[row] == tuple(TAXONOMY.names[c][i] for c, i in enumerate(labels))
        assert prediction.path_names[row] == TAXONOMY.path("genus", labels[-1])
        assert prediction.paths[row].tolist() == TAXONOMY.ancestors("genus")[labels[-1]].tolist()
    TAXONOMY.check_labels(prediction.paths)


RULE = DecodingRule(kind="crm", temperature=2.0, head=HierarchicalSoftmaxConfig())


def test_a_saved_rule_decides_the_names_but_not_their_probabilities(tmp_path):
    model = save(tmp_path)
    x = inputs(40)
    as_trained = load_model(tmp_path).predict(x, batch_size=16)
    save_decoding(tmp_path, RULE)
    predictor = load_model(tmp_path)
    assert predictor.rule == RULE
    prediction = predictor.predict(x, batch_size=16)
    with torch.inference_mode():
        model(x)
        expected = Decoder(TAXONOMY, RULE, model.head.refine)(model.base_logits).numpy()
    assert prediction.labels.tolist() == expected.tolist()
    assert prediction.labels.tolist() != as_trained.labels.tolist()
    known = prediction.paths >= 0
    assert (prediction.paths == prediction.labels)[known].all(), "whole paths"
    for column, probabilities in enumerate(predictor.probabilities(x).values()):
        of_named = probabilities[np.arange(40), prediction.labels[:, column]]
        np.testing.assert_allclose(prediction.confidences[:, column], of_named, rtol=1e-6)
    assert f"Names are given by {RULE}" in (tmp_path / "README.md").read_text()

    save_decoding(tmp_path, AS_TRAINED)
    assert load_model(tmp_path).predict(x).labels.tolist() == as_trained.labels.tolist()
    assert "Names are given by" not in (tmp_path / "README.md").read_text()


def test_the_head_is_read_without_the_weights(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_head(tmp_path) == (MODELS["mlp"].head, TAXONOMY)
    spoil(tmp_path, config={})
    with pytest.raises(InputError, match=r"model.json: can't be read"):
        read_head(tmp_path)


def test_no_rows_give_no_predictions(tmp_path):
    save(tmp_path)
    predictor = load_model(tmp_path)
    assert predictor.predict(inputs(0)).labels.shape == (0, 3)
    assert predictor.probabilities(inputs(0))["genus"].shape == (0, 4)


def test_loading_leaves_the_random_state_alone(tmp_path):
    save(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_folder_explains_itself(tmp_path):
    save(tmp_path, metrics={"test/accuracy/genus": 0.75, "val/loss": 1.0})
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["levels"] == list(LEVELS)
    assert description["classes"] == {"domain": 2, "type": 3, "genus": 4}
    assert description["input_shape"] == [FEATURES]
    assert description["metrics"] == {"test/accuracy/genus": 0.75, "val/loss": 1.0}
    assert TrialConfig.model_validate_json(json.dumps(description["config"])).model == MODELS["mlp"]
    readme = (tmp_path / "README.md").read_text()
    assert "| test/accuracy/genus | 0.7500 |" in readme
    assert "genus (4)" in readme
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]


def test_a_model_replaces_the_one_before(tmp_path):
    save(tmp_path, "mlp")
    model = save(tmp_path, "identity")
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path).model(inputs())["genus"], model(inputs())["genus"])


# ----------------------------------------------------------------------------------- bad folders


class Bomb:
    def __reduce__(self):
        return (Path("/tmp/hiertune-was-here").touch, ())


def spoil(folder, **changes):
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**description, **changes}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "can't be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "can't be read"),
        (lambda folder: (folder / "model.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "model.json").write_text("[]"), "does not describe"),
        (lambda folder: (folder / "model.json").write_text('{"format": "x"}'), "does not describe"),
        (lambda folder: spoil(folder, version=2), "version 2"),
        (lambda folder: spoil(folder, config={}), "can't be loaded"),
        (lambda folder: spoil(folder, kmer={"k": 99}), "can't be loaded"),
        (lambda folder: spoil(folder, taxonomy={}), "can't be loaded"),
        (lambda folder: spoil(folder, decoding={"kind": "luck"}), "can't be loaded"),
        (lambda folder: spoil(folder, input_shape=[3]), "can't be loaded"),
        (lambda folder: spoil(folder, input_shape=None), "can't be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "is damaged"),
        (lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb())), "is damaged"),
    ],
)
def test_bad_folders_are_refused(tmp_path, damage, words):
    save(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "m")


def test_a_pickle_with_the_right_checksum_is_not_run(tmp_path):
    save(tmp_path)
    marker = tmp_path / "marker"
    bomb = b"cos\nmkdir\n(S'" + str(marker).encode() + b"'\ntR."
    (tmp_path / "model.safetensors").write_bytes(bomb)
    spoil(tmp_path, weights_sha256=export.hashlib.sha256(bomb).hexdigest())
    with pytest.raises(InputError, match="can't be loaded"):
        load_model(tmp_path)
    assert not marker.exists()


def test_a_missing_key_is_named(tmp_path):
    save(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    del description["taxonomy"]
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="taxonomy"):
        load_model(tmp_path)


@pytest.mark.parametrize("shape", [(), (FEATURES,), (2, FEATURES + 1), (2, 4, 4)])
def test_inputs_of_another_shape_are_refused(tmp_path, shape):
    save(tmp_path)
    with pytest.raises(InputError, match="shape"):
        load_model(tmp_path).predict(np.zeros(shape))


def test_inputs_that_are_not_finite_are_refused(tmp_path):
    save(tmp_path)
    x = inputs(9)
    x[6, 3] = torch.nan
    with pytest.raises(InputError, match="row 6 "):
        load_model(tmp_path).predict(x, batch_size=4)
    with pytest.raises(InputError, match="row 2 "):
        load_model(tmp_path).predict(np.full((3, FEATURES), 1.0) * [[1], [1], [1e300]])


def test_loading_imports_neither_search_nor_ray_nor_mlflow(tmp_path):
    save(tmp_path)
    code = (
        "import sys; from hiertune.export import load_model; load_model(sys.argv[1])\n"
        "print([name for name in ('ray', 'mlflow', 'optuna', 'hiertune.search') if name in sys.modules])"
    )
    root = Path(export.__file__).resolve().parents[1]
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------ whole files


@pytest.fixture
def model_folder(tmp_path):
    save(tmp_path / "model")
    return tmp_path / "model"


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def expected_table(folder, ids, x):
    prediction = load_model(folder).predict(x)
    columns = zip(ids, prediction.names, prediction.confidences, prediction.path_names, strict=True)
    table = [["id", "domain", "domain_probability", "type", "type_probability"]]
    table[0] += ["genus", "genus_probability", "path"]
    for name, names, confidences, path in columns:
        pairs = zip(names, confidences, strict=True)
        cells = [cell for label, p in pairs for cell in (label, f"{p:.6f}")]
        table.append([name, *cells, ";".join(part or "" for part in path)])
    return table


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(export, "_BLOCK_ROWS", 3)


def test_npy(tmp_path, model_folder):
    x = inputs().numpy()
    np.save(tmp_path / "x.npy", x)
    predict_file(model_folder, tmp_path / "x.npy", tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv") == expected_table(model_folder, "0123456", x)


@pytest.mark.parametrize("with_ids", [True, False])
def test_csv(tmp_path, model_folder, with_ids):
    x = np.round(inputs().numpy(), 3)
    ids = [f"row {i}" for i in range(7)] if with_ids else list("0123456")
    with open(tmp_path / "x.csv", "w", newline="") as file:
        writer = csv.writer(file)
        features = [f"f{i}" for i in range(FEATURES)]
        writer.writerow([features[0], "id", *features[1:]] if with_ids else features)
        for name, row in zip(ids, x.tolist(), strict=True):
            writer.writerow([row[0], name, *row[1:]] if with_ids else row)
    predict_file(model_folder, tmp_path / "x.csv", tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv") == expected_table(model_folder, ids, x)


def test_hdf5(tmp_path, model_folder):
    x, ids = inputs(4).numpy(), ["k", "l", "m", "n"]
    write_dataset(tmp_path / "x.h5", x, TAXONOMY.encode(LINEAGES), TAXONOMY, ids)
    predict_file(model_folder, tmp_path / "x.h5", tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv") == expected_table(model_folder, ids, x)


SEQUENCES = {"s1": "ACGTTGCA", "s2": "GGGGCC", "s3": "ACNNUT", "s4": "TTTTTT"}


@pytest.mark.parametrize("name", ["x.fasta", "x.fa.gz", "X.FNA"])
def test_fasta(tmp_path, model_folder, name):
    text = "".join(f">{key} some words\n{sequence}\n" for key, sequence in SEQUENCES.items())
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    x = kmer_features([sequence.encode() for sequence in SEQUENCES.values()], 2, "frequency")
    predict_file(model_folder, tmp_path / name, tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv") == expected_table(model_folder, SEQUENCES, x)


def test_of_a_file_that_cannot_be_read_nothing_is_printed(tmp_path, model_folder, capsys):
    for name in ("none.npy", "none.csv", "none.h5"):
        with pytest.raises(InputError):
            predict_file(model_folder, tmp_path / name)
    assert capsys.readouterr().out == ""


def test_standard_output(tmp_path, model_folder, capsys):
    np.save(tmp_path / "x.npy", inputs(1).numpy())
    predict_file(model_folder, tmp_path / "x.npy")
    assert capsys.readouterr().out.splitlines()[0].startswith("id,domain,domain_probability,type,")


def write(path, text):
    path.write_text(text)
    return path


HEADER = ",".join(f"f{i}" for i in range(FEATURES))
GOOD = ",".join(["1"] * FEATURES)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "", "kind that isn't known"),
        ("x.csv", f"{HEADER}\n{GOOD}\n{GOOD[:-1]}a\n", "x.csv:3.*'a'"),
        ("x.csv", f"{HEADER}\n{GOOD}\n{GOOD},1\n", "x.csv:3.*has 17 cells"),
        ("x.csv", f"id,{HEADER}\n\n", "x.csv:2.*has 0 cells"),
        ("x.csv", "a,b\n1,2\n", "shape"),
        ("x.csv", f"id,{HEADER}\nq,{GOOD}\nr,{GOOD[:-1]}nan\n", "input of 'r' is not finite"),
        ("x.npy", "no array", "can't be read"),
        ("x.h5", "no hdf5", "not an HDF5"),
        ("x.fasta", "ACGT", "before the first header"),
    ],
)
def test_bad_files_leave_nothing_behind(tmp_path, model_folder, name, text, words):
    source = write(tmp_path / name, text)
    with pytest.raises(InputError, match=words):
        predict_file(model_folder, source, tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", name]


def test_more_bad_files(tmp_path, model_folder):
    with pytest.raises(InputError, match="can't be read"):
        predict_file(model_folder, tmp_path / "gone.csv", tmp_path / "out.csv")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(InputError, match="array of numbers"):
        predict_file(model_folder, tmp_path / "text.npy", tmp_path / "out.csv")
    np.save(tmp_path / "objects.npy", np.array([Bomb()], object))
    with pytest.raises(InputError, match="can't be read"):
        predict_file(model_folder, tmp_path / "objects.npy", tmp_path / "out.csv")
    with pytest.raises(InputError, match="folder does not exist"):
        predict_file(model_folder, tmp_path / "text.npy", tmp_path / "no" / "out.csv")
    assert not Path("/tmp/hiertune-was-here").exists()


def test_sequences_need_a_model_of_sequences(tmp_path):
    save(tmp_path / "model", kmer=None)
    with pytest.raises(InputError, match="how sequences become its inputs"):
        predict_file(tmp_path / "model", write(tmp_path / "x.fasta", ">a\nACGT\n"))


# ------------------------------------------------------------------------------------ image files


@pytest.fixture
def photos(tmp_path):
    """A model of 4 x 4 images, and a folder with 5 of them, their pixels by name."""
    shape = (4, 4, 3)
    config = TrialConfig(data=DataConfig(path="d.h5"), model=MODELS["identity"])
    model = make_model(MODELS["identity"], shape)
    save_model(tmp_path / "m", model, config, TAXONOMY, None, shape, None)
    (tmp_path / "photos" / "b").mkdir(parents=True)
    images = {}
    for i, name in enumerate(["a.png", "b/1.png", "b/2.png", "c.png", "d.png"]):
        images[name] = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(images[name]).save(tmp_path / "photos" / name)
    return images


def test_images_are_found_as_the_importer_finds_them(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(export, "_BLOCK_IMAGES", 2)
    folder = tmp_path / "photos"
    (folder / ".cache").mkdir()
    for hidden in (".cache/x.png", "b/.y.png"):
        shutil.copy(folder / "a.png", folder / hidden)
    os.mkfifo(folder / "pipe.png")
    (folder / "b" / "loop").symlink_to(folder)
    assert predict_file(tmp_path / "m", folder, tmp_path / "out.csv") == []
    expected = expected_table(tmp_path / "m", photos, np.stack(list(photos.values())))
    assert read_table(tmp_path / "out.csv") == expected
    assert predict_file(tmp_path / "m", folder / "c.png", tmp_path / "out.csv") == []
    expected = expected_table(tmp_path / "m", ["c.png"], photos["c.png"][None])
    assert read_table(tmp_path / "out.csv") == expected


def test_broken_images_can_be_left_out(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr(export, "_BLOCK_IMAGES", 2)
    for name in ("b/2.png", "c.png"):  # a whole block
        (tmp_path / "photos" / name).write_text("no image")
        del photos[name]
    source, out = tmp_path / "photos", tmp_path / "out.csv"
    with pytest.raises(InputError) as error:
        predict_file(tmp_path / "m", source, out)
    assert str(error.value).startswith(f"{source}/b/2.png: cannot be read as an image")
    assert not out.exists()
    assert predict_file(tmp_path / "m", source, out, skip_broken=True) == ["b/2.png", "c.png"]
    assert read_table(out) == expected_table(tmp_path / "m", photos, np.stack(list(photos.values())))

    out.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tmp_path / "m"), str(source), "--out", str(out), "--skip-broken"])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (0, "")
    assert printed.err == "note: 2 images cannot be read, and are left out: b/2.png, c.png\n"
    assert len(read_table(out)) == 4
    with pytest.raises(InputError) as error:
        predict_file(tmp_path / "m", source / "c.png", tmp_path / "no.csv", skip_broken=True)
    assert str(error.value) == f"{source}/c.png: none of 1 images can be read"
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(InputError, match="--skip-broken is for images"):
        predict_file(tmp_path / "m", tmp_path / "x.npy", tmp_path / "no.csv", skip_broken=True)
    assert not (tmp_path / "no.csv").exists()


def test_image_names_that_are_not_utf8(tmp_path, photos, capsys):
    source = tmp_path / "photos"
    (source / "d.png").rename(source / os.fsdecode(b"caf\xe9.png"))
    (source / "a.png").write_text("not read")
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(tmp_path / "m"), str(source)])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.splitlines()[0] == f"error: {source}: file name: 'caf\\udce9.png' is not UTF-8"


# -------------------------------------------------------------------------------------- the winner


def test_the_winner_leaves_with_its_metrics(tmp_path):
    model = save(tmp_path / "run" / "model")
    metrics = {"test/accuracy/genus": 0.5}
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"winner": {"metrics": metrics}}))
    export_winner(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model.json").read_text())["metrics"] == metrics
    assert "0.5000" in (tmp_path / "out" / "README.md").read_text()
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "out").model(inputs())["genus"], model(inputs())["genus"])
    with pytest.raises(InputError, match="exists already"):
        export_winner(tmp_path / "run", tmp_path / "out")


def test_no_winner_yet(tmp_path):
    with pytest.raises(InputError, match="no winner's model"):
        export_winner(tmp_path, tmp_path / "out")

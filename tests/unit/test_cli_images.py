"""The commands that import images: what they pass on, what they say, and bad input."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image

from hiertune.cli import main
from hiertune.data import SPLITS
from hiertune.data.format import read_contents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images/train/{cat,dog}/*.png and images/val/..., each of 12 x 10 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for i in range(20):
        path = tmp_path / "images" / ("val" if i < 4 else "train") / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((10, 12, 3), i, np.uint8)).save(path)
    return tmp_path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def done(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, ""), out + err
    return out


def refused(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    return err


def test_import_images(folder, capsys):
    (folder / "classes.csv").write_text("n,kind,name\n1,misc,cat\n2,Canidae,dog\n")
    (folder / "images/train/cat/5.png").write_text("broken")
    command = ["data", "import-images", "images", "out.h5", "--taxonomy", "classes.csv"]
    options = ["--levels", "kind,name", "--class-column", "name", "--size", "6", "--unknown", "MISC"]
    message = refused(capsys, *command, *options)
    assert "images/train/cat/5.png: cannot be read as an image" in message
    assert not (folder / "out.h5").exists()

    options += ["--skip-broken", "--test-share", "0.4", "--threads", "2"]
    said = done(capsys, *command, *options)
    assert "1 of 20 images are broken or missing, and left out: train/cat/5" in said
    assert "19 rows" in said
    assert "6 x 6 x 3 uint8" in said
    content = read_contents(folder / "out.h5")
    assert content.taxonomy.levels == ("kind", "name")
    assert content.taxonomy.names == (("Canidae",), ("cat", "dog"))
    splits = dict(zip(content.ids, content.split, strict=True))
    assert {SPLITS[splits[name]] for name in splits if name.startswith("val")} == {"val"}
    assert {SPLITS[splits[name]] for name in splits if name.startswith("train")} == {"train", "test"}

    assert "out.h5: exists already" in refused(capsys, *command, *options)
    assert "images: is a folder" in refused(
        capsys, *command[:3], "images", *options, "--overwrite", "--taxonomy", "classes.csv"
    )
    assert "size: is 5000" in refused(capsys, *command, *options, "--size", "5000")
    done(capsys, *command, *options, "--overwrite")


def test_import_nested_images(folder, capsys):
    said = done(capsys, "data", "import-images", "images", "out.h5", "--levels", "name", "--size", "10")
    assert "note: no row is in test, and a search needs train, val and test; --test-share would" in said
    with h5py.File(folder / "out.h5") as file:
        assert file["inputs"].shape == (20, 10, 10, 3)
        assert file["inputs"][0].tolist() == np.full((10, 10, 3), 11).tolist()  # train/cat/11.png
        assert file["ids"].asstr()[0] == "train/cat/11"
    assert "the levels need names" in refused(capsys, "data", "import-images", "images", "b.h5")
    assert "there is no such folder" in refused(capsys, "data", "import-images", "nowhere", "b.h5")


def test_import_inat(folder, capsys):
    def write(name, category, split):
        files = sorted(
            path.relative_to(folder / "images") for path in (folder / "images" / split).rglob("*.png")
        )
        content = {
            "images": [{"id": i, "file_name": str(path)} for i, path in enumerate(files)],
            "annotations": [{"id": i, "image_id": i, "category_id": category} for i in range(len(files))],
            "categories": [{"id": i, "name": f"obfuscated{i}"} for i in range(2)],
        }
        (folder / name).write_text(json.dumps(content))

    write("train.json", 1, "train")
    write("val.json", 0, "val")
    names = [{"id": i, "name": f"species{i}", "genus": f"genus{i}", "x": "X"} for i in range(2)]
    (folder / "categories.json").write_text(json.dumps(names))
    command = ["data", "import-inat", "train.json", "val.json", "out.h5", "--images", "images"]
    options = ["--categories", "categories.json", "--size", "4"]
    done(capsys, *command, *options)
    content = read_contents(folder / "out.h5")
    assert content.taxonomy.names == (("genus0", "genus1"), ("species0", "species1"))
    assert content.labels.tolist() == [[1, 1]] * 16 + [[0, 0]] * 4
    assert content.split.tolist() == [0] * 16 + [1] * 4

    options += ["--split", "test", "--split", "train", "--levels", "x,species", "--overwrite"]
    done(capsys, *command, *options)
    content = read_contents(folder / "out.h5")
    assert content.taxonomy.levels == ("x", "species")
    assert content.split.tolist() == [2] * 16 + [0] * 4
    assert "there is no such image; 4 of 4 are missing" in refused(
        capsys, "data", "import-inat", "val.json", "b.h5", "--images", "images/val"
    )


def test_import_linnaeus(folder, capsys):
    identifiers = [f"{i}" for i in range(4, 20, 2)]
    with h5py.File(folder / "labels.h5", "w") as file:
        file["img_identifiers"] = identifiers
        file["taxa_L10"] = np.arange(8, dtype=np.uint32)
        file["taxa_L20"] = np.array([5, 5, 5, 5, 6, 6, 0, 0], np.uint32)
        file["temporal"] = np.zeros((8, 2))
    (folder / "taxa.csv").write_text("id,name\n" + "".join(f"{i},taxon{i}\n" for i in range(8)))
    command = ["data", "import-linnaeus", "labels.h5", "out.h5", "--images", "images/train/dog"]
    options = ["--extension", ".png", "--names", "genus,species", "--taxa", "taxa.csv", "--size", "10"]
    said = done(capsys, *command, *options)
    assert "only labels and images are taken over, not temporal" in said
    content = read_contents(folder / "out.h5")
    assert content.taxonomy.levels == ("genus", "species")
    orphans, others = ["taxon6", "taxon7"], ["taxon1", "taxon2", "taxon3", "taxon4", "taxon5"]
    assert content.taxonomy.names == (("taxon5", "taxon6"), (*orphans, *others))
    assert content.labels.T.tolist() == [[0, 0, 0, 0, 1, 1, -1, -1], [-1, 2, 3, 4, 5, 6, 0, 1]]
    assert content.ids.tolist() == identifiers
    message = refused(capsys, *command, "--names", "species,genus")
    assert "labels.h5: taxa_L20 is named 'species'" in message
    done(capsys, *command, "--extension", ".png", "--levels", "taxa_L20", "--overwrite")
    assert read_contents(folder / "out.h5").taxonomy.names == (("5", "6"),)

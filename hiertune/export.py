"""A trained model as a folder that predicts anywhere: weights, settings and taxonomy, no code.

Loading needs neither Ray nor MLflow nor the search, and runs nothing that the folder holds.
Shapes: N rows, L levels (coarse -> fine), C_l classes at level l.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from hiertune._files import replace_file
from hiertune._summary import read_winner_metrics
from hiertune._text import check_storable
from hiertune.config import DataConfig, HeadConfig, KmerConfig, TrialConfig
from hiertune.decoding import AS_TRAINED, Decoder, DecodingRule
from hiertune.errors import InputError
from hiertune.models import HierarchicalClassifier, build_model
from hiertune.taxonomy import Taxonomy

if TYPE_CHECKING:
    from hiertune.data import HierarchicalDataset

WEIGHTS, DESCRIPTION, README = "model.safetensors", "model.json", "README.md"
_FORMAT, _VERSION = "hiertune.model", 1
_BLOCK_ROWS = 1024  # rows of a file that are held at once
_BLOCK_IMAGES = 64

# --------------------------------------------------------------------------------------- writing


def save_model(
    folder: str | Path,
    model: torch.nn.Module,
    config: TrialConfig,
    taxonomy: Taxonomy,
    metrics: Mapping[str, float] | None,
    input_shape: tuple[int, ...],
    kmer: KmerConfig | None,
    outcomes: Sequence[str] = (),
) -> Path:
    """Write `model` (of `build_model`, standardisation included) to `folder`; a model there is replaced.

    `input_shape` is that of one row. `kmer` says how sequences become inputs; None where they don't.
    `outcomes` are the levels whose last class says "unknown".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # copies, because safetensors refuses tensors that share memory (layers that a model uses twice)
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()
    }
    weights = safetensors.torch.save(state)
    description = {
        "format": _FORMAT,
        "version": _VERSION,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "levels": list(taxonomy.levels),
        "classes": dict(zip(taxonomy.levels, taxonomy.num_classes, strict=True)),
        "input_shape": list(input_shape),
        "kmer": None if kmer is None else kmer.model_dump(mode="json"),
        "outcomes": list(outcomes),
        "config": config.model_dump(mode="json"),
        "metrics": dict(metrics or {}),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")},
        },
        "taxonomy": taxonomy.to_dict(),
    }
    replace_file(folder / WEIGHTS, weights)
    _describe(folder, description)
    return folder


def save_trained(
    folder: str | Path, model: HierarchicalClassifier, config: TrialConfig, data: HierarchicalDataset
) -> None:
    """`save_model` for a model that was trained on `data`; its classes may include "unknown"."""
    taxonomy, sizes = model.head.taxonomy, data.taxonomy.num_classes
    levels = zip(taxonomy.levels, taxonomy.num_classes, sizes, strict=True)
    outcomes = [level for level, size, known in levels if size > known]
    save_model(folder, model, config, taxonomy, None, tuple(data.inputs.shape[1:]), data.kmer, outcomes)


def export_winner(run_dir: str | Path, out: str | Path) -> Path:
    """Copy the winner's model out of a search's folder, with its metrics.

    Raises:
        InputError: the search has no winner yet, its model is damaged, or `out` exists.
    """
    run_dir, out = Path(run_dir), Path(out)
    if out.exists():
        raise InputError("exists already", file=out, allowed="the name of a folder to make")
    if not (run_dir / "model" / DESCRIPTION).is_file():
        raise InputError(
            "has no winner's model (yet)", file=run_dir, allowed="the folder of a finished search"
        )
    load_model(run_dir / "model")
    file = run_dir / "summary.json"
    metrics = read_winner_metrics(file) if file.is_file() else None
    shutil.copytree(run_dir / "model", out)
    if metrics is not None:
        _describe(out, _read_description(out) | {"metrics": metrics})
    return out


def save_decoding(folder: str | Path, rule: DecodingRule) -> None:
    """Let the model in `folder` name by `rule` from now on. InputError if the folder is no model."""
    folder = Path(folder)
    _describe(folder, _read_description(folder) | {"decoding": rule.model_dump(mode="json")})


def _describe(folder: Path, description: Mapping[str, Any]) -> None:
    replace_file(folder / README, _readme(description).encode())
    replace_file(folder / DESCRIPTION, json.dumps(description, ensure_ascii=False).encode())


def _readme(description: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{level} ({count})" for level, count in description["classes"].items())
    shape = " x ".join(map(str, description["input_shape"]))
    kinds = ".h5, .npy, .csv"
    if len(description["input_shape"]) == 3:
        kinds = "a folder of images, an image, .h5, .npy"
    if description["kmer"] is not None:
        kinds = f".fasta, .fasta.gz, {kinds}"
    tested = {
        name: value for name, value in description["metrics"].items() if name.startswith("test/accuracy")
    }
    rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in tested.items())
    table = f"\n| on the test split, as trained | |\n|---|---|\n{rows}" if rows else ""
    rule = _rule(description)
    named = "" if rule == AS_TRAINED else f"\nNames are given by {rule} (`hiertune decode`).\n"
    return f"""# A hierarchical classifier, made by hiertune

Names {shape} inputs at {len(description["levels"])} levels (classes): {classes}.
{table}{named}
    hiertune predict THIS_FOLDER INPUT --out names.csv    # INPUT: {kinds}

    from hiertune.export import load_model
    prediction = load_model("THIS_FOLDER").predict(inputs)   # inputs: array [N, {shape.replace(" x ", ", ")}]
    prediction.names         # per row: a class at every level
    prediction.confidences   # their probabilities [N, levels]
    prediction.paths         # the finest prediction's ancestors: always one path of the taxonomy

`model.safetensors` holds the weights, `model.json` the settings, the taxonomy and the metrics.
"""


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Prediction:
    """What a model says of N rows."""

    taxonomy: Taxonomy
    labels: np.ndarray
    """int64 [N, L]: the class of every level, by the decoding rule. As trained it is the most probable one of
    each level by itself, and levels may contradict each other."""
    confidences: np.ndarray
    """float32 [N, L]: their probabilities, as `Predictor.probabilities` gives them whatever the rule."""
    outcomes: Sequence[str] = ()
    """Levels whose last class says "unknown"."""

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [N]: the finest level of which something else than "unknown" is said; -1 if there is none."""
        sizes = [
            size - (level in self.outcomes)
            for level, size in zip(self.taxonomy.levels, self.taxonomy.num_classes, strict=True)
        ]
        said = self.labels < sizes
        return np.where(said, np.arange(len(sizes)), -1).max(1)

    @cached_property
    def paths(self) -> np.ndarray:
        """int64 [N, L]: the class of the finest level that is not "unknown", and its ancestors.

        -1 below it, and from an unknown rank upwards.
        """
        paths = np.full(self.labels.shape, -1)
        for level in range(self.taxonomy.num_levels):
            rows = self.ends == level
            paths[rows, : level + 1] = self.taxonomy.ancestors(level)[self.labels[rows, level]]
        return paths

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Per row, the name of each level's class."""
        names = self.taxonomy.names
        return [tuple(names[level][i] for level, i in enumerate(row)) for row in self.labels.tolist()]

    @property
    def path_names(self) -> list[tuple[str | None, ...]]:
        """Per row, the names of `paths`; None at unknown ranks."""
        gaps = (None,) * self.taxonomy.num_levels
        found = []
        for row, level in zip(self.labels, self.ends.tolist(), strict=True):
            path = self.taxonomy.path(level, row[level]) if level >= 0 else ()
            found.append((path + gaps)[: len(gaps)])
        return found


class Predictor:
    """A loaded model. Inputs are arrays or tensors `[N, *input_shape]`, float or uint8."""

    def __init__(
        self,
        model: HierarchicalClassifier,
        taxonomy: Taxonomy,
        input_shape: tuple[int, ...],
        kmer: KmerConfig | None = None,
        device: str | torch.device = "cpu",
        rule: DecodingRule = AS_TRAINED,
        outcomes: Sequence[str] = (),
    ) -> None:
        self.model = model.to(device).eval()
        self.taxonomy = taxonomy
        self.input_shape = input_shape
        self.kmer = kmer
        self.device = torch.device(device)
        self.rule = rule
        self.outcomes = tuple(outcomes)

    def predict(self, inputs: np.ndarray | torch.Tensor, batch_size: int = 256) -> Prediction:
        """One class per level, by the model's own rule (`rule`; `hiertune decode` changes it).

        Raises:
            InputError: inputs of another shape, or not finite.
        """
        self.check_shape(inputs)
        decoder = Decoder(self.taxonomy, self.rule, self.model.head.refine, self.device)
        labels = np.empty((len(inputs), self.taxonomy.num_levels), np.int64)
        confidences = np.empty(labels.shape, np.float32)
        for first, base, logits in self._forward(inputs, batch_size):
            rows = slice(first, first + batch_size)
            named = decoder(base, logits)
            columns = zip(logits.values(), named.split(1, 1), strict=True)
            labels[rows] = named.cpu()
            confidences[rows] = torch.cat([z.softmax(1).gather(1, n) for z, n in columns], 1).cpu()
        return Prediction(self.taxonomy, labels, confidences, self.outcomes)

    def probabilities(
        self, inputs: np.ndarray | torch.Tensor, batch_size: int = 256
    ) -> dict[str, np.ndarray]:
        """Per level float32 `[N, C_l]`: softmax of the refined logits."""
        self.check_shape(inputs)
        blocks: dict[str, list[np.ndarray]] = {level: [] for level in self.taxonomy.levels}
        for _, _, logits in self._forward(inputs, batch_size):
            for level, level_logits in logits.items():
                blocks[level].append(level_logits.softmax(1).cpu().numpy())
        empty = {
            level: np.empty((0, count), np.float32)
            for level, count in zip(self.taxonomy.levels, self.taxonomy.num_classes, strict=True)
        }
        return {level: np.concatenate([empty[level], *parts]) for level, parts in blocks.items()}

    def check_shape(self, inputs: np.ndarray | torch.Tensor, file: str | Path | None = None) -> None:
        """InputError, naming `file`, unless `inputs` is `[N, *input_shape]`."""
        if inputs.ndim == 0 or tuple(inputs.shape[1:]) != self.input_shape:
            allowed = f"[N, {', '.join(map(str, self.input_shape))}]"
            raise InputError(f"inputs have the shape {list(inputs.shape)}", file=file, allowed=allowed)

    @torch.inference_mode()
    def _forward(
        self, inputs: np.ndarray | torch.Tensor, batch_size: int
    ) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """First row, base logits and refined logits of each batch."""
        for first in range(0, len(inputs), batch_size):
            batch = _as_tensor(inputs[first : first + batch_size])
            bad = _first_bad_row(batch)
            if bad is not None:
                raise InputError(f"row {first + bad} of the inputs is not finite", allowed="finite numbers")
            logits, base = self.model(batch.to(self.device)), self.model.base_logits
            assert base is not None
            self.model.release()
            yield first, base, logits


def _as_tensor(rows: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 as it is, all else float32; a copy, because files are mapped read-only."""
    if isinstance(rows, torch.Tensor):
        return rows if rows.dtype == torch.uint8 else rows.float()
    with np.errstate(over="ignore"):  # beyond float32 is inf, and refused as such
        return torch.from_numpy(np.array(rows, np.uint8 if rows.dtype == np.uint8 else np.float32))


def _first_bad_row(batch: torch.Tensor) -> int | None:
    """The first row with a NaN or infinity."""
    finite = torch.isfinite(batch).flatten(1).all(1)
    return None if bool(finite.all()) else int(finite.logical_not().nonzero()[0])


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load what `save_model` wrote.

    Raises:
        InputError: the folder is no model, of an unknown version, incomplete or damaged.
    """
    folder = Path(folder)
    description = _read_description(folder)
    weights = _read(folder / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != description.get("weights_sha256"):
        raise InputError("is damaged, or of another model", file=folder / WEIGHTS)
    try:
        config = TrialConfig.model_validate_json(json.dumps(description["config"]))
        kmer = None if description["kmer"] is None else KmerConfig(**description["kmer"])
        taxonomy = Taxonomy.from_dict(description["taxonomy"])
        input_shape = tuple(map(int, description["input_shape"]))
        rule = _rule(description)
        outcomes = [taxonomy.levels[taxonomy.level_index(level)] for level in description["outcomes"]]
        with torch.random.fork_rng(devices=[]):  # the fresh weights are replaced: spare the caller's state
            model = build_model(config.model, taxonomy, input_shape, None, load_weights=False)
        model.load_state_dict(safetensors.torch.load(weights))
    except (
        KeyError,
        TypeError,
        ValueError,  # pydantic's and InputError too
        RuntimeError,  # load_state_dict
        safetensors.SafetensorError,
    ) as error:
        raise InputError(f"can't be loaded: {error}", file=folder / DESCRIPTION) from error
    return Predictor(model, taxonomy, input_shape, kmer, device, rule, outcomes)


def _rule(description: Mapping[str, Any]) -> DecodingRule:
    """Models that nobody has chosen a rule for name as trained."""
    return DecodingRule.model_validate(description.get("decoding", {}))


def read_head(folder: str | Path) -> tuple[HeadConfig, Taxonomy]:
    """The head of a model and the classes it names, without its weights. InputError as `load_model`."""
    folder = Path(folder)
    description = _read_description(folder)
    try:
        config = TrialConfig.model_validate_json(json.dumps(description["config"]))
        return config.model.head, Taxonomy.from_dict(description["taxonomy"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"can't be read: {error}", file=folder / DESCRIPTION) from error


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(_read(path))
    except InputError:  # which is a ValueError, too
        raise
    except ValueError as error:
        raise InputError(f"is no JSON: {error}", file=path) from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise InputError("does not describe a hiertune model", file=path)
    if description.get("version") != _VERSION:
        raise InputError(f"has version {description.get('version')!r}", file=path, allowed=str(_VERSION))
    return description


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        allowed = "a model folder, such as runs/NAME/model"
        raise InputError(f"can't be read ({error.strerror})", file=path, allowed=allowed) from error


# ----------------------------------------------------------------------------------------- files


def predict_file(
    folder: str | Path,
    source: str | Path,
    out: str | Path | None = None,
    *,
    skip_broken: bool = False,
) -> list[str]:
    """Write a CSV with one row per row of `source`, to `out` or to standard output.

    Columns: `id`; per level its name and `<level>_probability`; `path`, the finest prediction's names from
    the top, joined by ";". `source` is a hiertune .h5, FASTA (for models of k-mers), .npy, a .csv of
    numbers with a header and, optionally, a column `id`, or (for models of images) an image file or a
    folder of them, found and read as `import-images` does. Returns the names of the images that can't be
    read and were left out: none unless `skip_broken`.

    Raises:
        InputError: a folder or file that can't be used; nothing is left at `out` then.
    """
    predictor = load_model(folder)
    broken: list[str] | None = [] if skip_broken else None
    blocks = _blocks(Path(source), predictor, broken)
    with _output(out) as file:
        first = list(islice(blocks, 1))  # a file that can't be read is told before anything is printed
        writer = csv.writer(_Lines(file))
        levels = predictor.taxonomy.levels
        writer.writerow(
            ["id", *(text for level in levels for text in (level, f"{level}_probability")), "path"]
        )
        for ids, inputs in chain(first, blocks):
            prediction = _predict_block(predictor, ids, inputs, source)
            rows = zip(ids, prediction.names, prediction.confidences, prediction.path_names, strict=True)
            for name, names, confidences, path in rows:
                pairs = zip(names, confidences, strict=True)
                cells = [cell for level, p in pairs for cell in (level, f"{p:.6f}")]
                writer.writerow([name, *cells, ";".join(part or "" for part in path)])
    return broken or []


class _Lines:
    """Rows of csv's own ending, which makes it quote names that hold either half of it, on lines of ours."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> None:
        self._file.write(row.removesuffix("\r\n") + "\n")


def _predict_block(
    predictor: Predictor, ids: list[str], inputs: np.ndarray | torch.Tensor, source: str | Path
) -> Prediction:
    predictor.check_shape(inputs, source)
    bad = _first_bad_row(_as_tensor(inputs))
    if bad is not None:
        raise InputError(f"the input of {ids[bad]!r} is not finite", file=source, allowed="finite numbers")
    return predictor.predict(inputs)


Block = tuple[list[str], np.ndarray | torch.Tensor]


def _blocks(source: Path, predictor: Predictor, broken: list[str] | None) -> Iterator[Block]:
    """`broken`: where images that can't be read are to be listed, if they are left out."""
    from hiertune.data.importers.pixels import IMAGE_SUFFIXES

    name = source.name.lower()
    if len(predictor.input_shape) == 3 and (source.is_dir() or name.endswith(IMAGE_SUFFIXES)):
        return _image_blocks(source, predictor, broken)
    if broken is not None:
        raise InputError("--skip-broken is for images", file=source, allowed="an image, a folder of images")
    if name.endswith((".h5", ".hdf5")):
        return _hdf5_blocks(source)
    if name.removesuffix(".gz").endswith((".fasta", ".fa", ".fna")):
        if predictor.kmer is None:
            raise InputError(
                "the model doesn't know how sequences become its inputs", file=source, allowed=".h5"
            )
        return _fasta_blocks(source, predictor.kmer)
    if name.endswith(".npy"):
        return _npy_blocks(source)
    if name.endswith(".csv"):
        return _csv_blocks(source)
    kinds = [".h5", ".fasta[.gz]", ".npy", ".csv"]
    if len(predictor.input_shape) == 3:
        kinds = ["an image", "a folder of images", ".h5", ".npy"]
    raise InputError("is of a kind that isn't known", file=source, allowed=", ".join(kinds))


def _image_blocks(source: Path, predictor: Predictor, broken: list[str] | None) -> Iterator[Block]:
    from hiertune.data.importers.pixels import IMAGE_SUFFIXES, file_rows, find_images, loaded

    height, width, channels = predictor.input_shape
    if channels != 3 or height != width:
        shape = " x ".join(map(str, predictor.input_shape))
        problem = f"the model takes images of {shape}, which image files are not resized to"
        raise InputError(problem, file=source, allowed=".h5, .npy")
    root, names = source.parent, [source.name]
    if source.is_dir():
        root, names = source, find_images(source).images
    if not names:
        raise InputError("has no images", file=source, allowed=", ".join(IMAGE_SUFFIXES))
    check_storable(names, file=source, key="file name")
    rows = loaded(file_rows(root, names, height), range(len(names)), skip_broken=broken is not None)
    pairs = zip(names, rows, strict=True)
    while block := list(islice(pairs, _BLOCK_IMAGES)):
        if broken is not None:
            broken += [name for name, pixels in block if pixels is None]
        read = {name: pixels for name, pixels in block if pixels is not None}
        if read:
            yield list(read), np.stack(list(read.values()))
    if broken is not None and len(broken) == len(names):
        raise InputError(f"none of {len(names):,} images can be read", file=source)


def _hdf5_blocks(source: Path) -> Iterator[Block]:
    from hiertune.data import open_dataset

    data = open_dataset(DataConfig(path=str(source), in_memory="never"), require=())
    for first in range(0, len(data), _BLOCK_ROWS):
        rows = np.arange(first, min(first + _BLOCK_ROWS, len(data)))
        yield list(data.ids[rows]), data.inputs.rows(rows)


def _fasta_blocks(source: Path, kmer: KmerConfig) -> Iterator[Block]:
    from hiertune.data.importers.fasta import read_fasta
    from hiertune.data.kmers import kmer_features

    records = read_fasta(source)
    while block := list(islice(records, _BLOCK_ROWS)):
        features = kmer_features([record.sequence for record in block], kmer.k, kmer.transform)
        yield [record.id for record in block], features


# numpy parses a header as a Python literal: damage shows as whatever the parser raises
_NPY_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    tokenize.TokenError,
)


def _npy_blocks(source: Path) -> Iterator[Block]:
    try:
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    except _NPY_DAMAGE as error:
        raise InputError(f"can't be read: {error}", file=source, allowed="an array of numbers") from error
    if not isinstance(array, np.ndarray):  # a .npz under another name
        raise InputError("holds several arrays", file=source, allowed="an array of numbers")
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise InputError(f"holds {array.dtype} {array.shape}", file=source, allowed="an array of numbers")
    for first in range(0, len(array), _BLOCK_ROWS):
        block = array[first : first + _BLOCK_ROWS]
        yield [str(row) for row in range(first, first + len(block))], block


def _csv_blocks(source: Path) -> Iterator[Block]:
    try:
        with source.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if not header:
                raise InputError("has no header", file=source, allowed="a CSV file with a header")
            ids = header.index("id") if "id" in header else None
            first = 0
            yield [], _numbers(source, [], len(header), ids, 0)  # its width is judged without a row, too
            while lines := list(islice(reader, _BLOCK_ROWS)):
                numbers = _numbers(source, lines, len(header), ids, first)
                numbered = [str(row) for row in range(first, first + len(lines))]
                yield numbered if ids is None else [line[ids] for line in lines], numbers
                first += len(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"can't be read: {error}", file=source, allowed="a CSV file with a header"
        ) from error


def _numbers(source: Path, lines: list[list[str]], columns: int, ids: int | None, first: int) -> np.ndarray:
    """float32 `[len(lines), columns without the id]`."""
    numbers = np.empty((len(lines), columns - (ids is not None)), np.float32)
    for row, line in enumerate(lines):
        if len(line) != columns:
            problem = f"has {len(line)} cells, the header {columns}"
            raise InputError(problem, file=source, line=first + row + 2)
        cells = line if ids is None else line[:ids] + line[ids + 1 :]
        try:
            numbers[row] = cells
        except ValueError as error:
            raise InputError(str(error), file=source, line=first + row + 2, allowed="numbers") from None
    return numbers


@contextlib.contextmanager
def _output(out: str | Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that appears when it is complete."""
    if out is None:
        yield sys.stdout
        return
    path = Path(out)
    if not path.parent.is_dir():
        raise InputError("its folder does not exist", file=path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Other people's files to hiertune's: FASTA with lineages, and tables (CSV, TSV, Parquet)."""

from __future__ import annotations

import csv
import difflib
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from hiertune.data.format import RowBlocks, block_rows, write_dataset
from hiertune.data.kmers import kmer_config, kmer_features
from hiertune.data.splits import SPLITS
from hiertune.errors import InputError
from hiertune.taxonomy import Taxonomy

# ------------------------------------------------------------------------------- unknown ranks

_PLACEHOLDER = re.compile(
    r"""incertae[\s_-]*sedis      # anywhere in the name: placement unknown
    | ^(unknown|unclassified|unassigned|unidentified|uncultured)(\b|_)
    | ^(na|n/a|nan|none|null|-|\?)$
    | ^[a-z]__$                  # a rank prefix without a name, as in Greengenes""",
    re.IGNORECASE | re.VERBOSE,
)


def clean_rank(name: str, unknown: Iterable[str] = ()) -> str | None:
    """A rank's name without surrounding space; None where it names no class.

    That is, whatever the case: an empty name; "incertae sedis" anywhere in it (also with "_" or
    "-"); a name that begins with the word unknown, unclassified, unassigned, unidentified or
    uncultured; one of NA, N/A, NaN, none, null, "-", "?"; a bare prefix such as "g__"; and the
    names in `unknown`, which are compared as a whole.
    """
    name = name.strip()
    if not name or _PLACEHOLDER.search(name) or name.casefold() in {other.casefold() for other in unknown}:
        return None
    return name


# --------------------------------------------------------------------------------------- FASTA


@dataclass(frozen=True)
class FastaRecord:
    id: str
    description: str
    """The header after the id."""
    sequence: bytes
    line: int
    """Line of the header, counted from 1."""


def read_fasta(path: str | Path) -> Iterator[FastaRecord]:
    """Records of a FASTA file (also gzipped: `.gz`), in order.

    The id ends at the first tab, or else at the first space. Raises InputError with the line
    for text before the first header, a header without id, an empty sequence, letters that are none,
    and for a file that cannot be read.
    """
    path = Path(path)
    header, header_line, parts = "", 0, list[str]()
    for line, text in _lines(path):
        if text.startswith(">"):
            if header_line:
                yield _record(path, header, header_line, parts)
            header, header_line, parts = text[1:], line, []
        elif not header_line:
            raise InputError("text before the first header", file=path, line=line, allowed=">ID<TAB>lineage")
        elif text.isascii() and text.isalpha():
            parts.append(text)
        else:
            wrong = next(letter for letter in text if not (letter.isascii() and letter.isalpha()))
            raise InputError(
                f"{wrong!r} in a sequence", file=path, line=line, allowed="letters; sequences without gaps"
            )
    if not header_line:
        raise InputError("has no sequences", file=path, allowed=">ID<TAB>lineage, then the sequence")
    yield _record(path, header, header_line, parts)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank."""
    try:
        with _open_text(path) as file:
            for line, text in enumerate(file, start=1):
                if stripped := text.strip():
                    yield line, stripped
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=path, allowed="text, or gzipped text") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")  # Windows puts a mark in front


def _record(path: Path, header: str, line: int, parts: list[str]) -> FastaRecord:
    name, _, description = header.partition("\t" if "\t" in header else " ")
    if not name.strip():
        raise InputError("a header without an id", file=path, line=line, allowed=">ID<TAB>lineage")
    if not parts:
        raise InputError(f"{name!r} has no sequence", file=path, line=line)
    return FastaRecord(name.strip(), description.strip(), "".join(parts).encode(), line)


def import_fasta(
    path: str | Path,
    out: str | Path,
    levels: Sequence[str],
    *,
    k: int = 6,
    transform: str = "sqrt",
    separator: str = ";",
    unknown: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a data set of k-mer features from FASTA whose headers are `>ID<TAB>domain;phylum;...`.

    levels: names of the ranks, coarse -> fine; a shorter lineage is unknown in its last ranks.
    k, transform: see `kmer_features`. separator: between ranks. unknown: more names that mean
    "unknown" (see `clean_rank`).
    Raises InputError with file and line for a bad record.
    """
    path = Path(path)
    kmer = kmer_config(k, transform)
    records = list(read_fasta(path))
    lines: dict[str, int] = {}
    lineages = []
    for record in records:
        if record.id in lines:
            problem = f"the id {record.id!r} occurred in line {lines[record.id]}"
            raise InputError(problem, file=path, line=record.line, allowed="ids that are all different")
        lines[record.id] = record.line
        lineages.append(_lineage(path, record, len(levels), separator, unknown))
    taxonomy = Taxonomy.from_lineages(lineages, levels)
    inputs = _kmer_blocks(path, records, k, transform)
    ids = [record.id for record in records]
    return write_dataset(
        out, inputs, taxonomy.encode(lineages), taxonomy, ids, kmer=kmer, overwrite=overwrite
    )


def _lineage(
    path: Path, record: FastaRecord, num_levels: int, separator: str, unknown: Sequence[str]
) -> list[str | None]:
    ranks = record.description.removesuffix(separator).split(separator)
    if not record.description or len(ranks) > num_levels:
        found = f"{len(ranks)} ranks" if record.description else "no lineage"
        raise InputError(
            f"{record.id!r} has {found}",
            file=path,
            line=record.line,
            allowed=f"1 to {num_levels} ranks, with {separator!r} between them",
        )
    return [clean_rank(rank, unknown) for rank in ranks] + [None] * (num_levels - len(ranks))


def _kmer_blocks(path: Path, records: Sequence[FastaRecord], k: int, transform: str) -> RowBlocks:
    shape = (len(records), 4**k)
    step = block_rows(shape, np.dtype(np.float32).itemsize)

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, len(records), step):
            here = records[first : first + step]
            features = kmer_features([record.sequence for record in here], k, transform)
            empty = ~features.any(axis=1)
            if empty.any():
                record = here[int(np.argmax(empty))]
                raise InputError(
                    f"{record.id!r} has no word of {k} letters A, C, G, T", file=path, line=record.line
                )
            yield features

    return RowBlocks(shape, np.dtype(np.float32), blocks())


# --------------------------------------------------------------------------------------- tables


def import_table(
    path: str | Path,
    out: str | Path,
    labels: Sequence[str],
    *,
    features: Sequence[str] | None = None,
    id_column: str | None = None,
    split_column: str | None = None,
    unknown: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:
    """Write a data set from a table: `.csv`, `.tsv` (both also `.gz`) or `.parquet`, with a header.

    labels: the column of each level, coarse -> fine; their names become the level names.
    features: feature columns; by default all other columns with a name that hold numbers. id_column: by
    default ids are row numbers from 0, so the split then depends on the order of the rows.
    split_column: a column with train, val or test; by default the split follows from the ids.
    unknown: more names that mean "unknown" (see `clean_rank`).
    Raises InputError with file, line (for Parquet: row) and column for a bad cell.
    """
    table = _Table.read(Path(path), [*labels, *filter(None, (id_column, split_column))])
    names = _feature_columns(table, features)
    inputs = np.stack([table.numbers(name) for name in names], axis=1)
    lineages = list(
        zip(*([clean_rank(x, unknown) for x in table.texts(name)] for name in labels), strict=True)
    )
    taxonomy = Taxonomy.from_lineages(lineages, labels)
    return write_dataset(
        out,
        inputs,
        taxonomy.encode(lineages),
        taxonomy,
        _table_ids(table, id_column),
        None if split_column is None else _table_split(table, split_column),
        overwrite=overwrite,
    )


@dataclass(frozen=True)
class _Table:
    path: Path
    frame: pd.DataFrame
    text_columns: tuple[str, ...]
    """Labels, id and split: never features."""

    @classmethod
    def read(cls, path: Path, text_columns: list[str]) -> _Table:
        separator = _separator(path)
        try:
            if separator is None:
                frame = pd.read_parquet(path, dtype_backend="numpy_nullable")
            else:
                texts = dict.fromkeys(text_columns, str)
                # text stays as it is: "NA" is for `clean_rank` to judge, and no number either
                frame = pd.read_csv(path, sep=separator, dtype=texts, keep_default_na=False, low_memory=False)
        except (OSError, EOFError, zlib.error, ValueError) as error:  # pandas' and pyarrow's are ValueErrors
            problem = " ".join(str(error).split())
            raise InputError(f"cannot be read as a table: {problem}", file=path) from error
        table = cls(path, frame, tuple(text_columns))
        table.check_columns(text_columns)
        if not len(frame):
            raise InputError("has no rows", file=path)
        return table

    def check_columns(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.frame.columns:
                columns = list(map(str, self.frame.columns))
                near = difflib.get_close_matches(name, columns) or [
                    *columns[:10],
                    *["..."][: len(columns) - 10],
                ]
                raise InputError(f"has no column {name!r}", file=self.path, allowed=", ".join(near))

    def texts(self, name: str) -> list[str]:
        return self.frame[name].astype("string").fillna("").tolist()

    def numbers(self, name: str) -> np.ndarray:
        """A column as float32; InputError for the first cell that is no finite number."""
        values = self._parsed(name)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise self.bad_cell(
                int(np.argmin(np.isfinite(values))), name, "finite numbers in a feature column"
            )
        return values

    def share_of_numbers(self, name: str) -> float:
        return float(np.isfinite(self._parsed(name)).mean())

    def _parsed(self, name: str) -> np.ndarray:
        """The column as float64, NaN for what is no number."""
        if self.frame[name].dtype.kind in "mM":  # pandas would count nanoseconds
            return np.full(len(self.frame), np.nan)
        return pd.to_numeric(self.frame[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)

    def bad_cell(self, row: int, name: str, allowed: str, problem: str = "") -> InputError:
        value = self.frame[name].iloc[row]
        shown = "missing" if pd.isna(value) or value == "" else repr(str(value))
        where = f"row {row}, " if _separator(self.path) is None else ""
        return InputError(
            f"{where}column {name!r} is {shown}{problem}",
            file=self.path,
            line=self._line(row),
            allowed=allowed,
        )

    def _line(self, row: int) -> int | None:
        """Line of a row: they differ where cells hold line breaks or lines are blank."""
        separator = _separator(self.path)
        if separator is None:
            return None
        with _open_text(self.path) as file:
            reader = csv.reader(file, delimiter=separator)
            lines = (reader.line_num - "".join(cells).count("\n") for cells in reader if cells)
            return next(line for number, line in enumerate(lines) if number == row + 1)


def _separator(path: Path) -> str | None:
    """What stands between cells; None for Parquet."""
    kinds = {".csv": ",", ".tsv": "\t", ".parquet": None, ".pq": None}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in kinds:
        raise InputError(
            "is no known kind of table", file=path, allowed=f"{', '.join(kinds)}, or .gz of text"
        )
    return kinds[suffix]


def _feature_columns(table: _Table, features: Sequence[str] | None) -> list[str]:
    if features is None:
        # half numbers is a feature column with bad cells, which `numbers` names, not one to leave out;
        # a column without a name is pandas' or R's row number
        columns = [name for name in table.frame.columns if not re.fullmatch(r"Unnamed: \d+", name)]
        others = [name for name in columns if name not in table.text_columns]
        features = [name for name in others if table.share_of_numbers(name) > 0.5]
    if not features:
        raise InputError("has no feature columns", file=table.path, allowed="at least one column of numbers")
    table.check_columns(features)
    for name in table.text_columns:
        if name in features:
            raise InputError(f"column {name!r} cannot be a feature as well", file=table.path)
    return list(features)


def _table_ids(table: _Table, id_column: str | None) -> list[str]:
    if id_column is None:
        return list(map(str, range(len(table.frame))))
    ids = table.texts(id_column)
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        if not name or name in first:
            problem = f" again, as in row {first[name]}" if name else ""
            raise table.bad_cell(row, id_column, "ids that are all different", problem)
        first[name] = row
    return ids


def _table_split(table: _Table, split_column: str) -> np.ndarray:
    texts = table.texts(split_column)
    for row, text in enumerate(texts):
        if text not in SPLITS:
            raise table.bad_cell(row, split_column, ", ".join(SPLITS))
    return np.array([SPLITS.index(text) for text in texts], np.int8)

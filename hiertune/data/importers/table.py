"""Tables of features and labels: CSV, TSV, Parquet."""

from __future__ import annotations

import csv
import difflib
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from hiertune.data.format import write_dataset
from hiertune.data.importers.notes import known_rows, quiet
from hiertune.data.importers.ranks import clean_rank
from hiertune.data.importers.text import open_text
from hiertune.data.splits import SPLITS
from hiertune.errors import InputError, about
from hiertune.taxonomy import Taxonomy


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
    console: Console | None = None,
) -> Path:
    """Write a data set from a table: `.csv`, `.tsv` (both also `.gz`) or `.parquet`, with a header.

    labels: the column of each level, coarse -> fine; their names become the level names.
    features: feature columns; by default all other columns with a name that hold numbers. id_column: by
    default ids are row numbers from 0, so the split then depends on the order of the rows.
    split_column: a column with train, val or test; by default the split follows from the ids.
    unknown: more names that mean "unknown" (see `clean_rank`). Rows unknown at all levels are left out, and
    `console` says how many.
    Raises InputError with file, line (for Parquet: row) and column for a bad cell.
    """
    table = Table.read(Path(path), [*labels, *filter(None, (id_column, split_column))])
    names = _feature_columns(table, features)
    inputs = np.stack([table.numbers(name) for name in names], axis=1)
    lineages = list(
        zip(*([clean_rank(x, unknown) for x in table.texts(name)] for name in labels), strict=True)
    )
    with about(path):
        taxonomy = Taxonomy.from_lineages(lineages, labels)
    ids = _table_ids(table, id_column)
    split = None if split_column is None else _table_split(table, split_column)
    encoded = taxonomy.encode(lineages)
    kept = known_rows(encoded, console or quiet())
    return write_dataset(
        out,
        inputs if len(kept) == len(inputs) else inputs[kept],
        encoded[kept],
        taxonomy,
        [ids[row] for row in kept],
        None if split is None else split[kept],
        overwrite=overwrite,
    )


# pandas' and pyarrow's own are ValueErrors; the others are what wrong metadata make of their readers
_DAMAGE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class Table:
    path: Path
    frame: pd.DataFrame
    text_columns: tuple[str, ...]
    """Labels, id and split: never features."""

    @classmethod
    def read(cls, path: Path, text_columns: list[str] | None = None) -> Table:
        """The table; `text_columns` must be there (None: all are text). InputError if it cannot be read."""
        separator = _separator(path)
        try:
            if separator is None:
                frame = pd.read_parquet(path, dtype_backend="numpy_nullable")
            else:
                texts = str if text_columns is None else dict.fromkeys(text_columns, str)
                # text stays as it is: "NA" is for `clean_rank` to judge, and no number either
                frame = pd.read_csv(path, sep=separator, dtype=texts, keep_default_na=False, low_memory=False)
        except _DAMAGE as error:
            problem = " ".join(str(error).split())
            raise InputError(f"cannot be read as a table: {problem}", file=path) from error
        if text_columns is None:
            text_columns = [str(name) for name in frame.columns]
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
                shown = [column if len(column) <= 60 else f"{column[:57]}..." for column in near]
                raise InputError(f"has no column {name!r}", file=self.path, allowed=", ".join(shown))

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
        with open_text(self.path) as file:
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


def _feature_columns(table: Table, features: Sequence[str] | None) -> list[str]:
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


def _table_ids(table: Table, id_column: str | None) -> list[str]:
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


def _table_split(table: Table, split_column: str) -> np.ndarray:
    texts = table.texts(split_column)
    for row, text in enumerate(texts):
        if text not in SPLITS:
            raise table.bad_cell(row, split_column, ", ".join(SPLITS))
    return np.array([SPLITS.index(text) for text in texts], np.int8)

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from hiertune.config import DataConfig
from hiertune.data import import_table, open_dataset, split_of_ids
from hiertune.errors import InputError


def open_rows(path: Path):
    data = open_dataset(DataConfig(path=str(path)), require=())
    return data, data.inputs.rows(np.arange(len(data)))


def message(function, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    return str(error.value)


TABLE = pd.DataFrame(
    {
        "name": ["p", "q", "NA", "s"],
        "order": ["A", "A", "B", "incertae sedis"],
        "genus": ["x", "", "NA", "w"],
        "size": [1.5, 2.0, -3.0, 1e3],
        "note": ["red", "blue", "1", "green"],
        "count": [1, 2, 3, 4],
        "part": ["train", "val", "test", "train"],
    }
)
LABELS = ["order", "genus"]


def write_table(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_table(tmp_path, name):
    path, out = write_table(TABLE, tmp_path / name), tmp_path / "out.h5"
    assert import_table(path, out, LABELS, id_column="name", split_column="part") == out
    data, rows = open_rows(out)
    assert data.ids.tolist() == ["p", "q", "NA", "s"]
    assert data.levels == ("order", "genus")
    lineages = [("A", "x"), ("A", None), ("B", None), (None, "w")]
    assert np.array_equal(data.labels, data.taxonomy.encode(lineages))
    assert data.split.tolist() == [0, 1, 2, 0]
    expected = np.array([[1.5, 1], [2, 2], [-3, 3], [1e3, 4]], np.float32)  # size, count: not the note
    assert np.array_equal(rows.numpy(), expected)


def test_table_without_ids_is_split_by_row_numbers(tmp_path):
    path, out = write_table(TABLE, tmp_path / "a.csv"), tmp_path / "out.h5"
    import_table(path, out, LABELS, features=["count"])
    data, rows = open_rows(out)
    assert data.ids.tolist() == ["0", "1", "2", "3"]
    assert np.array_equal(data.split, split_of_ids(["0", "1", "2", "3"]))
    assert rows.tolist() == [[1], [2], [3], [4]]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_numbers_can_be_labels_and_ids(tmp_path, name):
    path, out = tmp_path / name, tmp_path / "out.h5"
    if name == "a.csv":
        path.write_text("id,kind,f\n10,3,0.5\n11,,1\n12,2,2\n")
    else:  # without pandas' own notes on types, an integer column with gaps could become 3.0, nan, 2.0
        columns = {"id": [10, 11, 12], "kind": [3, None, 2], "f": [0.5, 1.0, 2.0]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    console = Console(file=io.StringIO(), width=300)
    import_table(path, out, ["kind"], id_column="id", console=console)
    data, rows = open_rows(out)
    assert data.taxonomy.names == (("2", "3"),)
    assert data.labels.tolist() == [[1], [0]]
    assert data.ids.tolist() == ["10", "12"]
    assert rows.tolist() == [[0.5], [2]]
    assert console.file.getvalue() == "note: 1 of 3 rows are unknown at all levels, and left out\n"


def test_row_numbers_and_dates_are_no_features(tmp_path):
    frame = pd.DataFrame({"kind": ["a", "b"], "f": [1.0, 2.0], "b": [True, False]})
    frame.to_csv(tmp_path / "a.csv")  # with pandas' column of row numbers
    import_table(tmp_path / "a.csv", tmp_path / "a.h5", ["kind"])
    assert open_rows(tmp_path / "a.h5")[1].tolist() == [[1, 1], [2, 0]]
    frame["day"] = pd.to_datetime(["2020-01-01", "2021-01-01"])
    frame.to_parquet(tmp_path / "a.parquet")
    import_table(tmp_path / "a.parquet", tmp_path / "b.h5", ["kind"])
    assert open_rows(tmp_path / "b.h5")[1].tolist() == [[1, 1], [2, 0]]


CSV = 'id,kind,f,note\n1,a,0.5,"two\nlines"\n\n2,b,oops,x\n3,c,0.25,y\n4,c,0.25,y\n'


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (CSV, {}, ":5: column 'f' is 'oops'"),  # lines, not rows
        (CSV.replace("oops", ""), {}, ":5: column 'f' is missing"),
        (CSV.replace("oops", "inf"), {}, ":5: column 'f' is 'inf'"),
        (CSV.replace("oops", "1e99"), {}, ":5: column 'f' is '1e+99'"),
        (CSV, {"features": ["note"]}, ":2: column 'note' is 'two\\nlines'"),
        (CSV, {"features": ["g"]}, ": has no column 'g'"),
        (CSV, {"features": ["kind"]}, ": column 'kind' cannot be a feature as well"),
        (CSV, {"labels": ["kin"]}, ": has no column 'kin'"),
        (CSV, {"id_column": "ID"}, ": has no column 'ID'"),
        (CSV, {"split_column": "note", "features": ["id"]}, ":2: column 'note' is 'two\\nlines'"),
        (CSV, {"id_column": "kind", "labels": ["note"], "features": ["id"]},
         ":7: column 'kind' is 'c' again, as in row 2"),
        (CSV.replace("2,b,oops", ",b,1"), {"id_column": "id"}, ":5: column 'id' is missing"),
        (CSV, {"features": []}, ": has no feature columns"),
        ("kind,note\na,b\n", {}, ": has no feature columns"),
        ("kind,f\n", {}, ": has no rows"),
    ],
)  # fmt: skip
def test_bad_table(tmp_path, text, options, expected):
    path = tmp_path / "a.csv"
    path.write_text(text)
    options = {"labels": ["kind"], **options}
    found = message(import_table, path, tmp_path / "out.h5", **options).splitlines()[0]
    assert found == f"{path}{expected}"
    assert not (tmp_path / "out.h5").exists()


def test_near_columns_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV)
    assert message(import_table, path, tmp_path / "o.h5", ["kin"]).splitlines()[1] == "  allowed: kind"
    found = message(import_table, path, tmp_path / "o.h5", ["zzz"])
    assert found.splitlines()[1] == "  allowed: id, kind, f, note"
    path.write_text(",".join(f"c{i}" for i in range(12)))
    found = message(import_table, path, tmp_path / "o.h5", ["zzz"])
    assert found.splitlines()[1] == "  allowed: c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, ..."


def test_bad_cell_of_parquet_is_named_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"kind": ["a", "b", "c"], "f": [1.0, 2.0, None]}).to_parquet(path)
    found = message(import_table, path, tmp_path / "out.h5", ["kind"])
    assert found.splitlines()[0] == f"{path}: row 2, column 'f' is missing"


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("a.csv", b"a,b\n1,2\n1,2,3\n"), ("a.csv", b"a\n\xff\n"), ("a.csv.gz", b"a,b\n"),
     ("a.parquet", b"PAR1"), ("no.csv", None)],
)  # fmt: skip
def test_unreadable_table(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    found = message(import_table, path, tmp_path / "out.h5", ["a"])
    assert found.startswith(f"{path}: cannot be read as a table: ")
    assert len(found.splitlines()) == 1


def test_unknown_kind_of_table(tmp_path):
    found = message(import_table, tmp_path / "a.xlsx", tmp_path / "out.h5", ["a"])
    assert found.splitlines()[0] == f"{tmp_path / 'a.xlsx'}: is no known kind of table"

"""The command line on bad input: one message, exit code 2, nothing started, nothing left."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console

from hiertune import Taxonomy
from hiertune._database import Place
from hiertune._programs import as_typed
from hiertune.cli import main
from hiertune.data import write_dataset
from hiertune.errors import InputError
from hiertune.search.ledger import Ledger
from hiertune.search.mirror import Mirror
from hiertune.search.outputs import RunFolder
from hiertune.search.plan import plan_search
from hiertune.search.resume import open_ledger

GOOD = """name: it
data: {path: data.h5}
model: {backbone: {kind: mlp, hidden: [8]}, head: {kind: linear}}
optimizer: {kind: adamw, lr: {loguniform: [1e-4, 1e-2]}}
train: {epochs: 2, batch_size: 8}
search: {trials: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    lineages = [(f"f{i // 2}", f"g{i}") for i in range(4)] * 25
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    ids = [f"row{i}" for i in range(100)]
    write_dataset(tmp_path / "data.h5", inputs, taxonomy.encode(lineages), taxonomy, ids)
    (tmp_path / "space.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    assert "Traceback" not in printed.err + printed.out
    return printed.err


BAD_SPACES = {
    "unknown key": ("lr: {", "rate: {", "space.yaml:4: optimizer.rate: unknown key"),
    "wrong type": ("epochs: 2", "epochs: two", "space.yaml:5: train.epochs:"),
    "empty choice": ("{loguniform: [1e-4, 1e-2]}", "{choice: []}", "space.yaml:4: optimizer.lr"),
    "low above high": ("[1e-4, 1e-2]", "[1e-2, 1e-4]", "space.yaml:4: optimizer.lr"),
    "log through zero": ("[1e-4, 1e-2]", "[0.0, 1e-2]", "space.yaml:4: optimizer.lr"),
    "no such metric": (
        "search: {",
        "search: {objective: {metric: val/acuracy/genus}, ",
        "space.yaml:6: search.objective.metric:",
    ),
    "no such level": (
        "search: {",
        "search: {objective: {metric: val/accuracy/species}, ",
        "space.yaml:6: search.objective.metric:",
    ),
    "test split as objective": (
        "search: {",
        "search: {objective: {metric: test/accuracy/genus}, ",
        "the test split is read once",
    ),
    "level not in the data": (
        "train:",
        "weighting: {kind: fixed, weights: {order: 1.0}}\ntrain:",
        "space.yaml:5: weighting.weights.order:",
    ),
    "batch above the split": ("batch_size: 8", "batch_size: 800", "space.yaml:5: train.batch_size:"),
    "too many workers": (
        "search: {",
        "search: {workers_per_trial: 4000, ",
        "a trial needs 4000 workers x 1 CPU = 4000 CPU",
    ),
    "a share of two GPUs": (
        "search: {",
        "search: {gpus_per_worker: 1.5, ",
        "space.yaml:6: search.gpus_per_worker: 1.5: a share of a GPU is below 1",
    ),
    "syntax error": ("{kind: linear}}", "{kind: linear}", "space.yaml:"),
    "duplicate key": ("name: it", "name: it\nname: again", "space.yaml:2: name:"),
    "python tag": ("epochs: 2", "epochs: !!python/object/apply:os.getcwd []", "space.yaml:5"),
    "folder as tracking": (
        "search:",
        "tracking: {uri: ./mlruns}\nsearch:",
        "MLflow 3 no longer tracks into folders",
    ),
    "missing data": ("data.h5", "dta.h5", "dta.h5"),
}


@pytest.mark.parametrize("case", BAD_SPACES)
def test_a_broken_space_is_refused_with_its_place(folder, capsys, case):
    old, new, expected = BAD_SPACES[case]
    assert old in GOOD
    (folder / "space.yaml").write_text(GOOD.replace(old, new))
    message = refused(capsys, "search", "space.yaml")
    assert message.startswith("error: ")
    assert expected in message
    assert not (folder / "runs").exists()


def break_file(name):
    def not_hdf5(path):
        path.write_text("id,genus\n")

    def truncated(path):
        path.write_bytes(path.read_bytes()[:-4000])

    def label_out_of_range(path):
        with h5py.File(path, "r+") as file:
            file["labels"][3, 1] = 99

    def contradiction(path):
        with h5py.File(path, "r+") as file:
            file["labels"][0] = [1, 0]

    def nan(path):
        with h5py.File(path, "r+") as file:
            file["inputs"][7, 2] = np.nan

    def nothing_to_train(path):
        with h5py.File(path, "r+") as file:
            file["split"][:] = 2

    return locals()[name]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("not_hdf5", "not an HDF5 file"),
        ("truncated", "data.h5"),
        ("label_out_of_range", "99"),
        ("contradiction", "genus"),
        ("nan", "row 7"),
        ("nothing_to_train", "train"),
    ],
)
def test_a_broken_data_file_is_refused(folder, capsys, damage, expected):
    break_file(damage)(folder / "data.h5")
    message = refused(capsys, "search", "space.yaml")
    assert "data.h5" in message
    assert expected in message
    assert not (folder / "runs").exists()


def test_other_commands_refuse_too(folder, capsys):
    assert "hiertune search" in refused(capsys, "train", "space.yaml")
    assert "there is no search to resume" in refused(capsys, "search", "space.yaml", "--resume")
    message = refused(capsys, "predict", "nowhere", "data.h5")
    assert message.startswith("error: nowhere/model.json: can't be read (No such file or directory)")
    assert "nowhere" in refused(capsys, "report", "nowhere")
    assert "nowhere" in refused(capsys, "export", "nowhere", "out")
    assert "builtin:rrna16s" in refused(capsys, "data", "describe", "builtin:rna")
    assert "'../above': must be letters" in refused(capsys, "search", "space.yaml", "--name", "../above")


def test_a_runs_folder_that_can_not_be_one_is_refused(folder, capsys, monkeypatch):
    (folder / "file").write_text("mine")
    for arguments in (
        ("--runs", "file"),
        ("--runs", "file/below", "--resume"),
        ("--runs", "file", "--dry-run"),
    ):
        message = refused(capsys, "search", "space.yaml", *arguments)
        assert message.startswith(f"error: {folder / 'file'}: --runs: is a file\n  allowed: a folder")
    (folder / "runs").mkdir()
    (folder / "runs" / "it").write_text("mine")
    assert "--runs: is a file" in refused(capsys, "search", "space.yaml", "--resume")
    with pytest.raises(InputError, match=r"no/it: --runs: can't be made: No such file"):
        RunFolder(Path("/proc/no/it")).make()
    may = os.access
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK and may(path, mode))
    assert "--runs: can't be written" in refused(capsys, "search", "space.yaml", "--name", "other")


def test_a_terminal_that_lacks_a_mark_ends_nothing(folder):
    program = "from hiertune import cli\ncli.app = lambda args: print('\\u2714 trial 0')\ncli.main([])\n"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "? trial 0\n")


def test_a_search_that_nobody_reads_any_more_goes_on(folder):
    program = (
        "import sys, time\n"
        "from hiertune.cli import Console, _outputs\n"
        "with _outputs():\n"
        "    for number in range(3): Console().print(number); time.sleep(0.2)\n"
        "    print('not seen', flush=True)\n"
        "    print('done', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "done\n")


def test_an_address_that_is_refused_is_named_by_its_place(folder, capsys, monkeypatch):
    """A line of the file, or the variable."""
    for key, line in (
        ("tracking", "tracking: {uri: 'ftp://h'}"),
        ("ledger", "ledger: sqlite:////no/where/x.db"),
    ):
        (folder / "space.yaml").write_text(GOOD.replace("search:", f"{line}\nsearch:"))
        assert refused(capsys, "search", "space.yaml").startswith(f"error: space.yaml:6: {key}")
    (folder / "space.yaml").write_text(GOOD)
    for name, value in (
        ("MLFLOW_TRACKING_URI", "http://[h"),
        ("HIERTUNE_LEDGER", "sqlite:////no/where/x.db"),
    ):
        monkeypatch.setenv(name, value)
        assert refused(capsys, "search", "space.yaml").startswith(f"error: {name}: ")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("soon", "must be seconds, or a number with a unit"),
        ("0", "greater than 0"),
        ("-5m", "must be seconds"),
        ("nan", "finite"),
    ],
)
def test_a_time_budget_is_checked_as_in_the_file(folder, capsys, text, expected):
    message = refused(capsys, "search", "space.yaml", f"--time-budget={text}")
    assert message.startswith(f"error: --time-budget {text!r}: ")
    assert expected in message


@pytest.mark.parametrize(("text", "seconds"), [("90", 90.0), ("1.5h", 5400.0)])
def test_a_time_budget_replaces_that_of_the_file(folder, text, seconds):
    plan = plan_search(folder / "space.yaml", folder / "runs", time_budget=text, trials=7)
    assert plan.config.search.time_budget == seconds
    assert plan.config.search.trials == 2, "nothing else changes"
    assert plan.given == {"trials": "7", "time-budget": text}


def test_only_a_search_that_runs_can_be_stopped(folder, capsys):
    assert "runs: there is no search of this name: it" in refused(capsys, "stop", "it")
    for name in ("../it", "", ".", "/etc", "x" * 300, "a\0b"):
        assert "there is no search of this name" in refused(capsys, "stop", name)


def test_a_search_is_found_by_name_and_by_folder(folder, capsys):
    """By every command that takes one."""
    run = folder / "kept" / "it"
    run.mkdir(parents=True)
    run.joinpath("trials.csv").write_text("trial,state,objective\n0,completed,0.5\n")
    (folder / "it").mkdir()
    (folder / "it" / "space.yaml").write_text(GOOD)  # a folder of the same name that is no search's
    for words in (["it", "--runs", "kept"], ["kept/it"], [str(run)], ["it", "--runs", str(folder / "kept")]):
        assert done(capsys, "report", *words).endswith("kept/it/report.html\n")
        assert "kept/it: has no winner (yet)" in refused(capsys, "decode", *words)
        assert "it is not running; it goes on with" in refused(capsys, "stop", *words)
        assert "no search of this name was tracked" in refused(capsys, "track", "status", *words)
    for command in ("report", "decode", "stop"):
        said = refused(capsys, command, "other", "--runs", "kept")
        assert said == "error: kept: there is no search of this name: other\n  allowed: it\n"


def test_ctrl_c_while_a_search_is_checked_ends_at_once(folder):
    (folder / "space.yaml").unlink()
    os.mkfifo(folder / "space.yaml")  # nobody writes: reading it waits
    process = subprocess.Popen(
        [sys.executable, "-m", "hiertune", "search", "space.yaml"], stderr=subprocess.PIPE, text=True
    )
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped before the search began; the same command starts it\n"


def test_a_search_that_exists_is_not_overwritten(folder, capsys):
    (folder / "runs" / "it").mkdir(parents=True)
    (folder / "runs" / "it" / "precious").write_text("result")
    (folder / "runs" / "it" / "ledger.log").touch()
    message = refused(capsys, "search", "space.yaml")
    assert "--resume" in message
    assert sorted(os.listdir(folder / "runs" / "it")) == ["ledger.log", "precious"]


def files_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


PLACES = (
    "storage: a/b/c\nledger: sqlite:///{folder}/it.db\ntracking: {{uri: 'sqlite:///{folder}/mlflow.db'}}\n"
)


def test_a_dry_run_leaves_nothing(folder, capsys):
    (folder / "space.yaml").write_text(GOOD + PLACES.format(folder=folder))
    before = files_in(folder)
    assert "exists" not in done(capsys, "search", "space.yaml", "--dry-run")
    assert files_in(folder) == before


def test_a_refused_start_leaves_nothing(folder, capsys):
    (folder / "space.yaml").write_text(GOOD + PLACES.format(folder=folder))
    before = files_in(folder)
    assert "unable to open database file" in refused(capsys, "search", "space.yaml", "--resume")
    assert files_in(folder) == before
    (folder / "data.h5").unlink()
    del before[folder / "data.h5"]
    for how in ((), ("--resume",), ("--continue",), ("--dry-run",)):
        assert "data.h5" in refused(capsys, "search", "space.yaml", *how)
        assert files_in(folder) == before


@pytest.mark.parametrize("how", [("--resume",), ("--resume", "--dry-run")])
def test_a_search_that_its_database_does_not_have_is_not_begun(folder, capsys, how):
    (folder / "space.yaml").write_text(GOOD + PLACES.format(folder=folder))
    sqlite3.connect("it.db").execute("create table mine (number)").connection.close()
    before = files_in(folder)
    assert "/it.db' holds no searches\n" in refused(capsys, "search", "space.yaml", *how)
    assert files_in(folder) == before
    Ledger.open(Place(folder / "other.log", f"sqlite:///{folder}/it.db"), "other", "max", resume=False)
    before = files_in(folder)
    assert "holds no searches named 'it'" in refused(capsys, "search", "space.yaml", *how)
    assert files_in(folder) == before


def test_a_search_that_only_its_database_has(folder, capsys):
    """With storage, whose mirror makes the run folder first."""
    (folder / "space.yaml").write_text(GOOD + PLACES.format(folder=folder).replace("a/b/c", "new"))
    place = Place(folder / "it.log", f"sqlite:///{folder}/it.db")
    book = Ledger.open(place, "it", "max", resume=False, space=GOOD)
    plan = plan_search(folder / "space.yaml", folder / "runs")
    plan.space.suggest(trial := book.next_trial())
    book.begin(trial)
    said = done(capsys, "search", "space.yaml", "--resume", "--dry-run")
    assert f"a search of this name exists in sqlite:///{folder}/it.db; go on with:\n" in said
    plan = plan_search(folder / "space.yaml", folder / "runs", resume=True)
    mirror = Mirror(plan.folder)
    with open_ledger(plan, Console(quiet=True)) as resumed:
        assert resumed.identity.uid == book.identity.uid
    mirror.close()


def test_a_start_that_its_ledger_refuses_leaves_no_folder(folder):
    plan = plan_search(folder / "space.yaml", folder / "runs")
    broken = replace(plan, resume=True)
    with (
        pytest.raises(InputError, match="no search to resume here"),
        open_ledger(broken, Console(quiet=True)),
    ):
        pass
    assert not plan.folder.root.exists()


@pytest.mark.parametrize("ledger", ["", "ledger: sqlite:///{folder}/it.db\n"])
def test_a_dry_run_of_a_search_that_exists_says_what_resuming_it_does(folder, capsys, ledger):
    (folder / "space.yaml").write_text(GOOD + ledger.format(folder=folder))
    plan = plan_search(folder / "space.yaml", folder / "runs")
    with open_ledger(plan, Console(quiet=True)) as book:
        for state in ("completed", "failed"):
            trial = book.next_trial()
            plan.space.suggest(trial)
            book.begin(trial)
            book.tell(trial, state, value=0.5 if state == "completed" else None, epochs=2)
        plan.space.suggest(trial := book.next_trial())
        book.begin(trial)
    before = files_in(folder)
    run = folder / "runs" / "it"
    for flags in ((), ("--resume",), ("--continue",)):
        said = done(capsys, "search", "space.yaml", "--dry-run", "--trials", "9", *flags).splitlines()
        assert said[0].strip() == "The space of space.yaml"
        assert said[-2:] == [
            f"a search of this name exists: {run}; 2 of 9 trials ended (1 completed, 1 failed), 1 "
            "interrupted one goes on from epoch 0; go on with:",
            f"  {as_typed('hiertune')} search space.yaml --resume --trials 9",
        ]
    (folder / "space.yaml").write_text((folder / "space.yaml").read_text().replace("1e-2", "1e-1"))
    said = done(capsys, "search", "space.yaml", "--dry-run")
    assert "; its space was changed: trials that this one can't produce will count no more; go on" in said
    before[folder / "space.yaml"] = (folder / "space.yaml").read_bytes()
    assert files_in(folder) == before


def test_a_dry_run_of_a_search_that_was_killed_at_once(folder, capsys):
    (folder / "runs" / "it").mkdir(parents=True)
    assert "runs/it; 0 of 2 trials ended; go on with:" in done(capsys, "search", "space.yaml", "--dry-run")
    (folder / "runs" / "it" / "curves.csv").touch()
    assert "exists already" in refused(capsys, "search", "space.yaml", "--dry-run")


def test_bad_input_is_told_before_anything_heavy_is_loaded(folder):
    (folder / "space.yaml").write_text(GOOD.replace("epochs: 2", "epochs: 0"))
    program = (
        "import sys\n"
        "from hiertune.cli import main\n"
        "try: main(['search', 'space.yaml'])\n"
        "finally: print(sorted({'ray', 'mlflow', 'optuna', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 2
    assert done.stdout == "[]\n"


def test_where_smoothing_sends_the_mass_of_a_class(folder, capsys):
    def shown(*arguments: str) -> list[list[str]]:
        with pytest.raises(SystemExit) as ended:
            main(["data", "smoothing", "data.h5", *arguments])
        assert ended.value.code == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    lines = shown("--class", "g1", "--alpha", "0.2", "--clade-share", "0.75")
    assert lines[0] == ["genus:", "f0;", "g1"]
    assert ["same", "family", "f0", "1", "0.15", "0.15"] in lines
    assert ["unrelated", "2", "0.025", "0.05"] in lines
    assert ["g3", "unrelated", "0.025"] in lines
    lines = shown("--class", "f0;g1", "--level", "genus", "--alpha", "0.2", "--beta", "3", "--top", "1")
    assert lines[-1] == ["g0", "same", "family", "0.2"]
    assert ["same", "family", "f0", "1", "0.2", "0.2"] in lines
    assert ["itself", "f1", "1", "0.9", "0.9"] in shown("--class", "f1", "--level", "family")
    lines = shown("--class", "f1", "--level", "family", "--no-fallback-to-uniform", "--no-uniform-roots")
    assert ["itself", "f1", "1", "1", "1"] in lines

    where = ("data", "smoothing", "data.h5", "--class")
    assert "(did you mean 'g1'?)" in refused(capsys, *where, "g11")
    assert "allowed: family, genus" in refused(capsys, *where, "g1", "--level", "order")
    assert "alpha is 2.0" in refused(capsys, *where, "g1", "--alpha", "2")
    assert "clade_share is -1.0" in refused(capsys, *where, "g1", "--clade-share", "-1")
    assert "no such file" in refused(capsys, "data", "smoothing", "none.h5", "--class", "g1")


def test_train_alone_and_the_schema(folder, capsys):
    config = GOOD.replace("{loguniform: [1e-4, 1e-2]}", "0.01").replace("search: {trials: 2}\n", "")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as ended:
        main(["train", "config.yaml", "--out", "trained"])
    assert ended.value.code == 0
    metrics = json.loads((folder / "trained" / "metrics.json").read_text())
    assert 0 <= metrics["val/accuracy/genus"] <= 1
    assert (folder / "trained" / "model" / "model.safetensors").exists()
    assert "trained" in refused(capsys, "train", "config.yaml", "--out", "trained")

    with pytest.raises(SystemExit):
        main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    assert "search" in schema["properties"]


def test_what_a_training_notes_is_printed_once(folder, capsys, monkeypatch):
    monkeypatch.setattr("hiertune.train.trial.Trial._unused_parameters", lambda trial: ["spare"])
    config = GOOD.replace("{loguniform: [1e-4, 1e-2]}", "0.01").replace("search: {trials: 2}\n", "")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as ended:
        main(["train", "config.yaml", "--out", "trained"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("find_unused_parameters is on") == 1


def done(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.err) == (0, "")
    return printed.out


def test_names_of_folders_and_classes_are_no_markup(folder, capsys):
    """Brackets are shown as they are, and nothing that a terminal obeys is printed."""
    lineages = [("[red]f", "g\x1b[31m")] * 4 + [("[red]f", "[bold]h\n")] * 4
    taxonomy = Taxonomy.from_lineages(lineages, ["family", "genus"])
    inputs = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    write_dataset("[x]\x1b.h5", inputs, taxonomy.encode(lineages), taxonomy, list("abcdefgh"))
    assert done(capsys, "data", "describe", "[x]\x1b.h5").splitlines()[0] == r"[x]\x1b.h5"
    shown = done(capsys, "data", "smoothing", "[x]\x1b.h5", "--class", "g\x1b[31m")
    assert shown.splitlines()[0] == r"genus: [red]f; g\x1b[31m"
    assert r"[bold]h\n" in shown
    config = GOOD.replace("{loguniform: [1e-4, 1e-2]}", "0.01").replace("search: {trials: 2}\n", "")
    (folder / "config.yaml").write_text(config)
    said = done(capsys, "train", "config.yaml", "--out", "[bold]out")
    assert "the model is in [bold]out/model, its metrics in [bold]out/metrics.json" in said
    (folder / "[red]run").mkdir()
    (folder / "[bold]out" / "model").rename(folder / "[red]run" / "model")
    said = done(capsys, "export", "[red]run", "[/]")
    assert said == "the winner of [red]run is in [/]\n"
    assert r"no such file" in refused(capsys, "data", "describe", "[a]\x1b.h5")
    refused(capsys, "data", "describe", "caf\udce9.h5")


def test_a_dry_run_shows_names_as_they_are(folder, capsys):
    """A folder `a[` with a folder `b]` in it would be a closing tag."""
    for name in ("x[red].yaml", "a[/b]/space.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(GOOD.replace("path: data.h5", f"path: {folder}/data.h5"))
        assert f"The space of {name}" in done(capsys, "search", name, "--dry-run")
    (folder / "\x1b]0;.h5").write_bytes((folder / "data.h5").read_bytes())
    path = r'{choice: [data.h5, "\e]0;.h5"]}'
    (folder / "space.yaml").write_text(GOOD.replace("path: data.h5", f"path: {path}"))
    shown = done(capsys, "search", "space.yaml", "--dry-run")
    assert "\x1b" not in shown
    assert r"\x1b]0;.h5" in shown


def test_the_inputs_are_not_read_into_memory_to_be_counted(folder, capsys, monkeypatch):
    monkeypatch.delattr("hiertune.data.dataset.Hdf5Inputs.read_all")
    assert "100 rows" in done(capsys, "data", "describe", "data.h5")
    (folder / "t.csv").write_text("kind,f\na,1\nb,2\n,3\n")
    said = done(capsys, "data", "import-table", "t.csv", "t.h5", "--labels", "kind")
    assert said.splitlines()[0] == "note: 1 of 3 rows are unknown at all levels, and left out"
    assert "2 rows" in said


def test_an_import_that_is_ended_leaves_nothing(folder):
    """SIGTERM in the middle of the work, as a scheduler sends it."""
    program = (
        "import os, signal, sys\n"
        "from hiertune.cli import main\n"
        "from hiertune.data import format\n"
        "def end(*arguments):\n"
        "    assert any(name.endswith('.tmp') for name in os.listdir())\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "format._check_finite = end\n"
        "main(['data', 'import-table', 't.csv', 't.h5', '--labels', 'kind'])\n"
    )
    (folder / "t.csv").write_text("kind,f\na,1\nb,2\n")
    before = sorted(path.name for path in folder.iterdir())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stderr) == (143, "")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_handler_of_sigterm_is_put_back(folder, capsys):
    before = signal.getsignal(signal.SIGTERM)
    done(capsys, "data", "describe", "data.h5")
    refused(capsys, "data", "describe", "none.h5")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--continue",)])
def test_a_folder_of_other_things_is_left_alone(folder, capsys, flags):
    stored = plan_search(folder / "space.yaml", folder / "stored").folder
    (stored.root / "ledger.log.parts").mkdir(parents=True)
    (stored.root / "space.yaml").write_text(GOOD)  # in storage a search of this name has begun
    (stored.root / "session.json").write_text("{}")
    (folder / "space.yaml").write_text(GOOD.replace("search:", "storage: stored\nsearch:"))
    root = folder / "runs" / "it"
    (root / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "search.log", "space.yaml"):
        (root / name).write_text("mine")

    def found():
        return {
            path: path.is_file() and (path.read_text(), path.stat().st_mtime_ns) for path in root.rglob("*")
        }

    before = found()
    said = refused(capsys, "search", "space.yaml", *flags)
    assert said == (
        f"error: name: {root} is no search's, and holds other files: a.txt, space.yaml, sub\n"
        "  allowed: another name (`--name NAME`), or another folder (`--runs`)\n"
    )
    assert found() == before
    assert sorted(os.listdir(folder)) == ["data.h5", "runs", "space.yaml", "stored"]


def test_what_a_search_leaves_before_it_has_a_ledger_is_its_own(folder):
    root = folder / "runs" / "it"
    root.mkdir(parents=True)
    for name in ("search.log", "search.lock", "search.owner", "stop-request"):
        (root / name).touch()
        assert RunFolder(root).is_bare
    assert plan_search(folder / "space.yaml", folder / "runs", resume=True).resume
    (root / "curves.csv").touch()  # of one that has lost its ledger
    with pytest.raises(InputError, match="there is no search to resume"):
        plan_search(folder / "space.yaml", folder / "runs", resume=True)


@pytest.fixture
def tracked(folder):
    """`runs/it`, of a search whose delivery got half-way."""
    run = folder / "runs" / "it"
    run.mkdir(parents=True)
    spool = (
        '{"op":"open","t":1,"trial":null,"uri":"http://me:***@host","experiment":"e","search":"it","uid":"u",'
        '"session":"s","host":"h","pid":1,"n":0}\n'
        '{"op":"log","t":1,"trial":0,"step":1,"metrics":{"a":1.0,"b":2.0},"n":2}\n'
    )
    (run / "tracking.jsonl").write_text(spool)
    late = {"uri": "http://me:***@host", "passed": 1, "error": "http://[b] can't be reached", "since": 0.0}
    (run / "tracking.offset").write_text(json.dumps(late))
    return run


def test_a_search_that_tracks_is_found_by_name_and_by_folder(tracked, capsys):
    for words in (
        ["it"],
        ["runs/it"],
        [str(tracked)],
        ["it", "--runs", "runs"],
        ["it", "--runs", str(tracked.parent)],
    ):
        said = done(capsys, "track", "status", *words)
        assert said.splitlines()[0] == "1 of 2 points delivered to http://me:***@host"
        assert said.splitlines()[1].startswith("http://[b] can't be reached (since 19")
    assert "no search of this name was tracked: other" in refused(capsys, "track", "status", "other")
    assert "allowed: it" in refused(capsys, "track", "sync", "other")
    assert "nowhere: no search" in refused(capsys, "track", "sync", "it2", "--runs", "nowhere")


def test_a_sync_says_what_it_lacks(tracked, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "lacks its password, which is not kept" in refused(capsys, "track", "sync", "it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://you:secret@host")
    said = refused(capsys, "track", "sync", "it")
    assert "the whole address" in said
    assert "secret" not in said
    assert "MLflow knows no 'ftp' addresses" in refused(capsys, "track", "sync", "it", "--uri", "ftp://host")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:s3cret@host", "http://me:***@host"),
        ("http://:s3cr@et@host", "http://:***@host"),
        ("http://me:s3c/ret@host:5000/x", "http://me:***@host:5000/x"),
        ("postgresql://me:12/s3c@host/db", "postgresql://me:***@host/db"),
        ("http://me:***@host", "http://me:***@host"),
        ("postgresql://me@host/db?password=s3cret", "postgresql://me@host/db?password=***"),
    ],
)
def test_a_password_in_the_file_is_refused_and_not_repeated(folder, capsys, uri, shown):
    (folder / "space.yaml").write_text(GOOD + f"tracking: {{uri: '{uri}'}}\n")
    said = refused(capsys, "search", "space.yaml")
    assert f"space.yaml:7: tracking.uri: '{shown}': holds a password" in said
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert "s3c" not in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left", "trials.csv"), "[Errno 28] No space left: 'trials.csv'"),
        (ValueError("of [b]\nours"), "ValueError: of [b]"),
    ],
)
@pytest.mark.parametrize(
    "where", ["hiertune.search.resume.keep_spaces", "hiertune.search.driver.write_command"]
)
def test_what_ends_a_search_is_one_line_and_the_log_has_the_rest(
    folder, capsys, monkeypatch, where, error, line
):
    def what_fails(*args):
        raise error

    monkeypatch.setattr(where, what_fails)
    with pytest.raises(SystemExit) as ended:
        main(["search", "space.yaml"])
    log = folder / "runs" / "it" / "search.log"
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"the search failed: {line}\n  see {log}\n"
    kept = log.read_text()
    assert "ERROR hiertune.search.driver: the search failed\nTraceback (most recent call last):\n" in kept
    assert "in what_fails\n" in kept
    assert kept.endswith(f"{type(error).__name__}: {error}\n")


def test_a_refused_search_is_no_failure(folder, monkeypatch):
    def refuses(*args):
        raise InputError("is refused")

    monkeypatch.setattr("hiertune.search.driver.write_command", refuses)
    with pytest.raises(SystemExit) as ended:
        main(["search", "space.yaml"])
    assert ended.value.code == 2
    assert not (folder / "runs" / "it" / "search.log").exists()


def test_continue_begins_a_search_or_goes_on_with_it(folder):
    space, runs = folder / "space.yaml", folder / "runs"
    plan = plan_search(space, runs, resume=None)
    assert not plan.resume
    plan.folder.root.mkdir(parents=True)  # killed here, before there is a ledger
    assert plan_search(space, runs, resume=None).resume
    plan.folder.ledger.touch()
    assert plan_search(space, runs, resume=None).resume

"""Where a search is kept, decided before anything starts."""

import pytest
import s3

from hiertune._text import without_passwords
from hiertune.cli import main
from hiertune.doctor.probes import examine_space
from hiertune.errors import InputError
from hiertune.report.read import read_search
from hiertune.search.mirror import Mirror, Session
from hiertune.search.plan import plan_search
from hiertune.space import load_space

SPACE = """name: search
data: {path: builtin:rrna16s}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-4, 1.0e-2]}}
search: {trials: 2}
"""
SECRET = "hunter2-secret"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.delenv("HIERTUNE_STORAGE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # the size of this machine is no matter here

    def write(more=""):
        path = tmp_path / "space.yaml"
        path.write_text(SPACE + more)
        return path

    return write


def test_a_path_starts_where_the_space_file_is(write, tmp_path, monkeypatch):
    space = write("storage: kept\n")
    monkeypatch.chdir("/")
    plan = plan_search(space, tmp_path / "runs")
    assert str(plan.folder.storage) == str(tmp_path / "kept" / "search")
    assert plan.folder.trial_place(3) == str(tmp_path / "kept" / "search" / "trials" / "0003")
    assert not (tmp_path / "kept").exists(), "a plan leaves nothing behind"


def test_without_storage_workers_write_to_the_run_folder(write, tmp_path):
    plan = plan_search(write(), tmp_path / "runs")
    assert plan.folder.storage is None
    assert plan.folder.trial_place(3) == str(tmp_path / "runs" / "search" / "trials" / "0003")
    assert plan.folder.place() == str(tmp_path / "runs" / "search")


def test_the_environment_says_where_if_the_space_does_not(write, tmp_path, monkeypatch, s3_folder):
    monkeypatch.setenv("HIERTUNE_STORAGE", s3_folder)
    plan = plan_search(write(), tmp_path / "runs", name="other")
    assert str(plan.folder.storage).startswith(f"{s3_folder}/other?endpoint_override=")
    assert plan.folder.logits_place(1).startswith(f"{s3_folder}/other/trials/0001/val_logits.safetensors?")
    plan = plan_search(write("storage: kept\n"), tmp_path / "runs")
    assert plan.folder.storage.local


@pytest.mark.parametrize("by", ["file", "environment"])
def test_credentials_are_refused_and_not_repeated(write, tmp_path, monkeypatch, by):
    address = f"s3://AKIA:{SECRET}@bucket/x"
    space = write(f"storage: {address}\n" if by == "file" else "")
    if by == "environment":
        monkeypatch.setenv("HIERTUNE_STORAGE", address)
    with pytest.raises(InputError) as caught:
        plan_search(space, tmp_path / "runs")
    where = f"{space}:5" if by == "file" else "HIERTUNE_STORAGE"
    assert str(caught.value).startswith(f"{where}: storage: 's3://***@bucket/x': credentials must not")
    assert SECRET not in str(caught.value)


def test_the_runs_folder_itself_is_refused(write, tmp_path):
    with pytest.raises(InputError, match="is the runs folder itself"):
        plan_search(write("storage: runs\n"), tmp_path / "runs")


def test_a_broken_space_is_told_before_storage_is_looked_at(write, tmp_path):
    with pytest.raises(InputError, match="unknown key"):
        plan_search(write("storage: s3://bucket/x\nserach: {}\n"), tmp_path / "runs")


def test_a_search_is_resumed_where_it_never_was(write, tmp_path, s3_folder):
    space = write(f"storage: {s3_folder}\n")
    here = plan_search(space, tmp_path / "here").folder
    here.root.mkdir(parents=True)
    here.space.write_text(space.read_text())
    here.ledger.write_text("told\n")
    Mirror(here).close()
    with pytest.raises(InputError, match=r"exists already: s3://"):
        plan_search(space, tmp_path / "there")
    there = plan_search(space, tmp_path / "there", resume=True)
    assert there.folder.ledger.read_text() == "told\n"
    with pytest.raises(InputError, match=r"there is no search to resume in .* nor in s3://"):
        plan_search(space, tmp_path / "there", resume=True, name="other")


@pytest.mark.parametrize("kind", ["path", "s3"])
def test_a_look_at_a_search_in_storage_changes_nothing(request, write, tmp_path, capsys, monkeypatch, kind):
    storage = request.getfixturevalue("s3_folder") if kind == "s3" else tmp_path / "kept"
    space = write(f"storage: {storage}\n")
    here = plan_search(space, tmp_path / "here").folder
    here.root.mkdir(parents=True)
    here.space.write_text(space.read_text())
    here.ledger.write_text("told\n")
    Mirror(here).close()

    requests = request.getfixturevalue("faulty_s3").seen if kind == "s3" else []
    before = files_in(tmp_path)
    requests.clear()
    found = list(examine_space(str(space), str(tmp_path / "there")))
    assert [finding.status for finding in found] == ["ok", "ok"]
    assert found[0].what.endswith("; a search of this name was begun: --resume goes on with it")
    assert {method for method, _ in requests} <= {"GET", "HEAD"}, "not even a probe"
    assert files_in(tmp_path) == before

    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main(["search", str(space), "--runs", str(tmp_path / "there"), "--dry-run"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"a search of this name exists in {storage}/search" in said
    assert "; fetch it and go on with:" in said
    assert files_in(tmp_path) == before


def test_a_refused_resume_fetches_nothing(write, tmp_path):
    space = write("storage: kept\n")
    here = plan_search(space, tmp_path / "here").folder
    here.root.mkdir(parents=True)
    here.space.write_text(space.read_text())
    here.ledger.write_text("told\n")
    Mirror(here).close()
    before = files_in(tmp_path)
    broken = write("storage: kept\ntracking: {uri: 'ftp://h'}\n")
    for resume in (True, None):
        with pytest.raises(InputError, match="MLflow knows no 'ftp'"):
            plan_search(broken, tmp_path / "there", resume=resume)
    write("storage: kept\n")
    assert files_in(tmp_path) == before


def test_a_search_that_another_machine_has_just_begun(write, tmp_path):
    """It has nothing in storage yet but its sign of life: the mirror refuses, and makes no run folder."""
    plan = plan_search(write("storage: kept\n"), tmp_path / "runs")
    Session(id="x", host="elsewhere", user="me", pid=1, begun="now", machine="another machine").write(
        plan.folder.storage
    )
    with pytest.raises(InputError, match="is being run by me on elsewhere"):
        Mirror(plan.folder)
    assert not (tmp_path / "runs").exists()


def files_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_copy_of_the_space_has_no_password(write, tmp_path):
    uri = f"postgresql://me:{SECRET}@host:5432/db?x=1"
    space = write(f"# {uri}, mysql://u:{SECRET}@h\n# http://me:a/{SECRET}/b@host:5000/\n")
    folder = plan_folder(space, tmp_path)
    assert SECRET not in folder.space.read_text()
    assert "postgresql://me:***@host:5432/db?x=1" in folder.space.read_text()
    assert load_space(folder.space).tree == load_space(space).tree, "it can be resumed"
    folder.trials.write_text("trial,state,objective\n")
    assert SECRET not in read_search(folder.root).space
    assert s3.SECRET_KEY not in folder.space.read_text()


def plan_folder(space, tmp_path):
    from hiertune.search.outputs import RunFolder

    folder = RunFolder(tmp_path / "runs" / "search")
    folder.root.mkdir(parents=True)
    folder.space.write_text(without_passwords(space.read_text()))
    return folder

"""Addresses of ledgers: what is refused, and that no password is ever shown."""

import subprocess
import sys
import time
import traceback

import pytest

from hiertune._database import Place, check_reachable, display_ledger, engine_arguments, ledger_url, place_of
from hiertune.errors import InputError
from hiertune.record import open_storage
from hiertune.search.ledger import Ledger
from hiertune.search.plan import plan_search

SPACE = """
name: it
data: {path: builtin:rrna16s}
model: {head: {kind: linear}}
optimizer: {kind: adamw, lr: {loguniform: [1e-4, 1e-2]}}
"""


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("HIERTUNE_LEDGER", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def refused(setting):
    with pytest.raises(InputError) as raised:
        ledger_url(setting)
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))
    return raised.value


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@db/x", "'postgresql+psycopg://me:***@db/x' holds a password"),
        ("postgresql+psycopg://me:@db/x", "holds a password"),
        ("postgresql+psycopg://me@db/x?password=s3cret", "password=%2A%2A%2A' holds a password"),
        ("mysql+pymysql://me@db/x?passwd=s3cret", "holds a password"),
    ],
)
def test_a_password_in_the_space_file_is_refused(setting, shown):
    error = refused(setting)
    assert (error.key, error.allowed) == (
        "ledger",
        "an address without it; PGPASSWORD, ~/.pgpass or HIERTUNE_LEDGER may hold one",
    )
    assert shown in error.problem


def test_the_variable_may_hold_a_password_and_it_is_not_shown(monkeypatch):
    url = "postgresql+psycopg://me:s3cret@db/x"
    monkeypatch.setenv("HIERTUNE_LEDGER", url)
    assert ledger_url(None) == url
    assert ledger_url("sqlite:////tmp/x.db") == "sqlite:////tmp/x.db", "the file's own comes first"
    for text in (display_ledger(url), str(Place("x", url)), repr(Place("x", url))):
        assert "s3cret" not in text
    assert display_ledger(url) == "postgresql+psycopg://me:***@db/x"
    assert display_ledger("me:s3cret@db") == "***"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("postgresql+psycopg//me:s3cret@db", "is not the address of a database"),
        ("ledger.log", "is not the address of a database"),
        ("nosuch://me:s3cret@db/x", "nosuch"),
        ("mysql+mysqldb://me:s3cret@db/x", "its driver is missing"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_what_is_no_usable_address_is_refused(monkeypatch, url, problem):
    monkeypatch.setenv("HIERTUNE_LEDGER", url)
    error = refused(None)
    assert error.key == "HIERTUNE_LEDGER"
    assert problem in error.problem


def test_no_database_is_set():
    assert ledger_url(None) is None


def test_a_database_out_of_reach_is_said_in_seconds(monkeypatch):
    begun = time.monotonic()
    with pytest.raises(
        InputError, match=r"'postgresql\+psycopg://me:\*\*\*@127.0.0.1:9/x' can't be used: "
    ) as raised:
        check_reachable("postgresql+psycopg://me:s3cret@127.0.0.1:9/x")
    assert "s3cret" not in str(raised.value)
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("url", "limits"),
    [
        ("mysql+pymysql://me@db/x", {"connect_timeout": 5, "read_timeout": 15, "write_timeout": 15}),
        ("mysql+pymysql://me@db/x?read_timeout=90", {"connect_timeout": 5, "write_timeout": 15}),
        ("postgresql+pg8000://me@db/x", {"timeout": 15}),
        ("sqlite:////tmp/x.db?timeout=60", {}),
        ("mysql+aiomysql://me@db/x", {}),
    ],
)
def test_a_limit_in_the_address_comes_first(url, limits):
    assert engine_arguments(url) == {"pool_pre_ping": True, "connect_args": limits}


def test_a_database_that_hangs_is_said_in_seconds_or_those_of_its_address(postgresql, postgresql_server):
    seconds = []
    for query in ("?connect_timeout=2", ""):
        begun = time.monotonic()
        with postgresql_server.hung(), pytest.raises(InputError, match="can't be used: connection timeout"):
            check_reachable(postgresql + query)
        seconds.append(time.monotonic() - begun)
    assert 2 <= seconds[0] < 5 <= seconds[1] < 60
    check_reachable(postgresql)


def test_a_login_that_is_refused_is_said(postgresql, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "wr0ng-one")
    with pytest.raises(InputError, match=r"can't be used: .*password authentication failed") as raised:
        check_reachable(postgresql)
    assert "wr0ng" not in "".join(traceback.format_exception(raised.value))
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    check_reachable(postgresql)


def test_two_searches_of_one_name_share_a_database_and_nothing_else(postgresql, tmp_path):
    places = [Place(tmp_path / name / "ledger.log", postgresql) for name in "ab"]
    for count, place in enumerate(places, start=1):
        place.journal.parent.mkdir()
        ledger = Ledger.open(place, "it", "max", resume=False)
        for _ in range(count):
            ledger.begin(ledger.next_trial())
        assert "s3cret" not in place.pointer.read_text()
    assert [len(Ledger.open(place, "it", "max", resume=True).records()) for place in places] == [1, 2]
    elsewhere = Place(tmp_path / "c" / "ledger.log", postgresql)
    elsewhere.journal.parent.mkdir()
    with pytest.raises(InputError, match="holds 2 searches named 'it'"):
        Ledger.open(elsewhere, "it", "max", resume=True)


def test_a_search_is_found_by_its_name_where_its_folder_is_gone(postgresql, tmp_path):
    place = Place(tmp_path / "ledger.log", postgresql)
    ledger = Ledger.open(place, "it", "max", resume=False)
    ledger.begin(ledger.next_trial())
    place.pointer.unlink()
    assert len(Ledger.open(place, "it", "max", resume=True).records()) == 1
    assert place.uid == ledger.identity.uid


@pytest.mark.parametrize("left", [b"", bytes(120)])
def test_a_pointer_that_a_loss_of_power_emptied_is_made_again(postgresql, tmp_path, left):
    place = Place(tmp_path / "ledger.log", postgresql)
    ledger = Ledger.open(place, "it", "max", resume=False)
    place.pointer.write_bytes(left)
    with pytest.raises(InputError, match="the ledger of this search is a database\n"):
        place_of(place.journal, None)
    again = Ledger.open(place, "it", "max", resume=True)
    assert again.identity.uid != ledger.identity.uid, "without trials it begins again"
    again.begin(again.next_trial())
    place.pointer.write_bytes(left)
    assert Ledger.open(place, "it", "max", resume=True).identity == again.identity
    assert place.uid == again.identity.uid


def test_a_folder_keeps_to_its_ledger(tmp_path):
    url, journal = f"sqlite:///{tmp_path}/ledger.db", tmp_path / "ledger.log"
    Ledger.open(Place(journal, url), "it", "max", resume=False)
    with pytest.raises(InputError, match=r"the ledger of this search is the database sqlite:///.*ledger\.db"):
        place_of(journal, None)
    journal.with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match=r"ledger\.json: is damaged"):
        place_of(journal, None)
    journal.with_suffix(".json").unlink()
    Ledger.open(journal, "it", "max", resume=False)
    assert place_of(journal, url) == Place(journal), "the variable is for new searches"
    with pytest.raises(InputError, match="is not the ledger of this search: that is"):
        place_of(journal, url, given=True)


def test_what_is_no_ledger_of_optuna_is_said(tmp_path):
    file = tmp_path / "x.db"
    file.write_text("no database, but long enough to be looked at as one" * 20)
    with pytest.raises(InputError, match=r"can't be used: .*not a database"):
        open_storage(Place(tmp_path / "ledger.log", f"sqlite:///{file}"))


def test_a_plan_says_what_is_wrong_with_its_ledger(tmp_path, monkeypatch):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE + "ledger: postgresql+psycopg://me:s3cret@db/x\n")
    with pytest.raises(InputError, match=r"space\.yaml:\d+: ledger: .* holds a password"):
        plan_search(file, tmp_path / "runs")
    file.write_text(SPACE + f"ledger: sqlite:///{tmp_path}/nowhere/x.db\n")
    with pytest.raises(InputError, match=r"space\.yaml:\d+: ledger: .* can't be used: unable to open"):
        plan_search(file, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    file.write_text(SPACE + f"ledger: sqlite:///{tmp_path}/x.db\n")
    assert plan_search(file, tmp_path / "runs").ledger.url == f"sqlite:///{tmp_path}/x.db"


def test_planning_loads_neither_optuna_nor_sqlalchemy(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    code = (
        "import sys; from pathlib import Path; from hiertune.search.plan import plan_search\n"
        f"plan_search(Path({str(file)!r}), Path({str(tmp_path)!r}) / 'runs')\n"
        "print([name for name in ('optuna', 'sqlalchemy', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Addresses: what is used, what is refused before anything starts, what is shown."""

import sys
from pathlib import Path

import pytest

from hiertune.errors import InputError
from hiertune.tracking import check_uri, display_uri, resolve_uri, runs_page, ui_command
from hiertune.tracking.uri import artifact_location


@pytest.fixture(autouse=True)
def _no_address_in_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_config_beats_environment_beats_default(tmp_path, monkeypatch):
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_uri(None, tmp_path) == "http://server:5000"
    assert resolve_uri("https://other", tmp_path) == "https://other"


def test_relative_sqlite_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///a.db", Path("runs")) == f"sqlite:///{tmp_path}/a.db"
    assert resolve_uri("sqlite+pysqlite:////a.db", Path("runs")) == "sqlite+pysqlite:////a.db"
    assert resolve_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize(
    "uri", ["http://localhost:5000", "https://user:pw@host/path", "databricks://profile"]
)
def test_servers_are_accepted_without_being_asked(uri):
    check_uri(uri)


def test_sqlite_files_that_can_be_used(tmp_path):
    check_uri(f"sqlite:///{tmp_path}/new.db")
    (tmp_path / "old.db").write_bytes(b"SQLite format 3\0...")
    check_uri(f"sqlite:///{tmp_path}/old.db")
    (tmp_path / "empty.db").touch()
    check_uri(f"sqlite:///{tmp_path}/empty.db")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("./mlruns", "no longer tracks into folders"),
        ("file:///tmp/mlruns", "no longer tracks into folders"),
        ("ftp://host/x", "knows no 'ftp' addresses"),
        ("http:///nohost", "has no host"),
        ("http://[host", "is not an address"),
        ("http://host:port", "is not an address"),
        ("http://me:sec/secret@host", "is not an address"),
        ("sqlite://", "no file that other programs could open"),
        ("sqlite:///:memory:", "no file that other programs could open"),
        ("sqlite:////no/such/folder/x.db", "can't be a file"),
        ("sqlite:////tmp", "can't be a file"),
        ("sqlite:////tmp/x?y.db", "is not understood"),
        ("postgresql+nosuchdriver://u:secret@h/db", "nosuchdriver"),
    ],
)
def test_unusable_addresses(uri, words):
    with pytest.raises(InputError, match=words) as caught:
        check_uri(uri)
    assert caught.value.key == "tracking.uri"
    assert caught.value.allowed
    assert "secret" not in str(caught.value)


def test_folder_message_says_what_to_write_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"sqlite:///{tmp_path}/mlflow.db"):
        check_uri("mlruns")


def test_a_file_of_another_kind_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("something precious")
    with pytest.raises(InputError, match="not an SQLite database"):
        check_uri(f"sqlite:///{tmp_path}/notes.txt")


def test_passwords_are_not_shown():
    assert display_uri("https://me:s3cret@host:1/x") == "https://me:***@host:1/x"
    assert display_uri("https://me:a@b:c@host:1/x") == "https://me:***@host:1/x"
    assert display_uri("https://host/x") == "https://host/x"
    assert display_uri("https://me:s3cret@[host") == "***"
    assert display_uri("https://me:s3/cret@host:1/x") == "https://me:***@host:1/x"
    assert display_uri("postgresql://me:12/34@host/db") == "postgresql://me:***@host/db"
    assert display_uri("http://host:5000/a@b") == "http://host:5000/a@b"
    assert (
        display_uri("postgresql://me@host/db?password=s3cret&a=b")
        == "postgresql://me@host/db?password=***&a=b"
    )
    assert "s3cret" not in ui_command("postgresql://me:s3cret@host/db")


def test_artifacts_lie_beside_the_database(tmp_path):
    assert artifact_location("sqlite:////data/mlflow.db", tmp_path) == "file:///data/mlartifacts"
    assert artifact_location("postgresql://h/db", tmp_path) == (tmp_path / "mlartifacts").as_uri()
    assert artifact_location("http://h", tmp_path) is None


def test_ui_command_can_be_pasted(tmp_path, monkeypatch):
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    (programs / "mlflow").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    uri = "sqlite:////runs of mine/mlflow.db"
    assert ui_command(uri) == f"'my env/bin/mlflow' ui --backend-store-uri '{uri}'"
    monkeypatch.setenv("PATH", str(programs))
    assert ui_command(uri) == f"mlflow ui --backend-store-uri '{uri}'"
    assert ui_command("http://h:5000") is None, "a server is there already"


def test_the_page_of_the_runs_is_that_of_the_server_or_of_the_command(tmp_path):
    part = "/#/experiments?workflowType=machine_learning"
    assert runs_page("https://me:s3cret@h:5000/") == f"https://me:***@h:5000{part}"
    assert runs_page(f"sqlite:///{tmp_path}/mlflow.db") == f"http://127.0.0.1:5000{part}"

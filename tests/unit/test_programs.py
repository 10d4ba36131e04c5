import sys

import pytest

from hiertune._programs import as_typed


@pytest.fixture
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    (folder / "hiertune").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_program_on_the_path_goes_by_its_name(programs, monkeypatch):
    monkeypatch.setenv("PATH", str(programs))
    assert as_typed("hiertune") == "hiertune"


def test_one_that_is_not_on_the_path_goes_by_its_own(programs, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert as_typed("hiertune") == "'my env/bin/hiertune'"
    monkeypatch.chdir(programs)
    assert as_typed("hiertune") == "./hiertune"


def test_another_installation_on_the_path_is_not_meant(programs, monkeypatch, tmp_path):
    (tmp_path / "hiertune").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert as_typed("hiertune") == "'my env/bin/hiertune'"


def test_without_a_script_it_is_a_module(programs, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert as_typed("mlflow") == "'my env/bin/python' -m mlflow"

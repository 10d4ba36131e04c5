"""How a search ends whose trials can't go on. Ray is not started: what Tune would raise is raised."""

import traceback
from types import SimpleNamespace

import pytest
from ray.tune import TuneError

from hiertune import cli
from hiertune.config import SearchSection
from hiertune.search import driver
from hiertune.search.budget import Budget
from hiertune.search.driver import SearchFailed
from hiertune.search.interrupt import Interruption
from hiertune.search.ledger import Ledger
from hiertune.search.outputs import RunFolder


class Silent:
    """A display, a pool and a tracker that are not looked at."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """`run_all(trials)`: the part of a search in which Tune runs `trials`."""
    ledger = Ledger.open(tmp_path / "ledger.log", "search", "max", resume=False)
    search = SearchSection()
    plan = SimpleNamespace(config=SimpleNamespace(search=search), trials=3, folder=RunFolder(tmp_path))

    def run(trials):
        monkeypatch.setattr(driver, "run_trials", lambda *args: trials(ledger))
        budget = Budget(search, plan.trials, "max", ())
        silent = Silent()
        driver._run_all(plan, ledger, silent, budget, silent, silent, silent, Interruption())

    return run


def written(ledger):
    ledger.set_study_attr("any", 1)


def written_and_passed_on_as_tune_does(ledger):
    try:
        written(ledger)
    except RuntimeError:
        raise TuneError(traceback.format_exc()) from None


def swallowed(ledger):
    with pytest.raises(RuntimeError):
        written(ledger)


@pytest.mark.parametrize(
    "trials", [written, written_and_passed_on_as_tune_does, swallowed, lambda ledger: None]
)
def test_a_ledger_on_a_full_disk_ends_the_search_with_its_cause(run_all, monkeypatch, trials):
    def full(number):
        raise OSError(28, "No space left on device")

    def trials_on_a_full_disk(ledger):
        monkeypatch.setattr("os.fsync", full)
        trials(ledger)

    with pytest.raises(
        SearchFailed, match=r"ledger\.log can't be written to: .*No space left on device; what"
    ):
        run_all(trials_on_a_full_disk)


def test_what_else_goes_wrong_in_tune_is_one_line_and_the_log_has_the_rest(run_all, caplog):
    def trials(ledger):
        try:
            raise OSError(28, "No space left on device", "curves.csv")
        except OSError:
            raise TuneError(traceback.format_exc()) from None

    with pytest.raises(SearchFailed) as raised:
        run_all(trials)
    assert (
        str(raised.value) == "OSError: [Errno 28] No space left on device: 'curves.csv'; `--resume` goes on"
    )
    assert "Traceback" in caplog.text


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def run_search(*args):
        raise OSError(28, "No space left on device", "trials.csv")

    monkeypatch.setattr(driver, "run_search", run_search)
    with pytest.raises(SystemExit) as ended:
        cli._search(SimpleNamespace(folder=RunFolder(tmp_path)), cli.Console(), Interruption())
    assert ended.value.code == 1
    assert "the search failed: [Errno 28] No space left on device: 'trials.csv'" in capsys.readouterr().err

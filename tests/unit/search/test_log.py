"""What a search writes into its log."""

import logging
from pathlib import Path

import pytest

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.driver import _logging_to
from hiertune.search.ledger import TrialRecord
from hiertune.search.listeners import Log


def test_the_log_has_a_line_for_every_trial_that_starts_or_ends(tmp_path):
    path = tmp_path / "search.log"
    with _logging_to(path):
        Log().trial_started(3, TrialConfig(data=DataConfig(path="none.h5")), {"lr": 0.1})
        Log().trial_ended(TrialRecord(3, "pruned", {}, 0.5, "stopped after epoch 2", epochs=2, seconds=1.25))
        Log().trial_ended(TrialRecord(4, "completed", {}, 0.5, epochs=2, seconds=1.25))
    lines = [line.split(": ", 1)[1] for line in path.read_text().replace(" -- ", ": ").splitlines()]
    assert lines == [
        "trial 3 started: {'lr': 0.1}",
        "trial 3 pruned after 2 epochs, objective 0.5, 1.2 s: stopped after epoch 2",
        "trial 4 completed after 2 epochs, objective 0.5, 1.2 s",
    ]


@pytest.mark.parametrize("path", ["/dev/full", "/no/such/folder/search.log"])
def test_a_log_on_a_full_disk_is_done_without(capsys, path):
    with _logging_to(Path(path)):
        logging.getLogger("hiertune").warning("something")
    assert capsys.readouterr().err == ""


def test_logging_is_afterwards_what_it_was(tmp_path):
    logger = logging.getLogger("hiertune")
    before = (logger.level, logger.propagate, logger.handlers[:])
    with _logging_to(tmp_path / "search.log"):
        assert logger.isEnabledFor(logging.INFO)
        assert not logger.propagate
    assert (logger.level, logger.propagate, logger.handlers) == before

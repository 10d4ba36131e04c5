"""Metrics, parameters and files on their way to MLflow: spooled here, delivered by a side process.

The search only appends JSON lines to `<run_dir>/tracking.jsonl`: that costs microseconds and no
network. `python -m hiertune.tracking deliver` reads the spool in order and delivers it. What it
repeats after a crash or an outage changes nothing: runs are found again by their tags, MLflow keeps
one row per (run, key, step, timestamp, value), and every line has its timestamp. So "at least
once" here is "exactly once" there. What a resumed search repeats is not spooled again, and
`Tracker.reconcile` makes the spool agree with the ledger about what became of each trial.

Only `store.py` imports mlflow, and only in the side process.
"""

from hiertune.tracking.spool import Delivery, delivery, is_tracked
from hiertune.tracking.tracker import Tracker, at_work, destination_of, sync
from hiertune.tracking.uri import check_uri, display_uri, resolve_uri, runs_page, ui_command

__all__ = [
    "Delivery",
    "Tracker",
    "at_work",
    "check_uri",
    "delivery",
    "destination_of",
    "display_uri",
    "is_tracked",
    "resolve_uri",
    "runs_page",
    "sync",
    "ui_command",
]

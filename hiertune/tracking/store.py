"""MLflow's side of tracking: the only module that imports mlflow, and it runs in the side process."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException, RestException
from mlflow.tracking import MlflowClient
from requests.exceptions import ChunkedEncodingError
from sqlalchemy.exc import SQLAlchemyError

from hiertune.tracking.limits import (
    LONGEST_PARAM,
    LONGEST_TAG,
    MOST_METRICS,
    MOST_VALUES,
    batches,
    clean_name,
    json_size,
    text,
)
from hiertune.tracking.uri import artifact_location, display_uri

# Requests' errors are OSErrors; an answer that was cut off is no JSON, which is a ValueError.
Unavailable = (MlflowException, SQLAlchemyError, OSError, json.JSONDecodeError)
Unreachable = (ConnectionError, TimeoutError, requests.ConnectionError, requests.Timeout)

# Final answers: the same request can never succeed. Any other error may pass, and so may whatever
# something between us and MLflow says, such as a proxy's 404: MLflow's own answers are JSON.
FINAL = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
GONE = "RESOURCE_DOES_NOT_EXIST"

# Where MLflow and requests say which HTTP status there was.
_STATUS = r"error code (\d{3}) !=|too many (\d{3}) error responses|(\d{3}) (?:Client|Server) Error"

# A pruned trial is a good result of the search, but not a run that finished.
STATUS = {"completed": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "interrupted": "KILLED"}


class Emptied(Exception):
    """The store no longer has a run that it had: somebody began it anew."""


class Store:
    """The runs of one search in one MLflow store. Every call may be repeated."""

    def __init__(self, run_dir: Path, header: Mapping[str, Any], runs: Mapping[str, str]) -> None:
        """`runs`: known run ids of trials, and of the search under ''.

        Raises:
            Emptied: the search's run is gone, so the store was emptied since `runs` was noted.
        """
        self.runs = dict(runs)
        self.refused = 0
        """Values that MLflow refused for good."""
        self.refusal: str | None = None
        self._run_dir = run_dir
        self._header = header
        self._by_http = header["uri"].startswith("http")
        self._client = MlflowClient(tracking_uri=header["uri"])
        self._experiment = self._find_experiment()
        self._check_exists()

    def _find_experiment(self) -> str:
        name = self._header["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = artifact_location(self._header["uri"], self._run_dir.parent)
        return self._client.create_experiment(name, artifact_location=location)

    def _check_exists(self) -> None:
        if "" not in self.runs:
            return
        try:
            self._client.get_run(self.runs[""])
        except MlflowException as error:
            if self._is_final(error) and error.error_code == GONE:
                raise Emptied(self.runs[""]) from None
            raise

    def start(self, trial: str, record: Mapping[str, Any]) -> None:
        """Give a run its parameters. They can't change in MLflow: new values of a resumed run are tags."""
        run_id = self._run(trial, record["t"])
        given = {clean_name(key): text(value, LONGEST_PARAM) for key, value in record["params"].items()}
        before: dict[str, str] = {}

        def reopen() -> None:
            self._client.update_run(run_id, status="RUNNING")
            before.update(self._client.get_run(run_id).data.params)

        self._try(1, reopen)
        changed = {key: value for key, value in given.items() if before.get(key, value) != value}
        self._params(run_id, {key: value for key, value in given.items() if key not in changed})
        tags = {**record["tags"], **{f"hiertune.now/{key}": value for key, value in changed.items()}}
        self._tags(run_id, {**tags, "hiertune.state": "running"})

    def log(self, trial: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Metrics of one run. Stores bend NaN and infinity, each in its own way, so those are tags."""
        metrics: list[Metric] = []
        odd: dict[str, str] = {}
        for record in records:
            for name, value in record["metrics"].items():
                if math.isfinite(value):
                    metrics.append(Metric(clean_name(name), value, record["t"], record["step"]))
                else:
                    odd[f"hiertune.nonfinite/{name}"] = f"{value} at step {record['step']}"
            run_id = self._run(trial, record["t"])
        for batch in batches(metrics, MOST_METRICS, lambda metric: 6 * len(metric.key) + 100):
            self._try(len(batch), self._client.log_batch, run_id, batch)
        if odd:
            self._tags(run_id, odd)

    def end(self, trial: str, record: Mapping[str, Any]) -> None:
        run_id = self._run(trial, record["t"])
        self._tags(run_id, {**record["tags"], "hiertune.state": record["state"]})
        self._try(1, self._client.set_terminated, run_id, STATUS[record["state"]], record["t"])

    def artifact(self, trial: str, record: Mapping[str, Any]) -> None:
        """A file that can't be stored must not hold up what comes after it."""
        run_id = self._run(trial, record["t"])
        path = self._run_dir / record["path"]
        if not _is_within(self._run_dir, path):
            # a spool that somebody sent could name any file of the user's, and an address to send it to
            self._refuse(1, f"{path} is not, or leads out of, the run folder")
            return
        try:
            self._try(1, self._client.log_artifact, run_id, str(path), record["artifact_path"])
        except (MlflowException, requests.RequestException, *Unreachable) as error:
            if not _is_refusal(error):
                raise
            self._refuse(1, f"{path}: {error}")
        except Exception as error:  # noqa: BLE001 (each kind of file store raises its own library's errors)
            self._refuse(1, f"{path}: {error!r}")

    def _run(self, trial: str, started: int) -> str:
        """Run id of a trial: as noted, else found by its tags, else of a new run."""
        if trial not in self.runs:
            tags = {
                "hiertune.kind": "trial" if trial else "search",
                "hiertune.search": self._header["search"],
                "hiertune.uid": self._header["uid"],  # a name can be used again once its folder is deleted
            }
            if trial:
                tags["hiertune.trial"] = trial
            query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
            found = self._client.search_runs([self._experiment], query, ViewType.ALL, max_results=10)
            # One that was deleted by hand is used only where there is no other.
            best = min(found, key=lambda run: run.info.lifecycle_stage != "active", default=None)
            self.runs[trial] = best.info.run_id if best else self._create(trial, started, tags)
        return self.runs[trial]

    def _create(self, trial: str, started: int, tags: Mapping[str, str]) -> str:
        name = f"trial-{int(trial):03d}" if trial else self._header["search"]
        if trial:
            tags = {**tags, "mlflow.parentRunId": self._run("", started)}
        run = self._client.create_run(self._experiment, start_time=started, tags=dict(tags), run_name=name)
        if not run.info.run_id:  # MLflow's client takes an empty answer for a good one
            raise ConnectionError("an answer was empty")
        return run.info.run_id

    def remove_doubles(self) -> None:
        """Delete empty runs: a request made them whose answer never came, so it was sent again."""
        query = f"tags.`hiertune.uid` = '{self._header['uid']}'"
        known, token = set(self.runs.values()), None
        while True:
            page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            for run in page:
                if run.data.tags.get("hiertune.trial", "") in self.runs and run.info.run_id not in known:
                    self._client.delete_run(run.info.run_id)
            token = page.token
            if not token:
                return

    def _params(self, run_id: str, params: Mapping[str, str]) -> None:
        for batch in batches((Param(*item) for item in params.items()), MOST_VALUES, json_size):
            self._try(len(batch), self._client.log_batch, run_id, (), batch)

    def _tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags; None takes one away."""
        given = {clean_name(key): value for key, value in tags.items()}
        for key, value in given.items():
            if value is None:
                self._remove_tag(run_id, key)
        labels = [RunTag(key, text(value, LONGEST_TAG)) for key, value in given.items() if value is not None]
        for batch in batches(labels, MOST_VALUES, json_size):
            self._try(len(batch), self._client.log_batch, run_id, (), (), batch)

    def _remove_tag(self, run_id: str, key: str) -> None:
        try:
            self._client.delete_tag(run_id, key)
        except MlflowException as error:  # one that isn't there is a good end of it
            if not self._is_final(error):
                raise

    def _try(self, values: int, call: Callable[..., object], *arguments: object) -> None:
        try:
            call(*arguments)
        except MlflowException as error:
            if not self._is_final(error):
                raise
            if error.error_code == GONE:
                self._check_exists()  # or is it the whole store that is another one?
            self._refuse(values, error.message)

    def _is_final(self, error: MlflowException) -> bool:
        answered = not self._by_http or isinstance(error, RestException)
        return answered and error.error_code in FINAL

    def _refuse(self, values: int, why: str) -> None:
        self.refused += values
        self.refusal = f"refused for good: {' '.join(why.split())[:300]}"
        print(self.refusal, file=sys.stderr)


def _is_refusal(error: Exception) -> bool:
    """Whether a server's answer to a file means that the same file will never be taken."""
    if not isinstance(error, requests.HTTPError) or error.response is None:
        return False
    status = error.response.status_code
    return 400 <= status < 500 and status not in (401, 403, 407, 408, 425, 429)


def explain(error: BaseException, uri: str) -> str:
    """One line for the terminal; MLflow's own text for an unreachable server takes ten."""
    place, said = display_uri(uri), " ".join(str(error).replace(uri, display_uri(uri)).split())[:300]
    status = re.search(_STATUS, str(error))
    if status is not None:
        return f"{place} {_answer(int(status[status.lastindex or 0]))}"
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kinds, problem in _PROBLEMS.items():
        if any(isinstance(cause, kinds) for cause in causes):
            return f"{place} {problem}"
    return said


# Of the exceptions that led to one: a timeout is wrapped in what else is a lost connection.
_PROBLEMS: dict[tuple[type[BaseException], ...], str] = {
    (TimeoutError, requests.Timeout): "does not answer",
    (ChunkedEncodingError, json.JSONDecodeError): "breaks off in its answers",
    Unreachable: "can't be reached",
}


def _answer(status: int) -> str:
    if status in (401, 403):
        return (
            f"refused the login ({status}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN"
        )
    known = status in {each.value for each in HTTPStatus}
    return f"answers {status} {HTTPStatus(status).phrase}" if known else f"answers {status}"


def _is_within(folder: Path, path: Path) -> bool:
    """Whether a file, and all files of a folder, lie in `folder`, links followed."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return all(file.resolve().is_relative_to(folder.resolve()) for file in files)

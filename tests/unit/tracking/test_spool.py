"""The spool after kills at any byte: what MLflow gets from it is what an undisturbed search would give."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertune.errors import InputError
from hiertune.tracking import Delivery, Tracker, at_work, delivery, is_tracked, sync, tracker
from hiertune.tracking.spool import LOCK, SPOOL, encode, end_for_the_dead, parse, read_lines, summarise

TRIALS = {
    0: ("completed", None, 3),
    1: ("pruned", "stopped after epoch 2", 2),
    2: ("failed", "loss is nan", 1),
}
PARAMS = {"lr": 0.1}
FINAL = {"test/accuracy": 0.5, "n": 5.0}


class Process:
    """Stands for a delivery process that has nothing to do."""

    stdin = None

    def poll(self):
        return 0


@pytest.fixture(scope="module", autouse=True)
def _no_delivery():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "launch_delivery", lambda *_: Process())
        yield


@dataclass
class Record:
    """A trial, as the ledger has it."""

    number: int
    state: str = "running"
    reason: str | None = None
    params: dict = field(default_factory=lambda: dict(PARAMS))
    epochs: int = 0
    metrics: dict = field(default_factory=dict)
    attempts: int = 1
    fault: str | None = None


def metrics(trial, epoch):
    # `n` and the brace look like the end of a line
    return {"val/loss": trial + epoch / 7, "odd}": float("inf") if epoch == 2 else 1.0, "n": float(epoch)}


def start(run_dir, resume=False):
    return Tracker.start(run_dir, "http://host", "hiertune", "s1", resume=resume)


def events():
    """A whole search, its trials at once: (what, trial, epoch)."""
    yield "search", None, 0
    for trial in TRIALS:
        yield "start", trial, 0
    for epoch in (1, 2, 3):
        for trial, (_, _, epochs) in TRIALS.items():
            if epoch <= epochs:
                yield "log", trial, epoch
            if epoch == epochs:
                yield "end", trial, epoch
    yield "result", None, 0
    yield "search end", None, 0


def tell(tracked, what, trial, epoch):
    if what == "search":
        tracked.search_started({"trials": 3})
    elif what == "start":
        tracked.trial_started(trial, PARAMS)
    elif what == "log":
        tracked.log(trial, epoch, metrics(trial, epoch))
    elif what == "end":
        tracked.trial_ended(trial, *TRIALS[trial][:2])
    elif what == "result":
        tracked.log(None, 0, FINAL)
    else:
        tracked.search_ended("completed")


def note(ledger, what, trial, epoch):
    """What the ledger hears after the tracker."""
    if what == "log":
        ledger[trial].epochs, ledger[trial].metrics = epoch, metrics(trial, epoch)
    elif what == "end":
        ledger[trial].state, ledger[trial].reason = TRIALS[trial][:2]


def run(run_dir, ledger, resume, back=0):
    """A search from what the ledger has on; interrupted trials begin `back` epochs before that."""
    tracked = start(run_dir, resume)
    if resume:
        tracked.reconcile([record for record in ledger.values() if record.state != "running"])
    ended = {trial for trial, record in ledger.items() if record.state != "running"}
    begin = {trial: record.epochs - back for trial, record in ledger.items()}
    for what, trial, epoch in events():
        if trial not in ended and not (what == "log" and epoch <= begin[trial]):
            tell(tracked, what, trial, epoch)
            note(ledger, what, trial, epoch)
    tracked.close(0)


def kept(run_dir):
    """What MLflow keeps of a spool: per run its parameters, its points in order, its state and reason."""
    runs = {}
    data = (run_dir / SPOOL).read_bytes()
    assert read_lines(run_dir / SPOOL, 0, len(data) + 1) == data
    for line in data.splitlines():
        record = parse(line)
        if record is None or record["op"] in ("open", "close"):
            continue
        one = runs.setdefault(record["trial"], {"params": {}, "points": [], "state": None, "reason": None})
        one["reason"] = record.get("tags", {}).get("hiertune.reason", one["reason"])
        if record["op"] == "start":
            one["params"] = record["params"]
            one["state"] = "running"
        elif record["op"] == "end":
            one["state"] = record["state"]
        else:
            one["points"] += [(record["step"], name, value) for name, value in record["metrics"].items()]
    return runs


def new_ledger():
    return {trial: Record(trial) for trial in TRIALS}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, new_ledger(), resume=False)
    runs = kept(folder)
    for trial, (state, reason, epochs) in TRIALS.items():
        assert (runs[trial]["state"], runs[trial]["reason"]) == (state, reason)
        assert [step for step, name, _ in runs[trial]["points"] if name == "n"] == list(range(1, epochs + 1))
    return runs


def ledger_after(lines, late):
    """The ledger when so many lines of the first session were whole; `late`: killed before it heard of the
    last one."""
    ledger = new_ledger()
    for event in list(events())[: max(0, lines - 1 - late)]:  # the first line is `open`
        note(ledger, *event)
    return ledger


@settings(max_examples=40, deadline=None)
@given(
    cut=st.floats(0, 1),
    late=st.booleans(),
    orphan=st.booleans(),
    back=st.integers(0, 2),
    again=st.floats(0, 1),
)
def test_a_kill_at_any_byte_loses_and_doubles_nothing(undisturbed, cut, late, orphan, back, again):
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        run(run_dir, new_ledger(), resume=False)
        whole = (run_dir / SPOOL).read_bytes()
        size = round(cut * len(whole))
        (run_dir / SPOOL).write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        torn = not whole[:size].endswith(b"\n")
        ledger = ledger_after(lines, late and not torn)
        if orphan and lines:
            end_for_the_dead(run_dir, summarise(run_dir).header["session"])
            assert summarise(run_dir).open_runs == ()
            assert summarise(run_dir).closed
        run(run_dir, ledger, resume=True, back=back)
        assert kept(run_dir) == undisturbed
        opened = [
            line for line in (run_dir / SPOOL).read_bytes().splitlines() if line.startswith(b'{"op":"open"')
        ]
        assert len(opened) == (2 if lines else 1)
        # and once more: killed anywhere behind that, before anything was trained
        before = (run_dir / SPOOL).read_bytes()
        (run_dir / SPOOL).write_bytes(before[: size + round(again * (len(before) - size))])
        run(run_dir, {trial: Record(**vars(record)) for trial, record in ledger.items()}, resume=True)
        ends = {
            trial: (one["state"], one["reason"]) for trial, one in kept(run_dir).items() if trial is not None
        }
        assert ends == {trial: (state, reason) for trial, (state, reason, _) in TRIALS.items()}
        records = [parse(line) for line in (run_dir / SPOOL).read_bytes().splitlines()]
        values = [record["n"] for record in records if record is not None]
        assert values == sorted(values)
        assert delivery(run_dir) == Delivery(0, values[-1])


def test_a_resume_changes_nothing_that_is_known(tmp_path, undisturbed):
    ledger = new_ledger()
    run(tmp_path, ledger, resume=False)
    before = (tmp_path / SPOOL).read_bytes()
    tracked = start(tmp_path, resume=True)
    tracked.reconcile(ledger.values())
    for trial, (state, reason, epochs) in TRIALS.items():
        for epoch in range(1, epochs + 1):
            tracked.log(trial, epoch, metrics(trial, epoch))
        tracked.trial_ended(trial, state, reason)
    tracked.log(None, 0, FINAL)
    tracked.close(0)
    added = (tmp_path / SPOOL).read_bytes()[len(before) :]
    assert [parse(line)["op"] for line in added.splitlines()] == ["open", "close"]


def test_an_extended_search_tells_its_new_winner(tmp_path):
    run(tmp_path, new_ledger(), resume=False)
    tracked = start(tmp_path, resume=True)
    tracked.log(None, 0, {"test/accuracy": 0.75, "n": 5.0, "new": float("nan")})
    tracked.log(None, 0, {"new": float("nan")})
    tracked.close(0)
    assert kept(tmp_path)[None]["points"][2:-1] == [(0, "test/accuracy", 0.75)]
    assert kept(tmp_path)[None]["points"][-1][:2] == (0, "new")


def test_a_lost_spool_is_made_again_from_the_ledger(tmp_path):
    tracked = start(tmp_path)
    tracked.trial_started(1, PARAMS)
    tracked.log(1, 1, {"a": 1.0})
    tracked.trial_ended(1, "interrupted", "the search was killed")
    tracked.reconcile(
        [
            Record(0, "completed", epochs=3, metrics={"a": 3.0}),
            Record(1, "completed", epochs=2, metrics={"a": 2.0}),
            Record(2, "failed", "it was out of memory"),
        ]
    )
    tracked.close(0)
    points = {trial: one.pop("points") for trial, one in kept(tmp_path).items()}
    assert points == {0: [(3, "a", 3.0)], 1: [(1, "a", 1.0), (2, "a", 2.0)], 2: []}
    assert kept(tmp_path)[1] == {"params": PARAMS, "points": points[1], "state": "completed", "reason": None}
    assert kept(tmp_path)[2] == {
        "params": PARAMS,
        "points": [],
        "state": "failed",
        "reason": "it was out of memory",
    }


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_fast_pass_reads_what_json_reads(data):
    names = st.text(max_size=6) | st.sampled_from(["n", "}", '"n":3}', "},"])
    numbers = st.floats(allow_nan=False)
    logs = data.draw(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(-9, 99), st.dictionaries(names, numbers)), max_size=6
        )
    )
    lines, total = b"", 0
    for trial, step, values in logs:
        total += len(values)
        record = {"op": "log", "t": 1, "trial": trial, "step": step, "metrics": values}
        lines += encode(record, total)
    cut = data.draw(st.integers(0, len(lines)))
    torn = lines[:cut] + data.draw(st.sampled_from([b"", b"\n"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SPOOL).write_bytes(torn)
        found = summarise(Path(folder))
    expected, last = {}, 0
    for line in torn.splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            expected[record["trial"]], last = record["step"], record["n"]
    assert {trial: run.step for trial, run in found.runs.items()} == expected
    assert found.total == last


def test_a_folder_that_can_not_be_written_can_be_looked_at(tmp_path, monkeypatch):
    header = {"uri": "http://127.0.0.1:1", "experiment": "e", "search": "s", "uid": "u"}
    (tmp_path / SPOOL).write_bytes(encode({"op": "open", "t": 0, "trial": None, **header, "pid": 1}, 0))
    (tmp_path / LOCK).mkdir()  # stands for another user's
    assert not at_work(tmp_path)
    assert delivery(tmp_path).complete
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="can't be written\n  allowed: a folder"):
        sync(tmp_path)


def test_no_name_is_too_long_to_be_that_of_no_search():
    assert not is_tracked(Path("x" * 300))

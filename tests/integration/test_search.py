"""Whole searches by the command line, with exact expectations of what they print and leave."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from definitions import hyperband

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SPACE = """
name: small
data: {path: DATA}
model:
  backbone: {kind: mlp, hidden: [16]}
  head:
    choice:
      - {kind: linear}
      - {kind: conditional, routing: {choice: [soft, gumbel]}, temperature: {loguniform: [0.2, 5.0]}}
loss: {kind: taxonomy_smoothing, alpha: {uniform: [0.0, 0.4]}}
weighting: {choice: [{kind: equal}, {kind: gradnorm, alpha: {uniform: [0.0, 3.0]}}]}
optimizer: {kind: adamw, lr: {loguniform: [1.0e-3, 1.0e-1]}}
train: {epochs: EPOCHS, batch_size: 50}
search: {trials: TRIALS, workers_per_trial: 2, SEARCH}
"""


@pytest.fixture
def write_space(tmp_path, data_file):
    def write(search="scheduler: {kind: asha, grace_epochs: 1}", trials=6, epochs=4, text=SPACE):
        text = text.replace("DATA", str(data_file)).replace("SEARCH", search)
        text = text.replace("TRIALS", str(trials)).replace("EPOCHS", str(epochs))
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write


def rows_of(run):
    with (run / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def without_times(rows):
    times = ("seconds", "epoch_seconds", "input_seconds")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def processes_of(folder):
    """Command lines that name the folder of this search: its workers, its delivery."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if str(folder) in line and "pytest" not in line]


def test_a_search_from_the_space_to_the_model(hiertune, write_space, tmp_path):
    done = hiertune("search", write_space(), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "small"
    rows, summary = rows_of(run), json.loads((run / "summary.json").read_text())

    # Every trial is accounted for, and told as what it became.
    assert [row["trial"] for row in rows] == [str(number) for number in range(6)]
    states = {row["state"] for row in rows}
    assert states <= {"completed", "pruned"}
    assert sum(summary["trials"].values()) == 6
    for row in rows:
        assert (row["state"] == "completed") == (row["epochs"] == "4")
        assert row["objective"] == row["val/accuracy/genus"]
        # A parameter is there in just those trials whose branch has it.
        assert (row["param/model.head"] == "conditional") == bool(row["param/model.head.temperature"])
        assert (row["param/weighting"] == "gradnorm") == bool(row["param/weighting.alpha"])

    # The winner is the best completed trial; the test split is read for it and its controls only.
    best = max(
        (row for row in rows if row["state"] == "completed"),
        key=lambda row: (float(row["objective"]), -int(row["trial"])),
    )
    assert summary["winner"]["trial"] == int(best["trial"])
    assert summary["objective"] == {
        "metric": "val/accuracy/genus",
        "mode": "max",
        "value": float(best["objective"]),
    }
    assert set(summary["controls"]) == {"flat", "flat_crm", "nearest_neighbour"}
    for metrics in (summary["winner"]["metrics"], *(c["metrics"] for c in summary["controls"].values())):
        assert 0 < metrics["test/accuracy_seen/genus"] <= 1
    assert not any(name.startswith("test/") for name in rows[0])
    assert summary["tracking"]["delivered"] == summary["tracking"]["total"] > 0

    # What it says is what it leaves.
    assert "winner against flat" in done.stdout
    assert f"{summary['winner']['metrics']['test/accuracy_seen/genus']:.4f}" in done.stdout
    assert (run / "report.html").stat().st_size > 10_000
    kept = [path.relative_to(run / "trials").as_posix() for path in (run / "trials").rglob("*.*")]
    assert kept == [f"{summary['winner']['trial']:04d}/val_logits.safetensors"], "checkpoints are gone"
    assert processes_of(tmp_path) == []

    _check_mlflow(tmp_path / "runs", rows, summary)

    # `best.yaml` trains again without Ray, to the very numbers of the refit.
    again = hiertune("train", run / "best.yaml", "--refit", "--out", "again", capture_output=True)
    assert again.returncode == 0, again.stderr
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    for name, value in tested.items():  # one process here, two workers there
        assert value == pytest.approx(summary["winner"]["metrics"][name], abs=0.02), name

    # The model names rows, by itself.
    data = yaml.safe_load((run / "best.yaml").read_text())["data"]["path"]
    predicted = hiertune("predict", run / "model", data, "--out", "named.csv", capture_output=True)
    assert predicted.returncode == 0, predicted.stderr
    with (tmp_path / "named.csv").open() as file:
        named = list(csv.DictReader(file))
    assert len(named) == 600
    assert {row["genus"] for row in named} <= {f"g{i}" for i in range(8)}

    # How it names is chosen on its trial's validation logits, which two workers wrote together.
    decoding = summary["winner"]["decoding"]
    for name, value in decoding["val"]["before"].items():
        assert value == float(best[name]), name
    assert decoding["val"]["after"]["val/accuracy/genus"] >= float(best["objective"])
    decoded = hiertune("decode", run, "--metric", "val/hierarchical_distance", "--save", capture_output=True)
    assert decoded.returncode == 0, decoded.stderr
    assert f"{float(best['val/hierarchical_distance']):.4f}" in decoded.stdout
    assert json.loads((run / "model" / "model.json").read_text())["decoding"]["kind"] in ("argmax", "crm")

    # A second search of that name is refused; resuming a finished one adds nothing and says it again.
    refused = hiertune("search", tmp_path / "space.yaml", capture_output=True)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr
    assert "--resume" in refused.stderr
    resumed = hiertune("search", tmp_path / "space.yaml", "--resume", capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(rows_of(run)) == without_times(rows)


def _check_mlflow(runs, rows, summary):
    """One parent run, one child run per trial, parameters by key path, metrics by epoch."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("hiertune")
    found = client.search_runs([experiment.experiment_id], max_results=100)
    parents = [run for run in found if run.data.tags["hiertune.kind"] == "search"]
    children = {int(run.data.tags["hiertune.trial"]): run for run in found if run not in parents}
    assert len(parents) == 1
    assert sorted(children) == list(range(6))
    for row in rows:
        child = children[int(row["trial"])]
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert child.data.tags["hiertune.state"] == row["state"]
        assert child.data.params["model.head.kind"] == row["param/model.head"]
        history = client.get_metric_history(child.info.run_id, "val/accuracy/genus")
        assert [metric.step for metric in history] == list(range(1, int(row["epochs"]) + 1))
        assert history[-1].value == float(row["objective"])
    name = "test/accuracy_seen/genus"
    assert parents[0].data.metrics[name] == summary["winner"]["metrics"][name]


def test_one_seed_gives_the_same_trials_and_numbers(hiertune, write_space, tmp_path):
    space = write_space("sampler: {kind: tpe, startup_trials: 3}, scheduler: {kind: asha, grace_epochs: 1}")
    tables = []
    for runs in ("first", "second"):
        done = hiertune("search", space, "--runs", runs, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        tables.append(without_times(rows_of(tmp_path / runs / "small")))
    assert tables[0] == tables[1]


def test_an_interrupted_search_is_resumed_without_loss(start_hiertune, hiertune, write_space, tmp_path):
    run = tmp_path / "runs" / "small"
    space = write_space("scheduler: {kind: none}", trials=4, epochs=60)
    process = start_hiertune("search", space)
    _wait_for(lambda: (run / "curves.csv").exists() and "\n1,3," in (run / "curves.csv").read_text(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume" in output
    before = {row["trial"]: row for row in rows_of(run)}
    assert before["0"]["state"] == "completed"
    assert before["1"]["state"] == "interrupted"
    assert processes_of(tmp_path) == []

    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {row["trial"]: row for row in rows_of(run)}
    assert [row["state"] for row in after.values()] == ["completed"] * 4
    assert without_times([after["0"]]) == without_times([before["0"]])
    parameters = {key: value for key, value in before["1"].items() if key.startswith("param/")}
    assert {key: after["1"][key] for key in parameters} == parameters
    with (run / "curves.csv").open() as file:
        epochs = [
            int(row["epoch"])
            for row in csv.DictReader(file)
            if (row["trial"], row["metric"]) == ("1", "train/loss")
        ]
    assert sorted(set(epochs)) == list(range(1, 61))
    assert len(epochs) <= 61, "at most the epoch of the interruption is trained twice"
    assert not [path for path in run.rglob("checkpoint*") if ".ray" not in path.parts], "all are spent"


def _wait_for(condition, process, timeout_s=180):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended_rows(run):
    return [row for row in rows_of(run) if row["state"] not in ("interrupted", "outside")]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_search_whose_postgresql_hangs_ends_and_goes_on(
    hiertune, start_hiertune, write_space, tmp_path, postgresql, postgresql_server
):
    search = "scheduler: {kind: none}, controls: false, refit: false, max_concurrent: 1"
    space = write_space(search, trials=3, epochs=30)
    space.write_text(space.read_text() + f"ledger: {postgresql}\n")
    run, curves = tmp_path / "runs" / "small", tmp_path / "runs" / "small" / "curves.csv"
    process = start_hiertune("search", space)
    _wait_for(lambda: curves.exists() and "\n1,3," in curves.read_text(), process)  # in its second trial
    with postgresql_server.hung():
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"the search failed: the ledger {postgresql} can't be written to: " in said
    assert "what it has is kept, and `--resume` goes on" in said
    assert "Traceback" not in said

    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(row["trial"], row["state"], row["epochs"]) for row in rows_of(run)] == [
        (str(number), "completed", "30") for number in range(3)
    ]


@pytest.mark.long
def test_a_search_on_postgresql_is_killed_and_goes_on_and_is_extended(
    hiertune, start_hiertune, write_space, tmp_path, postgresql
):
    search = "scheduler: {kind: none}, controls: false, refit: false, max_concurrent: 1"
    space = write_space(search, trials=3, epochs=30)
    space.write_text(space.read_text() + f"ledger: {postgresql}\n")
    run, curves = tmp_path / "runs" / "small", tmp_path / "runs" / "small" / "curves.csv"
    process = start_hiertune("search", space)
    _wait_for(lambda: curves.exists() and "\n1,3," in curves.read_text(), process)  # in its second trial
    second = hiertune("search", space, "--resume", capture_output=True)
    assert second.returncode == 2
    assert f"this search is being run by process {process.pid} on" in second.stderr
    process.send_signal(signal.SIGKILL)
    process.wait()

    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first = rows_of(run)
    assert [(row["trial"], row["state"], row["epochs"]) for row in first] == [
        (str(number), "completed", "30") for number in range(3)
    ]
    assert not (run / "ledger.log").exists()
    assert "s3cret" not in (run / "ledger.json").read_text() + (run / "search.log").read_text()

    # A wider space extends it; what is finished stays as it is, number by number.
    text = space.read_text().replace("[0.0, 0.4]", "[0.0, 0.6]").replace("trials: 3", "trials: 5")
    space.write_text(text)
    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 trials are carried over" in done.stdout
    assert rows_of(run)[:3] == first
    assert len(rows_of(run)) == 5
    assert "[0.0, 0.4]" in (run / "space.1.yaml").read_text()
    assert "[0.0, 0.6]" in (run / "space.yaml").read_text()

    # A space without a branch leaves its trials outside, and as many are tried anew.
    heads = {row["param/model.head"] for row in rows_of(run)}
    gone = "linear" if "linear" in heads else "conditional"
    left = [row for row in rows_of(run) if row["param/model.head"] == gone]
    lines = [line for line in text.splitlines() if f"- {{kind: {gone}" not in line]
    space.write_text("\n".join(lines) + "\n")
    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    outside = [row for row in rows_of(run) if row["state"] == "outside"]
    assert [row["trial"] for row in outside] == [row["trial"] for row in left]
    assert [row["val/loss"] for row in outside] == [row["val/loss"] for row in left]
    assert len(ended_rows(run)) == 5


@pytest.mark.long
def test_finished_trials_stay_as_they_are(hiertune, write_space, tmp_path):
    search = "scheduler: {kind: asha, grace_epochs: 1}, controls: false, refit: false"
    space = write_space(search, trials=3)
    run = tmp_path / "runs" / "small"
    assert hiertune("search", space, capture_output=True).returncode == 0
    before = (run / "trials.csv").read_bytes()
    again = hiertune("search", space, "--resume", capture_output=True)
    assert again.returncode == 0, "there is nothing to do"
    assert (run / "trials.csv").read_bytes() == before
    done = hiertune("search", space, "--resume", "--trials", "5", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "trials.csv").read_bytes().splitlines()[:4] == before.splitlines()
    assert len(rows_of(run)) == 5


@pytest.mark.long
def test_what_is_switched_on_after_the_end_is_made_up_for(hiertune, write_space, tmp_path):
    def searched(*options, controls=True, refit=True, decode=True):
        settings = {"controls": controls, "refit": refit, "decode": decode}
        text = ", ".join(f"{name}: {str(value).lower()}" for name, value in settings.items())
        space = write_space(f"max_concurrent: 1, scheduler: {{kind: none}}, {text}", trials=2, epochs=2)
        done = hiertune("search", space, *options, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    whole, run = tmp_path / "runs" / "whole", tmp_path / "runs" / "small"
    searched("--name", "whole")
    searched(controls=False, refit=False, decode=False)
    rows, summary = rows_of(run), json.loads((run / "summary.json").read_text())
    assert (summary["controls"], summary["refit"], summary["winner"]["decoding"]["rule"]) == ({}, False, None)
    assert not (run / "trials").exists() or not list((run / "trials").rglob("*.*")), "no logits were kept"

    said = searched("--resume")
    assert "resuming small: 2 of 2 trials ended" in said
    every = "search.controls is on now and search.refit is on now and search.decode is on now"
    assert f"measured once more, since {every}" in said
    assert "winner against flat" in said
    assert rows_of(run) == rows
    summary, expected = (json.loads((each / "summary.json").read_text()) for each in (run, whole))
    for key in ("objective", "trials", "winner", "controls", "refit", "data"):
        assert without_seconds(summary[key]) == without_seconds(expected[key]), key
    kept = [path.relative_to(run / "trials").as_posix() for path in (run / "trials").rglob("*.*")]
    assert kept == [f"{summary['winner']['trial']:04d}/val_logits.safetensors"]

    # What is switched off stays: it is shown, and as what it is. Nothing is trained.
    text = (run / "summary.json").read_text()
    said = searched("--resume", controls=False, decode=False)
    off = "search.controls is off now and search.decode is off now"
    assert f"note: {off}; what is shown was measured before" in said
    assert "winner against flat" in said
    assert "starting Ray" not in said
    assert (run / "summary.json").read_text() == text


def without_seconds(value):
    if not isinstance(value, dict):
        return value
    return {key: without_seconds(each) for key, each in value.items() if not key.endswith("seconds")}


def test_the_median_rule_ends_every_trial(hiertune, write_space, tmp_path):
    search = "scheduler: {kind: median}, refit: false, controls: false"
    done = hiertune("search", write_space(search, trials=7, epochs=9), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "runs" / "small")
    assert len(rows) == 7
    assert {row["state"] for row in rows} <= {"completed", "pruned"}
    for row in rows:
        assert (row["state"] == "completed") == (row["epochs"] == "9")


@pytest.mark.long
@pytest.mark.parametrize("workers", [pytest.param(2, id="one group"), pytest.param(1, id="two groups")])
def test_hyperband_stops_those_of_the_definition_also_when_it_is_interrupted(
    hiertune, start_hiertune, write_space, tmp_path, workers
):
    text = SPACE.replace("{loguniform: [1.0e-3, 1.0e-1]}", "{choice: [1.0e-3, 1.0e-2, 3.0e-2, 1.0e+30]}")
    text = text.replace("workers_per_trial: 2", f"workers_per_trial: {workers}")
    search = "sampler: {kind: random}, scheduler: {kind: hyperband}, refit: false, controls: false"
    run, space = tmp_path / "runs" / "small", write_space(search, trials=11, epochs=9, text=text)

    def values():
        with (run / "curves.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "val/accuracy/genus"]
        return {(int(row["trial"]), int(row["epoch"])): float(row["value"]) for row in rows}

    process = start_hiertune("search", space)
    while not (run / "curves.csv").exists() or len(values()) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "interrupted" in {row["state"] for row in rows_of(run)}

    done = hiertune("search", space, "--resume", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(run)
    fails = {int(row["trial"]): int(row["epochs"]) + 1 for row in rows if row["state"] == "failed"}
    assert fails == {int(row["trial"]): 1 for row in rows if float(row["param/optimizer.lr"]) > 1}
    ends = {int(row["trial"]): (row["state"], int(row["epochs"])) for row in rows}
    assert ends == hyperband(11, lambda *at: values()[at], fails)
    assert {"completed", "pruned"} <= {row["state"] for row in rows}
    for row in rows:
        if row["state"] != "failed":
            assert float(row["val/accuracy/genus"]) == values()[int(row["trial"]), int(row["epochs"])]
            assert float(row["objective"]) == float(row["val/accuracy/genus"])


def test_a_trial_that_diverges_fails_with_its_reason_and_the_search_goes_on(hiertune, write_space, tmp_path):
    text = SPACE.replace("{loguniform: [1.0e-3, 1.0e-1]}", "{choice: [1.0e-2, 1.0e+30]}")
    search = "sampler: {kind: random}, controls: false"
    done = hiertune("search", write_space(search, text=text), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "runs" / "small")
    diverged = [row for row in rows if float(row["param/optimizer.lr"]) > 1]
    assert len(diverged) >= 1
    for row in diverged:
        assert row["state"] == "failed"
        assert row["reason"].startswith("train/loss is not finite at epoch 1")
    assert any(row["state"] == "completed" for row in rows)


@pytest.mark.long
def test_a_search_in_which_nothing_is_completed_fails(hiertune, write_space):
    text = SPACE.replace("{loguniform: [1.0e-3, 1.0e-1]}", "1.0e+30")
    done = hiertune("search", write_space(trials=2, text=text), capture_output=True)
    assert done.returncode == 1
    assert "no trial was completed; 2 of 2: train/loss is not finite at epoch 1" in done.stderr


def test_a_search_whose_trials_fail_for_one_cause_stops_and_says_how_to_go_on(
    hiertune, write_space, tmp_path
):
    text = SPACE.replace("{loguniform: [1.0e-3, 1.0e-1]}", "1.0e+30")
    search = "max_consecutive_failures: 2, max_concurrent: 1"
    done = hiertune("search", write_space(search, trials=9, text=text), capture_output=True)
    assert done.returncode == 1
    assert "2 trials in a row failed for one cause: train/loss is not finite at epoch 1" in done.stderr
    assert "Mend it, then go on: " in done.stderr
    assert "--resume" in done.stderr
    assert [(row["state"], row["fault"]) for row in rows_of(tmp_path / "runs" / "small")] == [
        ("failed", "diverged")
    ] * 2


def test_python_m_hiertune_search_is_the_same_command(write_space, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hiertune.search", str(write_space()), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "model.head.temperature" in done.stdout
    assert not (tmp_path / "runs").exists()

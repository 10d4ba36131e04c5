"""Tracking: values delivered per second to a real MLflow server, what that costs the search, and outages.

Without options: a server on loopback gets the metrics of a search by hiertune's spool and delivery, and,
in turn with it, the plain way: one request per metric, made where the search runs. With `--outage`:
searches whose server is killed for the whole middle half of their run, in turn with undisturbed ones;
then every point is read back through MLflow's client and compared with `curves.csv`.
`tracking.py [--quick] [--outage [--rounds N]]` prints a table, and as its last line one JSON object:
{"figures": {...}, "targets": {...}}.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from _bench import Figure, show
from _outage import Server, compare, search, write_data

from hiertune.tracking import Tracker
from hiertune.tracking.spool import SPOOL, encode, summarise

METRICS = 40
"""Per epoch, as many as a search over six levels has."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small sample: a look, not a result")
    parser.add_argument("--outage", action="store_true", help="searches whose server is killed")
    parser.add_argument("--rounds", type=int, help="searches of each kind; by default 20")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.outage:
            rounds = options.rounds or (1 if options.quick else 20)
            outages(Path(folder), rounds, 4, 100 if options.quick else 400)
        else:
            throughput(Path(folder), 1 if options.quick else 5, options.quick)


def throughput(folder: Path, rounds: int, quick: bool) -> None:
    trials, epochs = (5, 20) if quick else (20, 50)
    server = Server(folder / "server").start().wait()
    ours, plain, micros, plain_micros = [], [], [], []
    try:
        for number in range(rounds):
            spent, rate = _spooled(folder / f"run{number}", server.uri, trials, epochs)
            micros.append(spent)
            ours.append(rate)
            plain.append(_plain(server.uri, f"plain{number}", 2 if quick else 5))
            plain_micros.append(METRICS / plain[-1] * 1e6)
    finally:
        server.kill()
    resumes = [_seconds_to_read(folder / f"{trials} trials", trials, 20) for trials in (1000, 5000)]
    show(
        f"delivery of {trials} trials x {epochs} epochs x {METRICS} metrics to an MLflow server",
        [
            Figure("delivered", statistics.median(ours), 1000, "above", "values/s"),
            Figure("plain: a request per metric", statistics.median(plain), unit="values/s"),
            Figure("delivered / plain", _ratio(ours, plain), 10, "above"),
            Figure("the search's time per epoch", statistics.median(micros), 1000, "below", "us"),
            Figure("plain: the search's time per epoch", statistics.median(plain_micros), unit="us"),
            Figure("the search's time per epoch: hiertune / plain", _ratio(micros, plain_micros), 0.01),
            Figure("a resume reads 1,000 trials x 20 epochs", resumes[0], 1, "below", "s"),
            Figure("a resume reads 5,000 trials x 20 epochs", resumes[1], 2, "below", "s"),
        ],
    )


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _spooled(run: Path, uri: str, trials: int, epochs: int) -> tuple[float, float]:
    """(microseconds of the search per epoch, values delivered per second) of one search's metrics."""
    run.mkdir()
    tracked = Tracker.start(run, uri, "bench", run.name)
    tracked.search_started({"trials": trials})
    for trial in range(trials):
        tracked.trial_started(trial, {"optimizer.lr": 0.1})
    while not tracked.status().complete:  # the delivery process is up, the runs are there
        time.sleep(0.05)
    before = tracked.status().delivered
    spent, begun = 0.0, time.perf_counter()
    for epoch in range(1, epochs + 1):
        for trial in range(trials):
            metrics = _metrics(trial, epoch)
            start = time.perf_counter()
            tracked.log(trial, epoch, metrics)
            spent += time.perf_counter() - start
    done = tracked.close(60)
    seconds = time.perf_counter() - begun
    assert done.complete, done
    return spent / trials / epochs * 1e6, (done.delivered - before) / seconds


def _plain(uri: str, name: str, epochs: int) -> float:
    """Values per second of one request each."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run = client.create_run("0", run_name=name)
    client.log_metric(run.info.run_id, "warm", 1.0)
    begun = time.perf_counter()
    for epoch in range(epochs):
        for key, value in _metrics(0, epoch).items():
            client.log_metric(run.info.run_id, key, value, step=epoch)
    return epochs * METRICS / (time.perf_counter() - begun)


def _metrics(trial: int, epoch: int) -> dict[str, float]:
    return {f"val/accuracy/level {k}": trial + epoch / 7 + k / 1000 for k in range(METRICS)}


def _seconds_to_read(run: Path, trials: int, epochs: int) -> float:
    run.mkdir()
    values, total = _metrics(0, 1), 0
    with (run / SPOOL).open("wb") as file:
        for epoch in range(epochs):
            for trial in range(trials):
                total += METRICS
                log = {"op": "log", "t": 1764000000000, "trial": trial, "step": epoch, "metrics": values}
                file.write(encode(log, total))
    begun = time.perf_counter()
    assert summarise(run).total == total
    return time.perf_counter() - begun


def outages(folder: Path, rounds: int, trials: int, epochs: int) -> None:
    server, stand_in = Server(folder / "server").start().wait(), Server(folder / "stand-in").start().wait()
    write_data(folder)
    undisturbed: list[float] = []
    disturbed: list[float] = []
    found: Counter[str] = Counter()
    try:
        search(folder, "first", trials, 10, server, stand_in)  # what is loaded once is in memory then
        for number in range(rounds):
            for cut in (False, True) if number % 2 else (True, False):
                name = f"{'cut' if cut else 'calm'}{number}"
                seconds = search(folder, name, trials, epochs, server, None if cut else stand_in)
                (disturbed if cut else undisturbed).append(seconds)
                found.update(compare(folder, name, server))
    finally:
        server.kill()
        stand_in.kill()
    disturbed_s, undisturbed_s = statistics.median(disturbed), statistics.median(undisturbed)
    show(
        f"{rounds} searches whose MLflow server is gone for their middle half, in turn with undisturbed ones",
        [
            Figure("points in MLflow / points in curves.csv", found["there"] / found["expected"], 1, "above"),
            Figure("points there twice, or of another value", found["wrong"], 0, unit="points"),
            Figure("runs left open", found["open"], 0, unit="runs"),
            Figure("a search undisturbed, median", undisturbed_s, unit="s"),
            Figure("a search with the outage, median", disturbed_s, unit="s"),
            Figure("with the outage / undisturbed", disturbed_s / undisturbed_s, 1.05),
        ],
    )


if __name__ == "__main__":
    main()

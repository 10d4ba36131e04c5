"""The page says what the folder holds, at any time of a search, and lets nothing out of it run."""

import json
import re
from html.parser import HTMLParser

import optuna
import plotly.offline
import pytest

from hiertune.errors import InputError
from hiertune.report import write_report
from hiertune.report.page import cell, duration, score, short_names
from hiertune.report.read import read_search


class Page(HTMLParser):
    """What a browser makes of a report: elements, texts, tables, figures."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.figures, self.tables, self.words = [], [], [], [], []
        self._open = []
        before, library, after = path.read_text("utf-8").partition(plotly.offline.get_plotlyjs())
        assert library
        self.source = before + after
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)
        if "data-figure" in dict(attrs):
            self.figures.append(json.loads(dict(attrs)["data-figure"]))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" not in self._open and "style" not in self._open:
            self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def table(self, first_header):
        (found,) = [table for table in self.tables if table and table[0][0] == first_header]
        return found

    def figure(self, y_title):
        titles = [figure["layout"].get("yaxis", {}).get("title", {}).get("text") for figure in self.figures]
        return [figure for figure, title in zip(self.figures, titles, strict=True) if title == y_title]


def page_of(folder):
    return Page(write_report(folder))


# ---------------------------------------------------------------------------------- what is said


def test_headline(finished):
    page = page_of(finished)
    summary = json.loads((finished / "summary.json").read_text())
    value, best = summary["objective"]["value"], summary["winner"]["trial"]
    assert f"{value:.4f} val/accuracy/genus, trial {best}" in page.text
    assert "0.9580 test/accuracy/genus" in page.text
    assert "24 trials" in page.text
    assert "4 min 31 s in all" in page.text
    assert (
        "Against flat: +2.1 points of accuracy at the finest level (95% interval +0.4 to +3.8, p = 0.013;"
        " 523 test rows whose class has training rows)." in page.text
    )
    assert "Against nearest neighbour: -0.2 points" in page.text
    assert page.text.count("not to be told from chance") == 1


def test_winner_beside_controls(finished):
    table = page_of(finished).table("on the test split")
    assert table[0][1:] == ["winner", "flat", "nearest neighbour"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["accuracy/genus"] == ["0.9580", "0.9370", "0.9600 ★"]
    assert rows["loss"] == ["0.0420", "0.0630", "0.0400"], "everybody's own loss: nothing to compare"
    assert list(rows)[-1] == "loss"
    assert rows["hierarchical_distance"] == ["2.0840", "2.1260", "2.0800 ★"]


def test_a_comparison_of_nothing(finished):
    summary = json.loads((finished / "summary.json").read_text())
    nothing = {"rows": 1, "difference": None, "low": None, "high": None, "p_value": None}
    summary["controls"]["flat"]["against_winner"] = nothing
    (finished / "summary.json").write_text(json.dumps(summary))
    text = page_of(finished).text
    assert (
        "Against flat: –, as the test rows whose class has training rows are too few to compare (1)." in text
    )
    assert "Against nearest neighbour: " in text


@pytest.mark.parametrize(("by", "said"), [("patience", True), ("trials", False)])
def test_why_a_search_ended_early(finished, by, said):
    summary = json.loads((finished / "summary.json").read_text())
    summary["ended"] = {"by": by, "reason": "no improvement in the last 9 trials: 20 of <b> trials"}
    (finished / "summary.json").write_text(json.dumps(summary))
    text = write_report(finished).read_text()
    assert ("Ended early: no improvement in the last 9 trials: 20 of &lt;b&gt; trials." in text) == said


def decoded(finished, **decoding):
    summary = json.loads((finished / "summary.json").read_text())
    summary["winner"]["decoding"] = decoding
    (finished / "summary.json").write_text(json.dumps(summary))
    return page_of(finished)


def test_the_decoded_winner_beside_the_winner(finished):
    val = {"before": {"val/accuracy/genus": 0.9}, "after": {"val/accuracy/genus": 0.91}}
    test = {"test/accuracy/genus": 0.97}
    page = decoded(finished, rule={"kind": "crm"}, name="by risk", tried=25, val=val, test=test)
    table = page.table("on the test split")
    assert table[0][1:] == ["winner", "winner, decoded", "flat", "nearest neighbour"]
    assert next(row for row in table if row[0] == "accuracy/genus")[2] == "0.9700 ★"
    assert "by risk, of 25 ways to turn its logits into names the best by val/accuracy/genus" in page.text
    assert "(0.9000 as trained, 0.9100 so)" in page.text


def test_a_winner_that_names_as_trained(finished):
    val = {"before": {"val/accuracy/genus": 0.9}, "after": {"val/accuracy/genus": 0.9}}
    page = decoded(finished, rule={"kind": "argmax"}, name="as trained", tried=25, val=val, test={})
    assert page.table("on the test split")[0][1:] == ["winner", "flat", "nearest neighbour"]
    assert "names as trained: of 25 ways" in page.text
    page = decoded(finished, rule=None, name="as trained", reason="search.decode is off")
    assert "names as trained" not in page.text


def test_mistakes_per_level(finished):
    (figure,) = page_of(finished).figure("wrong (test split)")
    winner = figure["data"][0]
    assert winner["x"] == ["domain", "phylum", "class", "order", "family", "genus"]
    assert winner["y"] == pytest.approx([0.042 * k / 6 for k in range(1, 7)])
    assert [bar["name"] for bar in figure["data"]] == ["winner", "flat", "nearest neighbour"]


def test_leaderboard_and_all_trials(finished, example):
    page = page_of(finished)
    leaders = page.table("rank")
    assert leaders[0] == [
        "rank", "trial", "state", "val/accuracy/genus", "epochs", "seconds",
        "head", "temperature", "lr", "alpha", "hidden",
    ]  # fmt: skip
    completed = [trial for trial in example.study.trials if trial.state.name == "COMPLETE"]
    by_value = sorted(completed, key=lambda trial: -trial.value)
    assert [row[1] for row in leaders[1 : 1 + len(completed)]] == [str(trial.number) for trial in by_value]
    assert all(row[2] == "pruned" for row in leaders[1 + len(completed) :])
    assert leaders[1][3] == f"{by_value[0].value:.4f}"
    assert len(leaders) == 21
    everything = page.table("trial")
    assert [row[0] for row in everything[1:]] == [str(number) for number in range(24)]
    assert everything[1 + 4][1] == "failed: loss is nan at epoch 2"


def test_states_and_reasons(finished):
    page = page_of(finished)
    assert "14 completed, 8 pruned, 2 failed." in page.text
    assert "8 × pruned: stopped by asha at epoch 2" in page.text
    assert "1 × failed: loss is nan at epoch 2" in page.text


def test_history_and_best_so_far(finished, example):
    figure = page_of(finished).figure("val/accuracy/genus")[0]
    traces = {trace["name"]: trace for trace in figure["data"]}
    completed = [trial for trial in example.study.trials if trial.state.name == "COMPLETE"]
    assert traces["completed"]["x"] == [trial.number for trial in completed]
    assert traces["completed"]["y"] == pytest.approx([trial.value for trial in completed])
    best = [max(trial.value for trial in completed[: k + 1]) for k in range(len(completed))]
    assert traces["best so far"]["y"] == pytest.approx(best)
    assert len(traces["pruned"]["x"]) == 8


def test_learning_curves(finished, example):
    figure = page_of(finished).figure("val/accuracy/genus")[1]
    last = figure["data"][-1]
    best = example.study.best_trial
    assert last["name"] == f"trial {best.number}, the best"
    assert last["x"] == list(range(1, 9))
    assert last["y"] == pytest.approx([best.intermediate_values[epoch] for epoch in range(1, 9)])
    assert len(figure["data"]) == 24


def test_importance_is_optunas(finished, example):
    expected = optuna.importance.get_param_importances(example.study)
    figure = next(f for f in page_of(finished).figures if f["data"][0].get("orientation") == "h")
    bars = dict(zip(figure["data"][0]["y"], figure["data"][0]["x"], strict=True))
    assert bars == pytest.approx(expected)
    assert max(bars, key=bars.get) == "optimizer.lr"


def test_space_without_password_and_provenance(finished):
    page = page_of(finished)
    assert "temperature: {loguniform: [0.2, 5.0]}" in page.text
    assert "postgresql://me:***@host/db" in page.text
    assert "s3cret" not in page.source
    assert "torch 2.14.1" in page.text
    assert "90 of 100 values delivered" in page.text
    assert "train + validation" in page.text


# --------------------------------------------------------------------------- at any time of a search


def test_a_running_search_is_read_from_its_ledger(builder):
    builder.add()
    builder.add("running", epochs=3)
    builder.write_curves()
    search = read_search(builder.root)
    assert search.metric == "val/accuracy/genus"
    assert list(search.trials["state"]) == ["completed", "running"]
    assert search.trials["objective"][1] == builder.study.trials[1].intermediate_values[3]
    page = page_of(builder.root)
    assert "not finished" in page.text
    assert "Best settings so far" in page.text
    assert page.figure("wrong (val split)")
    assert all(table[0][0] != "on the test split" for table in page.tables)


def test_a_resumed_search_does_not_show_the_old_results(builder):
    builder.add()
    builder.finish()
    assert "test split" in page_of(builder.root).text
    builder.add()
    page = page_of(builder.root)
    assert "2 trials" in page.text
    assert "not finished" in page.text
    assert "test split" not in page.text


def test_the_tables_alone_are_enough(finished):
    (finished / "ledger.log").unlink()
    page = page_of(finished)
    assert "0.9580 test/accuracy/genus" in page.text
    assert len(page.table("trial")) == 25
    assert "Which settings mattered" not in page.text


def test_nothing_yet(builder):
    page = page_of(builder.root)
    assert "No trial was completed yet." in page.text
    assert "0 trials" in page.text


def test_only_failures(builder):
    builder.add("failed", epochs=0, reason="out of memory")
    page = page_of(builder.root)
    assert "No trial was completed yet." in page.text
    assert "1 × failed: out of memory" in page.text


def test_a_minimised_objective(tmp_path, builder):
    minimising = type(builder)(tmp_path / "loss", mode="min")
    for _ in range(6):
        minimising.add()
    search = read_search(minimising.finish())
    best = min(minimising.study.trials, key=lambda trial: trial.value)
    assert search.best == best.number
    values = list(search.ranked["objective"])
    assert values == sorted(values)
    figure = page_of(minimising.root).figure("val/loss")[0]
    assert figure["data"][-1]["y"][-1] == pytest.approx(best.value)


def test_a_single_trial_without_controls(builder):
    builder.add()
    page = page_of(builder.finish(controls=False))
    assert page.table("on the test split")[0] == ["on the test split", "winner"]
    assert "Against" not in page.text
    assert "★" not in "".join(map(str, page.tables))


def test_curves_of_a_trial_that_went_on_and_a_torn_line(builder):
    builder.add(epochs=2)
    builder.curves += [(0, 2, "val/accuracy/genus", 0.5), (0, 3, "val/accuracy/genus", 0.75)]
    builder.write_curves()
    with (builder.root / "curves.csv").open("a") as file:
        file.write("0,4,val/acc")
    curves = read_search(builder.root).curves
    assert list(curves["epoch"]) == [1, 2, 3]
    assert list(curves["value"])[1:] == [0.5, 0.75]


@pytest.mark.parametrize("trials", [0, 9])
def test_too_few_trials_have_no_importance(builder, trials):
    for _ in range(trials):
        builder.add()
    assert read_search(builder.root).importance == {}


def test_equal_trials_have_no_importance(builder):
    for _ in range(12):
        trial = builder.study.ask()
        trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)
        builder.study.tell(trial, 0.5)
    assert read_search(builder.root).importance == {}


def test_settings_that_never_varied_have_no_importance(builder):
    for number in range(12):
        trial = builder.study.ask()
        trial.suggest_categorical("model.head", ["linear"])
        builder.study.tell(trial, number / 12)
    assert read_search(builder.root).importance == {}
    assert page_of(builder.root).figures  # but the history is there


def test_folders_and_files_that_cannot_be_used(tmp_path, finished):
    with pytest.raises(InputError, match="not the folder of a search"):
        write_report(tmp_path)
    (finished / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary\.json"):
        write_report(finished)
    (finished / "trials.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="lacks the columns trial, state, objective"):
        write_report(finished)
    (finished / "ledger.log").write_text("no journal\n")
    with pytest.raises(InputError, match=r"ledger\.log"):
        write_report(finished)


# ------------------------------------------------------------------------------------ nothing gets out

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_texts_from_data_are_texts(tmp_path, builder):
    hostile = type(builder)(tmp_path / "<b>evil & co")
    for _ in range(12):
        trial = hostile.study.ask()
        trial.suggest_categorical(f"model.{EVIL}", [EVIL, "plain"])
        value = trial.suggest_float("optimizer.lr", 0.1, 1.0)
        trial.report(value, 1)
        hostile.curves.append((trial.number, 1, f"val/accuracy/{EVIL}", value))
        for key, attribute in {"metrics": {f"val/accuracy/{EVIL}": value}, "reason": EVIL}.items():
            trial.set_user_attr(key, attribute)
        trial.set_user_attr("epochs", 1)
        trial.set_user_attr("seconds", 1.0)
        hostile.study.tell(trial, value)
    (hostile.root / "space.yaml").write_text(EVIL)
    hostile.finish()
    summary = json.loads((hostile.root / "summary.json").read_text())
    for contender in (summary["winner"], summary["controls"]["flat"]):
        contender["metrics"] = {f"test/accuracy/{EVIL}": 0.5}
    summary["controls"][EVIL] = summary["controls"].pop("flat")
    summary["objective"]["metric"] = f"val/accuracy/{EVIL}"
    summary["versions"][EVIL] = EVIL
    summary["data"]["path"] = EVIL
    (hostile.root / "summary.json").write_text(json.dumps(summary))
    page = page_of(hostile.root)
    assert page.tags.count("script") == 2
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(EVIL) >= 10  # as text it is all there
    # Plotly reads tags in labels, so there they are escaped once more.
    inside = json.dumps(page.figures)
    assert "<script" not in inside
    assert "<img" not in inside
    assert "&lt;script&gt;" in inside


def test_the_page_loads_nothing_from_elsewhere(finished):
    page = page_of(finished)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset", "action")]
    assert not re.search(r"@import|url\(", page.source)
    assert "default-src 'none'" in dict(page.attributes)["content"]


# ------------------------------------------------------------------------------------------- details


def test_short_names_are_the_shortest_that_differ():
    assert short_names(["a.b.lr", "a.c.lr", "a.c.x", "x.y"]) == ["b.lr", "c.lr", "x", "y"]
    assert short_names(["alpha", "loss.alpha"]) == ["alpha", "loss.alpha"]
    assert short_names([]) == []


def test_cells():
    values = [None, float("nan"), 3.0, 0.123456, 1e-5, "x", True, [1, 2], 7]
    assert [cell(value) for value in values] == ["–", "–", "3", "0.1235", "1e-05", "x", "True", "[1, 2]", "7"]
    assert [score(0.5), score(float("nan"))] == ["0.5000", "–"]


def test_durations():
    assert [duration(seconds) for seconds in (9.4, 61, 7260)] == ["9 s", "1 min 1 s", "2 h 1 min"]


# ------------------------------------------------------------------------------- any ledger


def test_a_line_that_is_being_written_is_as_if_it_were_not_there(builder):
    builder.add()
    builder.add("running")
    whole = read_search(builder.root).trials
    with (builder.root / "ledger.log").open("ab") as file:
        file.write(b'{"op_code": 4, "tri')
    text = (builder.root / "ledger.log").read_bytes()
    assert read_search(builder.root).trials.equals(whole)
    assert (builder.root / "ledger.log").read_bytes() == text


@pytest.mark.parametrize("kind", ["journal", "sqlite", "postgresql"])
def test_the_newest_revision_of_any_ledger_is_read(tmp_path, kind, request):
    from hiertune._database import Place
    from hiertune.search.ledger import Ledger, carried_over, put_outside

    root = tmp_path / "demo"
    root.mkdir()
    url = {"journal": lambda: None, "sqlite": lambda: f"sqlite:///{tmp_path}/x.db"}.get(
        kind, lambda: request.getfixturevalue("postgresql")
    )()
    (root / "space.yaml").write_text("name: demo\n" + (f"ledger: {url}\n" if url else ""))
    place = Place(root / "ledger.log", url)
    ledger = Ledger.open(place, "demo", "min", resume=False, metric="val/loss")
    for value in (0.5, 0.25):
        trial = ledger.next_trial()
        trial.suggest_float("optimizer.lr", 0.0, 1.0)
        ledger.tell(trial, "completed", value=value, epochs=3, metrics={"val/loss": value})

    def carry(frozen, record):
        if frozen.number == 1:
            return put_outside(frozen, {}, "optimizer.lr: too large", 1)
        return carried_over(frozen, frozen.params, frozen.distributions, {})

    ledger.revise("name: demo", carry)
    search = read_search(root)
    assert (search.metric, search.mode, search.best) == ("val/loss", "min", 0)
    assert list(search.trials["state"]) == ["completed", "outside"]
    assert list(search.trials["val/loss"]) == [0.5, 0.25]
    assert list(search.trials["reason"])[1] == "optimizer.lr: too large"
    assert search.trials["param/optimizer.lr"].notna().all()
    assert page_of(root).text

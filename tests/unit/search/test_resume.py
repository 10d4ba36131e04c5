"""Searches that go on with another space: what is carried over, what stays outside, and what is said."""

import optuna
import pytest
import sqlalchemy
from rich.console import Console

from hiertune._database import Place
from hiertune.errors import InputError
from hiertune.record import newest_study, open_storage
from hiertune.search.ledger import Ledger
from hiertune.search.outputs import RunFolder
from hiertune.search.resume import Change, compare, keep_spaces, open_ledger, print_revision, revise
from hiertune.search.strategies import build_sampler
from hiertune.space import parse_space

SPACE = """
name: it
data: {path: data.h5}
model:
  head:
    choice:
      - {kind: linear}
      - {kind: conditional, routing: {choice: [soft, gumbel]}, temperature: {quniform: [1.0, 2.0, 0.5]}}
optimizer: {kind: adamw, lr: {choice: [1e-3, 1e-2]}}
train: {epochs: 5}
"""
CONTINUOUS = SPACE.replace("{choice: [1e-3, 1e-2]}", "{loguniform: [1e-3, 1e-2]}")


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "it")
    folder.root.mkdir()
    folder.space.write_text(CONTINUOUS)
    return folder


def begin(folder, text, sampler="random", trials=20, running=2):
    space = parse_space(text)
    ledger = Ledger.open(folder.ledger, "it", "max", resume=False, space=text)
    sample(ledger, space, sampler, trials)
    for _ in range(running):
        trial = ledger.next_trial()
        space.suggest(trial)
        ledger.begin(trial)
    return ledger


def sample(ledger, space, sampler, trials):
    kinds = {kind: config for kind, config in SAMPLERS.items()}
    ledger.study.sampler = build_sampler(kinds[sampler], 0)
    for _ in range(trials):
        trial = ledger.next_trial()
        config = space.suggest(trial)
        ledger.begin(trial)
        ledger.report(trial, 1, config.optimizer.lr)
        ledger.tell(trial, "completed", value=config.optimizer.lr, epochs=5, metrics={"val/it": 1.0})


def samplers():
    from hiertune.config import CMAESConfig, GPConfig, GridConfig, QMCConfig, RandomConfig, TPEConfig

    configs = [TPEConfig(), RandomConfig(), GridConfig(), GPConfig(), CMAESConfig(), QMCConfig()]
    return {config.kind: config for config in configs}


SAMPLERS = samplers()


def reopened(folder):
    return Ledger.open(folder.ledger, "it", "max", resume=True)


def test_the_same_space_is_no_revision(folder):
    ledger = begin(folder, CONTINUOUS)
    assert revise(ledger, folder, parse_space(CONTINUOUS + "search: {trials: 99}\n")) is None
    assert ledger.identity.revision == 1


def test_a_wider_space_carries_all_over(folder):
    ledger = begin(folder, CONTINUOUS)
    before = ledger.records()
    wide = CONTINUOUS.replace("[1e-3, 1e-2]", "[1e-4, 1e-1]").replace("epochs: 5", "epochs: {int: [5, 9]}")
    wide = wide.replace("- {kind: linear}", "- {kind: hierarchical_softmax}\n      - {kind: linear}")
    old, space = parse_space(CONTINUOUS), parse_space(wide)
    revision = revise(ledger, folder, space)
    assert (revision.carried, revision.outside) == (22, 0)
    assert revision.changes == (
        Change(
            "model.head",
            "choice: [linear, conditional]",
            "choice: [hierarchical_softmax, linear, conditional]",
        ),
        Change("optimizer.lr", "loguniform: [0.001, 0.01]", "loguniform: [0.0001, 0.1]"),
        Change("train.epochs", "5", "int: [5, 9]"),
    )
    for was, record in zip(before, reopened(folder).records(), strict=True):
        assert (record.state, record.value, record.metrics) == (was.state, was.value, was.metrics)
        assert record.params == was.params | {"train.epochs": 5}
        assert space.resolve(record.params) == old.resolve(was.params)
    storage = open_storage(Place(folder.ledger))
    frozen = storage.get_all_trials(newest_study(Place(folder.ledger), storage)._study_id)[0]
    assert frozen.user_attrs["carried"] == {"from": 1, "from_constants": ["train.epochs"]}
    assert frozen.distributions["optimizer.lr"].high == 0.1


def test_what_the_space_no_longer_holds_stays_outside_with_its_key(folder):
    ledger = begin(folder, CONTINUOUS)
    before = ledger.records()
    narrow = CONTINUOUS.replace("[1e-3, 1e-2]", "[1e-3, 4e-3]").replace("[soft, gumbel]", "[soft]")
    revision = revise(ledger, folder, parse_space(narrow))
    expected = {}
    for record in before:
        if record.params.get("model.head.routing") == "gumbel":
            expected[record.number] = "model.head.routing: 'gumbel' is not in choice: [soft]"
        elif record.params["optimizer.lr"] > 4e-3:
            lr = record.params["optimizer.lr"]
            expected[record.number] = f"optimizer.lr: {lr!r} is not in loguniform: [0.001, 0.004]"
    resumed = reopened(folder)
    records = resumed.records()
    assert {r.number: r.reason for r in records if r.state == "outside"} == expected
    assert [(r.params, r.value, r.metrics) for r in records] == [
        (r.params, r.value, r.metrics) for r in before
    ]
    routing, lr = revision.changes
    assert (routing.key, routing.before, routing.now) == (
        "model.head[conditional].routing",
        "choice: [soft, gumbel]",
        "choice: [soft]",
    )
    assert routing.outside == sum("routing" in reason for reason in expected.values()) > 0
    assert lr.outside == sum("optimizer.lr" in reason for reason in expected.values()) > 0
    assert (revision.carried, revision.outside) == (22 - len(expected), len(expected))
    running = [r.number for r in before if r.state == "running" and r.number not in expected]
    assert [resumed.next_trial().number for _ in range(len(running) + 1)] == [*running, 22]

    back = revise(resumed, folder, parse_space(CONTINUOUS))
    assert (back.carried, back.outside) == (22, 0)
    assert [r.state for r in resumed.records()] == [r.state for r in before]
    assert [r.params for r in reopened(folder).records()] == [r.params for r in before]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid", "gp", "cmaes", "qmc"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_sampler_goes_on_in_the_changed_space(folder, sampler):
    text = SPACE if sampler == "grid" else CONTINUOUS
    ledger = begin(folder, text, sampler, trials=12, running=0)
    changed = text.replace("[soft, gumbel]", "[gumbel, hard]").replace("1e-2", "8e-3")
    space = parse_space(changed)
    revise(ledger, folder, space)
    left = len(ledger.ended())
    assert 0 < left < 12
    resumed = reopened(folder)
    more = int(space.size()) - left if sampler == "grid" else 12
    sample(resumed, space, sampler, more)
    records = [record for record in resumed.records() if record.state == "completed"]
    assert len(records) == left + more
    if sampler == "grid":
        assert len({tuple(sorted(record.params.items())) for record in records}) == space.size()


def test_the_table_says_what_changed(folder):
    ledger = begin(folder, CONTINUOUS)
    console = Console(record=True, width=120)
    print_revision(console, revise(ledger, folder, parse_space(CONTINUOUS.replace("epochs: 5", "epochs: 6"))))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["train.epochs", "5", "6", "22"] in lines
    assert "0 of 22 trials are carried over; the others stay in trials.csv" in " ".join(
        word for line in lines for word in line
    )


def test_keys_that_come_and_go_are_compared():
    new = CONTINUOUS.replace(
        "train: {epochs: 5}", "train: {seed: 1}\nweighting: {kind: gradnorm, alpha: 0.5}"
    )
    changes = {
        change.key: change for change in compare(parse_space(CONTINUOUS), parse_space(new), {"else": 3})
    }
    assert changes["train.epochs"] == Change("train.epochs", "5", None)
    assert changes["train.seed"] == Change("train.seed", None, "1")
    assert changes["weighting.alpha"] == Change("weighting.alpha", None, "0.5")
    assert changes["else"] == Change("else", None, None, 3)
    assert changes["weighting.kind"] == Change("weighting.kind", None, "'gradnorm'")
    assert len(changes) == 5


def test_the_folder_keeps_every_space(folder):
    ledger = begin(folder, CONTINUOUS)
    given = folder.space.read_text()
    second, third = CONTINUOUS.replace("1e-2", "2e-2"), CONTINUOUS.replace("1e-2", "3e-2")
    revise(ledger, folder, parse_space(second))
    keep_spaces(folder, ledger)
    keep_spaces(folder, ledger)
    assert folder.space.read_text() == second
    assert folder.earlier_space(1).read_text() == given
    revise(ledger, folder, parse_space(third))
    ledger = reopened(folder)  # killed before the files were written
    keep_spaces(folder, ledger)
    texts = [folder.earlier_space(number).read_text() for number in (1, 2)]
    assert [*texts, folder.space.read_text()] == [given, second, third]


@pytest.mark.parametrize("cut", ["before the first file", "before the last file", "edited in the folder"])
def test_after_a_kill_the_folder_keeps_the_right_spaces(folder, cut):
    second, third = CONTINUOUS.replace("1e-2", "5e-3"), CONTINUOUS.replace("1e-2", "2e-3")
    ledger = begin(folder, CONTINUOUS, trials=2, running=0)
    revise(ledger, folder, parse_space(second))
    if cut == "before the last file":
        folder.earlier_space(1).write_text(CONTINUOUS)
    if cut == "edited in the folder":  # `hiertune search runs/it/space.yaml --resume`
        folder.space.write_text(second)
    else:
        revise(ledger, folder, parse_space(third))
    keep_spaces(folder, ledger)
    texts = [CONTINUOUS, second] if cut == "edited in the folder" else [CONTINUOUS, second, third]
    earlier = [folder.earlier_space(number + 1).read_text() for number in range(len(texts) - 1)]
    assert [*earlier, folder.space.read_text()] == texts


def test_a_space_that_was_not_replaced_before_a_kill_is_replaced_later(folder):
    second = CONTINUOUS.replace("1e-2", "5e-3")
    ledger = begin(folder, CONTINUOUS, trials=2, running=0)
    revise(ledger, folder, parse_space(second))
    folder.earlier_space(1).write_text(CONTINUOUS)
    keep_spaces(folder, ledger)
    assert folder.space.read_text() == second


def test_a_space_that_is_not_valid_any_more_is_said(folder):
    ledger = Ledger.open(folder.ledger, "it", "max", resume=False, space="name: it\n")
    with pytest.raises(InputError, match=r"begun with is not valid any more: .*data"):
        revise(ledger, folder, parse_space(CONTINUOUS))


def test_optuna_reads_what_was_written(folder):
    """By its own file backend, as its dashboard does."""
    begin(folder, CONTINUOUS)
    backend = optuna.storages.journal.JournalFileBackend(str(folder.ledger))
    storage = optuna.storages.JournalStorage(backend)
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 20 + ["RUNNING"] * 2


# ---------------------------------------------------------------------- from the command's plan on


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """`planned(text, resume)`: a checked plan, on real data."""
    from hiertune.search.plan import plan_search

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("HIERTUNE_LEDGER", raising=False)
    file = tmp_path / "space.yaml"

    def plan(text, resume=False, **options):
        file.write_text(text.replace("data.h5", "builtin:rrna16s"))
        return plan_search(file, tmp_path / "runs", resume=resume, **options)

    return plan


QUIET = Console(quiet=True)


def test_a_search_goes_on_with_what_its_ledger_says(planned):
    plan = planned(CONTINUOUS)
    with open_ledger(plan, QUIET) as ledger:
        assert (ledger.identity.metric, ledger.identity.mode) == (plan.metric, "max")
        assert ledger.identity.fingerprint == plan.data.fingerprint
        assert parse_space(ledger.identity.space).tree == plan.space.tree
        sample(ledger, plan.space, "random", 3)
        with pytest.raises(InputError, match="this search is being run by process"), open_ledger(plan, QUIET):
            pass

    plan = planned(CONTINUOUS.replace("epochs: 5", "epochs: {int: [5, 6]}"), resume=True, trials=9)
    console = Console(record=True, width=120)
    with open_ledger(plan, console) as ledger:
        assert ledger.identity.revision == 2
        assert len(ledger.ended()) == 3
    assert "3 of 3 trials are carried over" in console.export_text()
    assert "epochs: 5" in plan.folder.earlier_space(1).read_text()
    assert "int: [5, 6]" in plan.folder.space.read_text()

    plan = planned(CONTINUOUS + "search: {objective: {metric: val/chain_accuracy}}\n", resume=True)
    problem = r"begun with the objective val/accuracy/genus, and this is val/chain_accuracy"
    with pytest.raises(InputError, match=problem), open_ledger(plan, QUIET):
        pass


@pytest.mark.parametrize("files", [(), ("search.log",), ("search.log", "search.lock", "search.owner")])
def test_a_search_that_was_killed_before_its_ledger_begins_again(planned, files):
    plan = planned(CONTINUOUS)
    plan.folder.root.mkdir(parents=True)
    for name in files:
        (plan.folder.root / name).write_text("x")
    plan = planned(CONTINUOUS, resume=True)
    with open_ledger(plan, QUIET) as ledger:
        assert ledger.records() == []
    assert plan.folder.space.read_text() == plan.space.text


def test_a_folder_whose_ledger_is_gone_is_refused(planned):
    plan = planned(CONTINUOUS)
    plan.folder.root.mkdir(parents=True)
    plan.folder.curves.write_text("trial,epoch,metric,value\n")
    with pytest.raises(InputError, match="there is no search to resume"):
        planned(CONTINUOUS, resume=True)


def test_a_database_that_is_lost_while_the_search_is_opened_is_one_error(
    planned, postgresql, postgresql_server, monkeypatch, capfd
):
    text = CONTINUOUS + f"ledger: {postgresql}\n"
    with open_ledger(planned(text), QUIET) as ledger:
        sample(ledger, planned(text, resume=True).space, "random", 2)
    statements, at, opened, errors = 0, 0, False, []

    def lose(*args):
        nonlocal statements
        if statements == at:
            postgresql_server.close(postgresql)
        statements += 1

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", lose)
    monkeypatch.setattr("hiertune.search.owner._process.born", lambda pid: "")  # whoever had it is gone
    try:
        while not opened:
            statements = -1000  # planning looks at it, too
            plan = planned(text.replace("epochs: 5", f"epochs: {{int: [5, {6 + at}]}}"), resume=True)
            statements = 0
            try:
                with open_ledger(plan, QUIET) as ledger:
                    opened = True
                    statements = at + 1
            except InputError as error:
                errors.append(str(error))
            finally:
                postgresql_server.open(postgresql)
            at += 17
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", lose)
    assert len(errors) > 5
    assert {error.partition(" can't be used: ")[0] for error in errors} == {f"ledger: '{postgresql}'"}
    assert {len(error.splitlines()) for error in errors} == {2}, "one line, and what to do"
    assert {error.splitlines()[0].partition(" can't be used: ")[2] for error in errors} <= {
        "terminating connection due to administrator command",
        "the connection is closed",
    }
    assert capfd.readouterr().err == ""

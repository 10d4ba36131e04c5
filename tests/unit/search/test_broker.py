"""The broker is plain asyncio: here the trial actor and the workers are coroutines of one process."""

import asyncio
import contextlib
import dataclasses
import itertools
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.broker import Broker, JobStopped, StaleGeneration, UnknownJob
from hiertune.search.messages import Cause, Failed, Finished, Job, Reported, Stopped
from hiertune.search.processes import WorkerProcess
from hiertune.train.result import Decision, EpochResult, TrialOutcome

CONFIG = TrialConfig(data=DataConfig(path="none.h5"))


def job(name: str, max_retries: int = 3, hang_timeout: float = 1800.0) -> Job:
    return Job(name, CONFIG, "/nowhere", max_retries=max_retries, hang_timeout=hang_timeout)


def epoch(number: int, last: bool = False) -> EpochResult:
    return EpochResult(number, {"val/loss": 1.0 / number}, 0.1, number, last)


def process(rank: int, size: int = 2) -> WorkerProcess:
    return WorkerProcess(rank, size, actor=None, node="n", host="h", log=None, memory_kills=None)


class Coroner:
    """Processes that die of what the test says, and are ended when it says."""

    def __init__(self, *causes: Cause | None) -> None:
        self.causes = list(causes)
        self.examined: list[list[int]] = []
        self.ended: list[list[int]] = []
        self.release, self.looked = asyncio.Event(), asyncio.Event()
        self.release.set()
        self.looked.set()

    async def end(self, processes: list[WorkerProcess]) -> None:
        self.ended.append(sorted(each.rank for each in processes))
        await self.release.wait()

    async def cause(self, processes: list[WorkerProcess]) -> Cause | None:
        self.examined.append(sorted(each.rank for each in processes))
        await self.looked.wait()
        return self.causes.pop(0) if self.causes else None


OUTCOME = TrialOutcome(epochs=2, stopped=False, metrics={})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), timeout=10))


def test_every_rank_gets_the_same_jobs_in_the_order_of_submission():
    async def scenario():
        broker = Broker()
        for _rank in range(2):
            await broker.open_generation("g", "a")
        await broker.submit(job("first"))
        await broker.submit(job("second"))
        late = asyncio.create_task(broker.take("g", "a", 1, 0))
        taken = [await broker.take("g", "a", 0, 0), await late]
        assert [given.id for given in taken] == ["first", "first"]
        await broker.finish("g", "a", 0, OUTCOME)
        taken = await asyncio.gather(broker.take("g", "a", 1, 1), broker.take("g", "a", 0, 1))
        assert [given.id for given in taken] == ["second", "second"]
        assert await broker.generation_count() == 1

    run(scenario)


def test_workers_wait_for_the_decision_and_all_ranks_get_it():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        reports = [asyncio.create_task(broker.report("g", "a", rank, 0, epoch(1))) for rank in (1, 0)]
        assert await broker.advance("t", 0) == Reported(epoch(1))
        await settle()
        assert not any(report.done() for report in reports)
        follow = asyncio.create_task(broker.advance("t", 1))
        assert await asyncio.gather(*reports) == [Decision.CONTINUE] * 2
        reports = [asyncio.create_task(broker.report("g", "a", rank, 0, epoch(2))) for rank in (0, 1)]
        assert await follow == Reported(epoch(2))
        await broker.stop("t")
        assert await asyncio.gather(*reports) == [Decision.STOP] * 2

    run(scenario)


def test_the_last_epoch_needs_no_decision():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        assert await broker.report("g", "a", 0, 0, epoch(1, last=True)) is Decision.CONTINUE
        await broker.finish("g", "a", 0, OUTCOME)
        # The other rank is a little behind: the job has ended, its question still gets an answer.
        assert await broker.report("g", "a", 1, 0, epoch(1, last=True)) is Decision.CONTINUE
        assert await broker.advance("t", 0) == Reported(epoch(1, last=True))
        assert await broker.advance("t", 1) == Finished(OUTCOME)

    run(scenario)


def test_a_restarted_group_takes_its_job_up_again_and_repeated_epochs_are_not_delivered():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "old")
        await broker.submit(job("t"))
        await broker.take("g", "old", 0, 0)
        for number in (1, 2):
            report = asyncio.create_task(broker.report("g", "old", 0, 0, epoch(number)))
            assert await broker.advance("t", number - 1) == Reported(epoch(number))
        follow = asyncio.create_task(broker.advance("t", 2))
        await report

        await broker.open_generation("g", "new")
        with pytest.raises(StaleGeneration):
            await broker.report("g", "old", 0, 0, epoch(3))
        assert (await broker.take("g", "new", 0, 0)).id == "t"
        # Its checkpoint was of epoch 1, so epoch 2 is trained and reported again.
        assert await broker.report("g", "new", 0, 0, epoch(2)) is Decision.CONTINUE
        await settle()
        assert not follow.done()
        third = asyncio.create_task(broker.report("g", "new", 0, 0, epoch(3)))
        event = await follow
        assert event.result == epoch(3)
        assert [(i.fault, i.reason, i.epoch) for i in event.incidents] == [
            ("crashed", "its workers were lost", 2)
        ]
        third.cancel()

    run(scenario)


def test_a_waiter_of_a_dead_generation_does_not_swallow_a_job():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "old")
        dead = asyncio.create_task(broker.take("g", "old", 0, 0))
        await settle()
        await broker.open_generation("g", "new")
        alive = asyncio.create_task(broker.take("g", "new", 0, 0))
        await settle()
        await broker.submit(job("t"))
        assert (await alive).id == "t"
        with pytest.raises(StaleGeneration):
            await dead

    run(scenario)


def test_another_idle_group_takes_up_a_lost_job():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.open_generation("h", "b")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        idle = asyncio.create_task(broker.take("h", "b", 0, 0))
        await broker.lost("g")
        assert (await idle).id == "t"

    run(scenario)


def test_a_job_that_keeps_losing_its_workers_fails():
    async def scenario():
        broker = Broker()
        await broker.submit(job("t", max_retries=1))
        for token in ("a", "b", "c"):
            await broker.open_generation("g", token)
            if token != "c":
                await broker.take("g", token, 0, 0)
        ending = await broker.advance("t", 0)
        assert (ending.reason, ending.fault) == (
            "its workers were lost (given up after 2 attempts)",
            "crashed",
        )
        assert [incident.epoch for incident in ending.incidents] == [0]

    run(scenario)


def test_a_failure_of_any_rank_ends_the_job_once():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.fail("g", "a", 0, Cause("error", "first"))
        await broker.fail("g", "a", 0, Cause("diverged", "second"))
        assert await broker.advance("t", 0) == Failed("first", "error")
        await broker.open_generation("g", "b")  # the group falls; the failed job is not tried again
        await broker.submit(job("next"))
        assert (await broker.take("g", "b", 0, 0)).id == "next"

    run(scenario)


def test_submitting_a_live_job_again_follows_it():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.finish("g", "a", 0, OUTCOME)
        assert await broker.advance("t", 0) == Finished(OUTCOME)
        nothing = asyncio.create_task(broker.take("g", "a", 0, 1))
        await settle()
        assert not nothing.done()
        nothing.cancel()

    run(scenario)


def test_a_stopped_job_is_submitted_again_only_when_its_workers_have_let_go():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        report = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        await broker.advance("t", 0)
        await broker.stop("t")
        again = asyncio.create_task(broker.submit(job("t")))
        await settle()
        assert await report is Decision.STOP
        assert not again.done()
        await broker.finish("g", "a", 0, OUTCOME)
        await again
        assert (await broker.take("g", "a", 0, 1)).id == "t"

    run(scenario)


def test_a_stopped_job_that_waits_is_never_taken():
    async def scenario():
        broker = Broker()
        await broker.submit(job("t"))
        await broker.submit(job("u"))
        await broker.stop("t")
        await broker.open_generation("g", "a")
        assert (await broker.take("g", "a", 0, 0)).id == "u"

    run(scenario)


@pytest.mark.parametrize("recycle_after", [1, 2])
def test_a_generation_goes_home_after_its_share_of_jobs(recycle_after):
    async def scenario():
        broker = Broker(recycle_after)
        await broker.open_generation("g", "a")
        for number in range(3):
            await broker.submit(job(f"t{number}"))
        for number in range(recycle_after):
            assert (await broker.take("g", "a", 0, number)).id == f"t{number}"
            await broker.finish("g", "a", number, OUTCOME)
        assert await broker.take("g", "a", 0, recycle_after) is None
        assert await broker.take("g", "a", 1, recycle_after) is None

    run(scenario)


def test_closing_sends_idle_workers_home_after_the_last_job():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        waiting = [asyncio.create_task(broker.take("g", "a", rank, 0)) for rank in (0, 1)]
        await settle()
        await broker.close()
        assert await asyncio.gather(*waiting) == [None, None]

    run(scenario)


def test_when_workers_cannot_start_every_job_fails_with_the_cause():
    async def scenario():
        broker = Broker()
        await broker.submit(job("before"))
        await broker.abort("no module")
        await broker.submit(job("after"))
        assert await broker.advance("before", 0) == Failed("no module", "not_started")
        assert await broker.advance("after", 0) == Failed("no module", "not_started")

    run(scenario)


def test_what_ray_starts_first_loads_without_torch():
    """The broker and the trial actors start while the workers import torch on the same cores."""
    for module in ("hiertune.search.broker", "hiertune.search.trainable"):
        code = f"import sys, {module}; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "False\n", done.stderr


def test_a_waiter_of_a_lost_group_passes_the_job_on_to_another_group():
    async def scenario():
        broker = Broker()
        await broker.open_generation("lost", "a")
        await broker.open_generation("idle", "b")
        dead = asyncio.create_task(broker.take("lost", "a", 0, 0))
        await settle()
        alive = asyncio.create_task(broker.take("idle", "b", 0, 0))
        await settle()
        await broker.lost("lost")
        await broker.submit(job("t"))
        assert (await alive).id == "t"
        with pytest.raises(StaleGeneration):
            await dead

    run(scenario)


@pytest.mark.parametrize("how", ["restarted", "gone"])
def test_a_job_that_lost_its_workers_goes_before_those_that_wait(how):
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "old")
        await broker.submit(job("begun"))
        await broker.submit(job("waiting"))
        await broker.take("g", "old", 0, 0)
        if how == "gone":
            await broker.lost("g")
        await broker.open_generation("g", "new")
        assert (await broker.take("g", "new", 0, 0)).id == "begun"

    run(scenario)


def test_an_abort_fails_what_waits_and_leaves_what_has_ended():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("done"))
        await broker.submit(job("waiting"))
        await broker.take("g", "a", 0, 0)
        await broker.finish("g", "a", 0, OUTCOME)
        await broker.abort("no workers")
        assert await broker.advance("done", 0) == Finished(OUTCOME)
        assert await broker.advance("waiting", 0) == Failed("no workers", "not_started")
        idle = asyncio.create_task(broker.take("g", "a", 0, 1))
        await settle()
        assert not idle.done()  # a failed job is not handed out
        idle.cancel()

    run(scenario)


def test_after_a_stop_the_submitter_hears_nothing_more():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.stop("t")
        assert await broker.report("g", "a", 0, 0, epoch(1)) is Decision.STOP
        with pytest.raises(JobStopped):
            await broker.advance("t", 0)
        await broker.finish("g", "a", 0, OUTCOME)
        with pytest.raises(UnknownJob):  # it is forgotten
            await broker.advance("t", 0)
        assert await broker.jobs() == []

    run(scenario)


# ------------------------------------------------------------------------------- the cursor


async def begin(broker: Broker, given: Job, group: str = "g", token: str = "a", ranks: int = 2) -> None:
    """`given` is submitted and taken by a group that has just started."""
    await asyncio.gather(*(broker.open_generation(group, token, process(rank)) for rank in range(ranks)))
    await broker.submit(given)
    taken = await asyncio.gather(*(broker.take(group, token, rank, 0) for rank in range(ranks)))
    assert taken == [given] * ranks


async def train(broker: Broker, numbers, group: str = "g", token: str = "a", ranks: int = 2) -> None:
    for number in numbers:
        reports = [broker.report(group, token, rank, 0, epoch(number)) for rank in range(ranks)]
        assert await asyncio.gather(*reports) == [Decision.CONTINUE] * ranks


def test_asking_again_gives_the_same_event_to_any_number_of_waiters():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        waiters = [asyncio.create_task(broker.advance("t", 0)) for _ in range(3)]
        training = asyncio.create_task(train(broker, [1, 2, 3]))
        assert await asyncio.gather(*waiters) == [Reported(epoch(1))] * 3
        waiters = [asyncio.create_task(broker.advance("t", after)) for after in (1, 0, 1)]
        assert await asyncio.gather(*waiters) == [Reported(epoch(n)) for n in (2, 1, 2)]
        await settle()
        assert not training.done()
        assert await broker.advance("t", 2) == Reported(epoch(3))
        assert await broker.advance("t", 0) == Reported(epoch(1)), "events are kept"
        assert not training.done(), "nobody has asked for what comes after epoch 3"
        training.cancel()

    run(scenario)


def test_a_successor_reads_on_where_the_one_before_had_got_to():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        training = asyncio.create_task(train(broker, [1, 2]))
        assert await broker.advance("t", 0) == Reported(epoch(1))
        dead = asyncio.create_task(broker.advance("t", 1))  # never heard by its asker
        assert await dead == Reported(epoch(2))
        assert await broker.submit(job("t")) == 1
        assert await broker.advance("t", 1) == Reported(epoch(2))
        await settle()
        assert not training.done(), "epoch 2 still waits for its decision"
        training.cancel()

    run(scenario)


def test_a_follower_is_replaced_in_the_middle_of_a_wait():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        dead = asyncio.create_task(broker.advance("t", 0))
        await settle()
        after = await broker.submit(job("t"))
        heir = asyncio.create_task(broker.advance("t", after))
        training = asyncio.create_task(train(broker, [1]))
        assert await heir == await dead == Reported(epoch(1))
        training.cancel()

    run(scenario)


def test_decisions_made_before_a_stop_hold_for_ranks_that_ask_late():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        first = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        await broker.advance("t", 0)
        asking = asyncio.create_task(broker.advance("t", 1))
        assert await first is Decision.CONTINUE
        await broker.stop("t")
        with pytest.raises(JobStopped):
            await asking
        assert await broker.report("g", "a", 1, 0, epoch(1)) is Decision.CONTINUE
        both = [broker.report("g", "a", rank, 0, epoch(2)) for rank in (1, 0)]
        assert await asyncio.gather(*both) == [Decision.STOP] * 2

    run(scenario)


def test_a_broker_that_knows_nothing_takes_a_job_up_after_what_its_submitter_has():
    async def scenario():
        broker = Broker()
        with pytest.raises(UnknownJob):
            await broker.advance("t", 2)
        with pytest.raises(StaleGeneration):
            await broker.report("g", "a", 0, 0, epoch(3))
        await broker.stop("t")
        assert await broker.submit(job("t"), 2) == 2
        await broker.open_generation("g", "b", process(0))
        await broker.take("g", "b", 0, 0)
        # The checkpoint was of epoch 1: epoch 2 is repeated, and told to nobody.
        assert await broker.report("g", "b", 0, 0, epoch(2)) is Decision.CONTINUE
        third = asyncio.create_task(broker.report("g", "b", 0, 0, epoch(3)))
        assert await broker.advance("t", 2) == Reported(epoch(3))
        third.cancel()

    run(scenario)


# ---------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("causes", "ending", "tries"),
    [
        ([Cause("crashed", "killed")] * 3, ("killed (given up after 3 attempts)", "crashed"), 3),
        (
            [Cause("crashed", "a"), Cause("out_of_memory", "b")] * 2,
            ("a (given up after 3 attempts)", "crashed"),
            3,
        ),
        (
            [Cause("lost", "node")] * 5 + [Cause("crashed", "x")] * 3,
            ("x (given up after 3 attempts)", "crashed"),
            8,
        ),
    ],
)
def test_a_fault_is_retried_as_often_as_agreed_and_a_lost_node_is_not_counted(causes, ending, tries):
    async def scenario():
        coroner = Coroner(*causes)
        broker = Broker(processes=coroner)
        await broker.submit(job("t", max_retries=2))
        for number in range(tries):
            token = f"token-{number}"
            await broker.open_generation("g", token, process(0))
            assert (await broker.take("g", token, 0, 0)).id == "t"
            await broker.lost("g")
        event = await broker.advance("t", 0)
        assert (event.reason, event.fault) == ending
        assert [incident.fault for incident in event.incidents] == [
            each.fault for each in causes[: tries - 1]
        ]
        assert coroner.examined == [[0]] * tries

    run(scenario)


def test_with_no_retries_the_first_fault_is_the_end():
    async def scenario():
        broker = Broker(processes=Coroner(Cause("crashed", "killed")))
        await begin(broker, job("t", max_retries=0))
        await broker.lost("g")
        assert await broker.advance("t", 0) == Failed("killed", "crashed")

    run(scenario)


@pytest.mark.parametrize("fault", ["out_of_memory", "crashed", "hang", "lost"])
def test_what_another_try_can_mend_is_told_by_a_worker_and_retried_after_the_restart(fault):
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t"))
        await broker.fail("g", "a", 0, Cause(fault, "first"))
        await broker.fail("g", "a", 0, Cause("crashed", "second"))
        await broker.open_generation("g", "b", process(0))
        assert (await broker.take("g", "b", 0, 0)).id == "t"
        report = asyncio.create_task(broker.report("g", "b", 0, 0, epoch(1)))
        (incident,) = (await broker.advance("t", 0)).incidents
        assert (incident.fault, incident.reason, incident.epoch) == (fault, "first", 0)
        assert coroner.examined == [], "the workers had told"
        report.cancel()

    run(scenario)


@pytest.mark.parametrize("fault", ["diverged", "error"])
def test_what_another_try_cannot_mend_ends_the_job_at_once(fault):
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        await broker.fail("g", "a", 0, Cause(fault, "why"))
        assert await broker.advance("t", 0) == Failed("why", fault)

    run(scenario)


def test_a_broken_connection_is_the_cause_only_where_no_better_is_found():
    async def scenario():
        broker = Broker(processes=Coroner(Cause("crashed", "killed"), None))
        await begin(broker, job("t"))
        await broker.broken("g", "a", "connection closed by peer")
        await broker.open_generation("g", "b", process(0))
        await broker.take("g", "b", 0, 0)
        await broker.broken("g", "b", "timed out")
        await broker.open_generation("g", "c", process(0))
        await broker.take("g", "c", 0, 0)
        report = asyncio.create_task(broker.report("g", "c", 0, 0, epoch(1)))
        event = await broker.advance("t", 0)
        assert [incident.reason for incident in event.incidents] == ["killed", "timed out"]
        report.cancel()

    run(scenario)


def test_an_incident_is_told_once_with_the_next_event():
    async def scenario():
        broker = Broker(processes=Coroner(Cause("crashed", "killed")))
        await begin(broker, job("t"))
        await broker.lost("g")
        await broker.open_generation("g", "b", process(0))
        await broker.take("g", "b", 0, 0)
        training = asyncio.create_task(train(broker, [1, 2], token="b", ranks=1))
        events = [await broker.advance("t", after) for after in (0, 1)]
        assert [len(event.incidents) for event in events] == [1, 0]
        training.cancel()

    run(scenario)


def test_what_a_repeated_epoch_notes_is_told_with_the_next_new_one_and_nothing_twice():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"), ranks=1)
        noted = [dataclasses.replace(epoch(n), notes=notes) for n, notes in ((1, ("a",)), (1, ("a", "b")))]
        report = asyncio.create_task(broker.report("g", "a", 0, 0, noted[0]))
        assert (await broker.advance("t", 0)).result.notes == ("a",)
        waiting = asyncio.create_task(broker.advance("t", 1))
        await report
        await broker.open_generation("g", "b", process(0))
        await broker.take("g", "b", 0, 0)
        await broker.report("g", "b", 0, 0, noted[1])
        report = asyncio.create_task(broker.report("g", "b", 0, 0, epoch(2)))
        assert (await waiting).result.notes == ("b",)
        report.cancel()

    run(scenario)


def test_no_worker_waits_for_a_decision_of_a_generation_that_is_gone():
    async def scenario():
        broker = Broker()
        await begin(broker, job("t"))
        reports = [asyncio.create_task(broker.report("g", "a", rank, 0, epoch(1))) for rank in (0, 1)]
        await settle()
        await broker.open_generation("g", "b", process(0))
        for report in reports:
            with pytest.raises(StaleGeneration):
                await report

    run(scenario)


def test_a_job_that_is_stopped_while_its_end_is_looked_into_is_not_tried_again():
    async def scenario():
        coroner = Coroner(Cause("crashed", "killed"))
        broker = Broker(processes=coroner)
        await begin(broker, job("t"))
        coroner.looked.clear()
        losing = asyncio.create_task(broker.lost("g"))
        await settle()
        await broker.stop("t")
        again = asyncio.create_task(broker.submit(job("t")))
        await settle()
        assert not again.done()
        coroner.looked.set()
        await losing
        assert await again == 0
        assert await broker.jobs() == ["t"]
        await broker.open_generation("g", "b", process(0))
        assert (await broker.take("g", "b", 0, 0)).id == "t"
        idle = asyncio.create_task(broker.take("g", "b", 0, 1))
        await settle()
        assert not idle.done()
        idle.cancel()

    run(scenario)


# ---------------------------------------------------------------------------------- hangs


def test_workers_that_do_not_get_on_are_ended_and_their_job_is_tried_again():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.1))
        await broker.beat("g", "a", 0, (0, 0, 7))
        await broker.beat("g", "a", 1, (0, 0, 6))
        await broker.open_generation("idle", "i", process(0))
        assert (await broker.take("idle", "i", 0, 0)).id == "t", "it need not wait for the restart"
        assert coroner.ended == [[0, 1]]
        with pytest.raises(StaleGeneration):
            await broker.report("g", "a", 0, 0, epoch(1))
        report = asyncio.create_task(broker.report("idle", "i", 0, 0, epoch(1)))
        (incident,) = (await broker.advance("t", 0)).incidents
        assert incident.fault == "hang"
        assert incident.reason == "no batch for 0 s at epoch 1 (worker 2 of 2)"
        report.cancel()

    run(scenario)


def test_workers_that_wait_for_a_dead_one_do_not_hang():
    async def scenario():
        broker = Broker(processes=Coroner(Cause("crashed", "killed")))
        await begin(broker, job("t", hang_timeout=0.05, max_retries=0))
        assert await broker.advance("t", 0) == Failed("killed", "crashed")

    run(scenario)


@pytest.mark.parametrize(
    ("progress", "who"),
    [
        ({0: (0, 2, 7), 1: (0, 2, 6)}, " (worker 2 of 2)"),
        ({0: (0, 2, 7), 1: (0, 3, 0)}, " (worker 1 of 2)"),
        ({1: (0, 0, 1)}, " (worker 1 of 2)"),
        ({0: (0, 2, 7), 1: (0, 2, 7)}, ""),
        ({}, ""),
    ],
)
def test_the_worker_that_is_behind_is_named(progress, who):
    async def scenario():
        broker = Broker(processes=Coroner())
        await begin(broker, job("t", hang_timeout=0.05, max_retries=0))
        for rank, far in progress.items():
            await broker.beat("g", "a", rank, far)
        assert (await broker.advance("t", 0)).reason == f"no batch for 0 s at epoch 1{who}"

    run(scenario)


def test_whoever_gets_on_or_waits_for_a_decision_does_not_hang():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.2))
        for number in range(10):  # a slow epoch
            await broker.beat("g", "a", number % 2, (0, 0, number))
            await asyncio.sleep(0.04)
        waiting = asyncio.create_task(train(broker, [1]))
        assert await broker.advance("t", 0) == Reported(epoch(1))
        await asyncio.sleep(0.5)  # a slow decision
        assert coroner.ended == []
        deciding = asyncio.create_task(broker.advance("t", 1))
        await waiting
        await asyncio.sleep(0.05)
        assert coroner.ended == []
        await asyncio.sleep(0.5)
        assert coroner.ended == [[0, 1]]
        deciding.cancel()

    run(scenario)


def test_a_first_worker_that_never_reports_hangs_though_the_others_did():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.1, max_retries=0))
        await broker.beat("g", "a", 0, (0, 0, 7))
        waiting = asyncio.create_task(broker.report("g", "a", 1, 0, epoch(1)))
        assert (await broker.advance("t", 0)).fault == "hang"
        assert coroner.ended == [[0, 1]]
        with pytest.raises(StaleGeneration):
            await waiting

    run(scenario)


def test_a_beat_of_a_generation_that_is_gone_saves_nobody():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.1, max_retries=0))
        for number in range(5):
            await broker.beat("g", "older", 0, (0, 0, number))
            await broker.beat("unknown", "a", 0, (0, 0, number))
            await asyncio.sleep(0.04)
        assert coroner.ended == [[0, 1]]

    run(scenario)


def test_an_idle_group_and_one_whose_job_has_ended_do_not_hang():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.05))
        await broker.finish("g", "a", 0, OUTCOME)
        idle = [asyncio.create_task(broker.take("g", "a", rank, 1)) for rank in (0, 1)]
        await asyncio.sleep(0.2)
        assert coroner.ended == []
        assert not any(task.done() for task in idle)
        for task in idle:
            task.cancel()

    run(scenario)


def test_a_stopped_job_whose_workers_hang_is_let_go():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.1))
        await broker.stop("t")
        assert await broker.submit(job("t")) == 0  # waits until it is released
        assert coroner.ended == [[0, 1]]

    run(scenario)


def test_a_group_that_restarts_while_it_is_ended_is_hung_once():
    async def scenario():
        coroner = Coroner()
        broker = Broker(processes=coroner)
        await begin(broker, job("t", hang_timeout=0.05))
        coroner.release.clear()
        await asyncio.sleep(0.2)
        assert coroner.ended == [[0, 1]]
        await broker.open_generation("g", "b", process(0))
        assert (await broker.take("g", "b", 0, 0)).id == "t"
        coroner.release.set()
        report = asyncio.create_task(broker.report("g", "b", 0, 0, epoch(1)))
        (incident,) = (await broker.advance("t", 0)).incidents
        assert incident.fault == "hang"
        report.cancel()

    run(scenario)


# ------------------------------------------------------------------------ in whatever order


class World(RuleBasedStateMachine):
    """A job of some epochs, two groups of one worker, and a submitter, any of which may die at any time.

    The submitter hears every epoch, in order and without gaps, and an ending.
    """

    EPOCHS = 4

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.broker = Broker(processes=Coroner(*[Cause("crashed", "killed")] * 1000))
        self.workers: dict[str, asyncio.Task] = {}
        self.steps = {group: asyncio.Semaphore(0) for group in ("g", "h")}
        self.started = 0
        self.saved = 0  # the epoch of the checkpoint
        self.agreed = 0  # the last epoch after which the submitter asked on
        self.heard: list[int] = []
        self.asking: asyncio.Task | None = None
        self.paused = self.over = False
        self.resting = False  # it has heard an epoch, and not asked on
        self.after = self.do(self.broker.submit(self.job))

    @property
    def job(self):
        return job("t", max_retries=1000)

    def do(self, coroutine):
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 5))

    async def work(self, group, token):
        """What a worker process does."""
        with contextlib.suppress(StaleGeneration):
            await self.broker.open_generation(group, token, process(0, 1))
            for number in itertools.count():
                await self.broker.take(group, token, 0, number)
                for at in range(self.saved + 1, self.EPOCHS + 1):
                    await self.steps[group].acquire()
                    last = at == self.EPOCHS
                    if await self.broker.report(group, token, 0, number, epoch(at, last)) is Decision.STOP:
                        self.saved = at
                        break
                await self.broker.finish(group, token, number, OUTCOME)

    @rule(group=st.sampled_from(["g", "h"]))
    def restart(self, group):
        """A group's process is killed, and another one starts."""
        if group in self.workers:
            self.workers[group].cancel()
        self.started += 1
        self.workers[group] = self.loop.create_task(self.work(group, f"{group}{self.started}"))
        self.do(settle())

    @rule(group=st.sampled_from(["g", "h"]))
    def lose(self, group):
        """A group is gone for good, or for long."""
        if group in self.workers:
            self.workers.pop(group).cancel()
        self.do(self.broker.lost(group))

    @rule(group=st.sampled_from(["g", "h"]), epochs=st.integers(1, 3))
    def train(self, group, epochs):
        for _ in range(epochs):
            self.steps[group].release()
        self.do(settle())

    @rule(epoch=st.integers(1, EPOCHS - 1))
    def save(self, epoch):
        """A checkpoint of an epoch after which the submitter went on: there is none before that."""
        if self.saved < epoch <= self.agreed:
            self.saved = epoch

    @precondition(lambda self: not (self.paused or self.over or self.asking))
    @rule()
    def ask(self):
        """The trial actor is let to take its next step."""
        self.resting, self.agreed = False, max(self.agreed, self.after)
        self.asking = self.loop.create_task(self.broker.advance("t", self.after))
        self.do(settle())

    @precondition(lambda self: not (self.paused or self.over))
    @rule()
    def replace(self):
        """The trial actor dies, and another one takes its place."""
        if self.asking is not None:
            self.asking.cancel()
        self.asking = None
        self.after, self.resting = self.do(self.broker.submit(self.job)), False

    @precondition(lambda self: self.resting and not self.over)
    @rule()
    def pause(self):
        """Between two steps, as schedulers do."""
        self.do(self.broker.stop("t"))
        self.do(settle())
        self.paused, self.resting = True, False

    @precondition(lambda self: self.paused)
    @rule()
    def go_on(self):
        """As another actor, which knows how far the paused one was."""
        submitting = self.loop.create_task(self.broker.submit(self.job))
        self.do(settle())
        while not submitting.done():  # workers that repeat epochs first get to where they stop
            self.train("g", 1)
            self.train("h", 1)
        self.after = max(self.heard[-1], submitting.result())
        self.paused = False

    @invariant()
    def in_order_without_gaps(self):
        if self.asking is None or not self.asking.done():
            return
        event = self.asking.result()
        self.asking = None
        if isinstance(event, Finished):
            self.over = True
            return
        self.after, self.resting = event.result.epoch, True
        if not self.heard or self.after != self.heard[-1]:  # at most one is told twice
            self.heard.append(self.after)
        self.over = event.result.last
        assert self.heard == list(range(1, len(self.heard) + 1))

    def teardown(self):
        self.lose("h")
        self.restart("g")
        if self.paused:
            self.go_on()
        for _ in range(3 * self.EPOCHS):
            if not (self.over or self.asking):
                self.ask()
            self.train("g", 1)
            self.in_order_without_gaps()
        assert self.heard == list(range(1, self.EPOCHS + 1))
        assert self.over
        self.do(self.broker.stop("t"))
        self.do(settle())
        assert self.do(self.broker.jobs()) == []
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_until_complete(settle())
        self.loop.close()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, print_blob=False)


# --------------------------------------------------------------------- a search that stops


def test_when_halted_jobs_that_no_worker_holds_are_stopped_and_the_others_go_on():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("held"))
        await broker.submit(job("waits"))
        assert (await broker.take("g", "a", 0, 0)).id == "held"
        await broker.halt()
        await broker.submit(job("late"))
        assert await broker.advance("waits", 0) == Stopped()
        assert await broker.advance("late", 0) == Stopped()
        decided = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        assert await broker.advance("held", 0) == Reported(epoch(1))
        await broker.stop("held")
        assert await decided is Decision.STOP
        await broker.finish("g", "a", 0, OUTCOME)
        await broker.go_on()
        await broker.submit(job("after"))
        assert (await broker.take("g", "a", 0, 1)).id == "after"

    run(scenario)


def test_a_job_whose_workers_are_lost_while_halted_does_not_wait_for_new_ones():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.halt()
        await broker.lost("g")
        assert isinstance(await broker.advance("t", 0), Stopped)

    run(scenario)


def test_settling_waits_until_every_held_job_is_saved():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.halt()
        settled = asyncio.create_task(broker.settle())
        assert await broker.report("g", "a", 0, 0, epoch(1)) is Decision.STOP, "nobody asks for more of it"
        await settle()
        assert not settled.done()
        await broker.finish("g", "a", 0, OUTCOME)
        await settled

    run(scenario)


# ------------------------------------------------------------------ a job that is a part of a trial


def part(until: int) -> Job:
    return job("t").up_to(until)


def test_a_part_ends_after_its_last_epoch_when_its_submitter_has_it_and_all_ranks_hear_it():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(part(2))
        assert (await broker.take("g", "a", 0, 0)).id == "t-to-2"
        for number in (1, 2):
            reports = [asyncio.create_task(broker.report("g", "a", r, 0, epoch(number))) for r in (1, 0)]
            assert await broker.advance("t-to-2", number - 1) == Reported(epoch(number))
            await settle()
            assert not any(report.done() for report in reports), "the submitter may not have it yet"
            follow = asyncio.create_task(broker.advance("t-to-2", number))
            decision = Decision.CONTINUE if number < 2 else Decision.STOP
            assert await asyncio.gather(*reports) == [decision] * 2
            if number < 2:
                follow.cancel()
        assert not follow.done(), "its checkpoint is not saved yet"
        paused = Finished(TrialOutcome(epochs=2, stopped=True, metrics={}))
        await broker.finish("g", "a", 0, paused.outcome)
        assert await follow == paused
        assert await broker.submit(part(2), 2) == 2, "another actor took its place"
        assert await broker.advance("t-to-2", 2) == paused
        # The next part is another job, whatever becomes of this one.
        await broker.submit(part(6))
        await broker.stop("t-to-2")
        assert (await broker.take("g", "a", 0, 1)).id == "t-to-6"
        assert await broker.jobs() == ["t-to-6"]

    run(scenario)


def test_the_whole_of_a_job_is_the_job():
    assert job("t").up_to(None) == job("t")
    assert (part(3).id, part(3).until, part(3).folder) == ("t-to-3", 3, job("t").folder)


def test_a_part_whose_workers_are_lost_as_they_save_it_is_not_trained_beyond_its_end():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(part(1))
        await broker.take("g", "a", 0, 0)
        report = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        await broker.advance("t-to-1", 0)
        follow = asyncio.create_task(broker.advance("t-to-1", 1))
        assert await report is Decision.STOP
        await broker.open_generation("g", "b")
        event = await follow
        assert event.outcome == TrialOutcome(epochs=1, stopped=True, metrics={})
        assert [incident.fault for incident in event.incidents] == ["crashed"]
        # Nor where the broker itself was.
        broker = Broker()
        assert await broker.submit(part(1), 1) == 1
        assert await broker.advance("t-to-1", 1) == Finished(event.outcome)

    run(scenario)


# ------------------------------------------------------- a broker that Ray starts in the place of one it lost


def test_a_broker_that_is_restarted_while_a_search_stops_trains_no_job_until_it_goes_on(tmp_path):
    async def scenario():
        orders = tmp_path / "ray" / "broker.json"
        await Broker(orders=orders).halt()
        broker = Broker(orders=orders)
        await broker.open_generation("g", "b")
        assert await broker.submit(job("held"), after=2) == 2  # its worker group was lost to it
        assert await broker.advance("held", 2) == Stopped()
        await broker.go_on()
        broker = Broker(orders=orders)
        await broker.open_generation("g", "c")
        await broker.submit(job("after"))
        assert (await broker.take("g", "c", 0, 0)).id == "after"

    run(scenario)


def test_a_broker_that_is_restarted_sends_workers_home_if_the_one_before_would_have(tmp_path):
    async def scenario():
        orders = tmp_path / "broker.json"
        await Broker(orders=orders).close()
        broker = Broker(orders=orders)
        await broker.open_generation("g", "b")
        assert await broker.take("g", "b", 0, 0) is None

    run(scenario)


def test_a_broker_that_is_restarted_fails_every_job_if_workers_could_not_be_started(tmp_path):
    async def scenario():
        orders = tmp_path / "broker.json"
        await Broker(orders=orders).abort("no module caf\udce9")
        broker = Broker(orders=orders)
        await broker.submit(job("t"))
        assert await broker.advance("t", 0) == Failed("no module caf\udce9", "not_started")

    run(scenario)


def test_a_broker_whose_orders_cannot_be_written_obeys_them(tmp_path):
    async def scenario():
        (tmp_path / "file").touch()
        broker = Broker(orders=tmp_path / "file" / "broker.json")
        await broker.halt()
        await broker.submit(job("t"))
        assert await broker.advance("t", 0) == Stopped()

    run(scenario)

"""The broker is plain asyncio: here the trial actor and the workers are coroutines of one process."""

import asyncio
import subprocess
import sys

import pytest

from hiertune.config import DataConfig, TrialConfig
from hiertune.search.broker import Broker, StaleGeneration
from hiertune.search.messages import Failed, Finished, Job, Reported, Stopped
from hiertune.train.result import Decision, EpochResult, TrialOutcome

CONFIG = TrialConfig(data=DataConfig(path="none.h5"))


def job(name: str, max_retries: int = 3) -> Job:
    return Job(name, CONFIG, "/nowhere", max_retries=max_retries)


def epoch(number: int, last: bool = False) -> EpochResult:
    return EpochResult(number, {"val/loss": 1.0 / number}, 0.1, number, last)


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
        assert await broker.advance("t") == Reported(epoch(1))
        await settle()
        assert not any(report.done() for report in reports)
        follow = asyncio.create_task(broker.advance("t"))
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
        assert await broker.advance("t") == Reported(epoch(1, last=True))
        assert await broker.advance("t") == Finished(OUTCOME)

    run(scenario)


def test_a_restarted_group_takes_its_job_up_again_and_repeated_epochs_are_not_delivered():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "old")
        await broker.submit(job("t"))
        await broker.take("g", "old", 0, 0)
        for number in (1, 2):
            report = asyncio.create_task(broker.report("g", "old", 0, 0, epoch(number)))
            assert await broker.advance("t") == Reported(epoch(number))
        follow = asyncio.create_task(broker.advance("t"))
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
        assert await follow == Reported(epoch(3))
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
        assert await broker.advance("t") == Failed("lost its workers 2 times")

    run(scenario)


def test_a_failure_of_any_rank_ends_the_job_once():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        await broker.fail("g", "a", 0, "first")
        await broker.fail("g", "a", 0, "second")
        assert await broker.advance("t") == Failed("first")
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
        assert await broker.advance("t") == Finished(OUTCOME)
        nothing = asyncio.create_task(broker.take("g", "a", 0, 1))
        await settle()
        assert not nothing.done()
        nothing.cancel()

    run(scenario)


def test_a_paused_job_is_submitted_again_only_when_its_workers_have_let_go():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("t"))
        await broker.take("g", "a", 0, 0)
        report = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        await broker.advance("t")
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
        assert await broker.advance("before") == Failed("no module")
        assert await broker.advance("after") == Failed("no module")

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
        assert await broker.advance("done") == Finished(OUTCOME)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(broker.advance("done"), 0.01)
        assert await broker.advance("waiting") == Failed("no workers")
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
        await broker.finish("g", "a", 0, OUTCOME)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(broker.advance("t"), 0.01)

    run(scenario)


def test_when_halted_jobs_that_no_worker_holds_are_stopped_and_the_others_go_on():
    async def scenario():
        broker = Broker()
        await broker.open_generation("g", "a")
        await broker.submit(job("held"))
        await broker.submit(job("waits"))
        assert (await broker.take("g", "a", 0, 0)).id == "held"
        await broker.halt()
        await broker.submit(job("late"))
        assert await broker.advance("waits") == Stopped()
        assert await broker.advance("late") == Stopped()
        decided = asyncio.create_task(broker.report("g", "a", 0, 0, epoch(1)))
        assert await broker.advance("held") == Reported(epoch(1))
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
        assert await broker.advance("t") == Stopped()

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

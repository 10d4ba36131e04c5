"""The trials of a search, run by Ray Tune: it places them, starts them, and stops those that don't get on."""

from __future__ import annotations

from ray import tune

from hiertune.config import HyperbandConfig, TrialConfig
from hiertune.search import cluster
from hiertune.search.decoding import keeps_logits
from hiertune.search.hyperband import Hyperband
from hiertune.search.ledger import Ledger
from hiertune.search.listeners import Listeners
from hiertune.search.messages import Job
from hiertune.search.plan import SearchPlan
from hiertune.search.pool import WorkerPool
from hiertune.search.searcher import LedgerSearcher
from hiertune.search.session import Session
from hiertune.search.strategies import Memory, build_sampler, build_scheduler
from hiertune.search.trainable import TrialActor

_ACTORS_PER_TRIAL = 10
"""Trial actors that may die. They hold nothing but a place in the broker's list of events."""


def run_trials(
    plan: SearchPlan,
    ledger: Ledger,
    pool: WorkerPool,
    listeners: Listeners,
    session: Session,
) -> None:
    """Let Tune run the trials that are left; the ledger has them when this returns."""
    search = plan.config.search
    # A resumed search draws on: with the old seed it would propose its first trials again.
    ledger.study.sampler = build_sampler(search.sampler, search.seed + len(ledger.records()))

    hyperband = None
    if isinstance(search.scheduler, HyperbandConfig):
        factor = search.scheduler.reduction_factor
        hyperband = Hyperband(ledger, plan.space.max_epochs, factor)
    searcher = LedgerSearcher(
        ledger,
        plan.space.suggest,
        lambda number, config: trial_job(plan, number, config),
        pool.broker_name,
        plan.metric,
        plan.mode,
        listeners,
        halted=lambda: session.halted,
        enough=lambda: session.ending is not None,
        trials=plan.trials,
        groups=lambda: pool.size,
        check=pool.check,
        hyperband=hyperband,
    )
    tune.Tuner(
        # The worker groups hold the CPUs and GPUs; trial actors only ask to be where the driver is.
        tune.with_resources(TrialActor, tune.PlacementGroupFactory([cluster.this_node()])),
        tune_config=tune.TuneConfig(
            metric=plan.metric,
            mode=plan.mode,
            search_alg=searcher,
            scheduler=build_scheduler(search.scheduler, plan.space.max_epochs, _memory(ledger)),
            # The searcher counts: a trial is several of Tune's where it has to wait, or its actor was lost.
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(plan.folder.ray),
            stop=_Halt(session),
            failure_config=tune.FailureConfig(max_failures=_ACTORS_PER_TRIAL),
            # A trial's checkpoint is its job's; Tune's would be one more file and event per trial.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


def trial_job(plan: SearchPlan, number: int, config: TrialConfig) -> Job:
    search = plan.config.search
    return Job(
        f"trial-{number}",
        plan.located(config),
        plan.folder.trial_place(number),
        keep_logits=plan.folder.logits_place(number) if keeps_logits(plan) else None,
        max_retries=search.worker_group.max_retries,
        hang_timeout=search.worker_group.hang_timeout,
    )


def _memory(ledger: Ledger) -> Memory:
    """What the scheduler of a resumed search has to know."""
    epochs, ended = ledger.epochs(), {record.number for record in ledger.ended()}
    return Memory(
        {f"trial-{number}": values for number, values in epochs.items() if number in ended},
        {f"trial-{number}": values for number, values in epochs.items() if number not in ended},
    )


class _Halt(tune.Stopper):
    """Ends running trials with the result of their current epoch."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict) -> bool:
        return self._session.halted

    def stop_all(self) -> bool:
        """Never: Tune would throw that result away."""
        return False

    def __getstate__(self) -> dict:
        """For Tune's snapshot, which is never restored."""
        return {}

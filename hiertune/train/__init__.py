"""One trial: loop, optimiser, checkpoint. Knows torch.distributed, but neither Ray nor MLflow."""

from hiertune.train.loop import run_trial
from hiertune.train.result import Decision, EpochResult, TrialFailed, TrialOutcome

__all__ = ["Decision", "EpochResult", "TrialFailed", "TrialOutcome", "run_trial"]

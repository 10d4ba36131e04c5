"""`summary.json`: a finished search for machines to read."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from hiertune.decoding import AS_TRAINED
from hiertune.search.budget import Ending
from hiertune.search.decoding import Choice
from hiertune.search.ledger import TrialRecord, Used
from hiertune.search.outputs import count_states
from hiertune.search.plan import SearchPlan
from hiertune.search.winner import DECODED, Contender, compare

_VERSIONED = ("torch", "ray", "optuna", "mlflow", "numpy", "h5py")


def summarise(
    plan: SearchPlan,
    records: list[TrialRecord],
    best: TrialRecord,
    contenders: dict[str, Contender],
    decoding: Choice,
    seconds: float,
    ending: Ending,
    used: Used,
) -> dict[str, Any]:
    """Everything about the search but how its tracking was delivered."""
    winner, states = contenders["winner"], count_states(records)
    return {
        "name": plan.config.name,
        "objective": {"metric": plan.metric, "mode": plan.mode, "value": best.value},
        "trials": states,
        "ended": {
            "by": ending.by,
            "reason": ending.sentence(states, plan.trials),
            "limit": ending.limit,
            "used": {name: round(value, 1) for name, value in asdict(used).items()},
        },
        "winner": {
            "trial": best.number,
            "params": best.params,
            "metrics": best.metrics | winner.metrics,
            "decoding": _decoding(decoding, contenders.get(DECODED)),
        },
        "controls": {
            label: {
                "metrics": control.metrics,
                "against_winner": asdict(compare(winner, control, plan.data, plan.fit_on)),
            }
            for label, control in contenders.items()
            if label not in ("winner", DECODED)
        },
        "refit": plan.config.search.refit,
        "seconds": round(seconds, 1),
        "seed": plan.config.search.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _VERSIONED},
        },
        "data": {
            "path": plan.space.defaults().data.path,
            "fingerprint": plan.data.fingerprint,
            "rows": len(plan.data.labels),
        },
    }


def _decoding(choice: Choice, decoded: Contender | None) -> dict[str, Any]:
    """How the winner's logits become names: the rule, and metrics as trained (`before`) and by the rule."""
    if choice.rule is None or decoded is None:
        return {"rule": None, "name": str(AS_TRAINED), "reason": choice.reason}
    return {
        "rule": choice.rule.model_dump(mode="json"),
        "name": str(choice.rule),
        "tried": choice.tried,
        "val": {"before": choice.before, "after": choice.after},
        "test": decoded.metrics,
    }

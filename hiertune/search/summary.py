"""`summary.json`: a finished search for machines to read."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from dataclasses import asdict
from typing import Any

from hiertune.search.ledger import TrialRecord
from hiertune.search.plan import SearchPlan
from hiertune.search.winner import Contender, compare

_VERSIONED = ("torch", "ray", "optuna", "mlflow", "numpy", "h5py")


def summarise(
    plan: SearchPlan,
    records: list[TrialRecord],
    best: TrialRecord,
    contenders: dict[str, Contender],
    seconds: float,
) -> dict[str, Any]:
    """Everything about the search but how its tracking was delivered."""
    winner = contenders["winner"]
    return {
        "name": plan.config.name,
        "objective": {"metric": plan.metric, "mode": plan.mode, "value": best.value},
        "trials": dict(Counter(record.state for record in records)),
        "winner": {
            "trial": best.number,
            "params": best.params,
            "metrics": best.metrics | winner.metrics,
        },
        "controls": {
            label: {
                "metrics": control.metrics,
                "against_winner": asdict(compare(winner, control, plan.data, plan.fit_on)),
            }
            for label, control in contenders.items()
            if label != "winner"
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

"""How the winner's logits become names: the rule that is best on the validation split.

The rule is chosen on the logits of the winner's *trial*, which never saw the validation rows; the refitted
winner has trained on them. The flat control has no such trial, so it is decoded by plain conditional risk
minimisation, which has nothing to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

from hiertune._summary import DECODE_OFF
from hiertune.config import TrialConfig
from hiertune.decoding import (
    MOST_BYTES,
    DecodingRule,
    ValidationLogits,
    best_of,
    logits_bytes,
    try_rules,
)
from hiertune.errors import InputError
from hiertune.search.ledger import TrialRecord
from hiertune.search.plan import SearchPlan
from hiertune.train.unknown import with_unknown


@dataclass(frozen=True)
class Choice:
    """The chosen rule, and validation metrics as trained and by it; or why there is none."""

    rule: DecodingRule | None
    reason: str | None = None
    tried: int = 0
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None


def keeps_logits(plan: SearchPlan) -> bool:
    """Whether trials write their validation logits."""
    return plan.config.search.decode and not _too_large(plan)


def choose_rule(plan: SearchPlan, best: TrialRecord, config: TrialConfig) -> Choice:
    """The rule for the objective on the validation logits of the best trial, whose config is `config`."""
    if not plan.config.search.decode:
        return Choice(None, DECODE_OFF)
    if _too_large(plan):
        size = logits_bytes(len(plan.data.rows("val")), plan.data.taxonomy) / 2**20
        return Choice(
            None, f"the validation logits are not kept: {size:.0f} of at most {MOST_BYTES >> 20} MiB"
        )
    path = plan.folder.logits(best.number)
    if not path.exists():
        return Choice(None, f"there are no validation logits of trial {best.number}")
    taxonomy, _ = with_unknown(config.unknown, plan.data)
    tried = try_rules(ValidationLogits.load(path, taxonomy), taxonomy, config.model.head)
    try:
        chosen = best_of(tried, plan.metric, plan.mode)
    except InputError as error:
        return Choice(None, error.problem)
    return Choice(chosen.rule, None, len(tried), tried[0].metrics, chosen.metrics)


def _too_large(plan: SearchPlan) -> bool:
    return logits_bytes(len(plan.data.rows("val")), plan.data.taxonomy) > MOST_BYTES

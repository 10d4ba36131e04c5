"""Trials that fail one after another for one cause: then it is not the trials' fault."""

from __future__ import annotations

import re

from hiertune.search.ledger import TrialRecord

_VARIABLE = re.compile(
    r"""0x[0-9a-fA-F]+                     # addresses
    | (?<![\w.])~?(?:/[^\s/:,;'")]+)+/?    # paths
    | \b[0-9a-f]{16,}\b                    # ids
    | [-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?     # numbers
    """,
    re.VERBOSE,
)


def cause_of(record: TrialRecord) -> tuple[str | None, str]:
    """A failed trial's fault, and its reason without what differs from trial to trial."""
    return record.fault, _VARIABLE.sub("#", record.reason or "")


class FailureStreak:
    """Counts trials that failed in a row for one cause; broken from `limit` on, for good: no trial is begun
    then, whatever becomes of those that still run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._cause: tuple[str | None, str] | None = None
        self._count = 0
        self._reason = ""

    @property
    def broken(self) -> bool:
        return self._count >= self._limit

    @property
    def verdict(self) -> str:
        """Why the search ended, by the reason of the last of those trials."""
        return f"{self._count} trials in a row failed for one cause: {self._reason}"

    def trial_ended(self, record: TrialRecord) -> None:
        if self.broken:
            return
        cause = cause_of(record) if record.state == "failed" else None
        self._count = self._count + 1 if cause == self._cause else 1
        if cause is None:
            self._count = 0
        self._cause, self._reason = cause, record.reason or ""

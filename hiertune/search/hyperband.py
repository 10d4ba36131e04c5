"""Hyperband: brackets of successive halving over the trials of a ledger.

Li et al. 2018, "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 18 (185),
algorithm 1. A trial trains up to its bracket's next rung and lets its worker group go; once all trials of the
bracket are there, or have ended, the best of them go on from their checkpoints, and the others are stopped.

What is decided follows from the epochs that the ledger has, and from nothing else: not from the number of
worker groups, nor from who reports first, nor from where the search was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from optuna.trial import Trial

from hiertune.search.ledger import Ledger

_BRACKET = "bracket"


@dataclass(frozen=True)
class Bracket:
    """How many trials begin, and the epochs at which they are compared; at the last one they are done."""

    trials: int
    rungs: tuple[int, ...]


def brackets(epochs: int, factor: int) -> list[Bracket]:
    """One round, in the paper's order: those that stop the most trials first.

    With R = `epochs` and eta = `factor` it is n = ceil((s_max + 1) eta^s / (s + 1)) trials that are compared
    after R eta^-s, R eta^(1-s), ... epochs, for s = s_max, ..., 0. Epochs are rounded down to whole ones.
    """
    largest = 0
    while factor ** (largest + 1) <= epochs:
        largest += 1
    return [
        Bracket(
            -(-(largest + 1) * factor**s // (s + 1)),
            tuple(epochs // factor**left for left in range(s, -1, -1)),
        )
        for s in range(largest, -1, -1)
    ]


class Hyperband:
    """Which trial is trained next, up to which epoch, and which are stopped.

    Of a bracket of n trials floor(n / factor^i) go on from its i-th rung, at least one; never one without a
    finite objective there, as it has failed or ended before. Trials fill a bracket in the order in which they
    are begun; where no more are begun the last one is halved as it is, and of those it has n is the number.

    Args:
        epochs: the most that a trial may train.
        factor: of the trials at a rung one in so many goes on.
    """

    def __init__(self, ledger: Ledger, epochs: int, factor: int) -> None:
        self._ledger = ledger
        self._factor = factor
        self._round = brackets(epochs, factor)
        self._closed = False
        self._members: list[list[int]] = []
        """The trials of each bracket."""
        self._bracket_of: dict[int, int] = {}
        self._training: dict[int, int | None] = {}
        """Up to which epoch; None: all."""
        self._ready: dict[int, int | None] = {}
        """Those that shall be trained, and are not: up to which epoch."""
        for number, attrs in enumerate(ledger.attrs()):
            if _BRACKET in attrs:
                self._join(number, attrs[_BRACKET])
            elif self._is_open(number):  # begun under another scheduler
                self._ready[number] = None
        self._changed = set(range(len(self._members)))

    def decide(self, more: bool) -> list[int]:
        """The trials that are to be stopped now. `more`: whether new trials may be begun."""
        if self._members and not more and not self._closed:
            self._closed = True
            self._changed.add(len(self._members) - 1)
        stopped = [number for index in sorted(self._changed) for number in self._halve(index)]
        self._changed.clear()
        return stopped

    def next(self, more: bool) -> tuple[Trial, int | None] | None:
        """The trial to train next and up to which epoch (None: all of them); None while there is none."""
        if self._ready:
            number = min(self._ready)
            trial = self._ledger.take_up(number)
            self._training[number] = self._ready.pop(number)
        elif more:
            trial = self._ledger.study.ask()
            number = trial.number
            index = self._open_bracket()
            trial.set_user_attr(_BRACKET, index)  # recorded with the trial, as it begins
            self._join(number, index)
            first, *others = self._round[index % len(self._round)].rungs
            self._training[number] = first if others else None
        else:
            return None
        return trial, self._training[number]

    def compares_at(self, number: int, epoch: int) -> bool:
        """Whether the trial may have to wait for others after that epoch, and be stopped there."""
        index = self._bracket_of.get(number)
        return index is not None and epoch in self._round[index % len(self._round)].rungs[:-1]

    def let_go(self, number: int) -> None:
        """No worker group has the trial any more: it waits, or has ended."""
        self._training.pop(number, None)
        if number in self._bracket_of:
            self._changed.add(self._bracket_of[number])

    # ------------------------------------------------------------------------------ inside

    def _join(self, number: int, index: int) -> None:
        while len(self._members) <= index:
            self._members.append([])
        self._members[index].append(number)
        self._bracket_of[number] = index

    def _open_bracket(self) -> int:
        """The last one while it has room; not one that was halved without more trials in another session."""
        if not self._members:
            return 0
        index, members = len(self._members) - 1, self._members[-1]
        bracket = self._round[index % len(self._round)]
        halved = any(
            self._ledger.state_of(number) == "pruned" or self._last_epoch(number) > bracket.rungs[0]
            for number in members
        )
        return index + (halved or len(members) >= bracket.trials)

    def _is_open(self, number: int) -> bool:
        return self._ledger.state_of(number) == "running"

    def _last_epoch(self, number: int) -> int:
        return max(self._ledger.reported(number), default=0)

    def _halve(self, index: int) -> list[int]:
        """Decide all that can be decided in a bracket; those to be stopped are returned."""
        bracket, members = self._round[index % len(self._round)], self._members[index]
        is_filling = not self._closed and index == self._open_bracket()
        racing, until = members, None
        for halvings, rung in enumerate(bracket.rungs[:-1], start=1):
            if is_filling or not all(self._is_at(number, rung) for number in racing):
                until = rung
                break
            racing = self._best(racing, rung)[: max(1, len(members) // self._factor**halvings)]
        idle = [number for number in members if self._is_open(number) and number not in self._training]
        for number in idle:
            self._ready.pop(number, None)
            if number in racing and (until is None or not self._is_at(number, until)):
                self._ready[number] = until
        return [number for number in idle if number not in racing]

    def _is_at(self, number: int, rung: int) -> bool:
        """Whether the trial has come as far, or never will."""
        if number in self._training:
            until = self._training[number]
            return until is None or until > rung
        return self._last_epoch(number) >= rung or not self._is_open(number)

    def _best(self, numbers: list[int], rung: int) -> list[int]:
        """Those with a finite objective at a rung, the best first; of equals the one that was begun first."""
        sign = -1 if self._ledger.identity.mode == "max" else 1
        values = {number: self._ledger.reported(number).get(rung, math.nan) for number in numbers}
        finite = [number for number in numbers if math.isfinite(values[number])]
        return sorted(finite, key=lambda number: (sign * values[number], number))

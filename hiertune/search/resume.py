"""A search that goes on: its ledger opened for this process alone, and brought to the present space.

A changed space is compared with the one in the ledger key by key. A trial is carried over if the new space
can produce its very config; the others stay on record, outside the search. Imports no Ray.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from optuna.trial import FixedTrial, FrozenTrial
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hiertune._files import replace_file
from hiertune._text import visible, without_passwords
from hiertune._tree import written
from hiertune.config import TrialConfig
from hiertune.errors import InputError
from hiertune.record import OUTSIDE, answering
from hiertune.search.ledger import Ledger, TrialRecord, carried_over, put_outside
from hiertune.search.outputs import RunFolder
from hiertune.search.owner import FolderLock, Ownership
from hiertune.search.plan import SearchPlan
from hiertune.space import Mismatch, Space, parse_space


@dataclass(frozen=True)
class Change:
    """One key path in which two spaces differ."""

    key: str
    before: str | None
    """A value or a distribution as it is written; None where it was not there."""
    now: str | None
    outside: int = 0
    """Trials that are not carried over because of it."""


@dataclass(frozen=True)
class Revision:
    """What a changed space does to the trials on record."""

    changes: tuple[Change, ...]
    carried: int
    outside: int


@contextlib.contextmanager
def open_ledger(plan: SearchPlan, console: Console) -> Iterator[Ledger]:
    """The ledger of `plan`, for this process alone until the context ends.

    A resumed search whose space was changed is revised, and says so on the console.

    Raises:
        InputError: another process runs the search; the ledger is damaged or out of reach; the objective or
            the data are not what the search was begun with.
    """
    resume = plan.resume and not plan.bare
    plan.folder.make()
    with FolderLock(plan.folder), contextlib.ExitStack() as stack:
        try:
            with answering(plan.ledger):
                ledger = Ledger.open(
                    plan.ledger,
                    plan.config.name,
                    plan.mode,
                    resume=resume,
                    metric=plan.metric,
                    fingerprint=plan.data.fingerprint,
                    space=without_passwords(plan.space.text),
                )
                stack.enter_context(Ownership(ledger))
                if not resume:
                    replace_file(plan.folder.space, without_passwords(plan.space.text))
                elif (revision := revise(ledger, plan.folder, plan.space)) is not None:
                    print_revision(console, revision)
                keep_spaces(plan.folder, ledger)
        except InputError:
            plan.folder.remove_unused()
            raise
        yield ledger


def revise(ledger: Ledger, folder: RunFolder, space: Space) -> Revision | None:
    """Bring the ledger to `space`; None where it searches the same already."""
    old = space_of(ledger.identity.space, folder)
    if old.tree == space.tree:
        return None
    revision, outside = ledger.identity.revision, Counter[str]()

    def carry(frozen: FrozenTrial, record: TrialRecord) -> FrozenTrial:
        config = _config_of(frozen, record, old)
        try:
            params = space.params_of(config)
        except Mismatch as mismatch:
            outside[mismatch.key] += 1
            return put_outside(frozen, config.model_dump(mode="json"), str(mismatch), revision)
        fixed = FixedTrial(params)
        space.suggest(fixed)
        new = sorted(name for name in params if name not in record.params)
        provenance = {"from": revision} | ({"from_constants": new} if new else {})
        return carried_over(frozen, params, fixed.distributions, provenance)

    ledger.revise(without_passwords(space.text), carry)
    records = ledger.records()
    left = sum(record.state == "outside" for record in records)
    return Revision(tuple(compare(old, space, outside)), len(records) - left, left)


def compare(old: Space, new: Space, outside: Mapping[str, int]) -> Iterator[Change]:
    """Every key path whose value or distribution differs, and how many trials it leaves outside.

    Args:
        outside: number of trials by the key path that does not hold their config.
    """
    before, now = written(old.tree), written(new.tree)
    left = dict(outside)
    for address in [*before, *(address for address in now if address not in before)]:
        key, was = before.get(address, (None, None))
        key, is_now = now.get(address, (key, None))
        if was != is_now:
            yield Change(address, was, is_now, left.pop(key or address, 0))
    # What the space leaves out is a default, which another branch or version may change.
    yield from (Change(key, None, None, count) for key, count in left.items())


def print_revision(console: Console, revision: Revision) -> None:
    """The keys that changed, and what becomes of the trials."""
    table = Table(box=None, pad_edge=False)
    for name in ("key", "before", "now"):
        table.add_column(name, overflow="fold")
    table.add_column("trials left outside", justify="right")
    for change in revision.changes:
        cells = (change.key, change.before or "–", change.now or "–", str(change.outside or "–"))
        table.add_row(*(escape(visible(cell)) for cell in cells))
    console.print("the space was changed:", highlight=False)
    console.print(table)
    known = revision.carried + revision.outside
    text = f"{revision.carried} of {known} trials are carried over"
    if revision.outside:
        text += "; the others stay in trials.csv as `outside`, and count no more"
    console.print(text, highlight=False)


def keep_spaces(folder: RunFolder, ledger: Ledger) -> None:
    """`space.yaml` is the present revision's, `space.1.yaml` that of the first, and so on."""
    present = folder.space.read_text("utf-8") if folder.space.exists() else ""
    for earlier in range(1, ledger.identity.revision):
        if not folder.earlier_space(earlier).exists():
            # A ledger of before says nothing of its first one, which the file still holds.
            replace_file(folder.earlier_space(earlier), ledger.space_of(earlier) or present)
    if present != (text := ledger.identity.space or present):
        replace_file(folder.space, text)


def _config_of(frozen: FrozenTrial, record: TrialRecord, space: Space) -> TrialConfig:
    if record.state == "outside":
        return TrialConfig.model_validate(frozen.user_attrs[OUTSIDE]["config"])
    return space.resolve(record.params)


def space_of(recorded: str, folder: RunFolder) -> Space:
    """The space that the trials on record were suggested by; a ledger of before has none recorded."""
    try:
        return parse_space(recorded or folder.space.read_text("utf-8"))
    except InputError as error:
        what = ": ".join(part for part in (error.key, error.problem) if part)
        problem = f"the space that this search was begun with is not valid any more: {what}"
        raise InputError(problem, file=folder.space, allowed="another name for another search") from None

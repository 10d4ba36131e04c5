"""Which names of ranks name no class."""

from __future__ import annotations

import re
from collections.abc import Iterable

_PLACEHOLDER = re.compile(
    r"""incertae[\s_-]*sedis      # anywhere in the name: placement unknown
    | ^(unknown|unclassified|unassigned|unidentified|uncultured)(\b|_)
    | ^(na|n/a|nan|none|null|-|\?)$
    | ^[a-z]__$                  # a rank prefix without a name, as in Greengenes""",
    re.IGNORECASE | re.VERBOSE,
)


def clean_rank(name: str, unknown: Iterable[str] = ()) -> str | None:
    """A rank's name without surrounding space; None where it names no class.

    That is, whatever the case: an empty name; "incertae sedis" anywhere in it (also with "_" or
    "-"); a name that begins with the word unknown, unclassified, unassigned, unidentified or
    uncultured; one of NA, N/A, NaN, none, null, "-", "?"; a bare prefix such as "g__"; and the
    names in `unknown`, which are compared as a whole.
    """
    name = name.strip()
    if not name or _PLACEHOLDER.search(name) or name.casefold() in {other.casefold() for other in unknown}:
        return None
    return name

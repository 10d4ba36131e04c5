"""Texts that come from outside: which can be kept in files, and how all can be shown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from hiertune.errors import InputError

STORABLE = "text in UTF-8, without NUL"


def is_storable(text: str) -> bool:
    """Whether HDF5, JSON and CSV can keep it: no NUL, and no half of a surrogate pair.

    Such halves stand for the bytes of file names that are not UTF-8, and JSON can spell them.
    """
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def check_storable(texts: Iterable[str], *, key: str, file: str | Path | None = None) -> None:
    """InputError for the first text that is not storable."""
    for text in texts:
        if not is_storable(text):
            problem = "holds NUL" if "\0" in text else "is not UTF-8"
            raise InputError(f"{text!r} {problem}", file=file, key=key, allowed=STORABLE)


_ADDRESS = re.compile(r"(?:https?|hdfs|viewfs)?://[^\s\"']*", re.ASCII | re.IGNORECASE)
# Behind the first colon of these a number is a port. Databases take all up to the '@' for a password.
_LOGIN = re.compile(
    r"((?:https?|hdfs|viewfs)://[^:/@\[]*:(?!\d{1,5}[/?#])"
    r"|(?<!http)(?<!https)(?<!hdfs)(?<!viewfs)://[^:/@]*:)(?!\*+(?:@|$))(.+)",
    re.DOTALL | re.IGNORECASE,
)
_OPTION = re.compile(r"((?:password|passwd|pwd|passphrase)=)([^&]+)", re.IGNORECASE)


def without_passwords(text: str, *, same_length: bool = False) -> str:
    """`text` with `***` for the password of every address, `scheme://user:password@host` or `?password=`.

    A password may hold any sign but spaces and quotes; where it ends in doubt, what follows is hidden too.

    Args:
        same_length: as many stars as there were signs, so that all others stay where they are.
    """
    return _ADDRESS.sub(lambda found: without_password(found[0], same_length=same_length), text)


def without_password(address: str, *, same_length: bool = False) -> str:
    """As `without_passwords`, of a text that is one address, with any sign in its password."""

    def hide(found: re.Match[str]) -> str:
        return found[1] + "*" * (len(found[2]) if same_length else 3)

    login, at, host = address.rpartition("@")
    return _OPTION.sub(hide, _LOGIN.sub(hide, login) + at + host)


def visible(text: str, keep: str = "") -> str:
    """`text` with what a terminal obeys or cannot show written out: `\\x1b` for an escape character.

    These are control and format characters, line ends and halves of surrogate pairs, but for those in `keep`.
    """
    if text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and letter not in keep
        else letter
        for letter in text
    )

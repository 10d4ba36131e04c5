"""The one exception that means "the user can mend this": shown as a message, never as a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: a space file, a data file, an option.

    The command line prints the message and exits with code 2. The message names what is known of
    *where* (file, line, key), *what* (the value) and *what is allowed*.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str | None = None,
        allowed: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.line = line
        self.key = key
        self.allowed = allowed
        super().__init__(str(self))

    def __reduce__(self):  # keyword-only arguments do not survive BaseException's own pickling
        return _rebuild, (self.problem, self.file, self.line, self.key, self.allowed)

    def __str__(self) -> str:
        where = self.file or ""
        if where and self.line is not None:
            where += f":{self.line}"
        parts = [part for part in (where, self.key) if part]
        text = ": ".join([*parts, self.problem])
        return f"{text}\n  allowed: {self.allowed}" if self.allowed else text


@contextmanager
def about(file: str | Path | None, line: int | None = None) -> Iterator[None]:
    """What is raised within, and names no file, is said of `file`, and of a line of it."""
    try:
        yield
    except InputError as error:
        if error.file is not None:
            raise
        raise InputError(
            error.problem, file=file, line=error.line or line, key=error.key, allowed=error.allowed
        ) from None


def _rebuild(problem, file, line, key, allowed) -> InputError:
    return InputError(problem, file=file, line=line, key=key, allowed=allowed)

"""Connections to PostgreSQL that a server can't hold for ever."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from time import monotonic
from typing import Any

import psycopg
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL

from hiertune import _database


class Connection(psycopg.Connection[Any]):
    """Given up once the server has been silent for `_database.ANSWER_SECONDS` while it owed an answer.

    psycopg itself limits connecting alone. A server that hangs keeps no limit of its own, such as
    `statement_timeout`; nor do TCP's help as long as its kernel acknowledges what is sent.
    """

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        # All that a connection waits for comes by here; what waits sends `gen` a 0 every 0.1 s of silence.
        return super().wait(self._unless_silent(gen), *args, **kwargs)

    def _unless_silent(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        heard, ready = monotonic(), None
        while True:
            try:
                wanted = gen.send(ready)
            except StopIteration as end:
                return end.value
            ready = yield wanted
            if ready:
                heard = monotonic()
            elif monotonic() - heard > _database.ANSWER_SECONDS:
                self.pgconn.finish()  # an answer that comes after all must not be taken for the next one's
                raise psycopg.OperationalError(f"no answer for {_database.ANSWER_SECONDS:g} s")


def connect(url: URL, limits: Mapping[str, Any]) -> Connection:
    """Connect as SQLAlchemy's dialect would, within `limits`."""
    _, options = PGDialect_psycopg(dbapi=psycopg).create_connect_args(url)
    return Connection.connect(**limits, **options)

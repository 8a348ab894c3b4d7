"""Usage per key, model and day, in `CORRAL_HOME/usage.db`.

It can be read whether or not a server is running. Needs only the standard library, and knows nothing of Ray or HTTP.
"""

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from training.errors import CorralError
from training.home import corral_home

if TYPE_CHECKING:
    from deployments.accounting.request_record import RequestRecord

By = Literal["key", "model", "day"]

_BUSY_S = 5.0  # to wait for another writer: there are two while a server is redeployed
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL,  -- UTC
    key_id TEXT NOT NULL,  -- empty for requests without a key
    model TEXT NOT NULL,
    key_name TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,  -- of the prompt tokens
    completion_tokens INTEGER NOT NULL,
    errors INTEGER NOT NULL,  -- of the requests
    PRIMARY KEY (day, key_id, model)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reports (  -- last report of each replica of the API
    reporter TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    day TEXT NOT NULL
) WITHOUT ROWID;
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
    key_name = excluded.key_name,
    requests = requests + 1,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    errors = errors + excluded.errors
"""
_COLUMNS: dict[By | None, tuple[str, ...]] = {
    None: ("key_id", "model"),
    "key": ("key_id",),
    "model": ("model",),
    "day": ("day",),
}


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over all usage of one day, key or model; columns that are not grouped by are None.

    `key_id` is empty for requests without a key; `key` is the key's name.
    """

    day: str | None
    key_id: str | None
    key: str | None
    model: str | None
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageStore:
    """Writes usage. What `add` has returned for survives `kill -9`. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite creates its other files with the same mode
        path.chmod(0o600)
        self._db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power failure may lose the last seconds, not the file
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def add(self, reporter: str, number: int, records: "Iterable[RequestRecord]") -> bool:
        """Count requests in one transaction; False if this report was counted before.

        Args:
            reporter: id of the API replica.
            number: of its reports, growing.

        Raises:
            sqlite3.Error: on failure; nothing was counted.
        """
        today = datetime.now(UTC).date().isoformat()
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            last = self._db.execute("SELECT number FROM reports WHERE reporter = ?", (reporter,)).fetchone()
            if last is not None and last[0] >= number:
                return False
            self._db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?)", (reporter, number, today))
            if last is None:
                self._db.execute("DELETE FROM reports WHERE day < date('now', '-2 days')")  # of former replicas
            self._db.executemany(_ADD, [_values(record) for record in records if record.model is not None])
        return True

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def usage_path() -> Path:
    """Path of the usage database."""
    return corral_home() / "usage.db"


def read_usage(path: Path, since: date, by: By | None = None) -> list[UsageRow]:
    """Usage since a day, summed by key, model or day (default: by key and model); most tokens first, or newest day.

    Raises:
        CorralError: the file cannot be read.
    """
    if not path.exists():
        return []
    columns = _COLUMNS[by]
    day, key_id, model = (column if column in columns else "NULL" for column in ("day", "key_id", "model"))
    key = "max(key_name)" if "key_id" in columns else "NULL"
    order = "day DESC" if by == "day" else f"sum(prompt_tokens + completion_tokens) DESC, {', '.join(columns)}"
    query = f"""
        SELECT {day}, {key_id}, {key}, {model},
            sum(requests), sum(errors), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens)
        FROM usage WHERE day >= ? GROUP BY {", ".join(columns)} ORDER BY {order}
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as db:
            return [UsageRow(*row) for row in db.execute(query, (since.isoformat(),))]
    except sqlite3.Error as error:
        raise CorralError(
            f"usage in {str(path)!r} cannot be read: {error}: move the file away to start a new one"
        ) from error


def _values(record: "RequestRecord") -> tuple[str | int | None, ...]:
    return (
        datetime.fromtimestamp(record.ended_at, UTC).date().isoformat(),
        record.key_id or "",
        record.model,
        record.key_name or "",
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        int(record.failed),
    )

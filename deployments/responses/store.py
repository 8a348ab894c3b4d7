"""Stored responses, in `CORRAL_HOME/responses.db`, bounded in age and size.

A response and the items that it was made from and consists of belong to one owner. Items are kept once, however many
responses share them, so that a long conversation grows by what each turn adds. Knows nothing of Ray, HTTP or what is in
an item.
"""

import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.home import corral_home

_BUSY_S = 5.0  # to wait for another writer: there are two while a server is redeployed
_MAX_EVICTED = 1000  # for their age, in one transaction; nobody can read the others
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY,  -- grows with time
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    created_at REAL NOT NULL,  -- seconds since the epoch
    body TEXT NOT NULL,  -- JSON without its output
    UNIQUE (owner, id)
);
CREATE TABLE IF NOT EXISTS items (
    number INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    body TEXT NOT NULL,  -- JSON
    UNIQUE (owner, id)
);
CREATE TABLE IF NOT EXISTS response_items (
    response INTEGER NOT NULL,
    position INTEGER NOT NULL,  -- input first, then output
    is_output INTEGER NOT NULL,
    item INTEGER NOT NULL,
    PRIMARY KEY (response, position)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_of_an_item ON response_items (item);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (created_at);
CREATE TABLE IF NOT EXISTS last_check (one INTEGER PRIMARY KEY, checked_at REAL NOT NULL);
"""
_ITEMS = """
SELECT items.id, items.body, is_output
FROM responses JOIN response_items ON response = responses.number JOIN items ON items.number = item
WHERE responses.owner = ? AND responses.id = ? AND created_at > ? ORDER BY position
"""
_ITEM = """
SELECT items.body FROM items WHERE owner = ? AND id = ? AND EXISTS (
    SELECT 1 FROM response_items JOIN responses ON responses.number = response
    WHERE item = items.number AND created_at > ?
)
"""
_DELETE_ITEMS = """
DELETE FROM items WHERE number IN (SELECT item FROM response_items WHERE response = ?1)
AND NOT EXISTS (SELECT 1 FROM response_items WHERE item = items.number AND response != ?1)
"""


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item; `body` is its JSON without the id."""

    id: str
    body: str


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and its items; `body` is its JSON without the output.

    Attributes:
        input_items: all that it was made from, those of earlier responses first.
    """

    id: str
    body: str
    input_items: Sequence[StoredItem]
    output_items: Sequence[StoredItem]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What a request names of what is stored; None in place of what there is not.

    Attributes:
        previous: the response to continue, None also if the request names none.
        items: in the order in which they were named.
    """

    previous: StoredResponse | None
    items: Sequence[StoredItem | None]


class ResponseStore:
    """For one thread at a time. What `add` has returned for survives `kill -9`.

    Args:
        max_age_s: a response is gone so many seconds after it was created.
        max_bytes: of the file; beyond it, the oldest responses are deleted.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, max_age_s: float, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite creates its other files with the same mode
        path.chmod(0o600)
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power failure may lose the last seconds, not the file
        self._db.execute("PRAGMA secure_delete = ON")  # deleted texts do not stay in free pages
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def check(self) -> None:
        """Write to the disk, as `add` does.

        Raises:
            sqlite3.Error: nothing can be stored.
        """
        self._db.execute("INSERT OR REPLACE INTO last_check VALUES (1, ?)", (self._clock(),))

    def add(self, owner: str, response: StoredResponse) -> None:
        """Store a response; one that is stored already stays as it is.

        An item with the id of another one, and with other content, gets a new id.

        Raises:
            sqlite3.Error: on failure; nothing was stored.
        """
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            values = (owner, response.id, self._clock(), response.body)
            added = self._db.execute("INSERT OR IGNORE INTO responses VALUES (NULL, ?, ?, ?, ?)", values)
            if not added.rowcount:
                return
            number = added.lastrowid
            items = [(item, False) for item in response.input_items] + [(item, True) for item in response.output_items]
            of_this_response: set[int] = set()
            for position, (item, is_output) in enumerate(items):
                item_number = self._item_number(owner, item, of_this_response)
                of_this_response.add(item_number)
                link = (number, position, is_output, item_number)
                self._db.execute("INSERT INTO response_items VALUES (?, ?, ?, ?)", link)
            self._evict(except_number=number)

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response with its items, None if the owner has no such response."""
        oldest = self._clock() - self._max_age_s
        query = "SELECT body FROM responses WHERE owner = ? AND id = ? AND created_at > ?"
        row = self._db.execute(query, (owner, response_id, oldest)).fetchone()
        if row is None:
            return None
        items: tuple[list[StoredItem], list[StoredItem]] = ([], [])
        for item_id, body, is_output in self._db.execute(_ITEMS, (owner, response_id, oldest)):
            items[is_output].append(StoredItem(item_id, body))
        return StoredResponse(response_id, row[0], *items)

    def item(self, owner: str, item_id: str) -> StoredItem | None:
        """An item of any response of the owner, None if there is no such item."""
        row = self._db.execute(_ITEM, (owner, item_id, self._clock() - self._max_age_s)).fetchone()
        return None if row is None else StoredItem(item_id, row[0])

    def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response, and the items that no other response has; False if the owner has no such response."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            query = "SELECT number FROM responses WHERE owner = ? AND id = ? AND created_at > ?"
            row = self._db.execute(query, (owner, response_id, self._clock() - self._max_age_s)).fetchone()
            if row is not None:
                self._delete(row[0])
        return row is not None

    def evict(self) -> None:
        """Delete what is too old, and what is beyond the size."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._evict()

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _item_number(self, owner: str, item: StoredItem, taken: set[int]) -> int:
        query = "SELECT number, body FROM items WHERE owner = ? AND id = ?"
        row = self._db.execute(query, (owner, item.id)).fetchone()
        if row is not None and row[1] == item.body and row[0] not in taken:
            return int(row[0])
        item_id = item.id if row is None else f"{item.id.partition('_')[0]:.8}_{uuid.uuid4().hex}"
        added = self._db.execute("INSERT INTO items VALUES (NULL, ?, ?, ?)", (owner, item_id, item.body))
        assert added.lastrowid is not None
        return added.lastrowid

    def _evict(self, except_number: int | None = None) -> None:
        """Delete the oldest responses until age and size are within their bounds."""
        oldest = self._clock() - self._max_age_s
        query = "SELECT number FROM responses WHERE created_at <= ? ORDER BY created_at LIMIT ?"
        for (number,) in self._db.execute(query, (oldest, _MAX_EVICTED)).fetchall():
            self._delete(number)
        while self._num_bytes() > self._max_bytes:
            query = "SELECT number FROM responses WHERE number IS NOT ? ORDER BY created_at LIMIT 1"
            row = self._db.execute(query, (except_number,)).fetchone()
            if row is None:
                return
            self._delete(row[0])

    def _delete(self, number: int) -> None:
        self._db.execute(_DELETE_ITEMS, (number,))
        self._db.execute("DELETE FROM response_items WHERE response = ?", (number,))
        self._db.execute("DELETE FROM responses WHERE number = ?", (number,))

    def _num_bytes(self) -> int:
        """Of the pages in use; the file reuses the others before it grows."""
        total, free, size = (
            int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (total - free) * size


def responses_path() -> Path:
    """Path of the database."""
    return corral_home() / "responses.db"

"""Keys that identify a batch's items: a small database from a key's digest to the index of its item.

It stands on the disk, so a million keys take no memory; a key of any text and length costs 16 bytes.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from producer.disk import damaged, refused, said
from producer.errors import ParamsError, SpoolError

_TOGETHER = 1_000
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT)


class ItemKeys:
    """The keys of one spool. `add` and `find` by text; nothing is kept until `finish`.

    Each raises `SpoolError` where the disk refuses or the file is damaged.

    Args:
        count: items that the spool has; a key of a later one was left by a growth that was cut short.
    """

    def __init__(self, home: Path, batch: str, name: str, count: int = 0) -> None:
        self._home = home
        self._batch = batch
        self._name = name
        self._pending: dict[bytes, int] = {}
        path = home / "keys"
        with said(batch), self._said():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._base = sqlite3.connect(path, isolation_level=None)
        try:
            self._begin(count)
        except SpoolError:
            self.close()
            raise

    def _begin(self, count: int) -> None:
        with self._said():
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS keys (digest BLOB PRIMARY KEY, item INTEGER) WITHOUT ROWID"
            )
            self._base.execute("BEGIN")
            self._base.execute("DELETE FROM keys WHERE item >= ?", (count,))
            (found,) = self._base.execute("SELECT count(*) FROM keys").fetchone()
        if found != count:
            raise damaged(self._batch, self._home)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What the database meets, said as a `SpoolError`."""
        try:
            yield
        except sqlite3.Error as fault:
            if getattr(fault, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                raise damaged(self._batch, self._home) from None
            raise refused(self._batch, OSError(0, str(fault), str(self._home / "keys"))) from None

    def add(self, key: str, index: int) -> None:
        """Let `key` be item `index`'s.

        Raises:
            ParamsError: an earlier item has it; names both.
        """
        digest = _digest(key)
        first = self._pending.get(digest, self._stored(digest))
        if first is not None:
            raise ParamsError(
                f"items {first} and {index} have the same {self._name} ({key!r:.80}), which --key says is one "
                "item's alone: remove one. Nothing was enqueued.",
                index=index,
                path=repr(self._name),
            )
        self._pending[digest] = index
        if len(self._pending) == _TOGETHER:
            self._store()

    def find(self, key: str) -> int | None:
        """The index of the item that has the key."""
        digest = _digest(key)
        return self._pending.get(digest, self._stored(digest))

    def finish(self) -> None:
        """Keep what was added."""
        self._store()
        with self._said():
            self._base.execute("COMMIT")
            self._base.execute("BEGIN")

    def close(self) -> None:
        """Forget what was added since `finish`. May be called again."""
        self._base.close()

    def _stored(self, digest: bytes) -> int | None:
        with self._said():
            row = self._base.execute("SELECT item FROM keys WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row else None

    def _store(self) -> None:
        with self._said():
            self._base.executemany("INSERT INTO keys VALUES (?, ?)", self._pending.items())
        self._pending.clear()


def key_of(params: dict[str, object], name: str, index: int, where: str) -> str:
    """The text that identifies an item: the entry `name` of its params; a number counts as its digits.

    >>> key_of({"user_id": 7}, "user_id", 0, "prep_async")
    '7'

    Raises:
        ParamsError: the item has no such entry, or it is neither text nor a whole number.
    """
    value = params.get(name)
    if type(value) is str or type(value) is int:
        return str(value)
    problem = (
        f"is of type {type(value).__name__}; use text or a whole number"
        if name in params
        else "is not there; give every item one"
    )
    raise ParamsError(
        f"item {index} of {where}: {name!r}, the entry that --key names, {problem}. Nothing was enqueued.",
        index=index,
        path=repr(name),
    )


def _digest(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=16).digest()

"""Writing a spool: a new one all at once, or more items behind those of an old one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Self

import msgspec

from producer.disk import (
    batch_dir,
    flock,
    fsync_dir,
    make_batches,
    open_at,
    refused,
    replace_file,
    said,
    write_all,
    write_file,
)
from producer.errors import SpoolError
from producer.item_keys import ItemKeys
from producer.spool import BLOCK, Meta, Spool, digest

_FLUSH_BYTES = 1 << 20
_WRITING = "+writing."


class _Appender:
    """Writes items and their ends behind those of a directory, and digests every block of them."""

    def __init__(self, home: Path, count: int = 0, end: int = 0, digests: list[str] | None = None) -> None:
        self.count = count
        self.end = end
        self.digests = digests or []
        self._hash = blake2b(digest_size=16)
        self.pending: list[bytes] = []
        self._room = _FLUSH_BYTES
        self._until_block = BLOCK
        self.watch = -1
        self.watched = ""
        self._spool = open_at(home / "spool", end)
        self._ends = open_at(home / "ends", count * 8)

    def take_up(self, items: Iterable[tuple[int, bytes]]) -> None:
        """Go on with the digest of a block that already holds these items."""
        for _, encoded in items:
            self._hash.update(encoded)
            self._until_block -= 1

    def add(self, encoded: bytes) -> None:
        self.pending.append(encoded)
        if self.count + len(self.pending) == self.watch:
            so_far = self._hash.copy()
            so_far.update(b"".join(self.pending))
            self.watched = so_far.hexdigest()
        self._room -= len(encoded)
        if self._room <= 0 or len(self.pending) == self._until_block:
            self._flush()

    def _flush(self) -> None:
        ends = list(accumulate(map(len, self.pending), initial=self.end))
        data = b"".join(self.pending)
        self._hash.update(data)
        write_all(self._spool, data)
        write_all(self._ends, struct.pack(f"<{len(ends) - 1}Q", *ends[1:]))
        self.count += len(self.pending)
        self.end = ends[-1]
        self._until_block -= len(self.pending)
        self.pending.clear()
        self._room = _FLUSH_BYTES
        if not self._until_block:
            self._close_block()

    def _close_block(self) -> None:
        self.digests.append(self._hash.hexdigest())
        self._hash = blake2b(digest_size=16)
        self._until_block = BLOCK

    def finish(self) -> None:
        """Everything added is on the disk."""
        if self.pending:
            self._flush()
        if self._until_block < BLOCK:
            self._close_block()
        os.fsync(self._spool)
        os.fsync(self._ends)

    def close(self) -> None:
        for fd in (self._spool, self._ends):
            if fd >= 0:
                os.close(fd)
        self._spool = self._ends = -1


class SpoolWriter:
    """Writes a new spool out of sight; only `finish` makes it a batch's, all of it at once.

    A context manager: left without `finish`, or by kill -9 at any byte, it leaves no spool. What a killed
    writer leaves behind is removed by the next writer of the same data directory. Memory stays flat.

    Args:
        key: the params' entry that identifies an item; '' = its position.
        weight: of the batch among others under its limit.

    Raises:
        SpoolError: the batch has a spool, its id cannot be used, or the disk refuses.
    """

    def __init__(
        self, data_dir: str | Path, batch: str, flow: str, limit: str, key: str = "", weight: float = 1.0
    ) -> None:
        self._home = batch_dir(data_dir, batch)
        self._about = {"batch": batch, "flow": flow, "limit": limit, "key": key, "weight": weight}
        self._batch = batch
        self._keys: ItemKeys | None = None
        if self._home.exists():
            raise self._taken()
        with said(batch):
            make_batches(self._home.parent)
            self._temp, self._alive = _new_writing_dir(self._home.parent)
            self._appender = _Appender(self._temp)
        self._open = True
        if key:
            try:
                self._keys = ItemKeys(self._temp, batch, key)
            except SpoolError:
                self.abandon()
                raise

    @property
    def count(self) -> int:
        """Items added so far."""
        return self._appender.count + len(self._appender.pending)

    def watch(self, count: int) -> None:
        """Let `digest_of_block` know the block that `count` items end in as it is with just those."""
        self._appender.watch = count

    def digest_of_block(self, number: int) -> str:
        """The digest of a block of 1,000 items; of the last watched one, up to the watched count."""
        if self._appender.watch >= 0 and number == (self._appender.watch - 1) // BLOCK:
            return self._appender.watched
        return self._appender.digests[number] if number < len(self._appender.digests) else ""

    def add(self, encoded: bytes, key: str = "") -> None:
        """Append one item, as `checked_params` returned it, and its key where the batch has one."""
        if self._keys is not None:
            self._keys.add(key, self.count)
        try:
            self._appender.add(encoded)
        except OSError as fault:
            self.abandon()
            raise refused(self._batch, fault) from None

    def finish(self, base: bytes) -> Spool:
        """Put the whole spool on the disk, base included, and make it the batch's."""
        try:
            self._publish(base)
        except OSError as fault:
            if fault.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise self._taken() from None
            raise refused(self._batch, fault) from None
        finally:
            self.abandon()
        return Spool(self._home)

    def _publish(self, base: bytes) -> None:
        if self._keys is not None:
            self._keys.finish()
        self._appender.finish()
        write_file(self._temp / "base", base)
        meta = msgspec.convert(
            {
                **self._about,
                "count": self._appender.count,
                "created": time.time(),
                "digests": self._appender.digests,
                "base_digest": digest(base),
                "complete": True,
            },
            Meta,
        )
        write_file(self._temp / "meta.json", msgspec.json.encode(meta))
        fsync_dir(self._temp)
        os.rename(self._temp, self._home)
        fsync_dir(self._home.parent)

    def abandon(self) -> None:
        """Leave nothing behind. May be called again, and after `finish`."""
        if self._open:
            self._open = False
            if self._keys is not None:
                self._keys.close()
            self._appender.close()
            shutil.rmtree(self._temp, ignore_errors=True)
            os.close(self._alive)

    def _taken(self) -> SpoolError:
        return SpoolError(
            f"batch '{self._batch}' already has a spool in {self._home.parent}; use another batch id",
            batch=self._batch,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


class SpoolGrowth:
    """Appends items to a spool, all or, left without `finish` or by kill -9, none. A context manager."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        whole = spool.count // BLOCK
        with said(spool.batch):
            self._appender = _Appender(
                spool.home, spool.count, spool.end_of(spool.count), spool.digests[:whole]
            )
        self._appender.take_up(spool.items(whole * BLOCK))
        self._keys: ItemKeys | None = None
        if spool.key:
            try:
                self._keys = ItemKeys(spool.home, spool.batch, spool.key, spool.count)
            except SpoolError:
                self._appender.close()
                raise

    @property
    def count(self) -> int:
        """Items of the spool, those added included."""
        return self._appender.count + len(self._appender.pending)

    def find(self, key: str) -> int | None:
        """The index of the item that has the key, those added included."""
        return self._keys.find(key) if self._keys is not None else None

    def add(self, encoded: bytes, key: str = "") -> None:
        """Append one item."""
        if self._keys is not None:
            self._keys.add(key, self.count)
        with said(self._spool.batch):
            self._appender.add(encoded)

    def finish(self) -> None:
        """Put what was added on the disk and make it part of the spool."""
        if self._keys is not None:
            self._keys.finish()
        with said(self._spool.batch):
            self._appender.finish()
            meta = msgspec.structs.replace(
                self._spool.meta, count=self._appender.count, digests=self._appender.digests
            )
            replace_file(self._spool.home / "meta.json", msgspec.json.encode(meta))
        self._spool.use(meta)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._keys is not None:
            self._keys.close()
        self._appender.close()


def _new_writing_dir(batches: Path) -> tuple[Path, int]:
    """A directory to write in and the descriptor whose flock says that its writer lives."""
    turn = os.open(batches, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # nobody sweeps between the making of a directory and its flock
        for left in batches.glob(_WRITING + "*"):
            _sweep(left)
        temp = Path(tempfile.mkdtemp(prefix=_WRITING, dir=batches))
        alive = os.open(temp, os.O_RDONLY)
        flock(alive)
        return temp, alive
    finally:
        os.close(turn)


def _sweep(left: Path) -> None:
    try:
        fd = os.open(left, os.O_RDONLY)
    except FileNotFoundError:  # its writer has just finished
        return
    try:
        if flock(fd):
            shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(fd)

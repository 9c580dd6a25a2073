"""The manifest of a batch: every encoded param dict on disk, and which outcomes have come back.

A batch's directory (0700, files 0600) is `batches/<batch id>/` in the data directory:

| file | holds |
| --- | --- |
| spool | the encoded params, one after the other |
| ends | where each item ends in `spool`, 8 bytes little-endian per item |
| base | the caller's shared store, encoded once |
| meta.json | batch, flow, limit, count, created, digests, base digest; what stands past `count` is no part of the spool |
| received | one bit per outcome received |
| position | the last id of the outcome stream that was dealt with |

Names with a '+' beside it belong to no batch id: `+writing...` is a spool being written, `<batch>+lock`
the file that one producer of a batch holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from producer.errors import SpoolError
from worker import codec
from worker.contract import checked_batch

BLOCK = 1_000
"""Items per digest."""

_FLUSH_BYTES = 1 << 20
_WRITING = "+writing."
_STREAM_ID = re.compile(r"\d{1,20}-\d{1,20}")


def digest(data: bytes) -> str:
    """128 bits of blake2b in hex, as `Spool.digests` holds them.

    >>> digest(b"")
    'cae66941d9efbd404e4d88758ea67670'
    """
    return blake2b(data, digest_size=16).hexdigest()


class BatchLock:
    """Held by the one producer that writes or follows a batch in a data directory; a context manager.

    It goes with the process, also by kill -9. Readers need none.

    Raises:
        SpoolError: another producer holds it.
    """

    def __init__(self, data_dir: str | Path, batch: str) -> None:
        home = _batch_dir(data_dir, batch)
        with _sentence(batch):
            _make_batches(home.parent)
            self._fd = os.open(home.with_name(batch + "+lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _flock(self._fd):
                    os.ftruncate(self._fd, 0)
                    os.pwrite(self._fd, str(os.getpid()).encode(), 0)
                    return
                pid = os.pread(self._fd, 20, 0).decode() or "unknown"
            except OSError:
                self.release()
                raise
        self.release()
        raise SpoolError(
            f"batch '{batch}' is in the hands of another producer (pid {pid}); wait until it ends or stop it",
            batch=batch,
        )

    def release(self) -> None:
        """Let the next one have it. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Appender:
    """Writes items and their ends behind those of a directory, and digests every block of them."""

    def __init__(self, home: Path, count: int = 0, end: int = 0, digests: list[str] | None = None) -> None:
        self.count = count
        self.end = end
        self.digests = digests or []
        self._hash = blake2b(digest_size=16)
        self._pending: list[bytes] = []
        self._room = _FLUSH_BYTES
        self._until_block = BLOCK
        self._spool = _open_at(home / "spool", end)
        self._ends = _open_at(home / "ends", count * 8)

    def take_up(self, items: Iterable[tuple[int, bytes]]) -> None:
        """Go on with the digest of a block that already holds these items."""
        for _, encoded in items:
            self._hash.update(encoded)
            self._until_block -= 1

    def add(self, encoded: bytes) -> None:
        self._pending.append(encoded)
        self._room -= len(encoded)
        if self._room <= 0 or len(self._pending) == self._until_block:
            self._flush()

    def _flush(self) -> None:
        ends = list(accumulate(map(len, self._pending), initial=self.end))
        data = b"".join(self._pending)
        self._hash.update(data)
        _write_all(self._spool, data)
        _write_all(self._ends, struct.pack(f"<{len(ends) - 1}Q", *ends[1:]))
        self.count += len(self._pending)
        self.end = ends[-1]
        self._until_block -= len(self._pending)
        self._pending.clear()
        self._room = _FLUSH_BYTES
        if not self._until_block:
            self._close_block()

    def _close_block(self) -> None:
        self.digests.append(self._hash.hexdigest())
        self._hash = blake2b(digest_size=16)
        self._until_block = BLOCK

    def finish(self) -> None:
        """Everything added is on the disk."""
        if self._pending:
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

    Raises:
        SpoolError: the batch has a spool, its id cannot be used, or the disk refuses.
    """

    def __init__(self, data_dir: str | Path, batch: str, flow: str, limit: str) -> None:
        self._home = _batch_dir(data_dir, batch)
        self._about = {"batch": batch, "flow": flow, "limit": limit}
        self._batch = batch
        if self._home.exists():
            raise self._taken()
        with _sentence(batch):
            _make_batches(self._home.parent)
            self._temp, self._alive = _new_writing_dir(self._home.parent)
            self._appender = _Appender(self._temp)
        self._open = True

    @property
    def count(self) -> int:
        """Items added so far."""
        return self._appender.count + len(self._appender._pending)

    def add(self, encoded: bytes) -> None:
        """Append one item, as `checked_params` returned it."""
        try:
            self._appender.add(encoded)
        except OSError as fault:
            self.abandon()
            raise _disk(self._batch, fault) from None

    def finish(self, base: bytes) -> Spool:
        """Put the whole spool on the disk, base included, and make it the batch's."""
        try:
            self._publish(base)
        except OSError as fault:
            if fault.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise self._taken() from None
            raise _disk(self._batch, fault) from None
        finally:
            self.abandon()
        return Spool(self._home)

    def _publish(self, base: bytes) -> None:
        self._appender.finish()
        _write_file(self._temp / "base", base)
        meta = _Meta(
            **self._about,
            count=self._appender.count,
            created=time.time(),
            digests=self._appender.digests,
            base_digest=digest(base),
            complete=True,
        )
        _write_file(self._temp / "meta.json", msgspec.json.encode(meta))
        _fsync_dir(self._temp)
        os.rename(self._temp, self._home)
        _fsync_dir(self._home.parent)

    def abandon(self) -> None:
        """Leave nothing behind. May be called again, and after `finish`."""
        if self._open:
            self._open = False
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

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


@dataclass(frozen=True)
class Comparison:
    """How a new input stands to a spool. `index` is the first item that differs, is new or is missing.

    `rest` holds the items from `index` on if the verdict is "appended", for `Spool.grow`.
    """

    verdict: Literal["same", "appended", "differs"]
    index: int
    rest: Iterator[bytes]


class Spool:
    """A whole spool, read in flat memory. Only the holder of the `BatchLock` calls what writes.

    Attributes:
        batch, flow, limit: as the writer was told.
        count: items.
        created: seconds since 1970.
        digests: one per 1,000 items, the last one may stand for fewer; `base_digest`: of the base.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._use(_read_meta(home))
        self._bits: bytearray | None = None
        self._bits_fd = -1
        with _sentence(self.batch):
            whole = self._end_of(self.count) <= (home / "spool").stat().st_size
        if not whole:
            raise _damaged(self.batch, home)

    @classmethod
    def open(cls, data_dir: str | Path, batch: str) -> Spool:
        """The spool of `batch`; a `SpoolError` if there is none or it is damaged."""
        home = _batch_dir(data_dir, batch)
        if not cls.exists(data_dir, batch):
            raise SpoolError(
                f"batch '{batch}' has no spool in {home.parent}; check the id and the data directory",
                batch=batch,
            )
        return cls(home)

    @staticmethod
    def exists(data_dir: str | Path, batch: str) -> bool:
        """Whether `open` would find a spool."""
        return _batch_dir(data_dir, batch).is_dir()

    def _use(self, meta: _Meta) -> None:
        self._meta = meta
        self.batch = meta.batch
        self.flow = meta.flow
        self.limit = meta.limit
        self.created = meta.created
        self.count = meta.count
        self.digests = meta.digests
        self.base_digest = meta.base_digest

    def base(self) -> bytes:
        """The shared store as the writer was given it."""
        with _sentence(self.batch):
            return (self.home / "base").read_bytes()

    def params(self, index: int) -> dict[str, Any]:
        """The param dict of one item, at the same cost wherever it stands. IndexError: no such item."""
        self._check(index)
        start = self._end_of(index)
        with _sentence(self.batch), open(self.home / "spool", "rb") as spool:
            spool.seek(start)
            data = spool.read(self._end_of(index + 1) - start)
        params: dict[str, Any] = codec.decode(data)
        return params

    def items(self, start: int = 0) -> Generator[tuple[int, bytes], None, None]:
        """Index and encoded params of every item from `start` on."""
        place = self._end_of(min(start, self.count))
        with open(self.home / "spool", "rb", buffering=_FLUSH_BYTES) as spool:
            spool.seek(place)
            for index, end in enumerate(self._ends_from(start), start):
                data = spool.read(end - place)
                if len(data) != end - place:
                    raise _damaged(self.batch, self.home)
                place = end
                yield index, data

    def _ends_from(self, start: int) -> Iterator[int]:
        left = self.count - start
        with open(self.home / "ends", "rb") as ends:
            ends.seek(start * 8)
            while left > 0:
                data = ends.read(8 * min(left, BLOCK))
                if not data or len(data) % 8:
                    raise _damaged(self.batch, self.home)
                yield from struct.unpack(f"<{len(data) // 8}Q", data)
                left -= len(data) // 8

    def _end_of(self, items: int) -> int:
        """Where the first `items` items end."""
        if not items:
            return 0
        with _sentence(self.batch), open(self.home / "ends", "rb", buffering=0) as ends:
            ends.seek(items * 8 - 8)
            data = ends.read(8)
        if len(data) < 8:
            raise _damaged(self.batch, self.home)
        return int.from_bytes(data, "little")

    def compare(self, encoded: Iterable[bytes]) -> Comparison:
        """Whether a new input is the one in the spool, the same with more behind it, or another one.

        Stops at the first difference; a shorter input differs at its end.
        """
        fresh = iter(encoded)
        with closing(self.items()) as stored:
            for index, old in stored:
                if next(fresh, None) != old:
                    return Comparison("differs", index, iter(()))
        extra = next(fresh, None)
        if extra is None:
            return Comparison("same", self.count, iter(()))
        return Comparison("appended", self.count, chain([extra], fresh))

    def grow(self, encoded: Iterable[bytes]) -> None:
        """Append items, all or, if `encoded` raises or the process is killed, none."""
        whole = self.count // BLOCK
        with _sentence(self.batch):
            appender = _Appender(self.home, self.count, self._end_of(self.count), self.digests[:whole])
        with closing(appender):
            appender.take_up(self.items(whole * BLOCK))
            for item in encoded:
                with _sentence(self.batch):
                    appender.add(item)
            with _sentence(self.batch):
                appender.finish()
                meta = msgspec.structs.replace(self._meta, count=appender.count, digests=appender.digests)
                _replace_file(self.home / "meta.json", msgspec.json.encode(meta))
        self._use(meta)
        self._bits = None

    def received(self, index: int) -> bool:
        """Whether the outcome of this item has been marked."""
        self._check(index)
        return bool(self._received[index >> 3] & 1 << (index & 7))

    @property
    def received_count(self) -> int:
        return int.from_bytes(self._received, "little").bit_count()

    def mark_received(self, index: int) -> None:
        """Remember that this item's outcome is dealt with; outlives the process at once.

        It outlives a power cut once `set_position` has returned after it.
        """
        self._check(index)
        bits = self._received
        bits[index >> 3] |= 1 << (index & 7)
        with _sentence(self.batch):
            if self._bits_fd < 0:
                self._bits_fd = os.open(self.home / "received", os.O_RDWR | os.O_CREAT, 0o600)
            os.pwrite(self._bits_fd, bits[index >> 3 : (index >> 3) + 1], index >> 3)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(f"batch '{self.batch}' has no item {index}; it has {self.count:,}")

    @property
    def _received(self) -> bytearray:
        if self._bits is None:
            path = self.home / "received"
            with _sentence(self.batch):
                found = path.read_bytes() if path.exists() else b""
            self._bits = bytearray(found.ljust((self.count + 7) // 8, b"\0"))
        return self._bits

    @property
    def position(self) -> str:
        """The last id of the outcome stream that was dealt with, '0-0' at first."""
        path = self.home / "position"
        with _sentence(self.batch):
            found = path.read_text().strip() if path.exists() else "0-0"
        if not _STREAM_ID.fullmatch(found):
            raise _damaged(self.batch, self.home)
        return found

    def set_position(self, stream_id: str) -> None:
        """Remember how far the outcome stream is dealt with, marks included, safe from a power cut.

        Waits for the disk: meant for about once a second, not for every outcome.
        """
        if not _STREAM_ID.fullmatch(stream_id):
            raise ValueError(f"{stream_id!r} is no id of a stream; pass one such as '1700000000000-0'")
        with _sentence(self.batch):
            if self._bits_fd >= 0:
                os.fsync(self._bits_fd)
            _replace_file(self.home / "position", stream_id.encode())

    def close(self) -> None:
        """May be called again; a closed spool opens what it needs when it is next asked."""
        if self._bits_fd >= 0:
            os.close(self._bits_fd)
            self._bits_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Meta(msgspec.Struct, frozen=True):
    batch: str
    flow: str
    limit: str
    count: int
    created: float
    digests: list[str]
    base_digest: str
    complete: bool


def _read_meta(home: Path) -> _Meta:
    with _sentence(home.name):
        data = (home / "meta.json").read_bytes()
    try:
        meta = msgspec.json.decode(data, type=_Meta)
    except ValueError:
        raise _damaged(home.name, home) from None
    if meta.batch != home.name or not meta.complete:
        raise _damaged(home.name, home)
    return meta


def _batch_dir(data_dir: str | Path, batch: str) -> Path:
    checked_batch(batch)
    if batch in (".", ".."):
        raise SpoolError(f"batch id {batch!r} cannot be used: it names a directory; use another", batch=batch)
    return Path(data_dir) / "batches" / batch


def _make_batches(batches: Path) -> None:
    batches.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    batches.mkdir(mode=0o700, exist_ok=True)


def _new_writing_dir(batches: Path) -> tuple[Path, int]:
    """A directory to write in and the descriptor whose flock says that its writer lives."""
    turn = os.open(batches, os.O_RDONLY)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)  # nobody sweeps between the making of a directory and its flock
        for left in batches.glob(_WRITING + "*"):
            _sweep(left)
        temp = Path(tempfile.mkdtemp(prefix=_WRITING, dir=batches))
        alive = os.open(temp, os.O_RDONLY)
        _flock(alive)
        return temp, alive
    finally:
        os.close(turn)


def _sweep(left: Path) -> None:
    try:
        fd = os.open(left, os.O_RDONLY)
    except FileNotFoundError:  # its writer has just finished
        return
    try:
        if _flock(fd):
            shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(fd)


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_at(path: Path, size: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, size)
    os.lseek(fd, size, os.SEEK_SET)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _write_file(path: Path, data: bytes) -> None:
    fd = _open_at(path, 0)
    try:
        _write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace_file(path: Path, data: bytes) -> None:
    new = path.with_name(path.name + "+new")
    _write_file(new, data)
    os.replace(new, path)
    _fsync_dir(path.parent)


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _sentence(batch: str) -> Iterator[None]:
    """What the file system refuses, said as a `SpoolError`."""
    try:
        yield
    except OSError as fault:
        raise _disk(batch, fault) from None


def _disk(batch: str, fault: OSError) -> SpoolError:
    reason = (fault.strerror or str(fault)).lower()
    place = f" ({fault.filename})" if fault.filename else ""
    return SpoolError(
        f"the spool of batch '{batch}' cannot be used: {reason}{place}; mend that and start again",
        batch=batch,
    )


def _damaged(batch: str, home: Path) -> SpoolError:
    return SpoolError(
        f"the spool of batch '{batch}' is damaged: {home}; delete that directory and enqueue under a new batch id",
        batch=batch,
    )

"""Files as the manifest of a batch needs them: for the owner only, whole or not there, faults in a sentence."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from producer.errors import SpoolError
from worker.contract import checked_batch

if TYPE_CHECKING:
    from typing_extensions import Buffer


def batch_dir(data_dir: str | Path, batch: str) -> Path:
    """Where the manifest of a batch stands. Raises `SpoolError` or `LimitsError` for an id that cannot be."""
    checked_batch(batch)
    if batch in (".", ".."):
        raise SpoolError(f"batch id {batch!r} cannot be used: it names a directory; use another", batch=batch)
    return Path(data_dir) / "batches" / batch


def make_batches(batches: Path) -> None:
    batches.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    batches.mkdir(mode=0o700, exist_ok=True)


def flock(fd: int) -> bool:
    """Take the lock of an open file, without waiting; it goes with the process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_at(path: Path, size: int) -> int:
    """Open for writing at `size`; what stands past it is cut off."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        cut(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def cut(fd: int, size: int) -> None:
    """Go on at `size`; what stands past it is cut off."""
    os.ftruncate(fd, size)
    os.lseek(fd, size, os.SEEK_SET)


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_file(path: Path, data: bytes) -> None:
    fd = open_at(path, 0)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


class ReadAt(io.RawIOBase):
    """An open file, read from a place of its own on; it stays open."""

    def __init__(self, fd: int, place: int) -> None:
        self._fd = fd
        self._place = place

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        data = os.pread(self._fd, len(view), self._place)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def replace_file(path: Path, data: bytes) -> None:
    """Put other content in a file's place, all of it at once, safe from a power cut."""
    new = path.with_name(path.name + "+new")
    write_file(new, data)
    os.replace(new, path)
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def said(batch: str) -> Iterator[None]:
    """What the file system refuses, said as a `SpoolError`."""
    try:
        yield
    except OSError as fault:
        raise refused(batch, fault) from None


def refused(batch: str, fault: OSError) -> SpoolError:
    reason = (fault.strerror or str(fault)).lower()
    place = f" ({fault.filename})" if fault.filename else ""
    return SpoolError(
        f"the spool of batch '{batch}' cannot be used: {reason}{place}; mend that and start again",
        batch=batch,
    )


def damaged(batch: str, home: Path) -> SpoolError:
    return SpoolError(
        f"the spool of batch '{batch}' is damaged: {home}; delete that directory and enqueue under a new batch id",
        batch=batch,
    )

"""The lock that one producer of a batch holds, so that its manifest has one writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from producer.disk import batch_dir, flock, make_batches, said
from producer.errors import SpoolError


class InOtherHands(SpoolError):
    """Another producer writes or follows the batch."""


class BatchLock:
    """Held by the one producer that writes or follows a batch in a data directory; a context manager.

    It goes with the process, also by kill -9. Readers need none.

    Raises:
        InOtherHands: another producer holds it.
        SpoolError: the disk refuses.
    """

    def __init__(self, data_dir: str | Path, batch: str) -> None:
        home = batch_dir(data_dir, batch)
        path = home.with_name(batch + "+lock")
        with said(batch):
            make_batches(home.parent)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                while flock(self._fd):
                    if _is_at(path, self._fd):
                        os.ftruncate(self._fd, 0)
                        os.pwrite(self._fd, str(os.getpid()).encode(), 0)
                        return
                    self.release()  # who held it has deleted it with the batch
                    self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                pid = os.pread(self._fd, 20, 0).decode() or "unknown"
            except OSError:
                self.release()
                raise
        self.release()
        raise InOtherHands(
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


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file still stands there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False

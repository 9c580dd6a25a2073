"""The journal of a batch: every outcome received and every retry asked for, here or elsewhere, as they came.

With the spool it is the manifest that survives a Redis that lost its data: it says which items have
ended, and how. An outcome is one of an item and a retry (0 = the first enqueue, 1 = retried once, ...);
the first outcome of each counts, so one that Redis recorded again after a loss changes nothing.

A record is a header (little-endian) and its data: outcome as the worker encoded it, or epoch. A record
that a kill cut short is cut off when the journal is next opened for writing.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from producer.disk import ReadAt, open_at, said, write_all
from producer.follow import Ended
from worker.contract import STATUSES

_HEAD = struct.Struct("<IIBBHQQQQ")  # crc of the rest, size, kind, status, retry, index, attempt, position
_OUTCOME, _RETRY, _EPOCH = 1, 2, 3
_CODES = {status: code for code, status in enumerate(STATUSES, 1)}
_READ_BYTES = 1 << 20
START = "0-0"


@dataclass(frozen=True)
class Retry:
    """An item that is to run again: its retry number and the status it had ended with."""

    index: int
    number: int
    before: str


def _place(position: str) -> tuple[int, int]:
    """Where an entry stands in its stream, as a value that can be compared."""
    ms, _, number = position.partition("-")
    return int(ms), int(number or 0)


class Journal:
    """What is known of a batch's items, one byte each in memory. Only the holder of the lock writes.

    Attributes:
        end: size of the file, in bytes.
        position: the last stream id received in this epoch; `epoch`: of the batch in Redis, '' = none yet.
    """

    def __init__(self, home: Path, batch: str, count: int, *, write: bool = True) -> None:
        self._path = home / "journal"
        self._batch = batch
        self._statuses = bytearray(count)
        self._retries: dict[int, int] = {}
        self._before: dict[int, str] = {}
        self.epoch = ""
        self.position = START
        self.end = 0
        self._fd = -1
        for record in self._read(0):
            self._note(record)
        if write:
            with said(batch):
                self._fd = open_at(self._path, self.end)

    # --- what is known ------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """The batch has that many items now."""
        self._statuses.extend(bytes(max(0, count - len(self._statuses))))

    def status(self, index: int) -> str:
        """How the item ended, '' while it has not."""
        code = self._statuses[index]
        return STATUSES[code - 1] if code else ""

    def retry(self, index: int) -> int:
        """How often a retry of the item was asked for."""
        return self._retries.get(index, 0)

    def counts(self) -> dict[str, int]:
        """How many items ended, by status."""
        found = {status: self._statuses.count(code) for status, code in _CODES.items()}
        return {status: count for status, count in found.items() if count}

    @property
    def pending(self) -> int:
        """Items that have not ended."""
        return self._statuses.count(0)

    def unended(self) -> Iterator[int]:
        """Indexes of the items that have not ended, ascending."""
        index = self._statuses.find(0)
        while index >= 0:
            yield index
            index = self._statuses.find(0, index + 1)

    def ended_with(self, statuses: Iterable[str]) -> Iterator[int]:
        """Indexes of the items that ended with one of these statuses, ascending."""
        codes = {_CODES[status] for status in statuses}
        return (index for index, code in enumerate(self._statuses) if code in codes)

    def retries(self) -> list[Retry]:
        """Retries that were asked for and have not ended."""
        return [
            Retry(index, self._retries[index], before)
            for index, before in self._before.items()
            if not self._statuses[index]
        ]

    @property
    def written_at(self) -> float:
        """When it was last written to, seconds since 1970; 0 = never."""
        return self._path.stat().st_mtime if self._path.exists() else 0.0

    def bitmap(self) -> bytes:
        """One bit per item that has ended, as Redis numbers bits."""
        bits = "".join("1" if code else "0" for code in self._statuses)
        return b"".join(
            int(bits[n : n + 8].ljust(8, "0"), 2).to_bytes(1, "big") for n in range(0, len(bits), 8)
        )

    # --- writing ------------------------------------------------------------------------------------

    def take(self, ended: Iterable[Ended]) -> list[Ended]:
        """Write down the outcomes that are new; returns those. They outlive the process at once."""
        fresh, data = [], bytearray()
        for each in ended:
            if self._is_new(each):
                if each.retry > self.retry(each.index):
                    data += self._asked(each.index, each.retry)
                record = _Record(
                    _OUTCOME, each.index, each.retry, each.status, each.attempt, each.position, each.data
                )
                data += record.packed()
                self._note(record)
                fresh.append(each)
        self._append(bytes(data))
        return fresh

    def _is_new(self, each: Ended) -> bool:
        if not 0 <= each.index < len(self._statuses):
            return False
        expected = self.retry(each.index)
        if each.retry < 0:  # its payload was gone or not read, so nobody could say
            each.retry = expected
        if each.retry > expected:  # a producer with another data directory has asked for it
            return True
        return each.retry == expected and not self._statuses[each.index]

    def ask_again(self, indexes: Iterable[int]) -> list[Retry]:
        """Write down that these items, which have ended, are to run again."""
        asked, data = [], bytearray()
        for index in indexes:
            asked.append(Retry(index, self.retry(index) + 1, self.status(index)))
            data += self._asked(index, asked[-1].number)
        self._append(bytes(data))
        return asked

    def learn(self, retries: Iterable[tuple[int, int]]) -> None:
        """Write down retries that others have asked for: item, and how often it has been retried."""
        data = bytearray()
        for index, number in retries:
            if index < len(self._statuses) and number > self.retry(index):
                data += self._asked(index, number)
        self._append(bytes(data))

    def _asked(self, index: int, number: int) -> bytes:
        record = _Record(_RETRY, index, number, self.status(index), 0, START, b"")
        self._note(record)
        return record.packed()

    def begin(self, epoch: str) -> None:
        """The batch stands in Redis under this epoch from now on; its stream is read from the start."""
        record = _Record(_EPOCH, 0, 0, "", 0, START, epoch.encode())
        self._append(record.packed())
        self._note(record)

    def _append(self, data: bytes) -> None:
        if data:
            with said(self._batch):
                write_all(self._fd, data)

    def sync(self) -> None:
        """What was written is safe from a power cut."""
        with said(self._batch):
            os.fsync(self._fd)

    # --- reading ------------------------------------------------------------------------------------

    def outcomes(self, start: int = 0) -> Iterator[tuple[Ended, int]]:
        """Outcomes from that byte on, each with the byte after it."""
        for record in self._read(start):
            if record.kind == _OUTCOME:
                yield record.ended(), record.end

    def latest(self) -> Iterator[Ended]:
        """The outcome that counts of each item that has ended, in the order of receipt."""
        for ended, _ in self.outcomes():
            if self._statuses[ended.index] and ended.retry == self.retry(ended.index):
                yield ended

    def _read(self, start: int) -> Iterator[_Record]:
        """Whole records; what a kill left of one ends it."""
        if self._fd < 0 and not self._path.exists():
            return
        with said(self._batch), self._from(start) as file:
            place = start
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                crc, size = _HEAD.unpack(head)[:2]
                data = file.read(size)
                if len(data) != size or zlib.crc32(data, zlib.crc32(head[4:])) != crc:
                    return
                place += _HEAD.size + size
                yield _Record.unpacked(head, data, place)

    def _from(self, start: int) -> BinaryIO:
        """The file from that byte on: the very one that is being written, also once its name is gone."""
        if self._fd >= 0:
            return io.BufferedReader(ReadAt(self._fd, start), _READ_BYTES)
        file = io.FileIO(self._path)
        file.seek(start)
        return io.BufferedReader(file, _READ_BYTES)

    def _note(self, record: _Record) -> None:
        if record.kind == _EPOCH:
            self.epoch, self.position = record.data.decode(), START
        elif record.index < len(self._statuses):
            if record.kind == _OUTCOME:
                self._statuses[record.index] = _CODES[record.status]
                # a stream that is read again from its start brings older ones
                self.position = max(self.position, record.position, key=_place)
            else:
                self._statuses[record.index] = 0
                self._retries[record.index] = record.retry
                self._before[record.index] = record.status
        self.end = record.end or self.end + _HEAD.size + len(record.data)

    def close(self) -> None:
        """May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Record:
    kind: int
    index: int
    retry: int
    status: str
    attempt: int
    position: str
    data: bytes
    end: int = 0

    def packed(self) -> bytes:
        ms, _, number = self.position.partition("-")
        head = _HEAD.pack(
            0,
            len(self.data),
            self.kind,
            _CODES.get(self.status, 0),
            self.retry,
            self.index,
            self.attempt,
            int(ms),
            int(number),
        )
        return struct.pack("<I", zlib.crc32(self.data, zlib.crc32(head[4:]))) + head[4:] + self.data

    @classmethod
    def unpacked(cls, head: bytes, data: bytes, end: int) -> _Record:
        _, _, kind, code, retry, index, attempt, ms, number = _HEAD.unpack(head)
        return cls(
            kind, index, retry, STATUSES[code - 1] if code else "", attempt, f"{ms}-{number}", data, end
        )

    def ended(self) -> Ended:
        return Ended(self.index, self.retry, self.attempt, self.status, self.data, self.position)

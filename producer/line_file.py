"""The output file: one line per attempt that ended, JSON lines or, by its name, CSV.

The file follows the batch's journal: how far it has come (a byte of the journal, a size of the file) is
noted after each write, in one small write. A kill at any byte therefore leaves lines past the noted
size, which the next run cuts off and writes again: neither a half nor a second line.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import struct
import zlib
from hashlib import sha256
from pathlib import Path

from producer.disk import batch_dir, cut, flock, said, write_all
from producer.errors import InputError
from producer.follow import Ended
from producer.journal import Journal
from producer.lines import HEADER, csv_line, json_line, record_of
from producer.spool import Spool

_WRITTEN = struct.Struct("<QQII")  # journal's byte, file's size, length and crc of what it ends with
_TOGETHER = 1_000
_TAIL = 4_096


class LineFile:
    """Appends to `path` the lines of what its batch's journal has gained.

    A file that this batch was writing is gone on with; any other content is replaced: `check_output`
    comes first where a user named the file.

    Raises:
        InputError: the file cannot be written, or another run writes it.
        SpoolError: how far it has come cannot be noted.
    """

    def __init__(self, path: Path, spool: Spool, journal: Journal) -> None:
        self.path = path
        self._spool = spool
        self._journal = journal
        self._csv = is_csv(path)
        self._fd = self._note_fd = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            # before it is cut: what another run writes there is not ours
            if not _alone_in(self._fd):
                raise _in_use(self.path)
            place, size = self._known()
            cut(self._fd, size)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        with said(self._spool.batch):
            # the note of before stays until it is replaced: a kill here must not make the file a stranger's
            note = _note_of(self.path, self._spool.home)
            self._note_fd = os.open(note, os.O_RDWR | os.O_CREAT, 0o600)
        self._place, self._size, self._tail = place, size, _tail(self.path, size)
        self._note()
        if self._csv and not size:
            self._write([HEADER], place)

    def catch_up(self) -> None:
        """Write the lines of everything the journal has gained."""
        lines, end = [], self._place
        for ended, end in self._journal.outcomes(self._place):
            lines.append(self._line(ended))
            if len(lines) == _TOGETHER:
                self._write(lines, end)
                lines = []
        if lines:
            self._write(lines, end)

    def close(self) -> None:
        """May be called again."""
        for fd in (self._fd, self._note_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._note_fd = -1

    def _line(self, ended: Ended) -> bytes:
        record = record_of(ended, self._spool.params(ended.index))
        return csv_line(record) if self._csv else json_line(record)

    def _write(self, lines: list[bytes], place: int) -> None:
        data = b"".join(lines)
        try:
            write_all(self._fd, data)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._size += len(data)
        self._tail = (self._tail + data)[-_TAIL:]
        self._place = place
        self._note()

    def _note(self) -> None:
        note = _WRITTEN.pack(self._place, self._size, len(self._tail), zlib.crc32(self._tail))
        with said(self._spool.batch):
            os.pwrite(self._note_fd, note, 0)

    def _known(self) -> tuple[int, int]:
        """The journal's byte and the file's size up to which this batch has written this very file."""
        known = _known(self.path, self._spool.home)
        return known if known is not None and known[0] <= self._journal.end else (0, 0)


def _known(path: Path, home: Path) -> tuple[int, int] | None:
    """How far the batch of that manifest has written this very file, None if it did not."""
    try:
        place, size, length, crc = _WRITTEN.unpack(_note_of(path, home).read_bytes())
    except (OSError, struct.error):
        return None
    tail = _tail(path, size)
    return (place, size) if len(tail) == length and zlib.crc32(tail) == crc else None


def _note_of(path: Path, home: Path) -> Path:
    """Each file has a note of its own: the batch may write one, then another, then the first one again."""
    return home / f"written-{sha256(os.fsencode(path.resolve())).hexdigest()[:16]}"


def _tail(path: Path, size: int) -> bytes:
    """What the first `size` bytes of a file end with."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < size:
                return b""
            file.seek(max(0, size - _TAIL))
            return file.read(min(size, _TAIL))
    except OSError:
        return b""


def is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def own_output(data_dir: Path, batch: str) -> Path:
    """Where a batch's lines go if nobody names a file."""
    return data_dir / "output" / f"{batch}.jsonl"


def check_output(path: Path, data_dir: Path, batch: str) -> None:
    """Refuse a path that could not be written, or a file with content that this batch has not written.

    To be asked before anything is enqueued; what stands there stays, and no folder is made.

    Raises:
        InputError: names the path and why.
    """
    if own := path == own_output(data_dir, batch):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"POCKETFLEET_DATA_DIR={str(data_dir)!r} cannot be used ({error.strerror}): set it to a directory "
                "that you may write to",
                source=str(data_dir),
            ) from None
    _check_writable(path)
    if own or not path.is_file() or not path.stat().st_size:
        return
    if _known(path, batch_dir(data_dir, batch)) is None:
        raise InputError(
            f"--output {path} exists, and batch {batch} did not write it: name another file, or delete it",
            source=str(path),
        )


def _check_writable(path: Path) -> None:
    real = Path(os.path.realpath(path))  # the file that a link leads to may be new
    new = not os.path.exists(real)  # Path.exists may raise
    if new and not os.path.lexists(real.parent):
        folder = path.parent
        raise InputError(
            f"--output {path} cannot be written: there is no folder {folder}; make it first (mkdir -p "
            f"{shlex.quote(str(folder))})",
            source=str(path),
        )
    if not new and not os.path.isfile(real) and not os.path.isdir(real):
        raise InputError(f"--output {path} is a device or a pipe: name a file", source=str(path))
    try:
        real.open("ab").close()
    except OSError as error:
        raise _unwritable(path, error) from None
    if new:
        with contextlib.suppress(OSError):  # another run that asks the same has done it
            real.unlink()


def _alone_in(fd: int) -> bool:
    """Whether no other run has the open file; ours from now on, until it is closed."""
    try:
        return flock(fd)
    except OSError:  # a file system without locks
        return True


def _in_use(path: Path) -> InputError:
    return InputError(f"--output {path} is being written by another run: name another file", source=str(path))


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--output {path} cannot be written: {error.strerror}", source=str(path))

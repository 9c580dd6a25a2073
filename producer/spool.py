"""The spool of a batch: every encoded param dict on disk.

A batch's manifest is the directory (0700, files 0600) `batches/<batch id>/` in the data directory:

| file | holds |
| --- | --- |
| spool | the encoded params, one after the other |
| ends | where each item ends in `spool`, 8 bytes little-endian per item |
| base | the caller's shared store, encoded once |
| keys | with `--key`: a database from a key's digest to its item's index |
| meta.json | batch, flow, limit, count, created, digests, base digest; what stands past `count` is no part of the spool |
| journal | every outcome received and every retry asked for, see `producer.journal` |
| written-* | how far the outcomes stand in an output file, one note per file, see `producer.line_file` |

Names with a '+' beside it belong to no batch id: `+writing...` is a spool being written, `<batch>+lock`
the file that one producer of a batch holds.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import msgspec

from producer.disk import batch_dir, damaged, said
from producer.errors import SpoolError
from worker import codec

BLOCK = 1_000
"""Items per digest."""

_READ_BYTES = 1 << 20


def digest(data: bytes) -> str:
    """128 bits of blake2b in hex, as `Spool.digests` holds them.

    >>> digest(b"")
    'cae66941d9efbd404e4d88758ea67670'
    """
    return blake2b(data, digest_size=16).hexdigest()


class Meta(msgspec.Struct, frozen=True):
    """What `meta.json` holds. `key` names the params' entry that identifies an item, '' = its position."""

    batch: str
    flow: str
    limit: str
    count: int
    created: float
    digests: list[str]
    base_digest: str
    complete: bool
    key: str = ""
    weight: float = 1.0


class Spool:
    """A whole spool, read in flat memory; `producer.spool_writer` writes it.

    Attributes:
        batch, flow, limit, key, weight: as the writer was told.
        count: items.
        created: seconds since 1970.
        digests: one per 1,000 items, the last one may stand for fewer; `base_digest`: of the base.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()  # with --workers 0 nodes may go to another directory
        self._spool = self._ends = -1
        self.use(_read_meta(home))
        with said(self.batch):
            whole = self.end_of(self.count) <= (home / "spool").stat().st_size
        if not whole:
            self.close()
            raise damaged(self.batch, home)

    @classmethod
    def open(cls, data_dir: str | Path, batch: str) -> Spool:
        """The spool of `batch`; a `SpoolError` if there is none or it is damaged."""
        home = batch_dir(data_dir, batch)
        if not cls.exists(data_dir, batch):
            raise SpoolError(
                f"batch '{batch}' has no spool in {home.parent}; check the id and the data directory",
                batch=batch,
            )
        return cls(home)

    @staticmethod
    def exists(data_dir: str | Path, batch: str) -> bool:
        """Whether `open` would find a spool."""
        with said(batch):
            return batch_dir(data_dir, batch).is_dir()

    def use(self, meta: Meta) -> None:
        """Go on as `meta` says: more items stand in the files now."""
        self.meta = meta
        self.batch = meta.batch
        self.flow = meta.flow
        self.limit = meta.limit
        self.created = meta.created
        self.count = meta.count
        self.digests = meta.digests
        self.base_digest = meta.base_digest
        self.key = meta.key
        self.weight = meta.weight

    def base(self) -> bytes:
        """The shared store as the writer was given it."""
        with said(self.batch):
            data = (self.home / "base").read_bytes()
        if digest(data) != self.base_digest:
            raise damaged(self.batch, self.home)
        return data

    def encoded(self, index: int) -> bytes:
        """The encoded params of one item, at the same cost wherever it stands. IndexError: no such item."""
        if not 0 <= index < self.count:
            raise IndexError(f"batch '{self.batch}' has no item {index}; it has {self.count:,}")
        start = self.end_of(index)
        size = self.end_of(index + 1) - start
        with said(self.batch):
            if self._spool < 0:
                self._spool = os.open(self.home / "spool", os.O_RDONLY)
            data = os.pread(self._spool, size, start)
        if len(data) != size:
            raise damaged(self.batch, self.home)
        return data

    def params(self, index: int) -> dict[str, Any]:
        """The param dict of one item. IndexError: no such item."""
        params: dict[str, Any] = codec.decode(self.encoded(index))
        return params

    def items(self, start: int = 0) -> Generator[tuple[int, bytes], None, None]:
        """Index and encoded params of every item from `start` on."""
        place = self.end_of(min(start, self.count))
        with open(self.home / "spool", "rb", buffering=_READ_BYTES) as spool:
            spool.seek(place)
            for index, end in enumerate(self._ends_from(start), start):
                data = spool.read(end - place)
                if len(data) != end - place:
                    raise damaged(self.batch, self.home)
                place = end
                yield index, data

    def _ends_from(self, start: int) -> Iterator[int]:
        left = self.count - start
        with open(self.home / "ends", "rb") as ends:
            ends.seek(start * 8)
            while left > 0:
                data = ends.read(8 * min(left, BLOCK))
                if not data or len(data) % 8:
                    raise damaged(self.batch, self.home)
                yield from struct.unpack(f"<{len(data) // 8}Q", data)
                left -= len(data) // 8

    def end_of(self, items: int) -> int:
        """Where the first `items` items end."""
        if not items:
            return 0
        with said(self.batch):
            if self._ends < 0:
                self._ends = os.open(self.home / "ends", os.O_RDONLY)
            data = os.pread(self._ends, 8, items * 8 - 8)
        if len(data) < 8:
            raise damaged(self.batch, self.home)
        return int.from_bytes(data, "little")

    def digest_of(self, start: int, end: int) -> str:
        """The digest of the items from `start` up to `end`, as `digests` would hold it for a block of them."""
        state = blake2b(digest_size=16)
        for index, encoded in self.items(start):
            if index == end:
                break
            state.update(encoded)
        return state.hexdigest()

    def close(self) -> None:
        """May be called again; a closed spool opens what it needs when it is next asked."""
        for fd in (self._spool, self._ends):
            if fd >= 0:
                os.close(fd)
        self._spool = self._ends = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ends"):
            self.close()


def _read_meta(home: Path) -> Meta:
    with said(home.name):
        data = (home / "meta.json").read_bytes()
    try:
        meta = msgspec.json.decode(data, type=Meta)
    except ValueError:
        raise damaged(home.name, home) from None
    if meta.batch != home.name or not meta.complete:
        raise damaged(home.name, home)
    return meta

"""What the command line brings: `--set`, `--shared` and the files of `--params`."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from producer.errors import InputError
from producer.strict_json import NotJson, read_json

LONGEST_LINE = 16 * 1024 * 1024
STDIN = "-"

_Reader = Callable[[Iterator[tuple[int, bytes]], str], Iterator[dict[str, Any]]]
_BOM = b"\xef\xbb\xbf"


def parse_set(settings: Iterable[str]) -> dict[str, Any]:
    """The entries of several `--set key=JSON`, in their order.

    >>> parse_set(["user_ids=[1,2,3]", 'name="bob"'])
    {'user_ids': [1, 2, 3], 'name': 'bob'}

    Raises:
        InputError: no '=', no key, a key given twice, or a value that is not JSON.
    """
    shared: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        shown = f"--set {_shown(setting)}"
        if not equals or not key:
            raise InputError(f"{shown}: write it as --set key=VALUE, VALUE being JSON", source="--set")
        if key in shared:
            raise InputError(f"{shown}: {key!r:.80} is set twice; keep one", source="--set")
        try:
            shared[key] = read_json(text)
        except NotJson as fault:
            mend = _set_mend(key, text)
            sentence = f"{shown}: {_shown(repr(text))} is not JSON; {mend}"
            if fault.ours:
                sentence = f"{shown}: {fault}"
            raise InputError(sentence, source="--set") from None
    return shared


def _set_mend(key: str, text: str) -> str:
    constant = {"True": "true", "False": "false", "None": "null"}.get(text)
    if constant:
        return f"JSON writes it --set {shlex.quote(f'{key}={constant}')}"
    if text[:1] in ("[", "{", '"'):
        example = shlex.quote(key + '=["a", 1]')
        return f"the shell eats double quotes, so put single ones around all of it: --set {example}"
    quoted = json.dumps(text, ensure_ascii=False)
    return f"text needs quotes: --set {_shown(shlex.quote(f'{key}={quoted}'))}"


def read_shared(path: str) -> dict[str, Any]:
    """The shared store from a file that holds one JSON object; '-' reads standard input.

    Raises:
        InputError: the file cannot be read, or its text at line and column is not such an object.
    """
    with _opened(path) as (file, name):
        data = file.read().removeprefix(_BOM)
    if not data.strip():
        raise InputError(f"{name} is empty; it must hold one JSON object", source=name)
    value = _json_of(data, name, 0)
    if not isinstance(value, dict):
        raise InputError(f"{name} holds {_kind(value)}; it must hold one JSON object", source=name)
    return value


def merged_shared(from_set: dict[str, Any], from_file: dict[str, Any]) -> dict[str, Any]:
    """Both sources as one shared store; a key in both is an `InputError`."""
    for key in from_set:
        if key in from_file:
            raise InputError(
                f"{key!r:.80} is given by --set and by --shared; keep one of them", source="--set"
            )
    return {**from_file, **from_set}


def read_params(path: str) -> Iterator[dict[str, Any]]:
    """The param dicts of a `.jsonl`/`.ndjson` or `.csv` file, one by one, in flat memory.

    '-' reads JSON lines from standard input. Blank lines are skipped; cells of a CSV are text. A wrong
    name is refused by this call, a bad line when the iteration reaches it.

    Raises:
        InputError: with the file, the line's number and the reason.
    """
    suffix = ".jsonl" if path == STDIN else Path(path).suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".csv"):
        raise InputError(f"{path!r}: cannot tell its format; name it .jsonl, .ndjson or .csv", source=path)
    _check_path(path)
    return _read_items(path, _csv_items if suffix == ".csv" else _json_items)


def may_block(path: str) -> bool:
    """Whether a read from it may wait for somebody, as from a pipe or a terminal."""
    try:
        return not stat.S_ISREG((os.fstat(sys.stdin.fileno()) if path == STDIN else os.stat(path)).st_mode)
    except (OSError, AttributeError):
        return False


def _read_items(path: str, reader: _Reader) -> Iterator[dict[str, Any]]:
    with _opened(path) as (file, name):
        empty = True
        for item in reader(_lines(file, name), name):
            empty = False
            yield item
    if empty:
        raise InputError(f"{name} holds no items; write one per line", source=name)


def _json_items(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[dict[str, Any]]:
    for number, line in lines:
        if not line or line.isspace():
            continue
        item = _json_of(line.rstrip(b"\r\n"), name, number)
        if not isinstance(item, dict):
            _bad_line(name, number, f"holds {_kind(item)}; write one JSON object per line")
        yield item


def _csv_items(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[dict[str, Any]]:
    rows = _csv_rows(lines, name)
    number, header = next(rows, (0, []))
    _check_header(header, name, number)
    for number, row in rows:
        if len(row) != len(header):
            _bad_line(name, number, f"cells: {len(row)}, in the header {len(header)}; give each row as many")
        yield dict(zip(header, row, strict=True))


def _csv_rows(lines: Iterator[tuple[int, bytes]], name: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, with the number of the line on which it begins."""
    csv.field_size_limit(max(LONGEST_LINE, csv.field_size_limit()))  # else a cell may have 131,072 characters
    reader = csv.reader((_text(line, name, number) for number, line in lines), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as fault:
            reason = "a bare carriage return" if "new-line" in str(fault) else str(fault)
            _bad_line(name, number, f"the row that begins here is not CSV ({reason}); check its quotes")
        if row is None:
            return
        if row:
            yield number, row


def _check_header(header: list[str], name: str, number: int) -> None:
    seen: set[str] = set()
    for column, title in enumerate(header, 1):
        if not title.strip():
            _bad_line(name, number, f"column {column} of the header has no name; name every column")
        if title in seen:
            _bad_line(name, number, f"the header names {title!r:.80} twice; use each name once")
        seen.add(title)
    if len(header) == 1 and any(sign in header[0] for sign in ";\t"):
        _bad_line(name, number, f"the header {header[0]!r:.80} has no comma; separate cells by commas")


def _json_of(data: bytes, name: str, number: int) -> Any:
    """The value of `data`; `number` is its line in the file, 0 if it is the whole file."""
    text = _text(data, name, number)
    try:
        return read_json(text)
    except NotJson as fault:
        line = number or fault.line
        one = "one JSON object per line" if number else "one JSON object"
        reason = str(fault) if fault.ours else f"not JSON ({fault}); write {one}"
        _bad_line(name, line, reason, column=fault.column)


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], str]]:
    """The file and the name that sentences give it; standard input is left open."""
    if path == STDIN:
        yield _stdin(), "standard input"
        return
    _check_path(path)
    try:
        with open(path, "rb") as file:
            yield file, _shown(path)
    except OSError as fault:
        raise InputError(f"{_shown(path)}: {_reason(fault)}; check the file", source=path) from None


def _stdin() -> IO[bytes]:
    """Standard input, through a buffer of its own: Python's cannot be given up by a thread that reads it."""
    if sys.stdin is None:
        raise InputError("standard input is closed; pipe the items in, or name a file", source=STDIN)
    try:
        return open(sys.stdin.buffer.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:  # a program has put something else in its place
        return sys.stdin.buffer


def _check_path(path: str) -> None:
    if path == STDIN:
        return
    try:
        directory = stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError) as fault:
        raise InputError(f"{_shown(path)}: {_reason(fault)}; check its path", source=path) from None
    if directory:
        raise InputError(f"{_shown(path)}: is a directory; name a file in it", source=path)


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, ends included, the byte order mark taken off; a line never fills the memory."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            _bad_line(name, number, f"longer than {LONGEST_LINE:,} bytes; write one item per line")
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _text(data: bytes, name: str, number: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        line = number or data.count(b"\n", 0, fault.start) + 1
        _bad_line(name, line, "not UTF-8 text; save the file as UTF-8")


def _bad_line(name: str, number: int, problem: str, column: int = 0) -> NoReturn:
    place = f" line {number}" if number else ""
    if column:
        place += f", column {column}"
    raise InputError(f"{name}{place}: {problem}", source=name, line=number)


def _kind(value: object) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _reason(fault: Exception) -> str:
    return (getattr(fault, "strerror", None) or str(fault)).lower()


def _shown(text: str) -> str:
    """`text` fit for one line: cut at 200, control characters written out."""
    cut = text if len(text) <= 200 else text[:197] + "..."
    return cut if cut.isprintable() else repr(cut)

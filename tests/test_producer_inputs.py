"""What enters from the command line, and what each refusal says."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import sys
import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.batch import as_async
from producer.errors import InputError, ParamsError
from producer.inputs import merged_shared, parse_set, read_params, read_shared
from producer.params import checked_params
from worker import codec

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


def _nested(levels: int) -> list[Any]:
    nest: list[Any] = []
    for _ in range(levels):
        nest = [nest]
    return nest


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), _values, max_size=5))
def test_checked_params_come_back_equal(params: dict[str, Any]) -> None:
    assert codec.same(params, codec.decode(checked_params(0, params)))


def test_a_tuple_arrives_as_a_list() -> None:
    assert codec.decode(checked_params(0, {"pair": (1, (2,))})) == {"pair": [1, [2]]}


def test_keys_below_the_top_may_be_numbers() -> None:
    assert codec.decode(checked_params(0, {"by_id": {1: "a", 2: {3: None}}})) == {
        "by_id": {1: "a", 2: {3: None}}
    }


class _Text(str):
    pass


@pytest.mark.parametrize(
    ("params", "path", "problem"),
    [
        ({"user": {1}}, "'user'", ": 'user' is a set, which would arrive as a list; pass a list"),
        (
            {"a": {"b": [1, float("nan")]}},
            "'a'['b'][1]",
            ": 'a'['b'][1] is NaN, which is not equal to itself; pass None",
        ),
        ({"a": float("nan")}, "'a'", ": 'a' is NaN, which is not equal to itself; pass None"),
        ({"a": 2**64}, "'a'", ": 'a' is an integer past 64 bits; pass it as text"),
        ({"a": ["\ud800"]}, "'a'[0]", ": 'a'[0] holds a lone surrogate, which is not text"),
        ({1: 2}, "", ": the key 1 is of type int, not str; use text keys"),
        ({_Text("a"): 2}, "", ": the key 'a' is of type _Text, not str; use text keys"),
        ({"\ud800": 2}, "", ": it has the key '\\ud800', which holds a lone surrogate; use text keys"),
        (
            {"a": {"\ud800": 2}},
            "'a'",
            ": 'a' has the key '\\ud800', which holds a lone surrogate; use text keys",
        ),
        ({"a": {(1,): 2}}, "'a'", ": 'a' has the key (1,), a tuple; use text keys"),
        (None, "", " is of type NoneType, not dict; pass one dict of params per item"),
        ([1], "", " is of type list, not dict; pass one dict of params per item"),
        (
            {"a": "x" * 300_000},
            "",
            " takes 300,008 bytes encoded, 262,144 are allowed; pass a path or a key to the data",
        ),
    ],
)
def test_params_that_cannot_travel_are_named(params: object, path: str, problem: str) -> None:
    with pytest.raises(ParamsError) as refusal:
        checked_params(1207, params)
    assert str(refusal.value) == f"item 1207 of prep_async{problem}. Nothing was enqueued."
    assert (refusal.value.index, refusal.value.path) == (1207, path)


@pytest.mark.parametrize(
    "value",
    [
        lambda: None,
        threading.Lock(),
        datetime(2026, 1, 1),
        datetime(2026, 1, 1, tzinfo=UTC),
        msgspec.msgpack.Ext(1, b"x"),
        frozenset("a"),
        _Text("a"),
        bytearray(b"a"),
        {float("nan"): 1},
        _nested(500),
        _nested(10_000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_and_deep_nests_are_refused_in_one_short_line(value: object) -> None:
    with pytest.raises(ParamsError) as refusal:
        checked_params(3, {"a": 1, "x": [value]}, where="users.jsonl")
    sentence = str(refusal.value)
    assert sentence.startswith("item 3 of users.jsonl: ")
    assert len(sentence) < 300
    assert sentence.isprintable()


def test_a_key_with_a_newline_forges_no_line() -> None:
    with pytest.raises(ParamsError, match=r"'a\\nb' is a set") as refusal:
        checked_params(0, {"a\nb": {1}})
    assert "\n" not in str(refusal.value)


def test_set_reads_json_values() -> None:
    assert parse_set(["user_ids=[1,2,3]", 'name="bob"', "x=null", 'q="a=b"']) == {
        "user_ids": [1, 2, 3],
        "name": "bob",
        "x": None,
        "q": "a=b",
    }


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("name=bob", "--set name=bob: 'bob' is not JSON; text needs quotes: --set 'name=\"bob\"'"),
        ("name=", "--set name=: '' is not JSON; text needs quotes: --set 'name=\"\"'"),
        ("name", "--set name: write it as --set key=VALUE, VALUE being JSON"),
        ("=1", "--set =1: write it as --set key=VALUE, VALUE being JSON"),
        ("ok=True", "--set ok=True: 'True' is not JSON; JSON writes it --set ok=true"),
        (
            "names=[a,b]",
            "--set names=[a,b]: '[a,b]' is not JSON; the shell eats double quotes, so put single ones around "
            "all of it: --set 'names=[\"a\", 1]'",
        ),
        ("x=NaN", "--set x=NaN: NaN is not a finite number; use null or text"),
        ("x=-Infinity", "--set x=-Infinity: -Infinity is not a finite number; use null or text"),
        ("x=[1e999]", "--set x=[1e999]: 1e999 is not a finite number; use null or text"),
        ('x={"a":1,"a":2}', '--set x={"a":1,"a":2}: the key \'a\' stands twice in one object; keep one'),
        ("a=1\nb", "--set 'a=1\\nb': '1\\nb' is not JSON; text needs quotes: --set 'a=\"1\\nb\"'"),
    ],
)
def test_a_bad_set_is_refused_with_the_form_it_should_have(setting: str, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_set([setting])
    assert str(refusal.value) == sentence


def test_one_key_set_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--set a=2: 'a' is set twice; keep one$"):
        parse_set(["a=1", "a=2"])


def test_very_long_numbers_and_deep_nests_are_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"too many digits; write it as text$"):
        parse_set(["a=" + "1" * 5_000])
    with pytest.raises(InputError, match=r": 1{40} is not a finite number; use null or text$"):
        parse_set(["a=" + "1" * 4_000 + ".5"])
    with pytest.raises(InputError, match=r"nested too deep; flatten it$"):
        parse_set(["a=" + "[" * 100_000])


def test_set_and_shared_merge_unless_they_name_one_key() -> None:
    assert merged_shared({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(InputError, match=r"^'a' is given by --set and by --shared; keep one of them$"):
        merged_shared({"a": 1}, {"a": 1})


def test_shared_reads_an_object_also_behind_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "shared.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1]}\n')
    assert read_shared(str(file)) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b" \n", " is empty; it must hold one JSON object"),
        (b"[1]", " holds a list; it must hold one JSON object"),
        (b'{\n "a": }', " line 2, column 7: not JSON (expecting value); write one JSON object"),
        (b'{"a": 1}\n{"a": 2}', " line 2, column 1: not JSON (extra data); write one JSON object"),
        (b'{"a":\n "\xe9"}', " line 2: not UTF-8 text; save the file as UTF-8"),
        (b'{"a": NaN}', ": NaN is not a finite number; use null or text"),
    ],
)
def test_a_bad_shared_file_is_refused_at_its_place(tmp_path: Path, text: bytes, sentence: str) -> None:
    file = tmp_path / "shared.json"
    file.write_bytes(text)
    with pytest.raises(InputError) as refusal:
        read_shared(str(file))
    assert str(refusal.value) == f"{file}{sentence}"


def test_files_that_cannot_be_read_are_refused_in_a_sentence(tmp_path: Path) -> None:
    missing, folder = tmp_path / "no.jsonl", tmp_path / "folder.csv"
    folder.mkdir()
    with pytest.raises(InputError, match=r"no\.jsonl: no such file or directory; check its path$"):
        read_params(str(missing))
    with pytest.raises(InputError, match=r"folder\.csv: is a directory; name a file in it$"):
        read_params(str(folder))
    with pytest.raises(InputError, match=r"no\.json: no such file or directory; check its path$"):
        read_shared(str(tmp_path / "no.json"))
    with pytest.raises(
        InputError, match=r"^'users\.txt': cannot tell its format; name it \.jsonl, \.ndjson or"
    ):
        read_params("users.txt")


@pytest.mark.parametrize("name", ["users.jsonl", "users.NDJSON"])
def test_json_lines_are_read_and_blank_ones_skipped(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"id": 2, "u": "\xe2\x80\xa8"}')
    assert list(read_params(str(file))) == [{"id": 1}, {"id": 2, "u": "\u2028"}]


def test_csv_cells_are_text(tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    file.write_bytes(b'\xef\xbb\xbfid,note\r\n1,"a,\n""b"""\r\n\r\n007,\r\n')
    assert list(read_params(str(file))) == [{"id": "1", "note": 'a,\n"b"'}, {"id": "007", "note": ""}]


def test_a_cell_may_be_as_large_as_an_item(tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    file.write_text("id,text\n1," + "x" * 250_000 + "\n")
    (item,) = read_params(str(file))
    assert len(checked_params(0, item)) > 250_000


def test_standard_input_is_read_as_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"id": 1}\n[]\n')))
    items = read_params("-")
    assert next(items) == {"id": 1}
    with pytest.raises(
        InputError, match=r"^standard input line 2: holds a list; write one JSON object per line$"
    ):
        next(items)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", b"", " holds no items; write one per line"),
        (
            "a.jsonl",
            b'{"a":1}\n\n{"a":}\n',
            " line 3, column 6: not JSON (expecting value); write one JSON object per line",
        ),
        ("a.jsonl", b'{"a":1}\n{"a":1,"a":1}\n', " line 2: the key 'a' stands twice in one object; keep one"),
        ("a.jsonl", b'{"a":{"b":1,"b":1}}\n', " line 1: the key 'b' stands twice in one object; keep one"),
        ("a.jsonl", b'{"a":NaN}\n', " line 1: NaN is not a finite number; use null or text"),
        ("a.jsonl", b"null\n", " line 1: holds null; write one JSON object per line"),
        ("a.jsonl", b"\xff\xfe{\x00", " line 1: not UTF-8 text; save the file as UTF-8"),
        ("a.csv", b"", " holds no items; write one per line"),
        ("a.csv", b"id\n", " holds no items; write one per line"),
        ("a.csv", b"id,,x\n", " line 1: column 2 of the header has no name; name every column"),
        ("a.csv", b"\nid,id\n", " line 2: the header names 'id' twice; use each name once"),
        ("a.csv", b"id;name\n1;2\n", " line 1: the header 'id;name' has no comma; separate cells by commas"),
        ("a.csv", b'a,b\n"1\n",2\n3\n', " line 4: cells: 1, in the header 2; give each row as many"),
        ("a.csv", b"a,b\n1,2,3\n", " line 2: cells: 3, in the header 2; give each row as many"),
        (
            "a.csv",
            b'a,b\n1,2\n"3,4\n5,6\n',
            " line 3: the row that begins here is not CSV (unexpected end of data); check its quotes",
        ),
        (
            "a.csv",
            b"a\n1\r2\n",
            " line 2: the row that begins here is not CSV (a bare carriage return); check its quotes",
        ),
        ("a.csv", b"a\n1\n\xe9\n", " line 3: not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_a_bad_params_file_is_refused_at_its_line(
    tmp_path: Path, name: str, text: bytes, sentence: str
) -> None:
    file = tmp_path / name
    file.write_bytes(text)
    with pytest.raises(InputError) as refusal:
        list(read_params(str(file)))
    assert str(refusal.value) == f"{file}{sentence}"


@pytest.mark.parametrize("name", ["big.jsonl", "big.csv"])
def test_a_large_params_file_is_read_in_flat_memory(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    with file.open("w") as out:
        out.write("id,text\n" if name.endswith("csv") else "")
        for n in range(20_000):
            row = f"{n},{'x' * 100}" if name.endswith("csv") else json.dumps({"id": n, "text": "x" * 100})
            out.write(row + "\n")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_params(str(file))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.inputs.LONGEST_LINE", 1_000)
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "' + "x" * 2_000 + '"}\n')
    with pytest.raises(InputError, match=r"line 1: longer than 1,000 bytes; write one item per line$"):
        list(read_params(str(file)))


def test_the_event_loop_has_its_turn_while_slow_items_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0, 0.06)
    monkeypatch.setattr("producer.batch.monotonic", lambda: next(now))

    async def go() -> list[bool]:
        turn = asyncio.create_task(asyncio.sleep(0))
        return [turn.done() async for _ in as_async(iter(range(4)), "items")]

    assert asyncio.run(go())[-1], "a signal would have been heard"

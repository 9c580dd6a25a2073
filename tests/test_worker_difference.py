"""What a run changed: the tree, what it leaves behind, and putting it back."""

from __future__ import annotations

import math
from collections import defaultdict
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import codec
from worker.difference import NAMED, apply, changed, difference, equal

KEYS = st.one_of(st.text(max_size=2), st.integers(-3, 3), st.booleans(), st.sampled_from(["=", "+", "{"]))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, 1.0, math.inf]), st.text(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)
STORES = st.dictionaries(KEYS, VALUES, max_size=5)
AWKWARD = st.sampled_from(
    [
        math.nan,
        {1},
        frozenset(),
        object,
        2**64,
        -(2**63) - 1,
        b"x",
        (1, 2),
        "\ud800",
        defaultdict(int),
        1j,
        "\u00e9",
    ]
)
AWKWARD_KEYS = st.one_of(
    KEYS, st.sampled_from([(1, 2), math.nan, 2**64, "\ud800", frozenset(), b"k", "\u00e9"])
)
ANYTHING = st.recursive(
    st.one_of(SCALARS, AWKWARD),
    lambda inner: st.one_of(st.lists(inner, max_size=12), st.dictionaries(AWKWARD_KEYS, inner, max_size=3)),
    max_leaves=15,
)


@st.composite
def edited(draw: st.DrawFn, base: dict[Any, Any]) -> dict[Any, Any]:
    """`base` after a run that deleted nothing."""
    now: dict[Any, Any] = {}
    for key, old in base.items():
        how = draw(st.sampled_from(["keep", "keep", "replace", "change"]))
        if how == "change" and isinstance(old, dict):
            now[key] = draw(edited(old))
        elif how == "change" and isinstance(old, list):
            now[key] = [*old, *draw(st.lists(VALUES, max_size=2))]
        elif how == "replace":
            new = draw(VALUES)
            both = isinstance(old, dict) and isinstance(new, dict)  # nothing may vanish inside
            now[key] = draw(edited(old)) if both else new
        else:
            now[key] = deepcopy(old)
    fresh: dict[Any, Any] = draw(STORES)
    return {**now, **{key: value for key, value in fresh.items() if key not in base}}


def sent(tree: Any) -> Any:
    return codec.decode(codec.encode(tree))


@settings(max_examples=150, deadline=None)
@given(STORES.flatmap(lambda base: st.tuples(st.just(base), edited(base))))
def test_base_and_difference_give_back_what_the_run_left(pair: tuple[dict[Any, Any], dict[Any, Any]]) -> None:
    base, now = pair
    tree, left = difference(base, now)
    assert left == []
    assert equal(apply(deepcopy(base), sent(tree)), now)
    assert (tree == {}) == equal(base, now)


@settings(max_examples=150, deadline=None)
@given(ANYTHING)
def test_an_entry_is_left_behind_only_if_the_codec_refuses_it(value: Any) -> None:
    tree, left = difference({}, {"k": value})
    try:
        codec.travels(value)
    except codec.CannotTravel:
        assert left
    else:
        assert (tree, left) == ({"=": {"k": value}}, [])


@settings(max_examples=150, deadline=None)
@given(STORES, st.dictionaries(AWKWARD_KEYS, ANYTHING, max_size=4))
def test_a_tree_always_comes_back_as_it_was_sent(base: dict[Any, Any], now: dict[Any, Any]) -> None:
    tree, left = difference(base, now)
    codec.travels(tree)
    codec.travels(left)


def test_the_wire_format() -> None:
    base = {"log": ["a"], "stats": {"calls": 1, "old": 0}, "mode": "x", "rows": [1, 2], "same": [{"n": 1}]}
    now = {
        "log": ["a", "b"],
        "stats": {"calls": 2, "old": 0},
        "mode": ["y"],
        "rows": [2],
        "same": [{"n": 1}],
        "new": {},
    }
    tree, left = difference(base, now)
    assert tree == {
        "=": {"mode": ["y"], "rows": [2], "new": {}},
        "+": {"log": ["b"]},
        "{": {"stats": {"=": {"calls": 2}}},
    }
    assert left == []
    assert changed(tree) == {"mode": ["y"], "rows": [2], "new": {}, "log": ["b"], "stats": {"calls": 2}}


def test_with_an_empty_base_the_store_itself_is_sent() -> None:
    now = {"profile": {"name": "Ada", "tags": ["x", "y"]}}
    tree, _ = difference({}, now)
    assert tree["="] is now
    assert difference({}, {}) == ({}, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [(1, True), (1, 1.0), (0, False), (None, 0), ("1", 1), ([1], [True]), ([{"a": 1}], [{"a": 1.0}])],
)
def test_a_change_of_type_is_a_change(old: Any, new: Any) -> None:
    tree, _ = difference({"k": old}, {"k": new})
    assert type(tree["="]["k"]) is type(new)
    assert equal(tree, {"=": {"k": new}})


def test_tuples_count_as_lists() -> None:
    assert difference({"k": [1, [2]]}, {"k": (1, (2,))}) == ({}, [])
    assert sent(difference({"k": [1]}, {"k": (1, 2)})[0]) == {"+": {"k": [2]}}


def test_deletions_do_not_travel() -> None:
    assert difference({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 2}}) == ({}, [])


def test_only_what_cannot_travel_is_left_behind() -> None:
    base = {"images": {"a": "x"}, "log": ["start"], "set": [1]}
    now = {
        "images": {"a": "x", "raw": object(), "size": 3},
        "log": ["start", object(), "end"],
        "set": {1},
        "user": {"name": "Ada", "friends": {"photo": object(), "n": 2}},
        "rows": [1, math.nan],
        (1, 2): "tuple key",
    }
    tree, left = difference(base, now)
    assert tree == {"=": {"user": {"name": "Ada", "friends": {"n": 2}}}, "{": {"images": {"=": {"size": 3}}}}
    assert sorted(left) == [
        "'images'['raw']",
        "'log'",
        "'rows'",
        "'set'",
        "'user'['friends']['photo']",
        "(1, 2)",
    ]


def test_a_look_alike_of_what_stood_there_is_named() -> None:
    assert difference({"k": [[1]]}, {"k": [{1}]}) == ({}, ["'k'"])


def test_long_lists_of_one_kind_are_looked_at_item_by_item_where_it_matters() -> None:
    fine: dict[str, Any] = {
        "f": [1.5] * 20 + [math.inf, -math.inf],
        "s": ["\u00e9"] * 20,
        "i": [2**64 - 1] * 20,
    }
    assert difference({}, fine) == ({"=": fine}, [])
    bad: dict[str, Any] = {
        "f": [1.5] * 20 + [math.nan],
        "s": ["a"] * 20 + ["\ud800"],
        "i": [1] * 20 + [2**64],
    }
    assert difference({}, bad) == ({}, ["'f'", "'s'", "'i'"])


def test_cycles_are_left_behind_where_they_close() -> None:
    user: dict[str, Any] = {"name": "Ada"}
    user["self"] = user
    loop: list[Any] = []
    loop.append(loop)
    tree, left = difference({}, {"user": user, "loop": loop})
    assert tree == {"=": {"user": {"name": "Ada"}}}
    assert left == ["'user'['self']", "'loop'"]


def test_a_graph_in_which_all_point_at_all_ends_soon() -> None:
    people: list[dict[str, Any]] = [{"n": n} for n in range(30)]
    for person in people:
        person.update((str(n), other) for n, other in enumerate(people))
    tree, left = difference({}, {"people": people[0]})
    codec.travels(tree)
    assert len(left) == NAMED + 1
    assert left[-1].endswith("more")


@pytest.mark.parametrize("depth", [99, 100, 400, 5000])
def test_what_is_nested_too_deep_is_left_behind(depth: int) -> None:
    as_dict: dict[str, Any] = {}
    as_list: list[Any] = []
    for _ in range(depth - 1):
        as_dict, as_list = {"k": as_dict}, [as_list]
    tree, left = difference({"b": {}}, {"b": {"k": as_dict}, "d": as_dict, "l": as_list})
    assert codec.decode(codec.encode(tree)) == tree  # its own sections nest one level more
    assert ("'l'" in left) == (depth > 100)
    assert len(left) == (0 if depth == 99 else 1 if depth == 100 else 3)


def test_a_value_that_raises_when_compared_or_shown_is_left_behind() -> None:
    class Rude:
        def __eq__(self, other: object) -> bool:
            raise ValueError

        def __hash__(self) -> int:
            return 1

        def __repr__(self) -> str:
            raise ValueError

    tree, left = difference({"a": [1], "b": 1}, {"a": [Rude()], "b": Rude(), Rude(): 1})
    assert tree == {}
    assert left[:2] == ["'a'", "'b'"]
    assert "Rude" in left[2]


def test_apply_keeps_the_objects_that_stood_in_the_base() -> None:
    base: dict[str, Any] = {"rows": [1], "log": [1], "in": {"a": 1}}
    rows, log, inside = base["rows"], base["log"], base["in"]
    result = apply(base, {"=": {"rows": [9]}, "+": {"log": [2]}, "{": {"in": {"=": {"b": 2}}}})
    assert result is base
    assert (rows, log, inside) == ([9], [1, 2], {"a": 1, "b": 2})
    assert base["rows"] is rows

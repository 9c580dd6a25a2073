"""Merging: the caller's store after many runs, whatever order they ended in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.merge import Merger, Rule
from worker import codec
from worker.difference import apply, difference

Store = dict[str, Any]
Run = Callable[[Store], None]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.text(max_size=2))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc", max_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)
STORES = st.dictionaries(st.sampled_from("abcdef"), VALUES, max_size=5)


def tree_of(base: Store, run: Run) -> Any:
    """What the producer receives from one run."""
    now = deepcopy(base)
    run(now)
    return codec.decode(codec.encode(difference(base, now)[0]))


def merged(
    base: Store, runs: list[Run], order: list[int] | None = None, rule: Rule | None = None
) -> tuple[Store, Merger, list[str]]:
    store = deepcopy(base)
    merger = Merger(store, deepcopy(base), rule)
    told = []
    for index in range(len(runs)) if order is None else order:
        conflict = merger.add(index, tree_of(base, runs[index]))
        if conflict is not None:
            told.append(str(conflict))
    merger.finish()
    return store, merger, told


def setter(key: str, value: Any) -> Run:
    return lambda shared: shared.__setitem__(key, deepcopy(value))


# --- properties ------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from(["own", "log", "new log", "table", "new table", "deep", "mode"]), VALUES),
    max_size=5,
)


def polite(index: int, steps: list[tuple[str, Any]]) -> Run:
    """A run that writes as the docs say: keys of its own, or gains of a list."""

    def run(shared: Store) -> None:
        for number, (step, value) in enumerate(steps):
            value = deepcopy(value)
            if step == "own":
                shared[f"own{index}"] = value
            elif step == "log":
                shared["log"].append(value)
            elif step == "new log":
                shared.setdefault("new log", []).append(value)
            elif step == "table":
                shared["table"][f"{index}.{number}"] = value
            elif step == "new table":
                shared.setdefault("new table", {})[index] = value
            elif step == "deep":
                shared["table"].setdefault("deep", {}).setdefault("x", {}).setdefault("rows", []).append(
                    value
                )
            else:
                shared["mode"] = "same for all"

    return run


@settings(max_examples=100, deadline=None)
@given(STORES, st.lists(STEPS, max_size=5), st.randoms(use_true_random=False))
def test_runs_with_keys_of_their_own_merge_as_if_run_in_turn(
    rest: Store, all_steps: list[list[tuple[str, Any]]], random_: random.Random
) -> None:
    base = {**rest, "log": ["start"], "table": {"t": 1}, "mode": "before"}
    runs = [polite(index, steps) for index, steps in enumerate(all_steps)]
    order = list(range(len(runs)))
    random_.shuffle(order)

    store, merger, told = merged(base, runs, order)

    in_turn = deepcopy(base)
    for run in runs:
        run(in_turn)
    assert codec.encode(store) == codec.encode(in_turn), "same values, types and order of keys"
    assert (told, merger.conflicts) == ([], 0)


@settings(max_examples=100, deadline=None)
@given(STORES, st.lists(STORES, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_order_of_arrival_never_matters(base: Store, ends: list[Store], random_: random.Random) -> None:
    runs: list[Run] = [lambda shared, end=end: shared.update(deepcopy(end)) for end in ends]  # type: ignore[misc]
    order = list(range(len(runs)))
    random_.shuffle(order)
    one, first, told = merged(base, runs)
    other, second, told_too = merged(base, runs, order)
    assert codec.encode(one) == codec.encode(other)
    assert first.conflicts == second.conflicts
    assert len(told) == len(told_too) == min(1, first.conflicts)


@settings(max_examples=100, deadline=None)
@given(STORES, STORES)
def test_one_run_alone_leaves_what_it_left_and_never_conflicts(base: Store, end: Store) -> None:
    run: Run = lambda shared: shared.update(deepcopy(end))  # noqa: E731
    store, merger, _ = merged(base, [run])
    assert codec.encode(store) == codec.encode(apply(deepcopy(base), tree_of(base, run)))
    assert merger.conflicts == 0


# --- what conflicts, and what does not ---------------------------------------------------------------


def increment(shared: Store) -> None:
    shared["n"] += 1


def append(shared: Store) -> None:
    shared["rows"].append(2)


def replace(shared: Store) -> None:
    shared["rows"] = [7]


@pytest.mark.parametrize(
    ("base", "first", "second", "expected"),
    [
        ({}, setter("s", "a"), setter("s", "b"), {"s": "b"}),
        ({}, setter("s", 1), setter("s", True), {"s": True}),
        ({"n": 5}, increment, increment, {"n": 6}),
        ({"n": 0.5}, increment, increment, {"n": 1.5}),
        ({"c": {"n": 5}}, lambda s: increment(s["c"]), lambda s: increment(s["c"]), {"c": {"n": 6}}),
        ({"c": [5, 0]}, setter("c", [6, 0]), setter("c", [6, 0]), {"c": [6, 0]}),
        ({"rows": [1]}, append, replace, {"rows": [7]}),
        ({"rows": [1]}, replace, append, {"rows": [1, 2]}),
        ({}, setter("k", {"a": 1}), setter("k", 3), {"k": 3}),
        ({}, setter("k", 3), setter("k", {"a": 1}), {"k": {"a": 1}}),
        ({}, setter("k", [1]), setter("k", {"a": 1}), {"k": {"a": 1}}),
        ({}, setter("k", {"a": 1, "b": 1}), setter("k", {"a": 2, "c": 2}), {"k": {"a": 2, "b": 1, "c": 2}}),
        ({"k": None}, setter("k", {"a": 1}), setter("k", {"b": 1}), {"k": {"b": 1}}),
    ],
)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_conflict_is_told_and_the_last_item_wins(
    base: Store, first: Run, second: Run, expected: Store, order: list[int]
) -> None:
    store, merger, told = merged(base, [first, second], order)
    assert codec.encode(store) == codec.encode(expected)
    assert merger.conflicts == 1
    assert merger.first is not None
    assert merger.first.items == (0, 1)
    assert told == [str(merger.first)]


@pytest.mark.parametrize(
    ("base", "first", "second", "expected"),
    [
        ({}, setter("s", "a"), setter("s", "a"), {"s": "a"}),
        ({}, setter("n", 6), setter("n", 6), {"n": 6}),
        ({"on": False}, setter("on", True), setter("on", True), {"on": True}),
        ({"n": None}, setter("n", 1), setter("n", 1), {"n": 1}),
        ({"rows": [2, 1]}, lambda s: s["rows"].sort(), lambda s: s["rows"].sort(), {"rows": [1, 2]}),
        ({"rows": [1]}, append, append, {"rows": [1, 2, 2]}),
        ({}, setter("rows", [1]), setter("rows", [2]), {"rows": [1, 2]}),
        ({}, setter("p", {}), setter("p", {1: "x"}), {"p": {1: "x"}}),
        ({}, setter("p", {1: {"a": 1}}), setter("p", {1: {"b": 2}}), {"p": {1: {"a": 1, "b": 2}}}),
        ({"a": 1}, lambda s: s.pop("a"), setter("a", 2), {"a": 2}),
    ],
)
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_what_both_runs_can_have_is_no_conflict(
    base: Store, first: Run, second: Run, expected: Store, order: list[int]
) -> None:
    store, merger, _ = merged(base, [first, second], order)
    assert codec.encode(store) == codec.encode(expected)
    assert merger.conflicts == 0


def test_one_odd_item_does_not_cost_the_others_their_entries() -> None:
    runs: list[Run] = [lambda s, i=i: s.setdefault("p", {}).__setitem__(i, i) for i in range(5)]  # type: ignore[misc]
    runs[2] = setter("p", "odd")
    store, merger, _ = merged({}, runs)
    assert store == {"p": {0: 0, 1: 1, 3: 3, 4: 4}}
    assert merger.conflicts == 1


def test_only_the_first_conflict_is_told_at_the_item_that_makes_it() -> None:
    merger = Merger({}, {})
    assert merger.add(4, {"=": {"a": 1, "b": 1}}) is None
    assert merger.add(9, {"=": {"a": 1, "c": 1}}) is None
    conflict = merger.add(1, {"=": {"b": 2, "c": 2}})
    assert conflict is not None
    assert (conflict.path, conflict.items) == (("b",), (1, 4))
    assert merger.add(5, {"=": {"a": 3, "b": 4}}) is None
    assert merger.conflicts == 3
    assert merger.first is conflict


def test_a_conflict_names_the_key_both_items_and_the_mend() -> None:
    _, _, told = merged({"stats": {}}, [lambda s, i=i: s["stats"].update(best=i) for i in range(2)])  # type: ignore[misc]
    assert told == [
        "items 0 and 1 both changed shared['stats']['best'], and the last item in input order wins: write "
        "shared['stats'].setdefault('best', {})[item] = ..., a key per item, or pass merge= to say how they join"
    ]


# --- the store ---------------------------------------------------------------------------------------


def test_the_callers_objects_stay_the_same_objects_and_local_entries_untouched() -> None:
    client = object()
    store: Store = {"log": ["a"], "table": {"x": [1]}, "rows": [3, 1], "pair": (1,), "client": client}
    log, table, inner, rows = store["log"], store["table"], store["table"]["x"], store["rows"]
    base = {"log": ["a"], "table": {"x": [1]}, "rows": [3, 1], "pair": [1]}
    merger = Merger(store, base)

    def run(shared: Store) -> None:
        shared["log"].append("b")
        shared["table"]["x"].append(2)
        shared["rows"].sort()
        shared["pair"].append(2)
        shared["client"] = "mine"

    merger.add(0, tree_of(base, run))
    merger.finish()
    assert store == {
        "log": ["a", "b"],
        "table": {"x": [1, 2]},
        "rows": [1, 3],
        "pair": [1, 2],
        "client": client,
    }
    assert store["log"] is log
    assert store["table"] is table
    assert table["x"] is inner
    assert store["rows"] is rows
    assert merger.kept_local == {"client"}


def test_a_second_outcome_of_one_item_is_not_counted() -> None:
    store: Store = {}
    merger = Merger(store, {})
    assert merger.add(0, {"=": {"rows": [1]}}) is None
    assert merger.add(0, {"=": {"rows": [1], "a": 1}}) is None
    assert merger.add(1, None) is None
    assert merger.add(1, {"=": {"a": 1}}) is None
    merger.finish()
    merger.finish()
    assert store == {"rows": [1]}


def test_ten_thousand_runs_cost_the_same_each() -> None:
    def seconds(runs: int) -> float:
        base: Store = {"log": [], "table": {}}
        merger = Merger({"log": [], "table": {}}, base)
        trees: list[Any] = [
            {"=": {"p": {i: {"n": i}}, "r": [i]}, "+": {"log": [i]}, "{": {"table": {"=": {i: i}}}}
            for i in range(runs)
        ]
        random.Random(1).shuffle(trees)
        start = time.process_time()
        for index, tree in enumerate(trees):
            merger.add(index, tree)
        merger.finish()
        return time.process_time() - start

    few, many = (min(seconds(runs) for _ in range(3)) for runs in (1000, 10_000))
    assert many < 10 * few * 4


# --- the user's rule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_a_rule_joins_conflicting_values_in_input_order(order: list[int]) -> None:
    keys = []

    def rule(key: Any, mine: Any, theirs: Any) -> Any:
        keys.append(key)
        return mine + theirs

    def writer(index: int) -> Run:
        def run(shared: Store) -> None:
            shared.update(s=str(index), same=1)
            shared["in"]["t"] = [index, index]

        return run

    runs = [writer(index) for index in range(3)]
    base = {"in": {"t": [9, 9, 9]}}
    store, merger, told = merged(base, runs, order, rule)
    assert store == {"in": {"t": [0, 0, 1, 1, 2, 2]}, "s": "012", "same": 1}
    assert sorted(map(str, keys)) == ["('in', 't')"] * 2 + ["s"] * 2
    assert (told, merger.conflicts) == ([], 0)


def test_a_rule_gets_each_runs_whole_value_where_kinds_differ() -> None:
    seen: list[Any] = []

    def rule(key: Any, mine: Any, theirs: Any) -> Any:
        seen.append((mine, theirs))
        return mine + theirs

    base: Store = {"rows": [1], "t": {"a": 1}}
    store, _, _ = merged(base, [append, replace, append], None, rule)
    assert seen == [([1, 2], [7]), ([1, 2, 7], [1, 2])]
    assert store["rows"] == [1, 2, 7, 1, 2]


def test_a_rule_that_raises_does_not_cost_the_batch() -> None:
    def rule(key: Any, mine: Any, theirs: Any) -> Any:
        raise ZeroDivisionError("by zero")

    store, merger, _ = merged({}, [setter("s", i) for i in range(3)], None, rule)
    assert store == {"s": 2}
    assert merger.conflicts == 1
    assert str(merger.first) == (
        "merge= raised ZeroDivisionError: by zero for shared['s'], changed by items 0 to 2, so the last item in "
        "input order wins there: mend merge="
    )


def test_a_rule_may_change_what_it_is_given() -> None:
    def rule(key: Any, mine: Any, theirs: Any) -> Any:
        mine.extend(theirs)
        return mine

    trees: list[Any] = [{"=": {"rows": [n]}} for n in range(3)]
    store: Store = {"rows": [9, 9]}
    merger = Merger(store, {"rows": [9, 9]}, rule)
    for index, tree in enumerate(trees):
        merger.add(index, tree)
    merger.finish()
    assert store == {"rows": [0, 1, 2]}
    assert trees[0] == {"=": {"rows": [0]}}

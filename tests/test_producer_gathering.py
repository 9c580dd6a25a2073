"""Results in input order and one store, whatever order outcomes come in, and conflicts as soon as there are two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pocketflow import AsyncNode

from producer.flows import FlowFailed, ThrottledAsyncParallelBatchFlow
from producer.follow import Ended
from producer.gathering import ConflictError, Gathering
from producer.spool import Spool
from producer.spool_writer import SpoolWriter
from worker import codec
from worker.contract import Failure, Outcome, encode_outcome
from worker.difference import difference

BASE = {"count": 1}


def spool_in(data_dir: Path, count: int = 4) -> Spool:
    with SpoolWriter(data_dir, "b", "users:flow", "users") as writer:
        for number in range(count):
            writer.add(codec.encode({"user": number}))
        return writer.finish(codec.encode(BASE))


def ended(index: int, changes: dict[str, Any], status: str = "completed") -> Ended:
    changed, _ = difference(BASE, BASE | changes)
    failure = None if status == "completed" else Failure("ValueError", "unlucky", "Fetch")
    data = encode_outcome(Outcome(status, action=f"a{index}", difference=changed, failure=failure, retry=0))
    return Ended(index, 0, 1, status, data, "1-0")


def gathering(tmp_path: Path, **values: Any) -> tuple[Gathering, dict[str, Any]]:
    shared = dict(BASE)
    flow = ThrottledAsyncParallelBatchFlow(start=AsyncNode(), **values)
    return Gathering(flow, shared, spool_in(tmp_path)), shared


def test_a_conflict_is_told_at_the_second_item_that_makes_it_and_once(tmp_path: Path) -> None:
    gathered, shared = gathering(tmp_path)
    assert gathered.take(ended(2, {"summary": "two"}))[1] is None
    _, conflict = gathered.take(ended(0, {"summary": "zero"}))
    assert conflict is not None
    assert str(conflict).startswith("items 0 and 2 both changed shared['summary']")
    assert gathered.take(ended(1, {"summary": "one"}))[1] is None
    assert gathered.finish([]) is None
    assert (shared["summary"], gathered.conflicts) == ("two", 1)


def test_a_strict_flow_stops_at_the_second_item(tmp_path: Path) -> None:
    gathered, _ = gathering(tmp_path, conflicts="fail")
    gathered.take(ended(2, {"summary": "two"}))
    with pytest.raises(
        ConflictError, match=r"^stopped, as conflicts='fail' asks: items 0 and 2 both changed"
    ):
        gathered.take(ended(0, {"summary": "zero"}))


def test_a_merge_rule_joins_in_input_order_and_is_no_conflict(tmp_path: Path) -> None:
    gathered, shared = gathering(tmp_path, merge=lambda key, mine, theirs: f"{mine}, {theirs}")
    for index in (2, 0, 1):
        assert gathered.take(ended(index, {"summary": f"s{index}"}))[1] is None
    assert gathered.finish([]) is None
    assert shared["summary"] == "s0, s1, s2"


def test_a_merge_rule_that_raises_costs_no_outcome_and_is_told_at_the_end(tmp_path: Path) -> None:
    def rule(key: Any, mine: Any, theirs: Any) -> Any:
        raise ZeroDivisionError("no rule for it")

    gathered, shared = gathering(tmp_path, merge=rule)
    for index in (0, 1):
        gathered.take(ended(index, {"summary": f"s{index}"}))
    conflict = gathered.finish([])
    assert conflict is not None
    assert "merge= raised ZeroDivisionError: no rule for it for shared['summary']" in str(conflict)
    assert shared["summary"] == "s1"


def test_results_stand_in_input_order_and_say_what_became_of_the_others(tmp_path: Path) -> None:
    gathered, _ = gathering(tmp_path)
    gathered.take(ended(3, {}, "failed"))
    gathered.take(ended(0, {}))
    gathered.finish([1])
    first, lost, unrun, failed = gathered.results
    assert first == "a0"
    assert [str(each) for each in (lost, unrun, failed)] == [
        "item 1 lost: Lost: Redis lost it before it ended",
        "item 2 aborted: Cancelled: its batch was cancelled before it ran",
        "item 3 failed in Fetch: ValueError: unlucky",
    ]
    assert all(isinstance(each, FlowFailed) for each in (lost, unrun, failed))
    assert (gathered.completed, gathered.failed) == (1, 1)


def test_an_item_that_ends_again_counts_as_it_ended_last(tmp_path: Path) -> None:
    gathered, _ = gathering(tmp_path)
    gathered.take(ended(1, {"seen": "half"}, "failed"))
    assert not gathered.replaced
    gathered.take(ended(1, {"seen": "all"}))
    gathered.take(ended(0, {}))
    assert (gathered.completed, gathered.failed, gathered.results[:2]) == (2, 0, ["a0", "a1"])
    assert gathered.replaced, "what the merged store has of it is the first attempt's"

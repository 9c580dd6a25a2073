"""An outcome on its way to the gate."""

from __future__ import annotations

import asyncio

import pytest
import redis

from worker.contract import COMPLETED, Outcome, decode_outcome, encode_outcome
from worker.record import _until_answered, fitted


def test_of_an_outcome_too_large_for_redis_the_largest_entries_stay_behind_and_are_named() -> None:
    store = {"text": "x" * 3000, "page": {"of": "y" * 2000}, "count": 1}
    outcome = Outcome(COMPLETED, "done", {"=": store, "+": {"log": ["z" * 1000]}}, left_behind=["'photo'"])
    whole = encode_outcome(outcome)
    assert fitted(outcome, len(whole)) == whole

    back = decode_outcome(fitted(outcome, 2000))
    assert (back.status, back.action) == (COMPLETED, "done")
    assert back.difference == {"=": {"count": 1}, "+": {"log": ["z" * 1000]}}
    assert back.left_behind == ["'photo'", "'text'", "'page'"]
    assert list(store) == ["text", "page", "count"], "the run's own store stays as it is"


def test_what_stands_beside_a_call_is_sent_until_it_arrives_and_the_trouble_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = 2

    async def send() -> str:
        nonlocal left
        left -= 1
        if left >= 0:
            raise redis.TimeoutError("no answer in time")
        return "sent"

    assert asyncio.run(_until_answered("pocketfleet:{users.flow}:blob:b:1:7", send)) == "sent"
    said = [each.getMessage() for each in caplog.records]
    assert [each.split(" ")[:2] for each in said] == [
        ["redis.trouble", "limit=users.flow"],
        ["redis.back", "limit=users.flow"],
    ]

"""Trouble with Redis is told once when it begins, once when it changes, and once when it is over."""

from __future__ import annotations

import logging

import pytest
import redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from limiter.trouble import Trouble, words

SECRET = "canary"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_connection_that_breaks_once_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    trouble = Trouble("pocketfleet:{users}:gate")
    trouble.met(redis.ConnectionError("Connection closed by server."))
    trouble.over()
    assert told(caplog) == []


def test_an_outage_is_told_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble("pocketfleet:{users}:gate")
    for error in [
        redis.ConnectionError(),
        redis.TimeoutError(),
        ConnectionRefusedError(),
        redis.BusyLoadingError(),
    ]:
        trouble.met(error)
        trouble.met(error)
    trouble.over()
    first, last = told(caplog)
    assert "limit=users" in first and "cannot be reached" in first
    assert last.startswith("redis.back limit=users after_s=")


def test_another_trouble_is_news(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble("pocketfleet:{users}:gate")
    trouble.met(OutOfMemoryError("command not allowed"))
    trouble.met(OutOfMemoryError("command not allowed"))
    trouble.met(ReadOnlyError("You can't write against a read only replica."))
    trouble.over()
    assert [part in line for part, line in zip(["full", "read-only", "back"], told(caplog), strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize(
    "error",
    [
        ResponseError(f"unknown command 'EVALSHA', with args beginning with: '{SECRET}'"),
        OutOfMemoryError(SECRET),
        redis.ConnectionError(f"redis://:{SECRET}@host refused"),
        ResponseError(f"Command # 1 (SET x {SECRET}) of pipeline caused error: MISCONF Redis is configured"),
    ],
)
def test_nothing_of_what_was_sent_is_told(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble("pocketfleet:{users}:gate")
    trouble.met(error)
    trouble.met(error)
    assert told(caplog) and SECRET not in caplog.text and SECRET not in words(error)


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (redis.ConnectionError("max number of clients reached"), "maxclients"),
        (ResponseError("Protocol error: invalid bulk length"), "proto-max-bulk-len"),
    ],
)
def test_a_bound_of_the_server_is_named(error: Exception, mend: str) -> None:
    assert mend in words(error)

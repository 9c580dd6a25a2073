"""The pump's own connection: each call gets its own answer, whatever became of those before it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from limiter.client import open_client, open_sync_client
from limiter.control import may_be_poison
from limiter.line import Line
from limiter.trouble import words
from tests import servers

ECHO = """
if ARGV[1] == 'fail' then return redis.error_reply('NOLIMITS none') end
if ARGV[1] == 'error' then return redis.error_reply(ARGV[2]) end
if ARGV[1] == 'spin' then for _ = 1, 2000000 do end end
return ARGV[1]
"""


@pytest.fixture(autouse=True)
def _echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limiter.line.source", lambda path: ECHO)


@contextlib.asynccontextmanager
async def line_at(url: str, answer_s: float = 5.0) -> AsyncIterator[Line]:
    client = open_client(url, answer_s=answer_s)
    line = Line(client, Path("echo.lua"))
    yield line
    await line.close()
    await client.aclose()


def on_a_server(test: Callable[[redis.Redis, str], Coroutine[Any, Any, None]]) -> None:
    with servers.running("valkey") as url:
        client = redis.Redis.from_url(url)
        try:
            asyncio.run(test(client, url))
        finally:
            client.close()


def test_answers_come_back_and_errors_of_the_server_leave_the_connection_open() -> None:
    async def go(server: redis.Redis, url: str) -> None:
        async with line_at(url) as line:
            assert await line.call(["k"], [b"one"]) == b"one"
            with pytest.raises(redis.ResponseError, match="NOLIMITS"):
                await line.call(["k"], ["fail"])
            server.script_flush()
            large = os.urandom(8 * 1024 * 1024)
            assert await line.call(["k"], [large]) == large
            assert len(server.client_list()) == 2, "ours, and the one that asks"

    on_a_server(go)


def test_on_fakeredis_it_answers_alike() -> None:
    async def go() -> None:
        client = fakeredis.FakeAsyncRedis(version=(7,))
        line = Line(client, Path("echo.lua"))
        assert await line.call(["k"], [b"one"]) == b"one"
        with pytest.raises(redis.ResponseError, match="NOLIMITS"):
            await line.call(["k"], ["fail"])
        assert await line.call(["k"], [b"two"]) == b"two"
        await line.close()
        assert await line.call(["k"], [b"three"]) == b"three"
        await line.close()
        await client.aclose()

    asyncio.run(go())


def test_an_answer_that_comes_after_its_call_was_cancelled_is_nobodys() -> None:
    async def go(server: redis.Redis, url: str) -> None:
        async with line_at(url) as line:
            assert await line.call(["k"], [b"warm"]) == b"warm"
            for number in range(20):
                call = line.call(["k"], ["spin"])
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(call, 0.001 * number)
                assert await line.call(["k"], [str(number)]) == str(number).encode()

    on_a_server(go)


def test_a_connection_that_is_closed_while_nothing_is_asked_is_opened_again() -> None:
    async def go(server: redis.Redis, url: str) -> None:
        async with line_at(url) as line:
            assert await line.call(["k"], [b"one"]) == b"one"
            mine = server.client_id()
            for each in server.client_list():
                if int(each["id"]) != mine:
                    server.client_kill_filter(_id=each["id"])
            await asyncio.sleep(0.05)
            assert await line.call(["k"], [b"two"]) == b"two"

    on_a_server(go)


def test_a_server_that_does_not_answer_or_goes_away_fails_the_call_and_not_the_next() -> None:
    async def go(server: redis.Redis, url: str) -> None:
        pid: Any = server.info("server")["process_id"]  # type: ignore[index]
        async with line_at(url, answer_s=0.3) as line:
            assert await line.call(["k"], [b"one"]) == b"one"
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(redis.TimeoutError):
                await line.call(["k"], [b"two"])
            os.kill(pid, signal.SIGCONT)
        async with line_at(url) as line:
            assert await line.call(["k"], [b"three"]) == b"three"
            os.kill(pid, signal.SIGSTOP)
            asked = asyncio.create_task(line.call(["k"], [b"four"]))
            await asyncio.sleep(0.05)
            line._wire._transport.abort()  # type: ignore[union-attr]
            with pytest.raises(redis.ConnectionError):
                await asked
            os.kill(pid, signal.SIGCONT)
            assert await line.call(["k"], [b"five"]) == b"five"

    on_a_server(go)


def test_on_fakeredis_a_server_that_is_gone_fails_the_call_at_once_and_leaves_no_task() -> None:
    async def go() -> None:
        server = fakeredis.FakeServer(version=(7,))
        client = fakeredis.FakeAsyncRedis(server=server)
        line = Line(client, Path("echo.lua"))
        assert await line.call(["k"], [b"one"]) == b"one"
        server.connected = False
        async with asyncio.timeout(2):
            with pytest.raises(redis.ConnectionError):
                await line.call(["k"], [b"two"])
        server.connected = True
        assert await line.call(["k"], [b"three"]) == b"three"
        await line.close()
        await asyncio.sleep(0.05)
        assert [task.get_coro().__qualname__ for task in asyncio.all_tasks()] == [go.__qualname__]  # type: ignore[union-attr]
        await client.aclose()

    asyncio.run(go())


IN_62 = "ERR Error running script (call to f_f742): @user_script:5: @user_script: 5: -"
IN_7 = " script: f_f742, on @user_script:5."


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("READONLY You can't write against a read only replica.", ReadOnlyError),
        ("OOM command not allowed when used memory > 'maxmemory'.", OutOfMemoryError),
        ("MISCONF Redis is configured to save RDB snapshots.", redis.ResponseError),
    ],
)
def test_what_a_server_refuses_inside_a_script_is_known_however_it_is_worded(
    said: str, kind: type[Exception]
) -> None:
    async def go(server: redis.Redis, url: str) -> None:
        for worded in (said, IN_62 + said, said + IN_7):
            async with line_at(url) as line:
                with pytest.raises(kind) as refused:
                    await line.call(["k"], ["error", worded])
                assert (line._wire is None) == (kind is ReadOnlyError)
            heard: list[BaseException] = [refused.value]
            client = open_sync_client(url)
            with pytest.raises(kind) as refused:
                client.eval(ECHO, 0, "error", worded)
            client.close()
            for error in (*heard, refused.value):
                assert isinstance(error, redis.ResponseError) and not may_be_poison(error)
                assert words(error) != words(redis.ResponseError("ERR unknown"))

    on_a_server(go)


def test_what_a_script_met_in_its_keys_is_still_known_in_the_words_of_an_older_server() -> None:
    async def go(server: redis.Redis, url: str) -> None:
        async with line_at(url) as line:
            for said in (
                "WRONGTYPE Operation against a key holding the wrong kind of value",
                "ERR value is no",
            ):
                with pytest.raises(redis.ResponseError) as refused:
                    await line.call(["k"], ["error", IN_62 + said])
                assert may_be_poison(refused.value)

    on_a_server(go)

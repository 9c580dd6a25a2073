"""Clients on a real server: they decode, time out, retry as told, and never show a password."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from redis.asyncio.connection import SSLConnection

from limiter.address import redacted
from limiter.check import checked_connection
from limiter.client import open_client, open_pubsub_client, open_retrying_client, open_sync_client
from limiter.errors import RedisRefused
from tests import servers
from tests.stalls import slack_s

PASSWORD = "can@ry/7:%#"


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    with servers.running("valkey") as url:
        yield url


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A server with a password and a user of few rights; its URL has no password in it."""
    with servers.running("valkey") as url:
        client = redis.Redis.from_url(url)
        client.acl_setuser("few", enabled=True, passwords=[f"+{PASSWORD}"], commands=["+ping"])
        client.acl_setuser(
            "worker",
            enabled=True,
            passwords=[f"+{PASSWORD}"],
            keys=["pocketfleet:*", "arq:*"],
            categories=["+@all", "-@dangerous"],
        )
        client.config_set("requirepass", PASSWORD)
        client.close()
        yield url


def as_user(url: str, user: str, password: str) -> str:
    return url.replace("unix://", f"unix://{user}:{quote(password, safe='')}@")


def check(url: str) -> str | None:
    async def checked() -> str | None:
        client = open_client(url)
        try:
            return await checked_connection(client, redacted(url))
        finally:
            await client.aclose()

    return asyncio.run(checked())


def refusal(url: str) -> str:
    with pytest.raises(RedisRefused) as caught:
        check(url)
    text = str(caught.value)
    assert redacted(url) in text and "\n" not in text and PASSWORD not in text and quote(PASSWORD) not in text
    return text


def test_good_server_passes_without_a_warning(plain: str) -> None:
    assert check(plain) is None


def test_encoded_password_is_decoded(guarded: str) -> None:
    assert check(as_user(guarded, "", PASSWORD)) is None
    client = open_sync_client(as_user(guarded, "", PASSWORD))
    assert client.ping()
    client.close()


def test_user_without_info_passes(guarded: str) -> None:
    assert check(as_user(guarded, "worker", PASSWORD)) is None


def test_wrong_or_missing_password_is_never_echoed(guarded: str) -> None:
    assert "refuses the user or password" in refusal(as_user(guarded, "", PASSWORD + "x"))
    assert "refuses the user or password" in refusal(guarded)


def test_password_nobody_asked_for_is_refused_too(plain: str) -> None:
    assert "refuses" in refusal(as_user(plain, "nobody", PASSWORD))


def test_user_who_may_run_no_script_is_refused(guarded: str) -> None:
    assert "does not let this user work (" in refusal(as_user(guarded, "few", PASSWORD))


def test_database_that_is_not_there_is_refused(plain: str) -> None:
    assert "out of range" in refusal(f"{plain}?db=99")


def test_server_that_may_evict_is_warned_of(plain: str) -> None:
    client = open_sync_client(plain)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        warning = check(plain)
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.close()
    assert warning and "allkeys-lru" in warning and "set maxmemory-policy noeviction" in warning


def test_nobody_there_is_refused_at_once(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "cannot be reached (Connection refused)" in refusal(
        f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
    )
    assert "cannot be reached" in refusal("redis://no-such-host.invalid:6379")
    assert "cannot be reached (No such file or directory)" in refusal(f"unix://{tmp_path}/absent.sock")


class Talker:
    """A server that answers every command (but PING, if that is a text) with the same bytes, or closes the line if there are none."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Talker:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)

    def run(self) -> None:
        while True:
            try:
                line, _ = self.socket.accept()
            except OSError:
                return
            with line:
                line.settimeout(5)
                try:
                    while self.answer is not None and (said := line.recv(4096)):
                        for command in said.split(b"*")[1:] or [b""]:
                            pong = b"PING" in command and self.answer.startswith(b"$")
                            line.sendall(b"+PONG\r\n" if pong else self.answer)
                except OSError:
                    pass


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not answer as Redis does"),
        (None, "Redis at"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", "still loading"),
        (
            b"-ERR unknown command 'AUTH', with args beginning with: '%s'\r\n" % PASSWORD.encode(),
            "refuses us:",
        ),
        (b"-ERR max number of clients reached\r\n", "raise its maxclients"),
        (b"", "does not answer in time"),
    ],
)
def test_something_else_there_is_refused(answer: bytes | None, says: str) -> None:
    with Talker(answer) as talker:
        url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{talker.port}?socket_timeout=0.3"
        assert says in refusal(url)


def test_tls_to_a_plain_server_is_refused_in_a_sentence() -> None:
    with Talker(b"-ERR what\r\n") as talker:
        assert "TLS" in refusal(f"rediss://127.0.0.1:{talker.port}")


def test_old_server_is_refused() -> None:
    info = b"$20\r\nredis_version:6.0.16\r\n"
    with Talker(info) as talker:
        assert "is version 6.0.16: use Redis 6.2" in refusal(f"redis://127.0.0.1:{talker.port}")


def test_no_repr_shows_a_password() -> None:
    url = f"redis://me:{quote(PASSWORD, safe='')}@127.0.0.1:7/2"
    for client in (
        open_client(url),
        open_retrying_client(url),
        open_pubsub_client(url),
        open_sync_client(url),
    ):
        shown = repr(client) + str(client) + repr(client.connection_pool) + str(client.connection_pool)
        assert PASSWORD not in shown and "127.0.0.1:7/2" in shown
        assert client.connection_pool.connection_kwargs["password"] == PASSWORD


def test_tls_checks_the_host_name_unless_told_otherwise() -> None:
    for url, checks in [("rediss://h", True), ("rediss://h?ssl_check_hostname=no", False)]:
        client = open_client(url)
        assert issubclass(client.connection_pool.connection_class, SSLConnection)
        connection = client.connection_pool.make_connection()
        assert connection.ssl_context.check_hostname is checks
    open_client("rediss://h?ssl_cert_reqs=none").connection_pool.make_connection()


def test_plain_client_never_repeats_a_call_and_the_retrying_one_does() -> None:
    async def seconds(client: redis.asyncio.Redis) -> float:
        began = time.monotonic()
        with pytest.raises((redis.ConnectionError, OSError)):
            await client.get("x")
        await client.aclose()
        return time.monotonic() - began

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    assert asyncio.run(seconds(open_client(url))) < 0.05 + slack_s(began)
    # three pauses of 0.1, 0.2 and 0.4 s, not their square
    assert 0.6 < asyncio.run(seconds(open_retrying_client(url, retries=3))) < 1.2 + slack_s(began)


def test_retrying_client_survives_a_restart_and_is_bounded_when_it_ends(tmp_path: Path) -> None:
    async def scene() -> None:
        process = servers.start("valkey", tmp_path)
        client = open_retrying_client(f"unix://{tmp_path}/s", retries=4)
        await client.ping()
        process.kill()
        process.wait()
        again = asyncio.create_task(client.ping())
        await asyncio.sleep(0.3)
        process = servers.start("valkey", tmp_path)
        assert await again
        process.kill()
        process.wait()
        began = time.monotonic()
        with pytest.raises((redis.ConnectionError, OSError)):
            await client.ping()
        assert time.monotonic() - began < 3.5 + slack_s(began)
        await client.aclose()

    asyncio.run(scene())


def test_responses_are_bytes_unless_asked_for_text(plain: str) -> None:
    async def scene() -> None:
        raw, text = open_client(plain), open_client(plain, decode_responses=True)
        await raw.set("k", "v")
        assert (await raw.get("k"), await text.get("k")) == (b"v", "v")
        await raw.aclose()
        await text.aclose()

    asyncio.run(scene())


@pytest.mark.parametrize("turns", [0, 3])
def test_connection_that_the_server_closed_meanwhile_is_replaced(plain: str, turns: int) -> None:
    """Whether the loop has seen it yet or not, the next call, which is not repeated, goes out on a new one."""

    async def call_twice() -> tuple[int, int]:
        client, other = open_client(plain), open_sync_client(plain)
        try:
            before = await client.client_id()
            other.client_kill_filter(_id=before)
            for _ in range(turns):
                await asyncio.sleep(0.01)
            return before, await client.client_id()
        finally:
            other.close()
            await client.aclose()

    before, after = asyncio.run(call_twice())
    assert after > before


@pytest.mark.parametrize("turns", [0, 3])
def test_connection_with_an_answer_that_nobody_waits_for_is_replaced(plain: str, turns: int) -> None:
    """It would be taken for the answer to the next call."""

    async def call_twice() -> object:
        client = open_client(plain)
        try:
            connection = client.connection_pool.get_available_connection()
            await connection.connect()
            await connection.send_command("ECHO", "of another call")
            time.sleep(0.05)  # noqa: ASYNC251 - the loop is blocked
            await client.connection_pool.release(connection)
            for _ in range(turns):
                await asyncio.sleep(0.01)
            return await client.execute_command("ECHO", "own")
        finally:
            await client.aclose()

    assert asyncio.run(call_twice()) == b"own"

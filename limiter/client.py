"""Redis clients as the limiter wants them: time-outs, honest retries, and no password in any repr.

A call with a sequence number is repeated by its pump, so `open_client` repeats nothing by itself.
Only reads and calls that may run twice belong on `open_retrying_client`.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.retry import Retry as SyncRetry

from limiter.wording import AsyncParser, Parser

ANSWER_S, CONNECT_S = 5.0, 2.0
# A refused connect is the builtin OSError inside redis-py; without it nothing retries while Redis is down.
RETRIED = [
    redis.ConnectionError,
    redis.TimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    OutOfMemoryError,
    OSError,
]

T = TypeVar("T")


def open_client(url: str, *, decode_responses: bool = False, answer_s: float = ANSWER_S) -> Redis:
    """A client that gives up on a call after `answer_s` seconds and never repeats one.

    For calls with a sequence number. A process asks for less than its lease, so that a half-open connection
    is noticed while the lease still holds.
    """
    options = _options(url) | {"socket_timeout": answer_s}
    return _opened(url, options, decode_responses=decode_responses)


def open_retrying_client(
    url: str, *, decode_responses: bool = False, retries: int = 8, waits_if_full: bool = True
) -> Redis:
    """A client that repeats a failed call up to `retries` times (8 of them: about 6 s without Redis).

    A call whose reply was lost runs twice: use it only for reads and for calls that may.

    Args:
        waits_if_full: False raises `OutOfMemoryError` at once, for a caller that waits for memory itself.
    """
    retry = _FlatRetry(ExponentialBackoff(cap=1, base=0.05), retries)
    retried = [kind for kind in RETRIED if waits_if_full or kind is not OutOfMemoryError]
    options = _options(url) | {"retry": retry, "retry_on_error": retried}
    return _opened(url, options, decode_responses=decode_responses)


def open_pubsub_client(url: str) -> Redis:
    """A client for subscriptions: the subscriber pings by itself, so redis-py's health check is off."""
    return _opened(url, _options(url) | {"health_check_interval": 0})


def open_sync_client(url: str, *, answer_s: float = 2.0) -> redis.Redis:
    """A blocking client with short time-outs (`answer_s` to answer, 1 s to connect), for the renewal thread."""
    options = _options(url) | {
        "socket_timeout": answer_s,
        "socket_connect_timeout": min(1.0, answer_s),
        "retry": SyncRetry(NoBackoff(), 0),
        "parser_class": Parser,
    }
    return _SyncClient.from_pool(_SyncPool.from_url(url, **options))


class _FlatRetry(Retry):
    """redis-py connects with retries inside a call with retries; here only the outer one counts."""

    inside = False

    async def call_with_retry(self, do: Callable[[], Awaitable[T]], fail: Callable[[RedisError], Any]) -> T:
        if self.inside:
            return await do()
        self.inside = True
        try:
            return await super().call_with_retry(do, fail)
        finally:
            self.inside = False


def _address(pool: Any) -> str:
    """Where a pool connects to, from its options, without credentials."""
    options = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    return f"{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db', 0)}"


class _Sends(AbstractConnection):
    """Sends as redis-py should.

    redis-py sends under `asyncio.wait_for`: on Python 3.11 it loses a cancel that comes while the bytes
    have just gone out, and it costs a task per call.
    """

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        elif check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        data = command.encode() if isinstance(command, str) else command
        writer: Any = self._writer
        try:
            writer.writelines([data] if isinstance(data, bytes) else data)
            if writer.transport.get_write_buffer_size():  # else it has gone out: nothing to wait for
                async with asyncio.timeout(self.socket_timeout):
                    await writer.drain()
        except BaseException as error:
            await self.disconnect(nowait=True)
            if isinstance(error, TimeoutError):
                raise redis.TimeoutError("Timeout writing to socket") from None
            if isinstance(error, OSError):
                raise redis.ConnectionError(f"Error while writing to socket: {error}") from error
            raise

    async def can_read_destructive(self) -> bool:
        """Whether the server has closed it, or has sent what nobody waits for: then it is of no more use.

        redis-py finds out by a read that may take no time at all, two steps of the loop before each call: a
        fifth of what a call on loopback costs.
        """
        reader: Any = self._reader
        if reader is None or reader.at_eof() or reader.exception() is not None or reader._buffer:
            return True
        parser: Any = self._parser
        return parser._reader.has_data() or self._is_readable()

    def _is_readable(self) -> bool:
        """Whether something has come that the loop has not read yet. A TLS connection may owe us records that bring
        nothing, so there only what was read counts."""
        return False


class _Plain(_Sends):
    def _is_readable(self) -> bool:
        writer: Any = self._writer
        found = select.poll()
        found.register(writer.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(found.poll(0))


class _Tcp(_Plain, Connection):
    pass


class _Tls(_Sends, SSLConnection):
    pass


class _Unix(_Plain, UnixDomainSocketConnection):
    pass


OURS: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Tcp,
    SSLConnection: _Tls,
    UnixDomainSocketConnection: _Unix,
}


class _Pool(ConnectionPool):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.connection_class = OURS.get(self.connection_class, self.connection_class)

    def __repr__(self) -> str:
        return f"<pool of {_address(self)}>"


class _Client(Redis):
    def __repr__(self) -> str:
        return f"<client of {_address(self.connection_pool)}>"


class _SyncPool(redis.ConnectionPool):
    def __repr__(self) -> str:
        return f"<pool of {_address(self)}>"


class _SyncClient(redis.Redis):
    def __repr__(self) -> str:
        return f"<client of {_address(self.connection_pool)}>"


def _opened(url: str, options: dict[str, Any], **more: Any) -> Redis:
    return _Client.from_pool(_Pool.from_url(url, **(options | more)))


def _options(url: str) -> dict[str, Any]:
    """What every client is opened with; options in the URL win."""
    options: dict[str, Any] = {
        "socket_timeout": ANSWER_S,
        "socket_connect_timeout": CONNECT_S,
        "health_check_interval": 10,
        "retry": Retry(NoBackoff(), 0),
        "parser_class": AsyncParser,
    }
    scheme = urlsplit(url).scheme
    if scheme != "unix":
        options |= {"socket_keepalive": True, "socket_keepalive_options": _keepalive()}
    if scheme == "rediss":
        options["ssl_check_hostname"] = parse_url(url).get("ssl_cert_reqs", "required") == "required"
    return options


def _keepalive() -> dict[int, int]:
    """A dead peer is noticed within half a minute, where the system has these options."""
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}

"""Whether a Redis is one we can work with, and else why not, in a sentence with the mend."""

from __future__ import annotations

import os
import ssl
from typing import Any

import redis
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from limiter.errors import RedisRefused
from limiter.trouble import CROWDED, is_crowded

OLDEST = (6, 2)
PROBE = ("pocketfleet:{probe}", "arq:job:{probe}")


async def checked_connection(client: Redis, shown_url: str) -> str | None:
    """Make sure that Redis answers, is new enough and lets us run scripts on our keys.

    Args:
        shown_url: the address for people, see `redacted`.

    Returns:
        A warning for the user (Redis may throw data away when it is full), or None.

    Raises:
        RedisRefused: one sentence with the address and the mend, never with a password.
    """
    try:
        async with client.pipeline(transaction=False) as pipe:
            pipe.execute_command("EVAL", "return 1", len(PROBE), *PROBE)
            pipe.info("server")
            pipe.info("memory")
            scripts, *infos = await pipe.execute(raise_on_error=False)
        if isinstance(scripts, RedisError):
            raise scripts
        server, memory = map(_info, infos)
    except (RedisError, OSError) as error:
        reason = _reason(_root(error), _password(client))
        raise RedisRefused(f"Redis at {shown_url} {reason}") from None
    version = str(server.get("redis_version", ""))
    if version and _number(version) < OLDEST:
        raise RedisRefused(
            f"Redis at {shown_url} is version {version:.20}: use Redis 6.2 or newer, or Valkey"
        )
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return None
    return (
        f"Redis at {shown_url} has maxmemory-policy {policy!s:.40}, so it may throw jobs away when it is full: "
        "set maxmemory-policy noeviction"
    )


def _info(section: dict[str, Any] | Exception) -> dict[str, Any]:
    """One section of INFO, or nothing where the user may not ask.

    Raises:
        RedisError: the server is none to work with.
    """
    if isinstance(section, ResponseError):
        return {}
    if isinstance(section, Exception):
        raise section
    return section


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())


def _password(client: Redis) -> str:
    return str(client.connection_pool.connection_kwargs.get("password") or "")


def _root(error: Exception) -> Exception:
    """The server's own refusal, where redis-py wrapped it in a ConnectionError while connecting."""
    while isinstance(error.__cause__, RedisError):
        error = error.__cause__
    return error


def _reason(error: Exception, password: str) -> str:
    """Why Redis is no use, and the mend. Most special first: redis-py derives them from one another."""
    said = _said(error, password)
    if isinstance(error, (AuthenticationError, AuthorizationError)):
        return "refuses the user or password: correct them in POCKETFLEET_REDIS_URL (or its password file)"
    if isinstance(error, NoPermissionError):
        return f"does not let this user work{said}: give it the rights that the README lists"
    if is_crowded(error):
        return CROWDED
    if isinstance(error, BusyLoadingError):
        return "is still loading its data: try again in a moment"
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return "does not answer in time: is it the right address, and is it running?"
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"shows a certificate that does not hold ({cause.verify_message}): correct it or ssl_ca_certs"
    if isinstance(cause, ssl.SSLError):
        return "does not speak TLS with us: use redis:// for a server without TLS"
    if isinstance(cause, OSError) and not isinstance(error, redis.InvalidResponse):
        return f"cannot be reached ({_words(cause)}): start it, or correct POCKETFLEET_REDIS_URL"
    if isinstance(error, ResponseError) and not isinstance(error, redis.InvalidResponse):
        return f"refuses us{said}: correct POCKETFLEET_REDIS_URL or the server's settings"
    return f"does not answer as Redis does{said}: is it the right address (and rediss:// if it wants TLS)?"


def _said(error: Exception, password: str) -> str:
    """The server's own words in brackets, unless they repeat what we sent it."""
    words = " ".join(str(error).split())[:160]
    return "" if not words or (password and password in words) else f" ({words})"


def _words(error: OSError) -> str:
    number = error.errno or 0
    return os.strerror(number) if number > 0 else error.strerror or str(error)

"""Redis does not serve us: said once when it begins, again when it becomes another trouble, and once when it is over.

The words say what is wrong and what to do. They never hold what was sent, which may be params.
"""

from __future__ import annotations

import logging
import ssl
from time import monotonic

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
)

log = logging.getLogger("pocketfleet.limiter")

UNREACHABLE = "cannot be reached"
UNKNOWN = "answers with an error: see its log"
CROWDED = "has as many clients as it takes: raise its maxclients, or start fewer processes"

# Most special first: redis-py derives them from one another.
WORDS: tuple[tuple[type[BaseException], str], ...] = (
    (OutOfMemoryError, "is full: raise maxmemory or free memory, nothing is lost meanwhile"),
    (ReadOnlyError, "is read-only, as a replica is: bring the primary back to this address"),
    (AuthenticationError, "refuses the user or password: correct them there"),
    (AuthorizationError, "refuses the user or password: correct them there"),
    (NoPermissionError, "does not let this user work: give it the rights that the README lists"),
    (BusyLoadingError, UNREACHABLE),
    (ssl.SSLError, f"{UNREACHABLE}: its certificate or TLS fails"),
    (redis.ConnectionError, UNREACHABLE),
    (redis.TimeoutError, UNREACHABLE),
    (OSError, UNREACHABLE),
)
BY_CODE = {
    "MISCONF": "cannot write its data to disk: free space there, or see its log",
    "NOAUTH": "wants a password: correct POCKETFLEET_REDIS_URL or its password file",
    "NOREPLICAS": "has too few replicas to accept writes",
    "MASTERDOWN": "is a replica without its primary",
    "CLUSTERDOWN": "is part of a cluster that is down",
    "BUSY": "runs a script that does not end",
    "Protocol": "takes no value of this size: raise its proto-max-bulk-len",
    "WRONGTYPE": "holds a key of another type where ours should stand: a worker mends it",
}


def words(error: BaseException) -> str:
    """What is wrong, and the mend, as the end of a sentence that begins with 'Redis'.

    >>> from redis import ResponseError
    >>> words(ResponseError("MISCONF Redis is configured to save RDB snapshots, but it is ..."))
    'cannot write its data to disk: free space there, or see its log'
    >>> words(ConnectionRefusedError(111, "refused"))
    'cannot be reached'
    """
    if is_crowded(error):
        return CROWDED
    for kind, said in WORDS:
        if isinstance(error, kind):
            return said
    # redis-py puts the whole command in front of what the server said, where it was one of several
    code = str(error).rpartition("caused error: ")[2].partition(" ")[0]
    return BY_CODE.get(code, UNKNOWN)


def is_crowded(error: BaseException) -> bool:
    """Whether Redis took no further client, which redis-py does not tell from a broken connection."""
    return isinstance(error, redis.RedisError) and "max number of clients" in str(error)


class Trouble:
    """The trouble of one call, which is made again until it is answered. `key` is any key of its limit.

    A connection that breaks once is no trouble: it is opened anew, and only the second failure is told.
    """

    def __init__(self, key: str) -> None:
        self._limit = key.partition("{")[2].partition("}")[0]
        self._since = 0.0
        self._said = ""

    def met(self, error: BaseException) -> None:
        """The call failed, and will be made again."""
        said, first = words(error), not self._since
        self._since = self._since or monotonic()
        if said == self._said or (first and said.startswith(UNREACHABLE)):
            return
        self._said = said
        log.warning(
            'redis.trouble limit=%s error=%s what="Redis %s"; trying again',
            self._limit,
            type(error).__name__,
            said,
        )

    def over(self) -> None:
        """The call was answered."""
        if self._said:
            log.warning("redis.back limit=%s after_s=%.1f", self._limit, monotonic() - self._since)

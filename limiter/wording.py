"""Errors as every server words them.

Redis 6.2 tells why it refused a command inside a script at the end of a sentence about the script; later ones, and
Valkey, say it as of any command. redis-py knows an error by its first word.
"""

from __future__ import annotations

import re
from typing import Any

from redis.asyncio.connection import DefaultParser as AsyncDefaultParser
from redis.connection import DefaultParser

STATES = "READONLY|OOM|MISCONF|NOREPLICAS|MASTERDOWN"
"""What a server refuses because of its own state, whatever the script does."""
IN_A_SCRIPT = re.compile(rf"ERR Error running script .*@user_script: ?\d+: -((?:{STATES}) .*)", re.DOTALL)


def plain(said: str) -> str:
    """What was refused, without the sentence around it.

    >>> plain("ERR Error running script (call to f_ab): @user_script:5: @user_script: 5: -OOM command not allowed")
    'OOM command not allowed'
    >>> plain("ERR Error running script (call to f_ab): @user_script:5: attempt to index a nil value")
    'ERR Error running script (call to f_ab): @user_script:5: attempt to index a nil value'
    """
    found = IN_A_SCRIPT.match(said)
    return found[1] if found else said


class AsyncParser(AsyncDefaultParser):  # type: ignore[misc, valid-type]
    """redis-py's own, for asyncio."""

    @classmethod
    def parse_error(cls, response: str) -> Any:
        return super().parse_error(plain(response))


class Parser(DefaultParser):  # type: ignore[misc, valid-type]
    """The same for a blocking client."""

    @classmethod
    def parse_error(cls, response: str) -> Any:
        return super().parse_error(plain(response))

"""Settings of every test: Hypothesis judges what is drawn, never how long a busy machine took for it, and the
processes that tests start, several hundred, keep their bytecode. Compiling all of ours anew is two thirds of
what a start costs. Ctrl-C works in them, also where whoever started the tests ignores it, as a shell does
for what it runs in the background. And what tests of the scripts start from: a gate on each kind of server.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import redis
from gate_model import Gate, Ledger, gate_on, server_of
from hypothesis import HealthCheck, settings
from servers import KINDS

from limiter.settings import _first_directory

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def first_directory() -> None:
    """A test that goes to another directory stands for a process that was started there."""
    _first_directory.cache_clear()


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[redis.Redis, str]]:
    with server_of(request.param) as client:
        yield client, request.param


@pytest.fixture
def gate(server: tuple[redis.Redis, str]) -> Iterator[Gate]:
    with gate_on(*server) as gate:
        yield gate


@pytest.fixture
def ledger(gate: Gate) -> Ledger:
    return Ledger(gate)

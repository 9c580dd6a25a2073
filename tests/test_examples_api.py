"""The example API and its account, which the demo and the acceptance tests believe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.api.account import BUSY_RETRY_S, ORDERS, PROFILE, Account
from examples.api.server import orders_of, profile_of
from examples.users import nodes

ROOT = Path(__file__).resolve().parents[1]
BUSY = BUSY_RETRY_S

# (limits, rows of (now, call, what `arrive` returns), what the report holds afterwards).
# A call is "arrive|leave|break user step [connection]", or "reset".
TABLE: dict[str, tuple[dict[str, Any], list[tuple[float, str, float | None]], dict[str, Any]]] = {
    "a user is in progress between its two requests": (
        {},
        [
            (0.0, "arrive a profile", 0.0),
            (0.5, "leave a profile", None),
            (0.5, "arrive b profile", 0.0),
        ],
        {"users": 2, "peak_users": 2, "running": 1, "peak_running": 1, "served": 1},
    ),
    "the next user may start when the orders were answered": (
        {},
        [
            (0.0, "arrive a profile", 0.0),
            (0.5, "leave a profile", None),
            (0.5, "arrive a orders", 0.0),
            (1.0, "leave a orders", None),
            (1.0, "arrive b profile", 0.0),
        ],
        {"users": 1, "peak_users": 1, "served": 2, "flows_started": 2, "flows": {"a": 1, "b": 1}},
    ),
    "one request too many at a time is refused and burns no start": (
        {"concurrent": 1},
        [
            (0.0, "arrive a profile", 0.0),
            (0.1, "arrive b profile", BUSY),
            (0.5, "leave a profile", None),
            (0.6, "arrive b profile", 0.0),
        ],
        {"refused": 1, "peak_running": 1, "most_starts": 2, "flows": {"a": 1, "b": 2}, "peak_users": 2},
    ),
    "a refused user is no longer in progress": (
        {"concurrent": 1},
        [(0.0, "arrive a profile", 0.0), (0.1, "arrive b profile", BUSY), (0.1, "arrive c profile", BUSY)],
        {"users": 1, "peak_users": 2, "refused": 2},
    ),
    "a start leaves the window exactly one length later": (
        {"per_window": 2, "window_s": 60.0},
        [
            (0.0, "arrive a profile", 0.0),
            (10.0, "arrive b profile", 0.0),
            (59.5, "arrive c profile", 0.5),
            (60.0, "arrive c profile", 0.0),
            (60.0, "arrive d profile", 10.0),
        ],
        {"most_starts": 2, "refused": 2, "most_flow_starts": 4, "flows_started": 5},
    ),
    "when both limits refuse, the longer wait is told": (
        {"concurrent": 1, "per_window": 1, "window_s": 60.0},
        [(0.0, "arrive a profile", 0.0), (1.0, "arrive b profile", 59.0), (59.9, "arrive b profile", BUSY)],
        {"refused": 2, "most_starts": 1},
    ),
    "a user whose connection breaks during a request is gone": (
        {},
        [(0.0, "arrive a profile 1", 0.0), (0.1, "break a profile 1", None), (0.2, "arrive b profile", 0.0)],
        {"users": 1, "peak_users": 1, "broken": 1, "served": 0, "running": 1},
    ),
    "a broken run does not end the user's second run": (
        {},
        [
            (0.0, "arrive a profile 1", 0.0),
            (0.1, "arrive a profile 2", 0.0),
            (0.2, "break a profile 1", None),
        ],
        {"users": 1, "peak_users": 1, "flows": {"a": 2}},
    ),
    "a run that resumes at its second step is in progress again": (
        {"concurrent": 1},
        [
            (0.0, "arrive a profile", 0.0),
            (0.5, "leave a profile", None),
            (0.5, "arrive b profile", 0.0),
            (0.6, "arrive a orders", BUSY),
            (1.0, "leave b profile", None),
            (1.6, "arrive a orders", 0.0),
        ],
        {"users": 2, "peak_users": 2, "refused": 1, "flows": {"a": 1, "b": 1}},
    ),
    "a reset keeps what runs and forgets the rest, the window too": (
        {"per_window": 1, "window_s": 60.0},
        [(0.0, "arrive a profile", 0.0), (0.1, "reset", None), (0.2, "arrive b profile", 0.0)],
        {"running": 2, "peak_running": 2, "peak_users": 2, "most_starts": 1, "flows": {"b": 1}},
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_account_says(name: str) -> None:
    limits, rows, expected = TABLE[name]
    account = Account(**limits)

    for now, call, answer in rows:
        assert play(account, now, call) == pytest.approx(answer), (now, call)

    report = account.report()
    assert {key: report[key] for key in expected} == expected


def play(account: Account, now: float, call: str) -> float | None:
    verb, user, step, connection = [*call.split(), "", "", ""][:4]
    if verb == "arrive":
        return account.arrive(now, user, step, connection)
    if verb == "reset":
        account.reset()
    else:
        account.leave(user, step, connection, answered=verb == "leave")
    return None


def test_users_between_two_requests_end_with_their_connection() -> None:
    account = Account()
    for user, connection in (("a", "dead"), ("b", "alive")):
        account.arrive(0.0, user, PROFILE, connection)
        account.leave(user, PROFILE, connection, answered=True)

    account.drop_broken(lambda connection: connection == "dead")
    account.arrive(1.0, "c", PROFILE, "alive")

    assert account.report()["users"] == 2
    assert account.report()["peak_users"] == 2


def test_every_id_has_its_own_body_always() -> None:
    assert profile_of("7") == profile_of("7") != profile_of("8")
    assert orders_of("7") == orders_of("7") != orders_of("8")
    assert all(1 <= len(orders_of(str(number))) <= 4 for number in range(50))


@contextlib.contextmanager
def api(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server as a user starts it; ended with SIGTERM, which must be clean."""
    command = [sys.executable, "-m", "examples.api.server", "--port", "0", "--quiet", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def clients(url: str) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """One client that works, and one that only looks at the account."""
    async with httpx.AsyncClient(base_url=url) as works, httpx.AsyncClient(base_url=url) as looks:
        yield works, looks


def test_api_answers_429_above_its_concurrency_and_counts_it() -> None:
    async def ten_at_once(url: str) -> tuple[list[httpx.Response], dict[str, Any]]:
        async with clients(url) as (works, looks):
            answers = await asyncio.gather(*(works.get(f"/users/{n}/profile") for n in range(10)))
            return list(answers), (await looks.get("/account")).json()

    with api("--concurrent", "3", "--delay", "0.3") as (url, _):
        answers, account = asyncio.run(ten_at_once(url))

    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 7
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert (account["served"], account["refused"], account["peak_running"]) == (3, 7, 3)
    assert account["flows_started"] == account["most_flow_starts"] == 10


def test_api_answers_429_above_its_starts_per_window_and_says_how_long() -> None:
    async def three(url: str) -> list[httpx.Response]:
        async with clients(url) as (works, _):
            return [await works.get(f"/users/1/{step}") for step in (PROFILE, ORDERS, PROFILE)]

    with api("--per-minute", "2", "--delay", "0", "--window", "30") as (url, _):
        first, second, third = asyncio.run(three(url))

    assert first.json() == profile_of("1")
    assert second.json() == orders_of("1")
    assert third.status_code == 429
    assert 25 <= third.json()["retry_after_s"] <= int(third.headers["Retry-After"]) <= 30


def test_api_notices_a_client_that_goes_away_and_can_begin_anew() -> None:
    async def go_away_twice(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
        async with clients(url) as (works, looks):
            with contextlib.suppress(httpx.ReadTimeout):
                await works.get("/users/1/profile", timeout=0.1)
            await looks.get("/users/2/profile")
            await works.aclose()
            seen = (await looks.get("/account")).json()
            return seen, (await looks.post("/account/reset")).json()

    with api("--delay", "0.3") as (url, _):
        seen, anew = asyncio.run(go_away_twice(url))

    assert (seen["broken"], seen["served"], seen["running"]) == (1, 1, 0)
    assert (seen["users"], seen["peak_users"]) == (1, 1)
    assert (anew["served"], anew["broken"], anew["flows"], anew["peak_users"]) == (0, 0, {}, 1)


def test_api_forgets_the_users_of_a_killed_process() -> None:
    ask = "import httpx, os, sys; httpx.Client().get(sys.argv[1] + '/users/1/profile'); "
    script = ask + f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    with api("--delay", "0") as (url, _):
        subprocess.run([sys.executable, "-c", script, url], check=False)
        account = httpx.get(url + "/account").json()

    assert (account["served"], account["users"], account["peak_users"]) == (1, 0, 1)


def test_api_stops_on_sigterm_while_a_request_runs() -> None:
    async def ask_and_stop(url: str, process: subprocess.Popen[str]) -> int:
        async with clients(url) as (works, _):
            request = asyncio.ensure_future(works.get("/users/1/profile"))
            await asyncio.sleep(0.2)
            process.terminate()
            with contextlib.suppress(httpx.HTTPError):
                await request
        return process.wait(10)

    with api("--delay", "30") as (url, process):
        assert asyncio.run(ask_and_stop(url, process)) == 0


@pytest.mark.parametrize(
    ("option", "value"), [("--port", "70000"), ("--concurrent", "-1"), ("--delay", "nan"), ("--window", "0")]
)
def test_api_refuses_a_bad_option_in_one_sentence(option: str, value: str) -> None:
    command = [sys.executable, "-m", "examples.api.server", option, value]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert f"argument {option}: '{value}' cannot be used: give " in done.stderr
    assert "Traceback" not in done.stderr


def test_nodes_fetch_a_user_from_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    async def walk(shared: dict[str, Any]) -> list[Any]:
        nodes.open_client()
        actions = []
        for node in (nodes.FetchProfile(), nodes.FetchOrders()):
            node.set_params({"user_id": 7})
            actions.append(await node.run_async(shared))
        await nodes.close_client()
        return actions

    shared: dict[str, Any] = {}
    with api("--delay", "0") as (url, _):
        monkeypatch.setitem(os.environ, "USERS_API_URL", url)
        assert asyncio.run(walk(shared)) == ["fetch_orders", "default"]

    assert shared == {"profiles": {7: profile_of("7")}, "orders": {7: orders_of("7")}}


def test_nodes_without_an_url_say_which_variable_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USERS_API_URL", raising=False)

    with pytest.raises(RuntimeError, match="USERS_API_URL is not set: give it the URL"):
        nodes.open_client()

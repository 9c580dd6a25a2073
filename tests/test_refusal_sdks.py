"""Each provider's real client, refused by our own server inside a node, makes one request and leaves it."""

# mypy: disable-error-code="type-arg"

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest
import requests
from google import genai
from google.genai import types as genai_types
from pocketflow import AsyncNode, Node

from limiter.refusal import recognised
from tests.sdk_server import SdkServer, anthropic_error, google_error, openai_error
from worker.guard import Refused, guard

# google-genai derives a class from aiohttp's session, which aiohttp discourages.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")

AFTER = {"Retry-After": "7"}
SAY: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def running() -> Iterator[SdkServer]:
    with SdkServer() as server:
        yield server


@pytest.fixture
def server(running: SdkServer) -> SdkServer:
    running.reset()
    return running


def call_openai(url: str, **more: Any) -> Any:
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key="k", max_retries=0) as client:
        answer = client.chat.completions.create(model="m", messages=SAY, **more)
        return list(answer) if more else answer.choices[0].message.content


async def call_openai_async(url: str) -> Any:
    async with openai.AsyncOpenAI(base_url=f"{url}/openai/v1", api_key="k", max_retries=0) as client:
        answer = await client.chat.completions.create(model="m", messages=SAY)
        return answer.choices[0].message.content


def call_anthropic(url: str, **more: Any) -> Any:
    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key="k", max_retries=0) as client:
        answer = client.messages.create(model="m", max_tokens=9, messages=SAY, **more)
        return list(answer) if more else answer.content[0].text


async def call_anthropic_async(url: str) -> Any:
    async with anthropic.AsyncAnthropic(base_url=f"{url}/anthropic", api_key="k", max_retries=0) as client:
        answer: Any = await client.messages.create(model="m", max_tokens=9, messages=SAY)
        return answer.content[0].text


def google_client(url: str) -> genai.Client:
    once = genai_types.HttpRetryOptions(attempts=1)
    options = genai_types.HttpOptions(base_url=f"{url}/google", api_version="v1", retry_options=once)
    return genai.Client(api_key="k", http_options=options)


def call_google(url: str) -> Any:
    client = google_client(url)
    try:
        return client.models.generate_content(model="m", contents="hello").text
    finally:
        client.close()


async def call_google_async(url: str) -> Any:
    client = google_client(url)
    try:
        return (await client.aio.models.generate_content(model="m", contents="hello")).text
    finally:
        await client.aio.aclose()
        client.close()


def call_httpx(url: str) -> Any:
    return httpx.get(f"{url}/plain").raise_for_status().json()["text"]


async def call_httpx_async(url: str) -> Any:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{url}/plain")).raise_for_status().json()["text"]


async def call_aiohttp(url: str) -> Any:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/plain") as response:
        response.raise_for_status()
        return (await response.json())["text"]


def call_requests(url: str) -> Any:
    with requests.get(f"{url}/plain", timeout=10) as response:
        response.raise_for_status()
        return response.json()["text"]


class SyncCall(Node):
    """The client in a node that retries and falls back."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(max_retries=3)
        self.call = call

    def exec(self, prep_res: Any) -> Any:
        return self.call()

    def exec_fallback(self, prep_res: Any, exc: Exception) -> Any:
        return "fallback"

    def post(self, shared: dict[str, Any], prep_res: Any, exec_res: Any) -> Any:
        shared["text"] = exec_res


class AsyncCall(AsyncNode):
    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(max_retries=3)
        self.call = call

    async def exec_async(self, prep_res: Any) -> Any:
        return await self.call()

    async def exec_fallback_async(self, prep_res: Any, exc: Exception) -> Any:
        return "fallback"

    async def post_async(self, shared: dict[str, Any], prep_res: Any, exec_res: Any) -> Any:
        shared["text"] = exec_res


def run(
    server: SdkServer,
    call: Callable[..., Any],
    *,
    guarded: bool = True,
    overloaded: bool = False,
    **more: Any,
) -> Any:
    """What one run of a node that makes the call stores."""
    bound = functools.partial(call, server.url, **more)
    node = copy.copy(AsyncCall(bound) if asyncio.iscoroutinefunction(call) else SyncCall(bound))
    if guarded:
        guard(node, recognise=functools.partial(recognised, overloaded=overloaded))
    shared: dict[str, Any] = {}
    if isinstance(node, AsyncNode):
        asyncio.run(node._run_async(shared))
    else:
        node._run(shared)
    return shared["text"]


def refused(server: SdkServer, call: Callable[..., Any], **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        run(server, call, **more)
    assert len(server.seen) == 1
    return caught.value


CLIENTS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "openai": (call_openai, openai_error(), "openai"),
    "openai, async": (call_openai_async, openai_error(), "openai"),
    "anthropic": (call_anthropic, anthropic_error(), "anthropic"),
    "anthropic, async": (call_anthropic_async, anthropic_error(), "anthropic"),
    "google-genai": (call_google, google_error(), "google"),
    "google-genai, async": (call_google_async, google_error(), "google"),
    "httpx": (call_httpx, {}, "httpx"),
    "httpx, async": (call_httpx_async, {}, "httpx"),
    "aiohttp": (call_aiohttp, {}, "aiohttp"),
    "requests": (call_requests, {}, "requests"),
}


@pytest.mark.parametrize(("call", "body", "source"), CLIENTS.values(), ids=CLIENTS.keys())
def test_client_refused_once_in_a_node_makes_one_request(
    server: SdkServer, call: Callable[..., Any], body: Any, source: str
) -> None:
    server.refuse(body, headers=AFTER)
    hit = refused(server, call).hit
    assert (hit.retry_after, hit.source) == (7.0, source)
    assert run(server, call) == "hello"
    assert len(server.seen) == 2


@pytest.mark.parametrize(("call", "body", "source"), CLIENTS.values(), ids=CLIENTS.keys())
def test_same_node_without_its_guard_hammers_on_and_falls_back(
    server: SdkServer, call: Callable[..., Any], body: Any, source: str
) -> None:
    server.refuse(body, headers=AFTER, times=3)
    assert run(server, call, guarded=False) == "fallback"
    assert len(server.seen) == 3


@pytest.mark.parametrize("name", ["httpx", "aiohttp", "requests", "openai", "anthropic, async"])
def test_unavailable_with_retry_after_is_a_refusal(server: SdkServer, name: str) -> None:
    server.refuse({}, status=503, headers=AFTER)
    assert refused(server, CLIENTS[name][0]).hit.retry_after == 7.0


@pytest.mark.parametrize("name", ["httpx", "openai", "google-genai, async"])
def test_other_answers_are_retried_as_ever(server: SdkServer, name: str) -> None:
    server.refuse({"error": {"message": "429"}}, status=500, times=2)
    assert run(server, CLIENTS[name][0]) == "hello"
    assert len(server.seen) == 3


def test_openai_account_without_money_fails_and_does_not_wait(server: SdkServer) -> None:
    body = openai_error("insufficient_quota", "insufficient_quota")
    server.refuse(body, headers=AFTER, times=3)
    assert run(server, call_openai) == "fallback"


def test_anthropic_overload_is_a_refusal_where_asked_for(server: SdkServer) -> None:
    server.refuse(anthropic_error("overloaded_error"), status=529, headers=AFTER)
    assert refused(server, call_anthropic, overloaded=True).hit.retry_after == 7.0
    server.reset()
    server.refuse(anthropic_error("overloaded_error"), status=529, times=2)
    assert run(server, call_anthropic) == "hello"


@pytest.mark.parametrize(
    ("call", "event"),
    [
        (call_openai, f"data: {openai_error()}\n\n".replace("'", '"').replace("None", "null")),
        (call_anthropic, f"event: error\ndata: {anthropic_error()}\n\n".replace("'", '"')),
    ],
    ids=["openai", "anthropic"],
)
def test_refusal_inside_a_stream_is_recognised(
    server: SdkServer, call: Callable[..., Any], event: str
) -> None:
    server.refuse(event, status=200)
    assert refused(server, call, stream=True).hit.retry_after is None


HINTS: dict[str, tuple[Callable[..., Any], Any, dict[str, str], float]] = {
    "openai's milliseconds": (call_openai, openai_error(), {"retry-after-ms": "1500"}, 1.5),
    "openai's resets": (
        call_openai_async,
        openai_error(),
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"},
        62.0,
    ),
    "anthropic's resets": (
        call_anthropic,
        anthropic_error(),
        {
            "Date": "Tue, 14 Nov 2023 22:13:20 GMT",
            "anthropic-ratelimit-tokens-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:50Z",
        },
        30.0,
    ),
    "google's details": (call_google, google_error("34s"), {}, 34.0),
    "google's details, async": (call_google_async, google_error("34.5s"), {}, 34.5),
    "a date": (
        call_aiohttp,
        {},
        {"Date": "Tue, 14 Nov 2023 22:13:20 GMT", "Retry-After": "Tue, 14 Nov 2023 22:13:29 GMT"},
        9.0,
    ),
    "the cap": (call_requests, {}, {"Retry-After": "86400"}, 120.0),
}


@pytest.mark.parametrize(("call", "body", "headers", "hint"), HINTS.values(), ids=HINTS.keys())
def test_hint_reaches_the_refusal(
    server: SdkServer, call: Callable[..., Any], body: Any, headers: dict[str, str], hint: float
) -> None:
    server.refuse(body, headers=headers)
    assert refused(server, call).hit.retry_after == hint

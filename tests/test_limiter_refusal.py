"""What counts as a provider's refusal, and how long it asks us to stay away."""

from __future__ import annotations

import concurrent.futures
import math
import pickle
import time
import urllib.error
from email.message import Message
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.hints import CAP_S, retry_after_s
from limiter.refusal import RateLimitHit, recognised

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"


class Response:
    """As requests', whose truth value is False for an error."""

    def __init__(self, headers: Any = None, **attributes: Any) -> None:
        self.headers = {} if headers is None else headers
        self.__dict__.update(attributes)

    def __bool__(self) -> bool:
        return False


class ApiError(Exception):
    """Some SDK's error: attributes as given."""

    def __init__(self, text: str = "no", **attributes: Any) -> None:
        super().__init__(text)
        self.__dict__.update(attributes)


def from_sdk(module: str, *names: str) -> type[ApiError]:
    """The last of a chain of classes that stand in a module of that name, innermost base first."""
    cls: type[ApiError] = ApiError
    for name in names:
        cls = type(name, (cls,), {"__module__": module})
    return cls


OPENAI = from_sdk("openai", "APIError")
OPENAI_LIMIT = from_sdk("openai", "APIError", "APIStatusError", "RateLimitError")
ANTHROPIC = from_sdk("anthropic._exceptions", "APIError", "APIStatusError")

HINTS: dict[str, tuple[Any, float | None]] = {
    "seconds": ({"Retry-After": "7"}, 7.0),
    "seconds with a fraction": ({"retry-after": " 1.5 "}, 1.5),
    "names and values as bytes": ({b"Retry-After": b"7"}, 7.0),
    "a number that is no text": ({"Retry-After": 7}, 7.0),
    "milliseconds, which are asked first": ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
    "milliseconds that cannot be read leave the seconds": ({"retry-after-ms": "x", "retry-after": "1"}, 1.0),
    "a date on the server's clock": (
        {"Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT", "Date": "Wed, 01 Jan 2020 00:00:10 GMT"},
        20.0,
    ),
    "a date on this host's clock": ({"Retry-After": "Tue, 14 Nov 2023 22:13:45 GMT"}, 25.0),
    "a date with an unreadable Date": ({"Retry-After": "Tue, 14 Nov 2023 22:13:45 GMT", "Date": "?"}, 25.0),
    "a date that is over": ({"Retry-After": "Wed, 01 Jan 2020 00:00:30 GMT"}, 0.0),
    "openai's seconds": ({"x-ratelimit-reset-requests": "1s"}, 1.0),
    "openai's minutes": ({"x-ratelimit-reset-requests": "1m0.5s"}, 60.5),
    "openai's milliseconds": ({"x-ratelimit-reset-tokens": "20ms"}, 0.02),
    "openai's longest": ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6s"}, 6.0),
    "openai's that is used up": (
        {
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-tokens": "6m0s",
            "x-ratelimit-remaining-tokens": "149984",
        },
        1.0,
    ),
    "anthropic's that is used up": (
        {
            "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:50Z",
            "anthropic-ratelimit-requests-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "2023-11-14T22:14:50Z",
            "anthropic-ratelimit-tokens-remaining": "1000",
        },
        30.0,
    ),
    "anthropic's without what remains": ({"anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:50Z"}, None),
    "retry-after before resets": ({"retry-after": "2", "x-ratelimit-reset-requests": "9s"}, 2.0),
    "resets where retry-after cannot be read": ({"retry-after": "?", "x-ratelimit-reset-tokens": "9s"}, 9.0),
    "the cap": ({"Retry-After": "3600"}, CAP_S),
    "the cap for 1e12": ({"Retry-After": "1e12"}, CAP_S),
    "the cap for a far date": ({"Retry-After": "Fri, 14 Nov 2025 22:13:20 GMT"}, CAP_S),
    "less than nothing": ({"Retry-After": "-5"}, 0.0),
    "no headers": ({}, None),
    "no mapping": ([("Retry-After", "7")], None),
    "None": (None, None),
}


@pytest.mark.parametrize(("headers", "expected"), HINTS.values(), ids=HINTS.keys())
def test_hint_is_read_from_headers(headers: Any, expected: float | None) -> None:
    assert retry_after_s(headers, NOW) == pytest.approx(expected)


@pytest.mark.parametrize(
    "nonsense",
    ["abc", "", "NaN", "inf", "-inf", "1e999", "1_0", "٣", "9" * 10_000, "1 2", "1s2", "Tue, 99 Foo", "0x10"]
    + [math.nan, math.inf, True, None, [], ["7"], {"a": 1}, object(), 10**400, b"\xff\xfe"],
)
@pytest.mark.parametrize("name", ["retry-after-ms", "retry-after", "x-ratelimit-reset-requests"])
def test_nonsense_in_a_header_counts_as_not_said(name: str, nonsense: Any) -> None:
    assert retry_after_s({name: nonsense, "date": DATE}, NOW) is None


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "retry-after",
                "retry-after-ms",
                "date",
                "x-ratelimit-reset-tokens",
                "x-ratelimit-remaining-tokens",
            ]
            + ["anthropic-ratelimit-tokens-reset", "anthropic-ratelimit-tokens-remaining"]
        ),
        st.one_of(
            st.text(alphabet="0123456789.:+-eEsmhdZT ,GMTJan\x00²", max_size=40),
            st.text(),
            st.binary(),
            st.floats(),
            st.integers(),
            st.datetimes().map(str),
        ),
    )
)
def test_whatever_stands_in_headers_the_hint_is_none_or_within_the_cap(headers: dict[str, Any]) -> None:
    found = retry_after_s(headers, NOW)
    assert found is None or 0.0 <= found <= CAP_S
    assert recognised(ApiError(status_code=429, headers=headers, details=[headers], body=headers)) is not None


def test_headers_that_fail_when_read_count_as_not_said() -> None:
    class Broken:
        def items(self) -> Any:
            raise OSError

    assert retry_after_s(ApiError(response=Response(Broken())), NOW) is None


def test_hint_is_found_in_googles_details() -> None:
    info = [{"@type": "type.googleapis.com/google.rpc.Help"}]
    info += [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}]
    body = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": info}}
    for error in (ApiError(details=body), ApiError(details=body["error"]), ApiError(body=[body])):
        assert retry_after_s(error, NOW) == 34.5
    assert retry_after_s(ApiError(details=body, response=Response({"Retry-After": "3"})), NOW) == 3.0


def http_error(status: int, **headers: str) -> urllib.error.HTTPError:
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return urllib.error.HTTPError("http://127.0.0.1/", status, "no", message, None)


LATER = {"Retry-After": "2"}
REFUSALS: dict[str, tuple[BaseException, float | None]] = {
    "the user's own": (RateLimitHit("slow down", retry_after=3), 3.0),
    "own status_code": (ApiError(status_code=429), None),
    "own status": (ApiError(status=429, headers=LATER), 2.0),
    "own code": (ApiError(code=429, status="RESOURCE_EXHAUSTED"), None),
    "an enum": (ApiError(code=HTTPStatus.TOO_MANY_REQUESTS), None),
    "the response's status_code": (ApiError(response=Response(LATER, status_code=429)), 2.0),
    "the response's status": (ApiError(response=Response(status=429)), None),
    "the response's beside an own code": (ApiError(code=1302, response=Response(status_code=429)), None),
    "botocore's response": (
        ApiError(response={"ResponseMetadata": {"HTTPStatusCode": 429, "HTTPHeaders": {"retry-after": "2"}}}),
        2.0,
    ),
    "urllib's": (http_error(429, Retry_After="4"), 4.0),
    "unavailable with Retry-After": (ApiError(response=Response(LATER, status_code=503)), 2.0),
    "openai's class": (OPENAI_LIMIT(), None),
    "a class derived from openai's": (from_sdk("litellm", "RateLimitError")(status_code=429), None),
    "openai's stream": (OPENAI(code="rate_limit_exceeded"), None),
    "anthropic's stream": (ANTHROPIC(type="rate_limit_error", status_code=200), None),
    "an own retry_after": (ApiError(status=429, retry_after=5), 5.0),
}
NO_REFUSALS: dict[str, BaseException] = {
    "text": ValueError("Error code: 429 Too Many Requests, rate limit, throttled"),
    "another status": ApiError("429", status_code=400),
    "a status that is text": ApiError(status_code="429"),
    "a status that is True": ApiError(status_code=True),
    "a status that is a method": ApiError(status=lambda: 429),
    "unavailable without Retry-After": ApiError(response=Response(status_code=503)),
    "unavailable with nonsense": ApiError(response=Response({"Retry-After": "soon"}, status_code=503)),
    "overloaded": ApiError(status_code=529),
    "overloaded in a stream": ANTHROPIC(type="overloaded_error", status_code=200),
    "no money left": OPENAI_LIMIT(code="insufficient_quota", status_code=429, response=Response(LATER)),
    "another module's RateLimitError": from_sdk("mine", "RateLimitError")(),
    "sys.exit(429)": SystemExit(429),
    "a cancellation": concurrent.futures.CancelledError(),
}


@pytest.mark.parametrize(("error", "hint"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_is_recognised_with_its_hint(error: BaseException, hint: float | None) -> None:
    hit = recognised(error)
    assert hit is not None
    assert hit.retry_after == hint


@pytest.mark.parametrize("error", NO_REFUSALS.values(), ids=NO_REFUSALS.keys())
def test_what_only_looks_like_a_refusal_is_none(error: BaseException) -> None:
    assert recognised(error) is None


@pytest.mark.parametrize(
    "name",
    ["overloaded", "overloaded in a stream", "unavailable without Retry-After", "unavailable with nonsense"],
)
def test_overload_counts_where_asked_for(name: str) -> None:
    assert recognised(NO_REFUSALS[name], overloaded=True) is not None


def raised(error: BaseException, cause: BaseException | None = None, *, hides: bool = False) -> BaseException:
    """`error` as it is after a raise while `cause` was dealt with; `hides`: from None."""
    try:
        try:
            raise cause or KeyError
        except BaseException:
            if hides:
                raise error from None
            raise error  # noqa: B904 (its context is what is tested)
    except BaseException as seen:
        return seen


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def tenacity_like(error: BaseException) -> BaseException:
    attempt: concurrent.futures.Future[None] = concurrent.futures.Future()
    attempt.set_exception(error)
    return ApiError(last_attempt=attempt)


REFUSED = ApiError(status_code=429, headers=LATER)
WRAPPED: dict[str, tuple[BaseException, bool]] = {
    "from": (caused(ValueError(), REFUSED), True),
    "from, over an own status": (caused(ApiError(status_code=500), REFUSED), True),
    "while dealing with it": (raised(ValueError(), REFUSED), True),
    "while dealing with it, from None": (raised(ValueError(), REFUSED, hides=True), False),
    "while dealing with it, another answer": (raised(ApiError(status_code=400), REFUSED), False),
    "while dealing with it, from another": (caused(raised(ValueError(), REFUSED), KeyError()), False),
    "in a group": (ExceptionGroup("", [ValueError(), ExceptionGroup("", [REFUSED])]), True),
    "after the last attempt": (tenacity_like(REFUSED), True),
    "behind a last attempt's cause": (tenacity_like(caused(ValueError(), REFUSED)), True),
    "behind no money left": (caused(OPENAI_LIMIT(code="insufficient_quota"), REFUSED), False),
    "in front of no money left": (
        caused(ApiError(status_code=429), OPENAI_LIMIT(code="insufficient_quota")),
        False,
    ),
    "the user's word in front of no money left": (
        caused(RateLimitHit(retry_after=2), OPENAI_LIMIT(code="insufficient_quota")),
        True,
    ),
    "the user's word without a hint": (caused(RateLimitHit(), REFUSED), True),
}


@pytest.mark.parametrize(("error", "refused"), WRAPPED.values(), ids=WRAPPED.keys())
def test_refusal_is_found_behind_other_errors(error: BaseException, refused: bool) -> None:
    hit = recognised(error)
    assert (hit is not None) == refused
    assert hit is None or hit.retry_after == 2.0


def test_chains_without_end_are_looked_at_for_a_while() -> None:
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert recognised(one) is None
    attempt: concurrent.futures.Future[None] = concurrent.futures.Future()  # that never ends
    assert recognised(ApiError(last_attempt=attempt)) is None
    error: BaseException = REFUSED
    for _ in range(5_000):
        error = caused(ValueError(), error)
    assert recognised(error) is None


def test_hook_decides_before_the_other_rules() -> None:
    def hook(error: Exception) -> RateLimitHit | bool | None:
        if isinstance(error, LookupError):
            return RateLimitHit("mine", retry_after=9)
        return {TypeError: True, ApiError: False}.get(type(error))

    assert (hit := recognised(ValueError(), hook=hook)) is None
    assert (hit := recognised(caused(ValueError(), KeyError()), hook=hook)) and hit.retry_after == 9
    assert (hit := recognised(TypeError("x"), hook=hook)) and (str(hit), hit.source) == ("x", "builtins")
    assert recognised(REFUSED, hook=hook) is None
    assert recognised(OPENAI_LIMIT(), hook=hook) is not None


def test_hook_that_fails_is_logged_and_leaves_it_to_the_rules(caplog: pytest.LogCaptureFixture) -> None:
    def hook(error: Exception) -> bool:
        raise RuntimeError("bad hook")

    assert recognised(REFUSED, hook=hook) is not None
    assert "refusal.hook_failed error=RuntimeError" in caplog.text
    assert recognised(ValueError(), hook=lambda error: 30) is None  # type: ignore[arg-type, return-value]


def test_hit_can_be_pickled_and_printed() -> None:
    hit = RateLimitHit("slow down", retry_after=1.5, source="openai")
    again = pickle.loads(pickle.dumps(hit))
    assert (again.message, again.retry_after, again.source) == ("slow down", 1.5, "openai")
    assert str(again) == "slow down"
    assert str(RateLimitHit(retry_after=2, source="openai")) == "rate limit hit by openai, retry after 2 s"
    assert str(RateLimitHit()) == "rate limit hit"
    assert repr(hit) == "RateLimitHit('slow down', 1.5, 'openai')"


@pytest.mark.parametrize(
    ("given_", "expected"),
    [("30", 30.0), (600, CAP_S), (-1, 0.0), (math.nan, None), ("soon", None), ([1], None), (True, None)],
)
def test_retry_after_of_the_users_own_hit_is_made_sane(given_: Any, expected: float | None) -> None:
    hit = recognised(RateLimitHit(retry_after=given_))
    assert hit is not None and hit.retry_after == expected


def test_sane_hit_comes_back_as_it_is() -> None:
    hit = RateLimitHit("mine", retry_after=4)
    assert recognised(hit) is hit


def test_hit_names_who_refused_and_cuts_what_it_said() -> None:
    class Unprintable(ApiError):
        def __str__(self) -> str:
            raise ValueError

    hit = recognised(OPENAI_LIMIT("x" * 10_000))
    assert hit is not None and hit.source == "openai" and len(hit.message) == 500
    hit = recognised(Unprintable(status=429))
    assert hit is not None and hit.message == "Unprintable"


def test_date_hint_of_an_error_uses_this_hosts_clock_by_default() -> None:
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    hit = recognised(http_error(429, Retry_After=when))
    assert hit is not None and hit.retry_after is not None and 50 < hit.retry_after <= 60


def test_attribute_that_fails_when_read_says_nothing() -> None:
    class Broken(Exception):
        @property
        def response(self) -> Any:
            raise RuntimeError

        status_code = response

    assert recognised(Broken()) is None

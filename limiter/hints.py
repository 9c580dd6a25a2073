"""How long a server asks us to stay away: read from an error or its headers, safe against nonsense.

Asked in this order, the first that can be read wins:

    the error's own `retry_after`      seconds, or a date
    retry-after-ms                     milliseconds
    retry-after                        seconds, or a date
    x-ratelimit-reset-KIND             a duration such as 6m0s, unless x-ratelimit-remaining-KIND is above 0
    anthropic-ratelimit-KIND-reset     an RFC 3339 time, only if anthropic-ratelimit-KIND-remaining is 0
    google.rpc.RetryInfo               retryDelay in the error's details

Of several kinds that are used up the longest counts. Times are read against the response's own Date, so
that this host's clock does not matter; without one, against `now`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

CAP_S = 120.0
"""Nobody is kept away for longer by a hint; what lasts longer is asked again then."""

MOST_TEXT = 100
MOST_HEADERS = 300
HTTP_STATUS = range(100, 600)


def retry_after_s(source: object, now: float, *, cap_s: float = CAP_S) -> float | None:
    """Seconds from 0 to `cap_s` until the server wants to be asked again, None if it did not say.

    Args:
        source: an exception (of any SDK, or none), or a response's headers as a mapping.
        now: seconds since 1970 on this host's clock.

    Never raises: what cannot be read counts as not said.
    """
    if not isinstance(source, BaseException):
        return clamped(_from_headers(_plain(source), now), cap_s)
    own = seconds(peek(source, "retry_after"), now)
    if own is not None:
        return clamped(own, cap_s)
    for holder in holders(source):
        found = _from_headers(_headers_of(holder), now)
        if found is not None:
            return clamped(found, cap_s)
    return clamped(_from_details(source), cap_s)


def seconds(value: object, now: float) -> float | None:
    """One `Retry-After` value: a number, its text, or a date; None if it is none of these.

    >>> seconds("1.5", 0), seconds("Thu, 01 Jan 1970 00:00:30 GMT", 10), seconds("soon", 0)
    (1.5, 20.0, None)
    """
    number = _number(value)
    if number is not None:
        return number
    text = _text(value)
    if text is None:
        return None
    try:
        return _after(parsedate_to_datetime(text), now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def clamped(found: float | None, cap_s: float = CAP_S) -> float | None:
    """`found` brought between 0 and the cap.

    >>> clamped(-5.0), clamped(1e12), clamped(None)
    (0.0, 120.0, None)
    """
    return None if found is None else min(max(found, 0.0), cap_s)


def holders(error: BaseException) -> tuple[object, ...]:
    """Where an error may carry a status and headers: itself, and the response it came from."""
    response = peek(error, "response")
    if isinstance(response, Mapping):  # botocore's is a dict
        response = response.get("ResponseMetadata")
    return (error,) if response is None else (error, response)


def status_of(holder: object) -> int | None:
    """The HTTP status an error or a response carries as a number."""
    if isinstance(holder, Mapping):
        status = holder.get("HTTPStatusCode")
        return int(status) if isinstance(status, int) and status in HTTP_STATUS else None
    # `code` last, and only if the others say nothing: reading aiohttp's warns
    for name in ("status_code", "status", "code"):
        status = peek(holder, name)
        if isinstance(status, int):
            return int(status) if status in HTTP_STATUS else None
    return None


def peek(thing: object, name: str) -> Any:
    """The attribute, or None if there is none or reading it fails."""
    try:
        return getattr(thing, name, None)
    except Exception:
        return None


def _from_headers(headers: dict[str, str], now: float) -> float | None:
    if not headers:
        return None
    here = _server_time(headers.get("date"), now)
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    asked = seconds(headers.get("retry-after"), here)
    if asked is not None:
        return asked
    return max(_resets(headers, here), default=None)


def _resets(headers: dict[str, str], now: float) -> Iterator[float]:
    """Seconds until each used-up allowance is filled again."""
    for name, value in headers.items():
        found = None
        if name.startswith("x-ratelimit-reset-"):
            if _number(headers.get(name.replace("-reset-", "-remaining-", 1), "0")) == 0:
                found = _duration(value)
        elif (
            name.startswith("anthropic-ratelimit-")
            and name.endswith("-reset")
            and _number(headers.get(name.removesuffix("reset") + "remaining")) == 0
        ):
            found = _rfc3339(value, now)
        if found is not None:
            yield found


def _from_details(error: BaseException) -> float | None:
    """RetryInfo, as google-genai keeps it in `details` and OpenAI's SDK in `body`."""
    for name in ("details", "body"):
        body = peek(error, name)
        if isinstance(body, list) and len(body) == 1:
            body = body[0]
        inner = body.get("error", body) if isinstance(body, Mapping) else None
        details = inner.get("details") if isinstance(inner, Mapping) else None
        for detail in details[:MOST_HEADERS] if isinstance(details, list) else ():
            if isinstance(detail, Mapping) and str(detail.get("@type")).endswith("/google.rpc.RetryInfo"):
                found = _duration(detail.get("retryDelay"))
                if found is not None:
                    return found
    return None


def _headers_of(holder: object) -> dict[str, str]:
    return _plain(holder.get("HTTPHeaders") if isinstance(holder, Mapping) else peek(holder, "headers"))


def _plain(headers: object) -> dict[str, str]:
    """Names in lower case, values as text; of a repeated name the first. Empty for anything else."""
    plain: dict[str, str] = {}
    try:
        for place, (name, value) in enumerate(headers.items()):  # type: ignore[attr-defined]
            if place >= MOST_HEADERS:
                break
            key, text = _text(name), _text(value)
            if key is not None and text is not None:
                plain.setdefault(key.lower(), text)
    except Exception:
        pass  # no mapping, or one that cannot be read
    return plain


def _text(value: object) -> str | None:
    """A header's short text. Numbers count, because hand-made headers hold them."""
    if isinstance(value, (bytes, bytearray)):
        value = value[: MOST_TEXT + 1].decode("latin-1")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _number(value)
        return None if number is None else repr(number)
    return value.strip() if isinstance(value, str) and len(value) <= MOST_TEXT else None


def _number(value: object) -> float | None:
    """A finite number, or the text of one."""
    if isinstance(value, (str, bytes, bytearray)):
        value = _text(value)
        if value is None or not _DECIMAL.fullmatch(value):
            return None
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ms|us|µs|ns|d|h|m|s)", re.ASCII)
_UNIT_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _duration(value: object) -> float | None:
    """Seconds of a duration as OpenAI and Google write it, or of a bare number.

    >>> _duration("6m0s"), _duration("20ms"), _duration("34.5s"), _duration("1 fortnight")
    (360.0, 0.02, 34.5, None)
    """
    text = _text(value)
    if not text:
        return None
    if _PART.sub("", text):
        return _number(text)
    return sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))


def _rfc3339(value: str, now: float) -> float | None:
    try:
        return _after(datetime.fromisoformat(value), now)
    except (ValueError, OverflowError):
        return None


def _server_time(date: str | None, now: float) -> float:
    """When the response was made, seconds since 1970 on the server's clock, else `now`."""
    try:
        return _after(parsedate_to_datetime(date), 0.0) if date else now
    except (ValueError, TypeError, OverflowError, IndexError):
        return now


def _after(moment: datetime, now: float) -> float:
    """Seconds from `now` to `moment`; one without a zone is in UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now

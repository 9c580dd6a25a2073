"""When a provider refuses us for going too fast: what to raise, and how it is recognised.

Known by type and status, never by searching a text. No SDK is imported: classes are known by their names.

| a refusal | |
| --- | --- |
| `RateLimitHit` | raised by the user's own code |
| status 429 | as a number in the error's own, or its response's, `status_code`, `status` or `code` |
| status 503 | with a `Retry-After` that can be read; without one only with `overloaded=True` |
| status 529 | "overloaded", only with `overloaded=True` |
| `openai.RateLimitError`, `anthropic.RateLimitError` | and what derives from them |
| refused inside a stream | openai's code `rate_limit_exceeded`, anthropic's type `rate_limit_error` |

Not a refusal, although its status is 429: OpenAI's code `insufficient_quota`. The account has no money
left, which no waiting mends, so the run fails with that error at once.
"""

from __future__ import annotations

import logging
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from typing import Any

from limiter.hints import CAP_S, holders, peek, retry_after_s, status_of

log = logging.getLogger("pocketfleet.limiter")

MOST_LINKS = 50
MOST_TEXT = 500
TOO_MANY, UNAVAILABLE, OVERLOADED = 429, 503, 529

Hook = Callable[[Exception], "RateLimitHit | bool | None"]
"""The user's own rule, asked about each error of a chain, the outermost first. A `RateLimitHit` or True:
refused. False: the whole chain is no refusal. None: the other rules decide."""


class RateLimitHit(Exception):
    """Raise it in a node when the provider refuses: the run waits and goes on, it does not fail.

    Args:
        message: for people.
        retry_after: seconds until the provider wants to be asked again; the text of a `Retry-After`
            header will do too. None if it did not say. The whole fleet waits so long, within a cap.
        source: who refused, for logs.

    Attributes:
        fed: a gate has learnt of it already, so that those around it need not.
    """

    fed = False

    def __init__(
        self, message: str = "", retry_after: float | None = None, source: str | None = None
    ) -> None:
        super().__init__(message, retry_after, source)
        self.message = message
        self.retry_after = retry_after
        self.source = source

    def __str__(self) -> str:
        if self.message:
            return str(self.message)
        by = f" by {self.source}" if self.source else ""
        after = f", retry after {self.retry_after} s" if self.retry_after is not None else ""
        return f"rate limit hit{by}{after}"


def recognised(
    error: BaseException,
    *,
    overloaded: bool = False,
    hook: Hook | None = None,
    now: float | None = None,
    cap_s: float = CAP_S,
) -> RateLimitHit | None:
    """`error` as a `RateLimitHit` if a provider's refusal stands behind it, else None.

    Looks at the error, what caused it, the members of exception groups and the last attempt of
    tenacity's `RetryError`, at most 50 errors. `retry_after` of the answer is None or a number from 0
    to `cap_s`, from the outermost error that carries a hint. An error that only came up while a refusal
    was dealt with (`__context__`) counts as that refusal too, unless it has an HTTP status of its own
    or was raised `from` something else.

    Args:
        overloaded: whether status 529 counts, and 503 without a `Retry-After`.
        hook: the user's own rule; one that raises is logged and counts as None.
        now: seconds since 1970, for hints that are dates; None reads this host's clock.
    """
    if not isinstance(error, Exception):
        return None  # cancelled, interrupted, or groups that hold such
    moment = time.time() if now is None else now
    links = list(_links(error))
    hit = _decided(links, overloaded, hook, moment)
    if hit is None:
        return None
    hint = retry_after_s(hit, moment, cap_s=cap_s)
    for link in links:
        if hint is not None:
            break
        hint = retry_after_s(link, moment, cap_s=cap_s)
    if type(hit.retry_after) not in (int, float, type(None)) or hit.retry_after != hint:
        hit = RateLimitHit(hit.message, hint, hit.source)
    if any(peek(link, _FED) is True for link in links):
        hit.fed = True
    return hit


_FED = "fed_to_a_gate_of_pocketfleet"


def mark_fed(error: BaseException, hit: RateLimitHit) -> None:
    """A gate has learnt of this refusal: `recognised` says so (`fed`) to whoever meets it further out."""
    hit.fed = True
    object.__setattr__(error, _FED, True)


def hit_of(error: BaseException | None) -> RateLimitHit | None:
    """The refusal that stands behind what leaves a block, also where a guarded node has recognised it."""
    if error is None:
        return None
    known = peek(error, "hit")
    return known if isinstance(known, RateLimitHit) else recognised(error)


def _decided(links: list[Exception], overloaded: bool, hook: Hook | None, now: float) -> RateLimitHit | None:
    """The user's own word ends the matter, whatever stands behind it; else the outermost refusal counts,
    unless something in the chain can never be mended by waiting."""
    first: RateLimitHit | None = None
    for link in links:
        if isinstance(link, RateLimitHit):
            return link
        word = None if hook is None else _asked(hook, link)
        if word is not None:
            return word if isinstance(word, RateLimitHit) else _hit(link) if word is True else None
        kinds = _kinds(link)
        if ("openai", "APIError") in kinds and peek(link, "code") == "insufficient_quota":
            return None
        if first is None and _is_refusal(link, kinds, overloaded, now):
            first = _hit(link)
    return first


def _is_refusal(link: Exception, kinds: set[tuple[str, str]], overloaded: bool, now: float) -> bool:
    for holder in holders(link):
        status = status_of(holder)
        if status == TOO_MANY or (overloaded and status in (UNAVAILABLE, OVERLOADED)):
            return True
        if status == UNAVAILABLE and retry_after_s(link, now) is not None:
            return True
    if ("openai", "RateLimitError") in kinds or ("anthropic", "RateLimitError") in kinds:
        return True
    if ("openai", "APIError") in kinds:
        return bool(peek(link, "code") == "rate_limit_exceeded")
    if ("anthropic", "APIError") in kinds:
        kind = peek(link, "type")
        return kind == "rate_limit_error" or (overloaded and kind == "overloaded_error")
    return False


def _kinds(link: Exception) -> set[tuple[str, str]]:
    """Distribution and name of the error's classes."""
    return {(_root(cls), cls.__name__) for cls in type(link).__mro__}


def _root(cls: type) -> str:
    return str(cls.__module__).partition(".")[0]


def _hit(link: Exception) -> RateLimitHit:
    try:
        message = str(link)[:MOST_TEXT]
    except Exception:
        message = type(link).__name__
    return RateLimitHit(message, None, _root(type(link)))


def _asked(hook: Hook, link: Exception) -> RateLimitHit | bool | None:
    try:
        answer = hook(link)
    except Exception as error:
        log.warning("refusal.hook_failed error=%s", type(error).__name__, exc_info=True)
        return None
    return answer if isinstance(answer, (RateLimitHit, bool)) else None


def _links(error: Exception) -> Iterator[Exception]:
    """The error and what stands behind it, outermost first, each once."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting and len(seen) < MOST_LINKS:
        link = waiting.pop()
        if id(link) in seen or not isinstance(link, Exception):
            continue
        seen.add(id(link))
        yield link
        waiting.extend(reversed(_behind(link)))


def _behind(link: Exception) -> list[BaseException]:
    behind: list[BaseException] = []
    if isinstance(link, BaseExceptionGroup):
        behind.extend(link.exceptions[:MOST_LINKS])
    last = _last_attempt(link)
    if last is not None:
        behind.append(last)
    if link.__cause__ is not None:
        behind.append(link.__cause__)
    elif link.__context__ is not None and not link.__suppress_context__ and _has_no_status(link):
        behind.append(link.__context__)
    return behind


def _has_no_status(link: Exception) -> bool:
    return all(status_of(holder) is None for holder in holders(link))


def _last_attempt(link: Exception) -> BaseException | None:
    """What the last try of a retrying library raised. Never waits for a future that is not done."""
    attempt: Any = peek(link, "last_attempt")
    try:
        last = attempt.exception() if attempt is not None and attempt.done() is True else None
    except (Exception, CancelledError):
        return None
    return last if isinstance(last, BaseException) else None

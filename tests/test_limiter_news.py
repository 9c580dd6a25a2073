"""What rides on one call, and what has to wait for the next."""

from __future__ import annotations

from limiter.news import MOST_BYTES, News
from limiter.sync import MOST, Call, Entry


def calls_of(news: News) -> list[Call]:
    calls: list[Call] = []
    while news:
        calls.append(Call("p", len(calls) + 1))
        news.put_into(calls[-1])
    return calls


def size(call: Call) -> int:
    return sum(len(entry.arg) for entry in call.entries if isinstance(entry.arg, bytes))


def test_a_call_carries_at_most_its_bytes_and_entries_and_keeps_their_order() -> None:
    news = News()
    news.add(Entry(f"j{n}", n, 1, "save", bytes(60_000)) for n in range(10))
    news.add(Entry(f"k{n}", n, 1, "completed", b"") for n in range(MOST + 5))
    calls = calls_of(news)
    assert all(size(call) <= MOST_BYTES and len(call.entries) <= MOST for call in calls)
    assert [entry.job for call in calls for entry in call.entries] == [
        *(f"j{n}" for n in range(10)),
        *(f"k{n}" for n in range(MOST + 5)),
    ]
    assert len(calls) == 4


def test_an_entry_larger_than_a_call_goes_alone() -> None:
    news = News()
    news.add(Entry(f"j{n}", n, 1, "result:1", bytes(MOST_BYTES + n)) for n in range(3))
    assert [len(call.entries) for call in calls_of(news)] == [1, 1, 1]

"""The account of the examples' services, which their tests believe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.services import answers
from examples.services.account import Account

ROOT = Path(__file__).resolve().parents[1]

# (limits, calls "arrive|leave|break step key", what the report holds afterwards)
TABLE: dict[str, tuple[dict[str, int], list[str], dict[str, Any]]] = {
    "a key is in progress between its steps": (
        {},
        ["arrive first a", "leave first a", "arrive first b"],
        {"in_progress": 2, "most_in_progress": 2},
    ),
    "a key is done when its last step is answered": (
        {},
        ["arrive first a", "leave first a", "arrive last a", "leave last a", "arrive first b"],
        {"in_progress": 1, "most_in_progress": 1},
    ),
    "parallel calls of one key are one key": (
        {},
        ["arrive first a", "arrive first a", "leave first a"],
        {"in_progress": 1, "most_in_progress": 1},
    ),
    "a refused key is no longer in progress, though it was": (
        {"first": 1},
        ["arrive first a", "refuse first b", "refuse first c"],
        {"in_progress": 1, "most_in_progress": 2},
    ),
    "a refused key that comes again is in progress again": (
        {"first": 1},
        ["arrive first a", "refuse first b", "leave first a", "arrive first b"],
        {"in_progress": 2, "most_in_progress": 2},
    ),
    "a key whose connection breaks is gone": (
        {},
        ["arrive first a", "break first a", "arrive first b"],
        {"in_progress": 1, "most_in_progress": 1},
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_account_says_how_many_keys_are_in_progress(name: str) -> None:
    limits, calls, expected = TABLE[name]
    account = Account({"last"}, limits)

    play(account, calls)

    report = account.report()
    assert {key: report[key] for key in expected} == expected


def test_account_counts_each_step_by_itself() -> None:
    account = Account({"last"}, {"first": 2})

    play(account, ["arrive first a", "arrive first b", "refuse first c", "leave first a", "arrive last a"])
    play(account, ["break last a", "leave first b", "arrive first a", "leave first a"])

    assert account.report()["steps"] == {
        "first": {"most_at_once": 2, "refused": 1, "broken": 0, "answered": {"a": 2, "b": 1}},
        "last": {"most_at_once": 1, "refused": 0, "broken": 1, "answered": {}},
    }


def play(account: Account, calls: list[str]) -> None:
    for call in calls:
        verb, step, key = call.split()
        if verb in ("arrive", "refuse"):
            assert account.arrive(step, key) is (verb == "arrive"), call
        else:
            account.leave(step, key, answered=verb == "leave")


def test_a_summary_is_the_sentence_with_most_of_the_keywords() -> None:
    text = "Nobody came. The harbour keeps tide tables. The harbour sleeps."

    found = answers.analyze("x", {"content": text})
    summary = answers.summarize("x", {"content": text, **found})

    assert (found["words"], found["keywords"][0]) == (10, "harbour")
    assert summary == {"summary": "The harbour keeps tide tables."}


def test_a_completion_names_the_feeling_and_counts_its_words() -> None:
    found = answers.chat("Fresh bread, but a cold and stale cake", {"model": "m"})

    assert found["choices"][0]["message"]["content"] == "negative"
    assert found["usage"] == {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}


@pytest.mark.parametrize("value", ["emial=2", "email=-1"])
def test_services_refuse_a_limit_of_no_step(value: str) -> None:
    command = [sys.executable, "examples/services", "--at-once", value]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert f"'{value}' cannot be used: write STEP=N with one of analyze, " in done.stderr

"""The gate's promises, one table or one small story each; every call is judged by the ledger as well.

A row is (us after T0, call, what the answer must say). Time is passed in, nothing sleeps.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from gate_model import GRACE_US, T0, Fleet, Gate, Ledger, Pump, job_id
from pytest import approx
from redis.exceptions import ResponseError

from limiter.limits import Limits
from limiter.sync import Answer, Call, Entry, read_answer

S = 1_000_000
LEASE = 15 * S
PLAIN = Limits("L", 2)
RATED = Limits("L", 100, 3, window_s=10)
EVEN = Limits("L", 100, 10, even=True, window_s=10)
PACE = (10 * S + 41_666) // 10 + 1
"""From one start to the next: the window and its slack hold ten."""
FIRST = PACE - 10 * S // 1200
"""From a first start to the second, which may catch up with a little lateness."""
ADAPTIVE = Limits(
    "L",
    8,
    min_concurrent=1,
    initial_concurrent=8,
    recovery_threshold=2,
    backoff_factor=0.5,
    recovery_factor=1.2,
)
TWO = Limits("L", 2, min_concurrent=1, initial_concurrent=2, lease_s=30)
GENTLE = Limits("L", 100, min_concurrent=1, initial_concurrent=100, backoff_factor=0.9)
ADDING = Limits("L", 20, min_concurrent=1, initial_concurrent=4, additive=True)
EAGER = Limits("L", 8, min_concurrent=1, initial_concurrent=8, recovery_threshold=4, recovery_factor=3)


def says(ledger: Ledger, after: int, call: Call) -> Answer:
    """The answer, after the ledger judged it and the whole state."""
    raw = ledger.gate.sync(call, T0 + after)
    answer = ledger.sync(call, T0 + after, raw)
    ledger.compare()
    return answer


def put(
    ledger: Ledger, after: int, count: int, batch: str = "b", flow: str = "f", spacing: float = 1000
) -> None:
    items = {i: f"{flow} {i}".encode() for i in range(count)}
    reply = ledger.gate.enqueue(T0 + after, batch, flow, items, spacing)
    ledger.enqueue(T0 + after, batch, flow, items, spacing, reply)


def ask(process: str, seq: int, limits: Limits = PLAIN, **values: Any) -> Call:
    """A call; it remembers that its process started at T0 unless it is the first."""
    values.setdefault("started", T0 if seq > 1 else 0)
    values.setdefault("limits", limits.as_argument())
    return Call(process, seq, **values)


def jobs(process: str, seq: int, count: int, limits: Limits = PLAIN, **values: Any) -> Call:
    return ask(process, seq, limits, jobs=count, flows=values.pop("flows", ("f",)), **values)


def ended(index: int, attempt: int, what: str = "completed", arg: Any = b"out") -> Entry:
    return Entry(job_id("L", "b", index), T0 + attempt, 1, what, arg)


def taken(answer: Answer) -> list[int]:
    return [int(job.id.rpartition(":")[2]) for job in answer.jobs]


Row = tuple[int, Call, dict[str, Any]]
TABLES: dict[str, list[Row]] = {
    "permits_never_exceed_the_maximum": [
        (0, ask("A", 1, permits=1), {"permits": 1, "in_use": 1, "reason": "-"}),
        (1, ask("B", 1, permits=5), {"permits": 1, "in_use": 2, "reason": "level"}),
        (2, ask("C", 1, permits=1), {"permits": 0, "in_use": 2, "reason": "level"}),
    ],
    "a_released_slot_goes_to_the_first_in_line": [
        (0, ask("A", 1, permits=2), {"permits": 2}),
        (1, ask("B", 1, permits=1), {"permits": 0}),
        (2, ask("C", 1, permits=1), {"permits": 0}),
        (3, ask("A", 2, held=1), {"in_use": 2}),  # B was granted it in its wake message
        (4, ask("C", 2, permits=1), {"permits": 0, "reason": "level"}),
        (5, ask("B", 2, held=1, permits=1), {"permits": 0, "in_use": 2}),
        (6, ask("A", 3), {"in_use": 2}),
        (7, ask("C", 3, held=1), {"in_use": 2}),
    ],
    "the_same_number_gets_the_same_answer_and_a_lower_one_none": [
        (0, ask("A", 1, permits=1), {"permits": 1, "in_use": 1}),
        (9, ask("A", 1, permits=1), {"permits": 1, "in_use": 1, "now": T0}),
        (10, ask("A", 2, held=1, permits=1), {"permits": 1, "in_use": 2}),
        (11, ask("A", 1, permits=1), {"status": -1}),
        (12, ask("B", 1, permits=1), {"permits": 0, "in_use": 2}),
    ],
    "an_even_pace_spreads_the_starts_over_the_window": [
        (0, ask("A", 1, EVEN, permits=9), {"permits": 1, "reason": "pacing", "wait_s": FIRST / 1e6}),
        (1, ask("A", 2, EVEN, held=1, permits=8), {"permits": 0, "used": 1, "wait_s": (FIRST - 1) / 1e6}),
        (FIRST - 1, ask("A", 3, EVEN, held=1, permits=8), {"permits": 0}),
        (FIRST, ask("A", 4, EVEN, held=1, permits=8), {"permits": 1, "used": 2}),
        # late by less than what may be caught up with: the next is due as if it had not been
        (FIRST + PACE + 8_000, ask("A", 5, EVEN, held=2, permits=7), {"permits": 1}),
        (FIRST + 2 * PACE - 1, ask("A", 6, EVEN, held=3, permits=6), {"permits": 0}),
        (FIRST + 2 * PACE, ask("A", 7, EVEN, held=3, permits=6), {"permits": 1}),
        # a lull is not made up for
        (8 * S, ask("A", 8, EVEN, held=4, permits=5), {"permits": 1, "reason": "pacing"}),
    ],
    "the_next_in_line_is_told_when_an_even_pace_lets_it_start": [
        (0, ask("A", 1, EVEN, permits=1), {"permits": 1}),
        (1, ask("B", 1, EVEN, permits=1), {"permits": 0, "reason": "pacing", "wait_s": (FIRST - 1) / 1e6}),
        (2, ask("C", 1, EVEN, permits=1), {"permits": 0, "wait_s": 5.0}),
        (FIRST, ask("B", 2, EVEN, permits=1), {"permits": 1}),
    ],
    "a_start_that_is_given_back_does_not_hold_up_an_even_pace": [
        (0, ask("A", 1, EVEN, permits=1), {"permits": 1}),
        (100, ask("A", 2, EVEN, permits=1, returned=f"{T0 + 41_666} 1"), {"permits": 1, "used": 1}),
        (200, ask("A", 3, EVEN, held=1, permits=1), {"permits": 0, "reason": "pacing"}),
    ],
    "a_refused_call_burns_no_start": [
        (0, ask("A", 1, RATED, permits=3), {"permits": 3, "used": 3, "slack_s": 0.041666}),
        (1, ask("B", 1, RATED, permits=3), {"permits": 0, "used": 3, "reason": "window"}),
        (2, ask("C", 1, RATED, permits=3), {"permits": 0, "used": 3}),
    ],
    "a_start_leaves_the_window_exactly_one_length_after_its_latest_moment": [
        (0, ask("A", 1, RATED, permits=3), {"permits": 3, "stamp": T0 + 41_666}),
        (1, ask("B", 1, RATED, permits=3), {"permits": 0, "wait_s": 5.0}),
        (5 * S, ask("B", 2, RATED, permits=3), {"permits": 0, "wait_s": 5.0}),
        (9 * S, ask("B", 3, RATED, permits=3), {"permits": 0, "wait_s": 1.041666}),
        (10 * S + 41_665, ask("B", 4, RATED, permits=3), {"permits": 0, "wait_s": 0.000001}),
        (10 * S + 41_666, ask("B", 5, RATED, permits=3), {"permits": 3, "used": 3}),
    ],
    "each_start_leaves_the_window_in_its_own_microsecond": [
        (0, ask("A", 1, RATED, permits=2), {"permits": 2, "stamp": T0 + 41_666}),
        (1, ask("A", 2, RATED, held=2, permits=1), {"permits": 1, "stamp": T0 + 41_667}),
        (10 * S + 41_666, ask("A", 3, RATED, permits=3), {"permits": 2, "used": 3, "wait_s": 0.000001}),
        (10 * S + 41_667, ask("A", 4, RATED, permits=1), {"permits": 1, "used": 3}),
    ],
    "a_returned_grant_gives_its_start_back_and_doubles_the_slack": [
        (0, ask("A", 1, RATED, permits=3), {"permits": 3, "used": 3}),
        (1, ask("A", 2, RATED, held=1, returned=f"late {T0 + 41_666} 2"), {"used": 1, "slack_s": 0.083333}),
        (2, ask("A", 3, RATED, held=1, permits=3), {"permits": 2, "used": 3}),
    ],
    "a_pause_stops_the_whole_fleet_and_ends_on_time": [
        (0, ask("A", 1, permits=1, pause_us=4 * S), {"permits": 0, "reason": "pause", "wait_s": 4.0}),
        (1 * S, ask("B", 1, permits=1), {"permits": 0, "reason": "pause"}),
        (4 * S - 1, ask("A", 2, permits=1), {"permits": 0, "wait_s": 0.000001}),
        (4 * S, ask("A", 3, permits=1), {"permits": 1}),
    ],
    "a_dead_process_keeps_its_slots_for_one_lease_and_not_longer": [
        (0, ask("A", 1, permits=2), {"permits": 2}),
        (1, ask("B", 1, permits=2), {"permits": 0}),
        (5 * S, ask("B", 2, permits=2), {"permits": 0}),
        (10 * S, ask("B", 3, permits=2), {"permits": 0, "wait_s": 5.0}),
        (15 * S, ask("B", 4, permits=2), {"permits": 0, "wait_s": 0.001}),
        (15 * S + 1, ask("B", 5, permits=2), {"permits": 2, "in_use": 2}),
        (16 * S, ask("A", 2, held=2, permits=1), {"status": 1, "permits": 0, "in_use": 4}),
    ],
    "the_process_that_started_last_sets_the_limits": [
        (0, ask("A", 1, Limits("L", 1), permits=1), {"permits": 1, "level": 1}),
        (5, ask("B", 1, Limits("L", 3), permits=2), {"permits": 2, "level": 3, "in_use": 3}),
        (6, ask("A", 2, Limits("L", 1), held=1), {"level": 3}),
        (7, ask("C", 1, Limits("L", 2), permits=2), {"permits": 0, "level": 2, "in_use": 3}),
    ],
    "a_level_below_its_ceiling_stays_when_the_ceiling_is_raised": [
        (0, ask("A", 1, ADAPTIVE, permits=4), {"level": 8, "attempt": T0 + 4}),
        (1, ask("A", 2, ADAPTIVE, refused=T0 + 4, held=3), {"level": 4, "cut": T0 + 4}),
        (5, ask("B", 1, Limits("L", 16, min_concurrent=1)), {"level": 4}),
    ],
    "twenty_429s_in_one_episode_cut_the_level_once": [
        (0, ask("A", 1, ADAPTIVE, permits=6), {"permits": 6, "attempt": T0 + 6}),
        (1, ask("A", 2, ADAPTIVE, refused=T0 + 3, held=3), {"level": 4, "cut": T0 + 6}),
        (2, ask("B", 1, ADAPTIVE, refused=T0 + 6), {"level": 4}),
        (3, ask("A", 3, ADAPTIVE, refused=T0 + 5, held=2, permits=1), {"level": 4, "attempt": T0 + 7}),
        (4, ask("A", 4, ADAPTIVE, refused=T0 + 7, held=0), {"level": 2, "cut": T0 + 7}),
    ],
    "an_old_429_cuts_again_when_nothing_ended_for_half_a_minute": [
        (0, ask("A", 1, ADAPTIVE, permits=6), {"attempt": T0 + 6}),
        (1, ask("A", 2, ADAPTIVE, refused=T0 + 3, held=5), {"level": 4}),
        (8 * S, ask("A", 3, ADAPTIVE, held=5), {}),
        (16 * S, ask("A", 4, ADAPTIVE, held=5), {}),
        (24 * S, ask("A", 5, ADAPTIVE, held=5), {}),
        (30 * S, ask("A", 6, ADAPTIVE, held=5, refused=T0 + 4), {"level": 4}),
        (30 * S + 2, ask("A", 7, ADAPTIVE, held=5, refused=T0 + 4), {"level": 2}),
    ],
    "the_level_grows_only_while_it_holds_the_fleet_back": [
        (0, ask("A", 1, ADAPTIVE, permits=8), {"permits": 8, "attempt": T0 + 8}),
        (1, ask("A", 2, ADAPTIVE, refused=T0 + 8, held=2), {"level": 4, "cut": T0 + 8}),
        (2, ask("A", 3, ADAPTIVE, held=2, successes=9, counted_under=T0 + 8), {"level": 4}),
        (3, ask("A", 4, ADAPTIVE, held=2, permits=2), {"permits": 2}),
        (4, ask("A", 5, ADAPTIVE, held=4, successes=1, counted_under=0), {"level": 4}),
        (5, ask("A", 6, ADAPTIVE, held=4, successes=2, counted_under=T0 + 8), {"level": 5}),
    ],
    "the_level_stays_within_its_bounds_and_comes_back_from_one": [
        (0, ask("A", 1, ADAPTIVE, permits=1), {"attempt": T0 + 1}),
        (1, ask("A", 2, ADAPTIVE, refused=T0 + 1, permits=1), {"level": 4, "attempt": T0 + 2}),
        (2, ask("A", 3, ADAPTIVE, refused=T0 + 2, permits=1), {"level": 2, "attempt": T0 + 3}),
        (3, ask("A", 4, ADAPTIVE, refused=T0 + 3, permits=1), {"level": 1, "attempt": T0 + 4}),
        (4, ask("A", 5, ADAPTIVE, refused=T0 + 4, permits=1), {"level": 1, "permits": 1}),
        (1 * S + 4, ask("A", 6, ADAPTIVE, permits=1), {"level": 1, "permits": 1}),
        (2 * S, ask("A", 7, ADAPTIVE, held=1, successes=3, counted_under=T0 + 4, permits=1), {"level": 2}),
        (2 * S + 1, ask("A", 8, ADAPTIVE, held=2, successes=2, counted_under=T0 + 4), {"level": 3}),
    ],
    "cuts_with_no_success_between_go_deeper_down_to_a_half": [
        (0, ask("A", 1, GENTLE, permits=1), {"level": 100}),
        (1, ask("A", 2, GENTLE, refused=T0 + 1, permits=1), {"level": 90}),
        (2, ask("A", 3, GENTLE, refused=T0 + 2, permits=1), {"level": approx(72.9)}),
        (3, ask("A", 4, GENTLE, refused=T0 + 3, permits=1), {"level": approx(47.82969)}),
        (4, ask("A", 5, GENTLE, refused=T0 + 4, permits=1), {"level": approx(23.914845)}),
        (5, ask("A", 6, GENTLE, successes=1, counted_under=T0 + 4, permits=1), {"permits": 1}),
        (6, ask("A", 7, GENTLE, refused=T0 + 6, permits=1), {"level": approx(23.914845 * 0.9)}),
    ],
    "additive_is_steep_to_just_below_what_was_refused_then_tries_it_and_is_steep_again_past_it": [
        (0, ask("A", 1, ADDING, permits=4), {"level": 4, "permits": 4}),
        (1, ask("A", 2, ADDING, held=0, successes=4, permits=8), {"level": 8, "permits": 8}),
        (2, ask("A", 3, ADDING, held=0, refused=T0 + 12, permits=4), {"level": 4, "permits": 4}),
        (3, ask("A", 4, ADDING, held=4, successes=2, counted_under=T0 + 12, permits=2), {"level": 6}),
        (
            4,
            ask("A", 5, ADDING, held=6, successes=6, counted_under=T0 + 12, permits=1),
            {"level": approx(7.99)},
        ),
        (5, ask("A", 6, ADDING, held=7, successes=19, counted_under=T0 + 12), {"level": approx(7.99)}),
        (6, ask("A", 7, ADDING, held=7, successes=1, counted_under=T0 + 12, permits=1), {"level": 8}),
        (7, ask("A", 8, ADDING, held=8, successes=4, counted_under=T0 + 12), {"level": 8.5}),
        (
            8,
            ask("A", 9, ADDING, held=8, successes=5, counted_under=T0 + 12, permits=1),
            {"level": 8.5 + 5 / 8.5},
        ),
        (9, ask("A", 10, ADDING, held=9, successes=6, counted_under=T0 + 12), {"level": 14.5 + 5 / 8.5}),
    ],
    "further_refusals_of_a_spell_lower_what_is_tried_again_and_not_the_level": [
        (0, ask("A", 1, ADDING, permits=4), {"level": 4}),
        (1, ask("A", 2, ADDING, held=0, successes=4, permits=8), {"level": 8, "permits": 8}),
        (2, ask("A", 3, ADDING, held=7, refused=T0 + 12), {"level": 4, "cut": T0 + 12}),
        (3, ask("A", 4, ADDING, held=6, refused=T0 + 11), {"level": 4}),
        (4, ask("A", 5, ADDING, held=5, refused=T0 + 10), {"level": 4}),
        (5, ask("A", 6, ADDING, held=0, permits=4), {"permits": 4}),
        (6, ask("A", 7, ADDING, held=4, successes=9, counted_under=T0 + 12), {"level": approx(5.99)}),
    ],
    "what_was_refused_is_tried_again_after_six_levels_of_successes": [
        (0, ask("A", 1, EAGER, permits=8), {"level": 8}),
        (1, ask("A", 2, EAGER, held=0, refused=T0 + 8, permits=4), {"level": 4, "permits": 4}),
        (2, ask("A", 3, EAGER, held=4, successes=4, counted_under=T0 + 8), {"level": approx(7.99)}),
        (3, ask("A", 4, EAGER, held=4, successes=9, counted_under=T0 + 8), {"level": approx(7.99)}),
        (4, ask("A", 5, EAGER, held=4, permits=3), {"permits": 3}),
        (5, ask("A", 6, EAGER, held=7, successes=8, counted_under=T0 + 8), {"level": approx(7.99)}),
        (6, ask("A", 7, EAGER, held=7, successes=24, counted_under=T0 + 8), {"level": approx(7.99)}),
        (7, ask("A", 8, EAGER, held=7, successes=8, counted_under=T0 + 8), {"level": 8}),
    ],
    "a_gate_that_lost_its_data_holds_for_a_lease": [
        (0, ask("A", 1, permits=1, birth=T0 - 9), {"permits": 0, "reason": "cold", "wait_s": 5.0}),
        (14 * S, ask("A", 2, permits=1, birth=T0), {"permits": 0, "wait_s": 1.0}),
        (15 * S, ask("A", 3, permits=1, birth=T0), {"permits": 1}),
    ],
    "with_a_rate_it_holds_for_the_longer_of_lease_and_window": [
        (0, ask("A", 1, Limits("L", 2, 5), permits=1, birth=T0 - 9), {"permits": 0, "reason": "cold"}),
        (50 * S, ask("A", 2, Limits("L", 2, 5), permits=1), {"permits": 0, "reason": "cold"}),
        (60 * S - 1, ask("A", 3, Limits("L", 2, 5), permits=1), {"permits": 0}),
        (60 * S, ask("A", 4, Limits("L", 2, 5), permits=1), {"permits": 1}),
    ],
    "one_that_never_saw_the_gate_and_comes_first_does_not_hold": [
        (0, ask("N", 1, permits=1), {"permits": 1}),
        (1, ask("A", 7, permits=1, held=1, birth=T0 - 9), {"status": 1, "permits": 0, "in_use": 2}),
        (2, ask("N", 2, held=0, permits=1), {"permits": 0, "reason": "cold"}),
    ],
}


@pytest.mark.parametrize("story", TABLES)
def test_table(ledger: Ledger, story: str) -> None:
    for after, call, expected in TABLES[story]:
        answer = says(ledger, after, call)
        told = {name: getattr(answer, name) for name in expected}
        assert told == expected, f"{story}, row at {after}: {told}"


# the window ------------------------------------------------------------------------------------


def test_no_window_holds_more_starts_than_the_rate_while_the_slack_shrinks(ledger: Ledger) -> None:
    """The fault of the first design: a slack that decayed let eight starts through where five were allowed."""
    limits = Limits("L", 1000, 5, window_s=2)
    rng = random.Random(7)
    now = 0
    begun: list[int] = []
    for seq in range(1, 301):
        now += rng.choice([1, 1000, 30_000, 400_000, 1_999_999])
        returned = f"{begun[-1]} 1" if begun and rng.random() < 0.1 else ""
        answer = says(ledger, now, ask("A", seq, limits, held=0, permits=5, returned=returned))
        if returned:
            begun.pop()
        begun += [answer.stamp] * answer.permits
        for moment in (T0 + now, answer.stamp):
            assert sum(moment - 2 * S < start <= moment for start in begun) <= 5


# the queue -------------------------------------------------------------------------------------


def test_jobs_are_claimed_first_in_first_out(ledger: Ledger) -> None:
    put(ledger, 0, 12)
    order: list[int] = []
    for seq in range(1, 7):
        back = [ended(i, (seq - 2) * 2 + n + 1) for n, i in enumerate(order[-2:])]
        order += taken(says(ledger, seq, jobs("A", seq, 2, entries=back)))
    assert order == list(range(12))


def test_the_same_number_gets_the_same_jobs_with_their_payloads(ledger: Ledger) -> None:
    put(ledger, 0, 3)
    first = says(ledger, 1, jobs("A", 1, 2))
    assert [job.payload for job in first.jobs] == [b"f 0", b"f 1"]
    assert says(ledger, 50, jobs("A", 1, 2)) == first


@pytest.mark.parametrize(
    ("what", "place_in_line"), [("back", [0, 2]), ("hand", [0, 2]), ("died", [0, 2]), ("refuse", [2, 3])]
)
def test_a_run_that_comes_back_has_its_old_place(ledger: Ledger, what: str, place_in_line: list[int]) -> None:
    put(ledger, 0, 6)
    says(ledger, 1, jobs("A", 1, 2))
    says(ledger, 2, jobs("B", 1, 1))
    attempt = ledger.items[job_id("L", "b", 0)].attempt
    news = [Entry(job_id("L", "b", 0), attempt, 1, what, 1000 if what == "refuse" else "")]
    answer = says(ledger, 3, ask("A", 2, held=1, flows=("f",), entries=news))
    assert answer.refused == []
    answer = says(ledger, 4, jobs("B", 2, 1))
    assert taken(answer) == place_in_line[:1]
    if what == "refuse":
        back = [Entry(answer.jobs[0].id, answer.jobs[0].attempt, 1, "completed", b"out")]
        answer = says(ledger, 1003, jobs("B", 3, 1, entries=back))
        assert [(job.id, job.refusals) for job in answer.jobs] == [(job_id("L", "b", 0), 1)]


def test_a_run_that_cannot_start_here_waits_and_counts_nothing(ledger: Ledger) -> None:
    put(ledger, 0, 2)
    says(ledger, 0, jobs("A", 1, 1))
    answer = says(ledger, 2, jobs("A", 2, 1, entries=[ended(0, 1, "wait", 1000)]))
    assert taken(answer) == [1], "the next in line was taken"
    answer = says(ledger, 1002, jobs("A", 3, 1, entries=[ended(1, 2)]))
    (job,) = answer.jobs
    assert (job.id, job.deaths, job.refusals, job.hand_backs) == (job_id("L", "b", 0), 0, 0, 0)


def test_a_checkpoint_is_kept_until_its_job_is_done_and_the_answer_says_whose_the_run_is(
    ledger: Ledger,
) -> None:
    put(ledger, 0, 1)
    says(ledger, 0, jobs("A", 1, 1))
    says(ledger, 2, jobs("A", 2, 0, held=1, entries=[ended(0, 1, "save", b"one")]))
    # given: A was cut off, and B has taken the run up with what A saved
    answer = says(ledger, 2 * LEASE, jobs("B", 1, 1))
    answer = answer if answer.jobs else says(ledger, 3 * LEASE + 10, jobs("B", 2, 1))
    assert [(job.saved, job.deaths) for job in answer.jobs] == [(b"one", 1)]
    # then: a late checkpoint of A is refused, and B's stands
    late = says(ledger, 3 * LEASE + 20, jobs("A", 3, 0, held=1, entries=[ended(0, 1, "save", b"late")]))
    assert late.refused == [job_id("L", "b", 0)]
    attempt = answer.jobs[0].attempt - T0
    key = f"{ledger.gate.keys.kept('b', 0)}:{answer.jobs[0].attempt}"
    ledger.store(key, b"a large one")
    says(ledger, 3 * LEASE + 30, jobs("B", 3, 0, held=1, entries=[ended(0, attempt, "save-beside", key)]))
    says(ledger, 3 * LEASE + 40, jobs("B", 4, 0, entries=[ended(0, attempt, "hand", "")]))
    answer = says(ledger, 3 * LEASE + 50, jobs("B", 5, 1))
    assert [job.saved for job in answer.jobs] == [b"beside"]
    assert ledger.gate.client.get(ledger.gate.keys.kept("b", 0)) == b"a large one"
    says(ledger, 3 * LEASE + 60, jobs("B", 6, 0, entries=[ended(0, answer.jobs[0].attempt - T0)]))
    assert not ledger.gate.client.keys("*kept*") and not ledger.gate.client.keys("*saved")


def test_a_run_that_is_kept_and_ends_in_one_call_leaves_nothing_behind(ledger: Ledger) -> None:
    put(ledger, 0, 1)
    says(ledger, 0, jobs("A", 1, 1))
    says(ledger, 2, jobs("A", 2, 0, held=1, entries=[ended(0, 1, "keep", ""), ended(0, 1, "save", b"x")]))
    says(ledger, 3, jobs("A", 3, 0, entries=[ended(0, 1, "keep", ""), ended(0, 1)]))
    assert not ledger.gate.client.keys("*queue*") and not ledger.gate.client.keys("arq:*")


def test_batches_interleave_by_weight_and_each_stays_in_order(ledger: Ledger) -> None:
    spacing = {"a": 1000.0, "b": 1000.0, "c": 500.0, "d": 3000.0}
    put(ledger, 0, 60, "a", spacing=spacing["a"])
    limits = Limits("L", 1)
    order: list[tuple[str, int]] = []
    entries: list[Entry] = []
    for seq in range(1, 150):
        if seq == 20:
            for name in "bcd":
                put(ledger, seq, 60, name, spacing=spacing[name])
        answer = ledger.sync(
            call := jobs("A", seq, 1, limits, entries=entries), T0 + seq, ledger.gate.sync(call, T0 + seq)
        )
        order += [(job.id.split(":")[1], int(job.id.split(":")[2])) for job in answer.jobs]
        entries = [Entry(job.id, job.attempt, 1, "completed", b"") for job in answer.jobs]
    for name in spacing:
        assert [i for batch, i in order if batch == name] == sorted(i for batch, i in order if batch == name)
    shared = order[20:120]
    for x in spacing:
        for y in spacing:
            for end in range(len(shared)):
                served = {n: spacing[n] * sum(b == n for b, _ in shared[:end]) for n in (x, y)}
                assert abs(served[x] - served[y]) <= spacing[x] + spacing[y], (x, y, end, served)


def test_a_worker_takes_only_the_lowest_places_of_the_flows_it_knows(ledger: Ledger) -> None:
    limits = Limits("L", 10)
    put(ledger, 0, 3, "x", "f", 1000)
    put(ledger, 0, 3, "y", "g", 1500)
    only_g = says(ledger, 1, jobs("G", 1, 1, limits, flows=("g",)))
    assert [job.id for job in only_g.jobs] == [job_id("L", "y", 0)]
    both = says(ledger, 2, jobs("B", 1, 3, limits, flows=("f", "g")))
    assert [job.id for job in both.jobs] == [job_id("L", *i) for i in (("x", 0), ("x", 1), ("y", 1))]


def test_flows_of_different_workers_take_turns_at_one_place(ledger: Ledger) -> None:
    limits = Limits("L", 1)
    put(ledger, 0, 6, "x", "f")
    put(ledger, 0, 6, "y", "g")
    flows, seqs = {"A": "f", "G": "g"}, {"A": 1, "G": 1}
    running = {"A": says(ledger, 1, jobs("A", 1, 1, limits)).jobs, "G": []}
    assert says(ledger, 2, jobs("G", 1, 1, limits, flows=("g",))).reason == "level"
    order = []
    for step in range(10):
        busy = "A" if running["A"] else "G"
        order.append(busy)
        for process in (busy, "G" if busy == "A" else "A"):
            seqs[process] += 1
            entries = [Entry(job.id, job.attempt, 1, "completed", b"") for job in running[process]]
            call = jobs(process, seqs[process], 1, limits, flows=(flows[process],), entries=entries)
            running[process] = says(ledger, 3 + 2 * step, call).jobs
    taken_by = [order[: end + 1].count("A") - order[: end + 1].count("G") for end in range(10)]
    assert max(map(abs, taken_by)) == 1, order  # places that are equal: who runs goes on


def test_a_head_without_jobs_of_its_own_passes_the_word_on(ledger: Ledger) -> None:
    limits = Limits("L", 1)
    put(ledger, 0, 1, "x", "f")
    put(ledger, 0, 1, "y", "g")
    says(ledger, 1, jobs("A", 1, 1, limits))
    says(ledger, 2, jobs("G", 1, 1, limits, flows=("g",)))
    assert says(ledger, 3, jobs("C", 1, 1, limits, flows=("g",))).reason == "level"
    ledger.gate.take_messages()
    done = [Entry(job_id("L", "x", 0), T0 + 2, 1, "completed", b"")]
    says(ledger, 4, ask("A", 2, limits, flows=("f",), entries=done))
    assert ledger.gate.take_messages() == [("G", 0)]
    assert len(says(ledger, 5, jobs("G", 2, 1, limits, flows=("g",))).jobs) == 1
    done = [Entry(job_id("L", "y", 0), T0 + 3, 1, "completed", b"")]
    says(ledger, 6, ask("G", 3, limits, flows=("g",), entries=done))
    assert ledger.gate.take_messages() == [("C", 0)]
    assert says(ledger, 7, jobs("C", 2, 1, limits, flows=("g",))).reason == "jobs"


def test_a_job_whose_payload_is_gone_ends_as_lost_and_the_next_is_asked_for_at_once(ledger: Ledger) -> None:
    put(ledger, 0, 4)
    for index in (0, 1):
        name = job_id("L", "b", index)
        ledger.gate.client.delete("arq:job:" + name)
        ledger.items[name].payload = None
    answer = says(ledger, 1, jobs("A", 1, 2))
    assert answer.jobs == []
    assert [outcome[:3:2] for outcome in ledger.batches["b"].outcomes] == [(0, "lost"), (1, "lost")]
    assert answer.wait_s == 0, "jobs and room are left, and the caller is told to sleep"


def test_a_lost_job_whose_end_cannot_be_written_leaves_nothing_claimed(ledger: Ledger) -> None:
    limits = Limits("L", 10)
    put(ledger, 0, 4)
    says(ledger, 1, jobs("A", 1, 0, limits))
    client = ledger.gate.client
    client.delete("arq:job:" + job_id("L", "b", 0))
    client.set("pocketfleet:{L}:out:b", "junk")
    for _ in range(2):
        with pytest.raises(ResponseError):
            ledger.gate.sync(jobs("A", 2, 2, limits), T0 + 2)
    assert not client.exists(*("arq:in-progress:" + job_id("L", "b", index) for index in range(4)))
    client.delete("pocketfleet:{L}:out:b")
    claimed = read_answer(ledger.gate.sync(jobs("A", 2, 3, limits), T0 + 3))
    assert [job.id for job in claimed.jobs] == [job_id("L", "b", index) for index in (1, 2)]


# death, and what comes back --------------------------------------------------------------------


def test_slots_and_jobs_of_the_dead_come_back_together_one_death_older(ledger: Ledger) -> None:
    put(ledger, 0, 3)
    says(ledger, 0, jobs("A", 1, 2))
    assert says(ledger, 1, jobs("B", 1, 1)).jobs == []
    for seq, after in ((2, 5), (3, 10)):
        assert says(ledger, after * S, jobs("B", seq, 1)).in_use == 2
    answer = says(ledger, LEASE + 1, jobs("B", 4, 2))
    assert [(job.id, job.deaths) for job in answer.jobs] == [(job_id("L", "b", i), 1) for i in (0, 1)]


def test_a_finish_by_an_attempt_that_is_not_its_own_is_refused_and_named(ledger: Ledger) -> None:
    put(ledger, 0, 1)
    says(ledger, 0, jobs("A", 1, 1))
    for seq, after in enumerate((1, 5, 10), 1):
        says(ledger, after * S, jobs("B", seq, 1))
    says(ledger, LEASE + 1, jobs("B", 4, 1))
    late = says(ledger, LEASE + 2, ask("A", 2, flows=("f",), entries=[ended(0, 1)]))
    assert late.refused == [job_id("L", "b", 0)]
    own = says(ledger, LEASE + 3, ask("B", 5, flows=("f",), entries=[ended(0, 2)]))
    assert own.refused == [] and len(ledger.batches["b"].outcomes) == 1


def test_a_run_taken_back_but_not_taken_up_may_still_be_finished(ledger: Ledger) -> None:
    put(ledger, 0, 1)
    says(ledger, 0, jobs("A", 1, 1))
    for seq, after in enumerate((1, 5, 10, 16), 1):
        says(ledger, after * S, ask("B", seq, flows=("f",)))
    assert ledger.items[job_id("L", "b", 0)].state == "waiting"
    assert says(ledger, 17 * S, ask("A", 2, flows=("f",), entries=[ended(0, 1)])).refused == []
    assert ledger.items == {} and len(ledger.batches["b"].outcomes) == 1


def test_an_unknown_process_keeps_what_nobody_took_up(ledger: Ledger) -> None:
    put(ledger, 0, 2)
    says(ledger, 0, jobs("A", 1, 2))
    for seq, after in enumerate((1, 5, 10), 1):
        says(ledger, after * S, jobs("B", seq, 1))
    assert taken(says(ledger, LEASE + 1, jobs("B", 4, 1))) == [0]
    assert says(ledger, LEASE + 2, jobs("A", 2, 5, held=2)).status == 1
    kept = [ended(0, 1, "keep", ""), ended(1, 2, "keep", "")]
    answer = says(ledger, LEASE + 3, ask("A", 3, held=2, flows=("f",), entries=kept))
    assert (answer.status, answer.refused) == (0, [job_id("L", "b", 0)])
    assert says(ledger, LEASE + 4, ask("A", 4, held=1, flows=("f",))).in_use == 2


def test_a_frozen_redis_takes_nothing_from_the_living(ledger: Ledger) -> None:
    """Also when the first to call after the freeze is a producer."""
    put(ledger, 0, 2)
    says(ledger, 0, jobs("A", 1, 2))
    says(ledger, 1, jobs("B", 1, 1))
    put(ledger, 40 * S, 3)
    assert says(ledger, 40 * S + 1, jobs("B", 2, 1)).in_use == 2
    assert says(ledger, 40 * S + 2, jobs("A", 2, 0, held=2)).status == 0


def test_one_survivor_sees_a_dead_neighbour_reaped_within_one_lease(ledger: Ledger) -> None:
    """Syncing each third of a lease never looks like a freeze; neither does a wait of a whole one, twice."""
    says(ledger, 0, ask("A", 1, permits=2))
    for seq, after in enumerate((1, 5 * S, 10 * S, 15 * S + 1), 1):
        in_use = says(ledger, after, ask("B", seq)).in_use
    assert in_use == 0


def test_a_freeze_extends_the_dead_only_once(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=2))
    for seq, after in enumerate((1, 10 * S, 20 * S, 30 * S), 1):
        in_use = says(ledger, after, ask("B", seq)).in_use
    assert in_use == 0


def test_a_lease_is_never_cut_short_by_the_rule_that_extends_it(ledger: Ledger) -> None:
    short = Limits("L", 2, lease_s=3)
    says(ledger, 0, ask("A", 1, permits=2))
    says(ledger, 1, ask("B", 1, short))
    says(ledger, 4 * S, ask("B", 2, short))
    assert says(ledger, 9 * S, ask("B", 3, short)).in_use == 2


def test_two_deaths_in_a_row_are_both_noticed_on_time(ledger: Ledger) -> None:
    """Whoever waits calls again when the next lease ends, also in the call that buried another."""
    says(ledger, 0, ask("A", 1, permits=1))
    says(ledger, 300_000, ask("B", 1, permits=1))
    after, seq = 300_001, 1
    while (answer := says(ledger, after, ask("C", seq, permits=2))).permits == 0 or ledger.in_use() > 2:
        after, seq = after + max(1, round(answer.wait_s * 1e6)), seq + 1
    while len(ledger.members) > 1:
        answer = says(ledger, after, ask("C", seq, held=ledger.members["C"].held, permits=1))
        after, seq = after + max(1, round(answer.wait_s * 1e6)), seq + 1
    assert answer.now - T0 <= 300_000 + LEASE + S


# a lost Redis ----------------------------------------------------------------------------------


def test_after_a_data_loss_claims_are_adopted_and_count(ledger: Ledger) -> None:
    put(ledger, 0, 4)
    first = says(ledger, 0, jobs("A", 1, 2))
    ledger.gate.client.flushall()
    ledger.flush()
    lost = says(ledger, S, jobs("A", 2, 2, held=2, birth=first.birth))
    assert (lost.status, lost.jobs) == (1, [])
    kept = [ended(0, 1, "keep", ""), ended(1, 2, "keep", "")]
    assert says(ledger, S + 1, jobs("A", 3, 2, held=2, birth=lost.birth, entries=kept)).refused == []
    put(ledger, S + 2, 4)
    ledger.compare()
    says(ledger, S + 3, jobs("A", 4, 2, held=1, birth=lost.birth, entries=[ended(0, 1)]))
    for seq, after in enumerate((6, 11, 15), 5):
        assert says(ledger, after * S, jobs("A", seq, 2, held=1, birth=lost.birth)).reason == "cold"
    answer = says(ledger, 16 * S, jobs("A", 8, 2, held=1, birth=lost.birth))
    assert taken(answer) == [2] and answer.jobs[0].attempt > T0 + S


# waking ----------------------------------------------------------------------------------------


def test_a_slot_freed_by_one_who_knows_no_flow_wakes_an_idle_worker(gate: Gate) -> None:
    """Both slots are permits when the jobs come: as they are released, both idle workers take one."""
    pumps = [Pump("C"), Pump("P", ("f",), 1), Pump("Q", ("f",), 1)]
    for pump in pumps:
        pump.limits = PLAIN
    fleet = Fleet(gate, pumps, lambda job, refused: (3 * S, "completed", "out"), permit_us=S)
    fleet.at(1000, "want", 0, 1)
    fleet.at(400_000, "want", 0, 1)
    fleet.at(500_000, "enqueue", "b", "f", 5)
    fleet.run(60 * S)


def test_a_window_that_opens_wakes_one_for_the_jobs_that_are_left(gate: Gate) -> None:
    limits = Limits("L", 4, 1, window_s=1)
    pumps = [Pump(name, ("f",), 1, limits) for name in "PQR"]
    fleet = Fleet(gate, pumps, lambda job, refused: (4 * S, "completed", "out"))
    fleet.at(500_000, "enqueue", "b", "f", 3)
    fleet.run(60 * S)


def test_a_delayed_run_wakes_an_idle_worker_when_it_is_due(gate: Gate) -> None:
    """The one that was refused took another flow's job; who stood idle before must hear of the time."""
    pumps = [Pump("A", ("f", "g"), 1, PLAIN), Pump("B", ("f",), 1, PLAIN)]
    plans: dict[bool, tuple[int, str, int | str]] = {
        True: (10_000, "refuse", 400_000),
        False: (3 * S, "completed", "out"),
    }
    fleet = Fleet(gate, pumps, lambda job, refused: plans[":x:" in job and not refused])
    fleet.at(100, "enqueue", "x", "f", 1)
    fleet.at(100, "enqueue", "y", "g", 1)
    fleet.run(60 * S)


def test_a_permit_waiter_gets_its_turn_among_workers_that_keep_their_slots(gate: Gate) -> None:
    limits = Limits("L", 1)
    pumps = [Pump("A", ("f",), 1, limits), Pump("B", ("f",), 1, limits), Pump("C", limits=limits)]
    fleet = Fleet(gate, pumps, lambda job, refused: (100_000, "completed", "out"))
    fleet.at(100, "enqueue", "b", "f", 200)
    fleet.at(10 * S, "want", 2, 1)
    fleet.run(60 * S)
    when = next(when for when, name, _ in fleet.granted if name == "C")
    assert when - T0 < 11 * S, f"a limit() caller waited {(when - T0) / 1e6 - 10:.1f} s at level 1"


def test_jobs_of_the_dead_wake_the_idle_also_when_the_caller_was_refused_by_the_provider(
    ledger: Ledger,
) -> None:
    """One call reaps and hands in a refusal: the second must not silence the wake of the first."""
    limits = Limits("L", 4)
    put(ledger, 0, 2)
    says(ledger, 0, jobs("D", 1, 1, limits))
    says(ledger, 1, jobs("A", 1, 1, limits))
    says(ledger, 2, jobs("I", 1, 1, limits))
    for seq, after in enumerate((5, 10, 14), 2):
        says(ledger, after * S, ask("A", seq, limits, held=1, flows=("f",)))
        says(ledger, after * S + 1, jobs("I", seq, 1, limits))
    ledger.gate.take_messages()
    says(ledger, LEASE + 10, ask("A", 5, limits, flows=("f",), entries=[ended(1, 2, "refuse", 9 * S)]))
    assert ledger.gate.take_messages() == [("I", 0)]


def test_a_silent_head_goes_to_the_tail_after_the_grace(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=2))
    put(ledger, 0, 9)
    for after, name in enumerate("HBC", 1):
        says(ledger, after, jobs(name, 1, 1))
    says(ledger, 10, ask("A", 2, held=1))
    assert ledger.gate.take_messages() == [("H", 0)]
    assert says(ledger, 11, jobs("B", 2, 1)).wait_s == GRACE_US / 1e6
    (job,) = says(ledger, 12 + GRACE_US, jobs("B", 3, 1)).jobs
    says(ledger, 13 + GRACE_US, jobs("B", 4, 0, entries=[Entry(job.id, job.attempt, 1, "completed", b"out")]))
    assert ledger.gate.take_messages()[-1] == ("C", 0)


def test_an_unheard_grant_goes_back_with_the_next_call_of_its_process(ledger: Ledger) -> None:
    """Its message was lost, or came after the next call was composed: what that call holds is what counts."""
    says(ledger, 0, ask("A", 1, RATED, permits=3))
    says(ledger, 1, ask("A", 2, RATED))
    says(ledger, 2, ask("B", 1, RATED, permits=2))
    says(ledger, 3, ask("C", 1, RATED, permits=1))
    says(ledger, 10 * S + 50_000, ask("A", 3, RATED))
    assert [name for name, _ in ledger.pushed] == ["B", "C"]
    answer = says(ledger, 10 * S + 50_001, ask("B", 2, RATED, held=0, permits=2))
    assert (answer.in_use, answer.used, answer.permits) == (3, 3, 2), "its starts and its turn came back"


def test_a_large_outcome_of_an_attempt_that_is_no_more_is_not_kept(ledger: Ledger) -> None:
    put(ledger, 0, 1)
    says(ledger, 1, jobs("A", 1, 1))
    ledger.gate.client.set(ledger.gate.keys.blob("b", 0, T0 + 7), b"large", px=600_000)
    answer = says(ledger, 2, jobs("A", 2, 0, held=1, entries=[ended(0, 7, "blob:completed", "")]))
    assert answer.refused == [job_id("L", "b", 0)]
    assert not ledger.gate.client.exists(ledger.gate.keys.blob("b", 0, T0 + 7))


def test_of_several_grants_only_the_unheard_ones_go_back(ledger: Ledger) -> None:
    limits = Limits("L", 4, 6, window_s=10)
    says(ledger, 0, ask("A", 1, limits, permits=4))
    says(ledger, 1, ask("B", 1, limits, permits=9))
    grants = []
    for seq, held in ((2, 3), (3, 2)):
        says(ledger, seq, ask("A", seq, limits, held=held))
        grants += [grant for _, grant in ledger.pushed]
    assert [grant.count for grant in grants] == [1, 1]
    answer = says(ledger, 4, ask("B", 2, limits, held=1, permits=8, last_grant=grants[0].attempt))
    assert ledger.counts["void"] == 1
    assert (answer.permits, answer.in_use, answer.used) == (1, 4, 6), "one start came back, and is given anew"


def test_what_is_given_back_counts_once_though_the_answer_was_lost_with_the_record(ledger: Ledger) -> None:
    """The record goes with a call that leaves, or as its lease ends; the same call may come again then."""
    given = says(ledger, 0, ask("A", 1, RATED, permits=3))
    leaving = ask("A", 2, RATED, leave=True, returned=f"{given.stamp} 1", birth=given.birth)
    for after in (1, 2):
        assert says(ledger, S + after, leaving).used == 2
    assert says(ledger, 2 * S, ask("B", 1, RATED, permits=3)).permits == 1


def test_a_gate_whose_clock_is_behind_the_birth_that_is_remembered_has_lost_its_data(ledger: Ledger) -> None:
    says(ledger, 0, ask("B", 1, RATED))
    answer = says(ledger, 1, ask("A", 7, RATED, held=2, birth=T0 + 60 * S))
    assert answer.status == 1
    assert says(ledger, 2, ask("B", 2, RATED, permits=1)).reason == "cold"


def test_renewing_keeps_the_gate_though_nobody_calls(ledger: Ledger) -> None:
    """A loop that is blocked for longer than the gate lives without calls still holds its slot."""
    says(ledger, 0, ask("A", 1, PLAIN, permits=1))
    gate = ledger.gate
    for after in range(1, 10):
        gate.client.pexpire(gate.keys.gate, 20_000)
        gate.client.pexpire(gate.keys.leases, 20_000)
        assert gate.renew("A", T0 + after * 6 * S) > 0
        assert gate.client.pttl(gate.keys.gate) > 60_000 < gate.client.pttl(gate.keys.leases)


def test_a_silent_head_is_granted_no_more_than_its_fair_share(ledger: Ledger) -> None:
    limits = Limits("L", 4)
    says(ledger, 0, ask("A", 1, limits, permits=4))
    says(ledger, 1, ask("H", 1, limits, permits=9))
    says(ledger, 2, ask("B", 1, limits, permits=9))
    for seq, held in enumerate((3, 2, 1, 0), 2):
        says(ledger, seq + 1, ask("A", seq, limits, held=held))
    assert ledger.members["H"].held == 2
    assert ledger.members["B"].held == 2


def test_a_head_that_is_gone_is_passed_over_by_the_call_that_would_wake_it(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=2))
    put(ledger, 0, 9)
    for after, name in enumerate("XYBC", 1):
        says(ledger, after, jobs(name, 1, 1))
    ledger.gate.deafen("X")
    ledger.gate.deafen("Y")
    says(ledger, 10, ask("A", 2, held=1))
    assert ledger.gate.take_messages() == [("B", 0)]
    assert len(says(ledger, 11, jobs("B", 2, 1)).jobs) == 1


def test_one_that_is_gone_is_granted_nothing(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=2))
    says(ledger, 1, ask("X", 1, permits=1))
    says(ledger, 2, ask("B", 1, permits=1))
    ledger.gate.deafen("X")
    says(ledger, 3, ask("A", 2, held=1))
    assert ledger.members["X"].held == 0
    assert ledger.gate.take_messages() == [("B", 0)]
    assert says(ledger, 4, ask("B", 2, permits=1)).permits == 1


def test_an_idle_process_that_is_gone_is_not_woken_in_place_of_a_living_one(ledger: Ledger) -> None:
    for after, name in enumerate("XYB"):
        says(ledger, after, jobs(name, 1, 1))
    ledger.gate.deafen("X")
    ledger.gate.deafen("Y")
    put(ledger, 5, 1)
    assert ledger.gate.take_messages() == [("B", 0)]


def test_one_call_grants_to_several_that_wait(ledger: Ledger) -> None:
    limits = Limits("L", 3)
    says(ledger, 0, ask("A", 1, limits, permits=3))
    for after, name in enumerate("BCDE", 1):
        says(ledger, after, ask(name, 1, limits, permits=1))
    says(ledger, 9, ask("A", 2, limits, leave=True))
    assert [(name, grant.count) for name, grant in ledger.pushed] == [("B", 1), ("C", 1), ("D", 1)]


def test_a_head_that_was_woken_once_is_woken_again(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=2))
    put(ledger, 0, 9)
    says(ledger, 1, jobs("P", 1, 2))
    says(ledger, 2, jobs("Q", 1, 1))
    says(ledger, 3, ask("A", 2, held=1))
    assert len(says(ledger, 4, jobs("P", 2, 2)).jobs) == 1
    says(ledger, 5, ask("Q", 2, flows=("f",), leave=True))
    ledger.gate.take_messages()
    says(ledger, 6, ask("A", 3))
    assert ledger.gate.take_messages() == [("P", 0)]


def test_where_the_level_can_fall_no_further_the_fleet_halts_twice_as_long_each_time(ledger: Ledger) -> None:
    """Only if the refused run comes back: `run_async` and `limit()` end what was refused, and go on at once."""
    put(ledger, 0, 3)
    attempt = says(ledger, 0, jobs("A", 1, 1, TWO)).jobs[0].attempt
    after, seq = 1, 2
    for pause_s in (0, 1, 2, 4):
        index = next(iter(ledger.items.values())).index
        back = Entry(job_id("L", "b", index), attempt, 1, "refuse", 0)
        answer = says(ledger, after, jobs("A", seq, 1, TWO, refused=attempt, entries=[back]))
        assert (answer.level, len(answer.jobs)) == (1, 0 if pause_s else 1)
        if pause_s:
            assert (answer.reason, answer.wait_s) == ("pause", pause_s)
            after, seq = after + pause_s * S, seq + 1
            answer = says(ledger, after, jobs("A", seq, 1, TWO))
        attempt, after, seq = answer.jobs[0].attempt, after + 1, seq + 1
    answer = says(ledger, after, ask("A", seq, TWO, refused=attempt, permits=1, flows=("f",)))
    assert (answer.level, answer.permits) == (1, 1), "what was refused did not come back"


@pytest.mark.parametrize(("refused", "tried_again"), [(1, 8), (3, 6), (8, 5)])
def test_each_run_refused_in_one_call_is_one_that_did_not_fit(
    ledger: Ledger, refused: int, tried_again: int
) -> None:
    """All at once they cut the level once; it comes back to just below what did fit, at least to what is left."""
    limits = Limits("L", 20, min_concurrent=1, initial_concurrent=8, additive=True)
    put(ledger, 0, 30)
    taken = says(ledger, 0, jobs("A", 1, 8, limits)).jobs
    back = [Entry(job.id, job.attempt, 1, "refuse", 60 * S) for job in taken[:refused]]
    attempt = max(job.attempt for job in taken)
    answer = says(ledger, 1, jobs("A", 2, 0, limits, held=8 - refused, refused=attempt, entries=back))
    assert answer.level == 4
    says(ledger, 2, ask("A", 3, limits, held=0, permits=4, flows=("f",)))
    answer = says(ledger, 3, ask("A", 4, limits, held=4, successes=9, counted_under=answer.cut, flows=("f",)))
    assert answer.level == approx(tried_again - 0.01)


# leaving ---------------------------------------------------------------------------------------


def test_one_that_leaves_without_having_heard_its_last_grant_strands_no_job(gate: Gate) -> None:
    """The reply with the job was lost and the process went: the job must not wait for ever."""
    gate.enqueue(T0, "b", "f", {0: b"f 0"})
    gate.sync(jobs("A", 1, 1), T0 + 1)
    gate.sync(ask("A", 2, flows=("f",), leave=True), T0 + 2)
    for seq, after in enumerate((0, 5, 10, 15, 20, 25), 1):
        reply = gate.sync(jobs("B", seq, 1), T0 + after * S + 3)
        if len(reply) > 3:
            assert reply[5] == 0, "a process that left was counted as a death"
            return
    pytest.fail("the job is parked under a process that is gone, for ever")


def test_a_limit_caller_alone_leaves_no_key_without_a_lifetime(gate: Gate) -> None:
    gate.sync(ask("A", 1, permits=1), T0)
    gate.sync(ask("A", 2, leave=True), T0 + 1)
    gate.sync(ask("B", 1, permits=1), T0 + 2)


def test_a_thousand_jobs_and_entries_fit_in_one_call(ledger: Ledger) -> None:
    limits = Limits("L", 5000)
    put(ledger, 0, 1000)
    answer = says(ledger, 1, jobs("A", 1, 1000, limits))
    assert len(answer.jobs) == 1000
    entries = [Entry(job.id, job.attempt, 1, "completed", b"out") for job in answer.jobs]
    assert says(ledger, 2, jobs("A", 2, 1000, limits, entries=entries)).in_use == 0

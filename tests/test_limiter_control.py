"""What an operator says holds from the next call of every process on, and is told in the trail.

The scripts run on every server with the time passed in; each call is judged by the ledger as well.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from gate_model import PARKED, T0, WEEK_MS, Fleet, Gate, Ledger, Pump

from limiter.limits import Limits
from limiter.notes import Notes
from limiter.sync import Answer, Call

S = 1_000_000
PLAIN = Limits("L", 5)
RATED = Limits("L", 100, 3, window_s=10)
ADAPTIVE = Limits("L", 8, min_concurrent=1, initial_concurrent=4, recovery_threshold=2)


def says(ledger: Ledger, after: int, call: Call) -> Answer:
    answer = ledger.sync(call, T0 + after, ledger.gate.sync(call, T0 + after))
    ledger.compare()
    return answer


def orders(ledger: Ledger, after: int, act: str, first: Any = "", second: Any = "") -> list[Any]:
    reply = ledger.gate.control(T0 + after, act, first, second)
    ledger.control(T0 + after, act, first, second, reply)
    return reply


def ask(process: str, seq: int, limits: Limits = PLAIN, **values: Any) -> Call:
    values.setdefault("started", T0 if seq > 1 else 0)
    return Call(process, seq, limits=limits.as_argument(), **values)


# set and clear ---------------------------------------------------------------------------------


def test_a_lowered_limit_admits_nothing_until_drained_and_takes_nothing_away(ledger: Ledger) -> None:
    assert says(ledger, 0, ask("A", 1, permits=5)).permits == 5
    orders(ledger, 1, "set", 2)
    assert says(ledger, 2, ask("A", 2, held=5, permits=1)).in_use == 5
    assert says(ledger, 3, ask("A", 3, held=2, permits=1)).permits == 0
    answer = says(ledger, 4, ask("A", 4, held=1, permits=3))
    assert (answer.permits, answer.in_use, answer.level) == (1, 2, 2)


def test_a_raised_limit_is_in_force_at_once_and_the_head_hears_of_it(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=5))
    says(ledger, 1, ask("B", 1, permits=4))
    ledger.gate.take_messages()
    orders(ledger, 2, "set", 8)
    assert ledger.gate.take_messages() == [("B", 0)]
    assert says(ledger, 3, ask("B", 2, permits=4)).permits == 3


def test_clear_brings_back_the_level_that_was_and_not_the_ceiling(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, ADAPTIVE))
    orders(ledger, 1, "set", 2)
    assert says(ledger, 2, ask("A", 2, ADAPTIVE)).level == 2
    orders(ledger, 3, "set", 3)
    says(ledger, 4, ask("A", 3, ADAPTIVE))
    orders(ledger, 5, "clear")
    assert says(ledger, 6, ask("A", 4, ADAPTIVE)).level == 4


def test_a_level_that_always_stood_at_its_ceiling_follows_it_back(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1))
    orders(ledger, 1, "set", 20)
    assert says(ledger, 2, ask("A", 2, permits=20)).permits == 20
    orders(ledger, 3, "clear")
    assert says(ledger, 4, ask("A", 3, held=20, permits=1)).level == 5


def test_no_start_is_forgotten_while_the_operator_has_lifted_the_rate(ledger: Ledger) -> None:
    assert says(ledger, 0, ask("A", 1, RATED, permits=9)).permits == 3
    orders(ledger, 1, "set", "", 0)
    assert says(ledger, 2, ask("A", 2, RATED, held=3, permits=2)).permits == 2
    orders(ledger, 3, "clear")
    assert says(ledger, 4, ask("A", 3, RATED, held=5, permits=1)).used == 5
    assert says(ledger, 10 * S + 42_000, ask("A", 4, RATED, held=5, permits=3)).permits == 3


def test_an_override_wins_over_a_process_that_starts_later(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1))
    orders(ledger, 1, "set", 2)
    assert says(ledger, 2, ask("B", 1, Limits("L", 9), permits=9)).permits == 2
    orders(ledger, 3, "clear")
    assert says(ledger, 4, ask("B", 2, Limits("L", 9), held=2, permits=9)).permits == 7


def test_the_word_says_who_when_and_what_was_before(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, RATED))
    words = orders(ledger, 7, "set", 2)[2].decode().split(" ")
    assert words[:4] == ["2", "-", "-", str(T0 + 7)]
    assert words[5:9] == [str(T0 + 7), "ana", "100", "3"]


def test_the_same_command_twice_is_one(gate: Gate) -> None:
    gate.sync(ask("A", 1), T0)
    first = gate.control(T0 + 1, "set", 2, request="x")
    again = gate.control(T0 + 9, "set", 2, request="x")
    assert again[2] == first[2]
    assert [what for what, _, _ in gate.events()] == ["override"]


# pause and resume ------------------------------------------------------------------------------


def test_a_pause_admits_nothing_until_resumed_and_then_the_head_starts(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=1))
    orders(ledger, 1, "pause")
    answer = says(ledger, 2, ask("B", 1, permits=1))
    assert (answer.permits, answer.reason, answer.wait_s) == (0, "pause", 5.0)
    ledger.gate.take_messages()
    orders(ledger, 3, "resume")
    assert ledger.gate.take_messages() == [("B", 0)]
    assert says(ledger, 4, ask("B", 2, permits=1)).permits == 1


def test_a_pause_with_an_end_ends_by_itself(ledger: Ledger) -> None:
    orders(ledger, 0, "pause", 4 * S)
    assert says(ledger, 1, ask("A", 1, permits=1)).wait_s == pytest.approx(4, abs=1e-5)
    assert says(ledger, 4 * S - 1, ask("A", 2, permits=1)).permits == 0
    assert says(ledger, 4 * S, ask("A", 3, permits=1)).permits == 1


def test_resume_ends_the_providers_pause_too(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, permits=1, pause_us=60 * S))
    orders(ledger, 1, "resume")
    assert says(ledger, 2, ask("A", 2, permits=1)).permits == 1


def test_a_pause_outlives_the_gate_and_every_process(ledger: Ledger) -> None:
    orders(ledger, 0, "pause")
    gate = ledger.gate
    assert gate.client.pttl(gate.keys.override) == -1
    gate.client.delete(gate.keys.gate, gate.keys.leases)
    assert says(ledger, 300 * S, ask("N", 1, permits=1)).reason == "pause"


def test_a_word_that_ended_is_kept_for_a_week_only(ledger: Ledger) -> None:
    orders(ledger, 0, "pause")
    orders(ledger, 1, "resume")
    assert 0 < ledger.gate.client.pttl(ledger.gate.keys.override) <= WEEK_MS


# after a data loss -----------------------------------------------------------------------------


def test_a_process_says_the_pause_again_after_a_data_loss(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1))
    orders(ledger, 1, "pause")
    word = says(ledger, 2, ask("A", 2)).override
    ledger.gate.client.flushall()
    ledger.flush()
    assert says(ledger, S, ask("A", 3, permits=1, override=word)).reason == "pause"
    assert ledger.gate.client.pttl(ledger.gate.keys.override) == -1


def test_of_two_words_that_are_remembered_the_later_holds(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1))
    orders(ledger, 1, "pause")
    old = says(ledger, 2, ask("A", 2)).override
    orders(ledger, 3, "resume")
    new = says(ledger, 4, ask("B", 1)).override
    ledger.gate.client.flushall()
    ledger.flush()
    assert says(ledger, S, ask("A", 3, permits=1, override=old)).reason == "pause"
    says(ledger, S + 1, ask("B", 2, override=new))
    assert says(ledger, S + 2, ask("A", 4, permits=1, override=old)).permits == 1


def test_one_that_slept_through_the_resume_does_not_bring_the_pause_back(ledger: Ledger) -> None:
    orders(ledger, 0, "pause")
    old = says(ledger, 1, ask("A", 1)).override
    orders(ledger, 2, "resume")
    ledger.gate.client.delete(ledger.gate.keys.gate, ledger.gate.keys.leases)  # idle for long
    ledger.birth, ledger.members = 0, {}
    assert says(ledger, 300 * S, ask("A", 2, permits=1, override=old)).permits == 1


# reset, and a level that nobody used -----------------------------------------------------------


def test_reset_brings_the_level_back_and_forgets_nothing(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, ADAPTIVE, permits=4))
    says(ledger, 1, ask("A", 2, ADAPTIVE, held=4, refused=T0 + 4))
    orders(ledger, 2, "reset")
    answer = says(ledger, 3, ask("A", 3, ADAPTIVE, held=4, permits=1))
    assert (answer.level, answer.in_use, answer.permits) == (4, 4, 0)


@pytest.mark.parametrize(("idle_s", "level"), [(299, 2), (300, 4)])
def test_a_level_that_nobody_used_for_five_minutes_begins_anew(
    ledger: Ledger, idle_s: int, level: float
) -> None:
    says(ledger, 0, ask("A", 1, ADAPTIVE, permits=1))
    says(ledger, 1, ask("A", 2, ADAPTIVE, refused=T0 + 1))
    for seq, after in enumerate(range(5, idle_s, 5), 3):
        assert says(ledger, after * S, ask("A", seq, ADAPTIVE)).level == 2
    assert says(ledger, idle_s * S, ask("A", seq + 1, ADAPTIVE)).level == level


def test_a_level_in_use_by_one_long_run_is_no_idle_level(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, ADAPTIVE, permits=2))
    says(ledger, 1, ask("A", 2, ADAPTIVE, refused=T0 + 1, held=1))
    for seq, after in enumerate(range(5, 600, 5), 3):
        assert says(ledger, after * S, ask("A", seq, ADAPTIVE, held=1)).level == 2


# a fleet ---------------------------------------------------------------------------------------


def test_a_paused_fleet_goes_on_by_itself_once_it_is_resumed(gate: Gate) -> None:
    pumps = [Pump(name, ("f",), 3, limits=Limits("L", 4)) for name in "ABC"]
    fleet = Fleet(gate, pumps, lambda job, refused: (100_000, "completed", "out"))
    fleet.at(1000, "enqueue", "b", "f", 200)
    fleet.at(S, "control", "pause")
    fleet.at(30 * S, "control", "resume")
    fleet.at(31 * S, "control", "set", 2)
    fleet.at(33 * S, "control", "set", 9)
    fleet.run(60 * S)
    began = [at - T0 for at, _, _ in fleet.granted]
    assert len(began) == 200
    assert not [at for at in began if S < at < 30 * S]
    assert sum(31.2 * S < at <= 33 * S for at in began) <= 2 * 19
    assert max(began) < 35 * S


# the trail -------------------------------------------------------------------------------------


def test_the_trail_tells_what_happened(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, ADAPTIVE, permits=4))
    says(ledger, 1, ask("A", 2, ADAPTIVE, held=4, refused=T0 + 4, pause_us=2 * S))
    says(ledger, 2, ask("A", 3, ADAPTIVE, held=4, refused=T0 + 4, pause_us=2 * S))
    orders(ledger, 3, "set", 3)
    orders(ledger, 4, "clear")
    orders(ledger, 5, "pause", 9 * S)
    orders(ledger, 6, "resume")
    orders(ledger, 7, "reset")
    says(ledger, 5 * S, ask("B", 1, ADAPTIVE))
    for seq, after in ((2, 10), (3, 15)):
        says(ledger, after * S, ask("B", seq, ADAPTIVE))
    says(ledger, 15 * S + 2, ask("B", 4, ADAPTIVE))
    assert ledger.gate.events() == [
        ("pause", "0", "2"),
        ("cut", "4", "2"),
        ("override", "max 8, rate none", "max 3, rate none"),
        ("clear", "max 3, rate none", "max 8, rate none"),
        ("pause", "0", "9"),
        ("resume", "ana", ""),
        ("reset", "2", "4"),
        ("reaped", "4", "0"),
    ]


def test_a_way_up_is_told_once_a_minute_and_at_its_end(ledger: Ledger) -> None:
    limits = Limits("L", 200, min_concurrent=1, initial_concurrent=8, recovery_threshold=1, recovery_factor=1)
    says(ledger, 0, ask("A", 1, limits, permits=8))
    says(ledger, 1, ask("A", 2, limits, held=8, refused=T0 + 8))
    level, seq, held = 4, 2, 8
    while level < 200:
        seq += 1
        answer = says(ledger, seq * S, ask("A", seq, limits, held=held, permits=300))
        held += answer.permits
        seq += 1
        answer = says(
            ledger, seq * S, ask("A", seq, limits, held=held, successes=1, counted_under=answer.cut)
        )
        level = int(answer.level)
    told = [(what, float(after)) for what, _, after in ledger.gate.events()]
    assert told[0] == ("cut", 4) and told[-1] == ("recovery", 200)
    assert {what for what, _ in told[1:]} == {"recovery"}
    assert len(told) == 1 + seq // 60 + 1


def test_a_steady_call_writes_nothing_into_the_trail_and_costs_no_more_commands(gate: Gate) -> None:
    gate.sync(ask("A", 1, permits=3), T0)
    gate.sync(ask("A", 2, held=3), T0 + 1)
    if gate.fake:
        pytest.skip("a server that does not count its commands")
    gate.client.config_resetstat()
    gate.sync(ask("A", 3, held=3), T0 + 2)
    stats = gate.client.info("commandstats")
    counted = {name[8:]: int(each["calls"]) for name, each in stats.items() if each["calls"]}
    assert {name: counted.get(name, 0) for name in ("xadd", "get", "rpush", "hget")} == dict.fromkeys(
        ("xadd", "get", "rpush", "hget"), 0
    )
    assert (counted["hmget"], counted["hset"]) == (1, 1)


def test_the_trail_keeps_about_a_thousand_entries(gate: Gate) -> None:
    gate.sync(ask("A", 1), T0)
    for number in range(1300):
        gate.control(T0 + number, "pause", S)
    assert 1000 <= gate.client.xlen(gate.keys.events) <= 1150


# two values ------------------------------------------------------------------------------------


def test_two_values_make_one_entry_and_a_note_to_each_who_brings_the_other(ledger: Ledger) -> None:
    old, new = Limits("L", 3), Limits("L", 7)
    assert says(ledger, 0, ask("A", 1, old)).note == ""
    assert says(ledger, 5, ask("B", 1, new)).note == "older=" + old.as_argument().replace(" ", ",")
    for seq in (2, 3):
        note = says(ledger, 5 + seq, ask("A", seq, old)).note
        assert note == "newer=" + new.as_argument().replace(" ", ",")
        assert says(ledger, 10 + seq, ask("B", seq, new, started=T0 + 5)).note == ""
    assert ledger.gate.events() == [("values", old.as_argument(), new.as_argument())]


def test_a_change_of_values_with_nobody_left_of_the_old_is_no_conflict(ledger: Ledger) -> None:
    says(ledger, 0, ask("A", 1, Limits("L", 3)))
    says(ledger, 1, ask("A", 2, Limits("L", 3), leave=True))
    assert says(ledger, 5, ask("B", 1, Limits("L", 7))).note == ""


# the clock -------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_and_a_standstill_are_told_once(ledger: Ledger) -> None:
    says(ledger, 10 * S, ask("A", 1, permits=1))
    says(ledger, 10 * S, ask("B", 1, permits=1))
    for seq in (2, 3):
        says(ledger, 5 * S, ask("A", seq, held=1))
    says(ledger, 21 * S, ask("A", 4, held=1))
    assert [what for what, _, _ in ledger.gate.events()] == ["clock", "stall"]


def test_forever_is_beyond_every_clock() -> None:
    assert PARKED > 2 * T0


@pytest.mark.parametrize(
    ("finer", "shown"),
    [
        ({"lease_s": 2.0}, ("lease_s=15", "lease_s=2")),
        ({"window_s": 30.0}, ("max_per_minute=60", "starts in 30 s=60")),
        ({"recovery_threshold": 3}, ("recovery_threshold=10", "recovery_threshold=3")),
        ({"even": True}, ("even=0", "even=1")),
    ],
)
def test_the_warning_about_two_values_names_what_differs(
    finer: dict[str, Any], shown: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = Limits("L", 5, 60).as_argument(), Limits("L", 5, 60, **finer).as_argument()
    Notes("L").hear("newer=" + theirs.replace(" ", ","), ours)
    said = re.search(r"ours=\((.*)\) theirs=\((.*)\) in_force", caplog.messages[0])
    assert said is not None and shown[0] in said[1] and shown[1] in said[2]

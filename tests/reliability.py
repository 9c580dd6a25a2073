"""The cases of the fault plan, the tests that hold them, and the table that tells how they went.

`make reliability` runs every test named here and writes docs/reliability.md from what it saw;
`python -m tests.reliability 12 16` repeats these cases and writes their rows.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True)
class Case:
    """One row of the plan. `tests` are `file::function` in tests/."""

    number: int
    what: str
    invariants: str
    tests: tuple[str, ...]


REDIS, WORKERS = "test_faults_redis.py::", "test_faults_workers.py::"
LOSS, PRODUCER, SECRETS = "test_faults_loss.py::", "test_faults_producer.py::", "test_faults_secrets.py::"
PROMISE = "test_faults_promise.py::"

CASES = (
    Case(
        1,
        "no fault (control)",
        "I1-I4 I7",
        (REDIS + "test_without_a_fault_every_item_runs_once_and_the_fleet_is_busy",),
    ),
    Case(
        2,
        "kill -9 of one worker after the other",
        "I1-I4",
        (
            WORKERS + "test_workers_killed_one_after_the_other_lose_nothing",
            WORKERS + "test_slots_of_a_killed_worker_come_back_within_a_lease_and_a_second",
            "test_acceptance_fleet.py::test_a_worker_of_four_is_killed_and_the_fleet_completes_within_both_limits",
            PROMISE + "test_normal_work_crash_deploy_dropped_connections_and_lost_replies",
        ),
    ),
    Case(
        3,
        "SIGTERM to all workers in turn, under load",
        "I1-I4 I6",
        (
            WORKERS + "test_rolling_restart_of_all_workers_fails_nothing_and_runs_nothing_twice",
            "test_deploy.py::test_a_rolling_restart_under_load_loses_and_fails_nothing",
        ),
    ),
    Case(
        4,
        "a worker frozen for longer than its lease",
        "I2-I4; I1 but for the slots it held",
        (
            WORKERS
            + "test_frozen_worker_overlaps_by_no_more_than_it_held_and_its_late_outcome_counts_nothing",
            "test_durable_runs.py::test_a_frozen_worker_starts_no_next_node_and_writes_nothing",
            PROMISE + "test_worker_frozen_for_longer_than_a_lease",
        ),
    ),
    Case(
        5,
        "a worker cut off from Redis for longer than its lease",
        "I2-I4 I6",
        (
            WORKERS + "test_worker_that_is_cut_off_starts_nothing_new_and_goes_on_by_itself",
            "test_durable_runs.py::test_a_worker_that_lost_redis_ends_or_cancels_its_node_as_the_flow_says",
        ),
    ),
    Case(
        6,
        "Redis frozen for 5, 15 and 20 s",
        "I1-I4 I6",
        (REDIS + "test_frozen_redis_breaks_no_limit", PROMISE + "test_redis_frozen_for_longer_than_a_lease"),
    ),
    Case(
        7,
        "CLIENT PAUSE; DEBUG SLEEP",
        "I1-I4 I6",
        (REDIS + "test_paused_clients_and_a_busy_server_break_no_limit",),
    ),
    Case(
        8,
        "CLIENT KILL every 100 ms; half-open connections",
        "I1-I4 I6",
        (
            REDIS + "test_killed_connections_cost_nothing",
            REDIS + "test_half_open_connections_are_noticed_before_a_lease_ends",
        ),
    ),
    Case(
        9,
        "a request or its reply is lost, at every script",
        "I1-I4 I6",
        (REDIS + "test_lost_requests_and_replies_of_every_script_change_nothing",),
    ),
    Case(10, "SCRIPT FLUSH in a loop", "I1-I3", (REDIS + "test_flushed_scripts_load_themselves_again",)),
    Case(
        11,
        "FLUSHALL in the middle",
        "I1 I2 within the bound, I6",
        (
            "test_producer_batches.py::test_items_that_redis_lost_are_named_and_only_they_run_again",
            "test_producer_batches.py::test_without_the_spool_a_loss_is_told_of_the_batch_as_a_whole",
            "test_limiter_data_loss.py::test_runs_that_all_end_just_after_the_loss_are_recorded",
            LOSS + "test_limits_hold_through_a_loss_and_what_is_missing_runs_when_it_is_enqueued_again",
            LOSS + "test_a_process_that_comes_first_to_an_emptied_redis_is_the_bound_of_twice_the_limit",
            PROMISE + "test_redis_loses_its_data",
        ),
    ),
    Case(
        12,
        "restart of Redis, with and without its file",
        "I1-I3 I6; without: as 11",
        (
            REDIS + "test_restart_with_an_append_only_file_loses_nothing",
            REDIS + "test_restart_while_every_running_node_ends_records_each_once",
            LOSS + "test_limits_hold_through_a_loss_and_what_is_missing_runs_when_it_is_enqueued_again",
            PRODUCER + "test_a_run_follows_its_batch_through_a_restart_and_a_freeze",
        ),
    ),
    Case(
        14,
        "maxmemory reached, then raised",
        "I1-I3 I6",
        (REDIS + "test_full_redis_is_waited_for_and_loses_nothing",),
    ),
    Case(
        15,
        "Redis becomes read-only, then writable",
        "I1-I3 I6",
        (REDIS + "test_read_only_redis_is_waited_for_and_loses_nothing",),
    ),
    Case(
        16,
        "failover: a replica promoted behind one address",
        "I1-I3 I6",
        (
            LOSS + "test_a_replica_promoted_behind_the_same_address_is_taken_up",
            LOSS + "test_a_primary_that_was_demoted_is_left_for_the_new_one",
        ),
    ),
    Case(
        17,
        "worker clocks an hour off, and one that runs 10 % fast",
        "I1 I2",
        (WORKERS + "test_hosts_with_a_wrong_clock_get_work_and_break_no_limit",),
    ),
    Case(
        19,
        "starts at the edges of the window, random schedules",
        "I1 I2",
        ("test_limiter_gate_stateful.py::test_random_schedules_keep_every_promise",),
    ),
    Case(
        20,
        "a limit of one; limits that cannot hold",
        "I1 I2 I6",
        (
            WORKERS + "test_one_at_a_time_and_one_start_a_window",
            "test_cli_bad_input.py::test_bad_input_gets_one_sentence_and_nothing_is_enqueued",
        ),
    ),
    Case(
        21,
        "limits changed while the fleet runs",
        "I1 I2",
        ("test_live_limits.py::test_a_lowered_limit_drains_and_a_raised_one_fills_at_once",),
    ),
    Case(
        23,
        "a storm of 429s, with hints of every kind",
        "I1 I5",
        (
            "test_refused_runs.py::test_retry_after_pauses_every_worker_and_the_level_is_cut_once",
            "test_limiter_refusal.py::test_whatever_stands_in_headers_the_hint_is_none_or_within_the_cap",
            "test_limiter_adaptive_stateful.py::test_the_adaptive_rules_hold_under_any_schedule",
        ),
    ),
    Case(
        24,
        "poisoned state: no numbers, text, keys of another type",
        "I1-I6",
        (
            "test_limiter_poison.py::test_a_poisoned_field_heals_in_one_call_and_no_promise_breaks",
            REDIS + "test_key_of_another_type_is_mended_while_the_fleet_runs",
        ),
    ),
    Case(
        25,
        "an API that fails, is slow, and drops answers",
        "I1 I3 I4 (a dropped answer is asked for again)",
        (
            PRODUCER
            + "test_an_api_that_fails_is_slow_and_drops_answers_is_asked_again_by_the_nodes_own_retries",
        ),
    ),
    Case(
        26,
        "an item that kills its process, among healthy ones",
        "I3 I4",
        (
            "test_crashed_runs.py::test_a_run_that_kills_its_process_is_quarantined_alone_and_its_neighbours_complete",
            "test_crashed_runs.py::test_fifty_runs_that_lose_their_host_three_times_are_not_quarantined",
            "test_crashed_runs.py::test_fifty_runs_that_each_lose_their_host_three_times_all_complete",
        ),
    ),
    Case(
        28,
        "user code that swallows cancels, exits, raises what cannot be printed",
        "I3 I6",
        (
            "test_worst_user_code.py::test_its_own_run_says_what_happened_and_its_neighbours_complete",
            "test_worst_user_code.py::test_a_run_that_swallows_its_cancellation_ends_at_the_next_node_and_is_handed_back",
        ),
    ),
    Case(
        29,
        "params that cannot travel",
        "I6",
        ("test_producer_inputs.py::test_params_that_cannot_travel_are_named",),
    ),
    Case(
        30,
        "results that cannot travel, or of 50 MB, or cyclic",
        "I3 I6",
        ("test_worst_user_code.py::test_its_own_run_says_what_happened_and_its_neighbours_complete",),
    ),
    Case(
        32,
        "a backlog of weeks",
        "I3",
        (PRODUCER + "test_a_waiting_job_never_expires_and_is_run_with_its_params",),
    ),
    Case(
        33,
        "an older worker beside a newer one",
        "I3",
        (
            WORKERS + "test_job_of_a_flow_that_a_worker_does_not_know_waits_for_one_that_does",
            "test_deploy.py::test_a_worker_leaves_the_jobs_of_a_flow_it_does_not_know",
        ),
    ),
    Case(
        35,
        "names, ids and texts with control characters and markup",
        "I6",
        (
            SECRETS + "test_names_and_texts_planted_in_redis_are_shown_escaped_and_break_no_command",
            SECRETS + "test_an_errors_text_cannot_forge_a_line",
            SECRETS + "test_an_operators_name_is_one_printable_line",
            "test_cli_bad_input.py::test_bad_input_gets_one_sentence_and_nothing_is_enqueued",
        ),
    ),
    Case(
        36,
        "pickles and deep nests planted in Redis",
        "never executed; I3 I6",
        (
            "test_worker_contract.py::test_a_planted_pickle_is_refused_and_never_run",
            SECRETS + "test_a_planted_outcome_is_never_executed",
            SECRETS + "test_what_is_decoded_is_capped_in_depth",
        ),
    ),
    Case(
        37,
        "a producer killed half way, started again",
        "I3",
        (
            PRODUCER + "test_producer_killed_half_way_and_started_again_queues_the_union_once",
            "test_killed_batch.py::test_producer_and_workers_are_killed_at_random_and_every_item_has_one_line",
        ),
    ),
    Case(
        38,
        "secrets in params, results, errors and the address",
        "I8",
        (
            SECRETS + "test_no_secret_is_in_a_log_a_command_line_or_an_error_at_any_level",
            "test_limiter_tls.py::test_another_name_for_the_same_certificate_is_refused",
            "test_limiter_tls.py::test_a_fleet_runs_over_tls_also_its_host_process",
        ),
    ),
    Case(
        39,
        "a way to Redis of 200 ms that loses 5 %",
        "I1-I4",
        (REDIS + "test_slow_and_lossy_way_to_redis_breaks_no_limit",),
    ),
    Case(
        40,
        "the cost of idle and of blocked workers",
        "at most one call a second and worker",
        (WORKERS + "test_idle_and_blocked_workers_call_at_most_once_a_second",),
    ),
)


@dataclass
class Seen:
    """How the tests of one function went."""

    outcomes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Collector:
    """A pytest plugin: keeps how each test function went."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0].removeprefix("tests/")
        seen = self.seen.setdefault(name, Seen())
        seen.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            seen.outcomes.append(report.outcome)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            seen.reasons.append(str(report.longrepr[2]).removeprefix("Skipped: "))


def result(case: Case, seen: dict[str, Seen]) -> str:
    """'pass', 'fail' or 'not run', and why."""
    found = [seen.get(name, Seen()) for name in case.tests]
    outcomes = [outcome for each in found for outcome in each.outcomes]
    reasons = sorted({reason for each in found for reason in each.reasons})
    if "failed" in outcomes:
        wrong = [
            name.partition("::")[2]
            for name, each in zip(case.tests, found, strict=True)
            if "failed" in each.outcomes
        ]
        return "**fail**: " + ", ".join(wrong)
    if "passed" not in outcomes:
        return "not run: " + ("; ".join(reasons) or "no test ran")
    return "pass" + (f" (a part not run: {'; '.join(reasons)})" if reasons else "")


def table(seen: dict[str, Seen]) -> str:
    """docs/reliability.md as these results make it."""
    lines = ["| case | what happens | must hold | result | tests |", "| --- | --- | --- | --- | --- |"]
    lines += [row(case, seen) for case in CASES]
    return "\n".join(lines)


def row(case: Case, seen: dict[str, Seen]) -> str:
    links = "<br>".join(
        f"[{name}](../tests/{file})" for file, _, name in (test.partition("::") for test in case.tests)
    )
    return f"| {case.number} | {case.what} | {case.invariants} | {result(case, seen)} | {links} |"


def page(seen: dict[str, Seen], seconds: float) -> str:
    from tests import servers  # late: pytest must see it first, to rewrite its asserts

    before, _, rest = TABLE.read_text().partition("<!-- table -->")
    _, _, after = rest.partition("<!-- /table -->")
    versions = ", ".join(f"{kind} {_version(servers.binary(kind))}" for kind in servers.REAL)
    ran = sum(len(each.outcomes) for each in seen.values())
    when = (
        f"{time.strftime('%Y-%m-%d')}, {ran} tests in {seconds / 60:.0f} minutes on {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {versions}; seed {os.environ.get('FAULT_SEED', 'new for each test')}"
    )
    return f"{before}<!-- table -->\n{when}\n\n{table(seen)}\n<!-- /table -->{after}"


def _version(server: str) -> str:
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
    return next((word[2:] for word in said.stdout.split() if word.startswith("v=")), "?")


def main(numbers: list[int]) -> int:
    """Run all cases, or those named, and write their rows."""
    cases = [case for case in CASES if not numbers or case.number in numbers]
    collector, began = Collector(), time.monotonic()
    names = sorted({f"tests/{test}" for case in cases for test in case.tests})
    code = pytest.main([*names, "-q", "-W", "error", "-m", "long or not long"], plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)  # not all were run: the table stays
    if numbers:
        TABLE.write_text(with_rows(TABLE.read_text(), collector.seen, cases))
    else:
        TABLE.write_text(page(collector.seen, time.monotonic() - began))
    print(f"wrote {TABLE.relative_to(ROOT)}")
    return int(code)


def with_rows(text: str, seen: dict[str, Seen], cases: list[Case]) -> str:
    """The page with the rows of these cases as they went now."""
    new = {str(case.number): row(case, seen) for case in cases}
    lines = text.splitlines()
    return "\n".join(new.get(line.removeprefix("| ").partition(" |")[0], line) for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))

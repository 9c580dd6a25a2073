"""The terminal of a command: closed while it works, gone for one that outlives it, or never there."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from tests import servers
from tests.test_cli import PATIENCE_S, Folder, until

OUTLIVES = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def _heeds_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def on_a_terminal(
    folder: Folder, line: str, before: list[str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """The command in a session of its own with a terminal, and the other end of that."""
    leader, follower = pty.openpty()
    running = subprocess.Popen(
        [*(before or []), *folder.words(line)],
        cwd=folder.path,
        env=folder.env,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=_heeds_hangups,  # also where the tests themselves are to outlive their terminal
    )
    os.close(follower)
    return running, leader


def shut(leader: int, running: subprocess.Popen[bytes]) -> int:
    """Close the terminal, and tell the command twice, as kernel and shell do; its exit code."""
    os.close(leader)
    for _ in range(2):
        running.send_signal(signal.SIGHUP)
    return running.wait(PATIENCE_S)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_terminal_stops_a_run_as_ctrl_c_does(workers: int, folder: Folder) -> None:
    line = "pocketfleet run users:flow --set user_ids=[1,2,3,4,5,6,7,8,9] --set s=1 --batch b"
    running, leader = on_a_terminal(folder, f"{line} --workers {workers}")
    until(lambda: folder.lines("ledger.txt"), "no item ran")
    assert shut(leader, running) == 130
    waiting = folder.start("pocketfleet batch wait b")  # which starts the server again
    try:
        until(lambda: "not in the queue" in folder.ask("pocketfleet batch status b").stdout, "all is queued")
    finally:
        waiting.send_signal(signal.SIGINT)
        waiting.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_outlives_its_terminal_goes_on_to_its_end(workers: int, folder: Folder) -> None:
    line = "pocketfleet run users:flow --set user_ids=[1,2,3,13,4,5] --set s=0.5 --batch b --output out.jsonl"
    running, leader = on_a_terminal(folder, f"{line} --workers {workers}", OUTLIVES)
    until(lambda: folder.lines("ledger.txt"), "no item ran")
    assert shut(leader, running) == 1  # item 13
    assert len(folder.lines("out.jsonl")) == 6
    assert len(folder.lines("post.txt")) == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_run_without_standard_streams_does_its_work(closed: str, folder: Folder) -> None:
    words = folder.words("pocketfleet run users:flow --set user_ids=[1,2] --workers 1 --output out.jsonl")
    shell = ["sh", "-c", f'"$@" {closed}', "sh", *words]
    done = subprocess.run(
        shell,
        cwd=folder.path,
        env=folder.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, len(folder.lines("out.jsonl"))) == (0, 2), done.stderr


def test_a_worker_whose_terminal_is_closed_lets_its_runs_end(tmp_path: Path) -> None:
    with servers.running("valkey") as url:
        folder = Folder(tmp_path, url)
        folder.ask("pocketfleet enqueue users:flow --set user_ids=[1] --set s=2 --batch b")
        worker, leader = on_a_terminal(folder, "pocketfleet worker users:flow")
        until(lambda: running(folder) == 1, "it runs")
        assert shut(leader, worker) == 0
        assert folder.lines("ledger.txt") == ["1"]
        assert "1 of 1 done: 1 completed" in folder.ask("pocketfleet batch status b").stdout


def running(folder: Folder) -> int:
    return sum(view["in_use"] for view in json.loads(folder.ask("pocketfleet limits show --json").stdout))

"""A process is called dead only by who can know it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from worker import aliveness
from worker.aliveness import born, pid_space, surely_dead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is judged")


def test_a_process_that_lives_is_never_called_dead() -> None:
    assert born(os.getpid()) > 0
    assert not surely_dead(pid_space(), os.getpid(), born(os.getpid()))


def test_one_that_ended_is_dead_also_before_its_parent_has_asked() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    then = born(child.pid)
    assert not surely_dead(pid_space(), child.pid, then)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert surely_dead(pid_space(), child.pid, then)
    assert born(child.pid) == 0
    child.communicate()
    assert surely_dead(pid_space(), child.pid, then)


def test_another_process_with_the_same_id_is_not_the_one_that_was_meant() -> None:
    assert surely_dead(pid_space(), os.getpid(), born(os.getpid()) - 1)


@pytest.mark.parametrize("space", ["", "another boot pid:[1] time:[1]"])
def test_an_id_of_another_container_or_host_is_not_judged(space: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not surely_dead(space, gone.pid, 1)


def test_who_cannot_read_start_times_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aliveness, "_stat", lambda pid: ("", 0))
    assert not surely_dead(pid_space(), os.getpid(), 7)
    assert not surely_dead(pid_space(), os.getpid(), 0)


def test_a_process_of_another_user_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert not surely_dead(pid_space(), os.getpid(), born(os.getpid()))

"""Commands of ours as forks of one process that has imported everything: what most of a short command costs.

A fork has its own directory, environment, words and output, is killed and paused like any process, and ends as
one. What has to do with the start itself (imports, the interpreter's own variables, the command line that the
system shows) is for tests that start a command as users do.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 1 << 17
OF_THE_START = ("PYTHON", "LC_", "LANG", "LD_", "TZ", "FAKETIME")
"""Variables which the interpreter or the C library reads once."""


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether a fork of this process' helper would be what a new process with this environment is."""
    ours, theirs = _of_the_start(_own_env()), _of_the_start(env)
    return ours == theirs


class Forked:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str], output: int) -> None:
        """`output`: file descriptor of all it prints. It reads nothing."""
        ask = json.dumps({"words": list(words), "cwd": str(cwd), "env": dict(env)}).encode()
        assert len(ask) < MOST_BYTES
        self._life, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_helper(), [ask], [output, theirs.fileno()])
        self.pid = int(self._said().removeprefix("pid "))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._life], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("pocketfleet", timeout or 0)
            self.returncode = int(self._said().removeprefix("code "))
            self._life.close()
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _said(self) -> str:
        """One line of the helper; they come one at a time."""
        said = self._life.recv(64).decode()
        assert said, "the process that forks commands is gone"
        return said


def _own_env() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}


def _of_the_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(OF_THE_START)}


@functools.cache
def _helper() -> socket.socket:
    """Where commands are asked for; the helper leaves when this end is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        words = [sys.executable, __file__, str(theirs.fileno())]
        started = subprocess.Popen(
            words, env=_own_env(), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/"
        )
    atexit.register(started.wait, 10)
    atexit.register(ours.close)
    return ours


# the helper's side --------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Fork a command for everyone who asks, and say how it ended."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    lives: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            os.read(woken, 1024)
            _say_who_ended(lives)
        if control in ready:
            ask, fds, _, _ = socket.recv_fds(control, MOST_BYTES, 2)
            if not ask:
                return
            output, life = fds
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (control, *lives.values()):
                    each.detach()  # _become closes them by number
                _become(json.loads(ask), output)
            os.close(output)
            lives[pid] = socket.socket(fileno=life)
            lives[pid].sendall(f"pid {pid}".encode())


def _say_who_ended(lives: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            with contextlib.suppress(OSError), lives.pop(pid) as life:
                life.sendall(f"code {os.waitstatus_to_exitcode(status)}".encode())


def _become(asked: dict[str, Any], output: int) -> NoReturn:
    """Be the command from here on, as `python -m pocketfleet` is."""
    import runpy

    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 4096)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[0] = asked["cwd"]
    sys.argv[:] = ["pocketfleet", *asked["words"]]
    runpy.run_module("pocketfleet", run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def _import_all() -> None:
    import importlib
    import pkgutil

    for room in ("limiter", "worker", "producer", "pocketfleet"):
        package = importlib.import_module(room)
        for module in pkgutil.iter_modules(package.__path__, f"{room}."):
            if module.name != "pocketfleet.__main__":  # that is what a fork runs
                importlib.import_module(module.name)


if __name__ == "__main__":
    _import_all()
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))

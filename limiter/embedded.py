"""The server of our own, for people who set no Redis: one Valkey per data directory.

It listens on a private unix socket only and keeps an append-only file. Whoever uses it holds a shared
lock on a file of the data directory, which the kernel takes back when the process dies; the last to
leave stops it, also where the directory has been deleted meanwhile. One left behind by a killed process is
adopted by the next that comes. Users come and go one at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from limiter import locks
from limiter.errors import RedisRefused
from limiter.server import INSTEAD, Home, connected, end, serve, server_lives, stop

TURN_S = 20.0


def join_or_start(data_dir: Path) -> Embedded:
    """The server of `data_dir`, started if none lives; blocks until it answers (at most 10 s).

    Raises:
        RedisRefused: there is no server for this system, or it does not start or answer.
        SettingsError: `data_dir` cannot be used.
    """
    home = Home(data_dir)
    with home.usable():
        home.make()
        with _turn(home):
            return _joined(home)


def join(data_dir: Path) -> Embedded | None:
    """The server of `data_dir` if one lives, else None (and nothing is created). Raises like `join_or_start`."""
    home = Home(data_dir)
    if not locks.AVAILABLE:
        return None
    with home.usable():
        if not home.server_lock.exists():
            return None
        home.make()
        with _turn(home):
            return _joined(home) if server_lives(home) else None


def hold(data_dir: Path) -> Embedded:
    """Like `join`, for a child process whose parent started the server: there must be one.

    Raises:
        RedisRefused: no server lives there.
    """
    joined = join(data_dir)
    if joined is None:
        raise RedisRefused(f"no PocketFleet server runs in {data_dir}: start a run there, {INSTEAD}")
    return joined


def address(data_dir: Path) -> str:
    """The URL a server of `data_dir` has, whether it lives or not."""
    return Home(data_dir).url


class Embedded:
    """One use of the server. It lives at least until `close`; a forgotten one is closed at exit."""

    def __init__(self, home: Home, users: int) -> None:
        self.url = home.url
        self.data_dir = home.data_dir
        self._home = home
        self._dir = home.dir.stat()
        self._line = connected(home)
        self._users: int | None = users
        _open.add(self)

    def close(self) -> None:
        """Leave; stops the server if nobody else uses it (its data stays). Safe to call twice."""
        users, self._users = self._users, None
        _open.discard(self)
        if users is None:
            return
        try:
            if not self._is_gone():
                with _turn(self._home):
                    if _alone(users, self._home):
                        stop(self._home)
            elif locks.take(users):
                end(self._line)
        except (OSError, RedisRefused):
            pass  # its files are gone or its neighbours hang: the server stays, to be adopted
        finally:
            locks.give_back(users)
            self._line.close()

    def _is_gone(self) -> bool:
        """Whether the server's directory was deleted, or made anew meanwhile: nobody finds the server any more."""
        try:
            return not os.path.samestat(self._dir, self._home.dir.stat())
        except FileNotFoundError:
            return True

    def leave_to_parent(self) -> None:
        """In a forked child: the use is the parent's alone."""
        users, self._users = self._users, None
        if users is not None:
            os.close(users)
            self._line.close()

    def __enter__(self) -> Embedded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_open: set[Embedded] = set()


@atexit.register
def _close_all() -> None:
    for embedded in list(_open):
        embedded.close()


def _after_fork() -> None:
    for embedded in list(_open):
        embedded.leave_to_parent()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _turn(home: Home) -> Iterator[None]:
    """Alone among all that join, start, leave or stop this server."""
    turn = locks.opened(home.turn_lock)
    try:
        deadline = time.monotonic() + TURN_S
        while not locks.take(turn):
            if time.monotonic() > deadline:
                raise RedisRefused(
                    f"another process has been starting or stopping the server in {home.dir} for {TURN_S:g} s: "
                    f"end it, {INSTEAD}"
                )
            time.sleep(0.01)
        yield
    finally:
        locks.give_back(turn)


def _alone(users: int, home: Home) -> bool:
    """Whether no other user is left. False too if the file was removed and made anew meanwhile."""
    same = os.path.samestat(os.fstat(users), home.users_lock.stat())
    return same and locks.take(users)


def _joined(home: Home) -> Embedded:
    users = locks.opened(home.users_lock)
    try:
        locks.share(users)
        serve(home)
        return Embedded(home, users)
    except BaseException:
        os.close(users)
        raise

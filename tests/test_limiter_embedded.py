"""The server of our own, with real processes: one per data directory, private, last one out stops it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from limiter import embedded, server
from limiter.connect import find_redis
from limiter.errors import RedisRefused, SettingsError
from limiter.settings import FleetSettings
from tests.stalls import slack_s

USER = """
import sys
from pathlib import Path
from limiter.embedded import hold, join_or_start
from tests.stalls import slack_s
use = {"hold": hold, "start": join_or_start}[sys.argv[1]](Path(sys.argv[2]))
print(use.url, flush=True)
sys.stdin.read()
if sys.argv[3:] != ["forgets"]:
    use.close()
"""


@pytest.fixture
def data() -> Iterator[Path]:
    """A data directory; a server that a test left behind is joined and so stopped."""
    with tempfile.TemporaryDirectory(prefix="pf") as name:
        path = Path(name) / ".pocketfleet"
        yield path
        left = embedded.join(path)
        if left:
            left.close()
        assert not lives(path)


@contextlib.contextmanager
def user(data: Path, how: str = "start", *more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the server until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, how, str(data), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        leave(process)


def leave(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    process.wait(15)


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def lives(data: Path) -> bool:
    home = server.Home(data)
    return home.server_lock.exists() and server.server_lives(home)


def run_id(url: str) -> str:
    return str(ask(url, "info", "server")["run_id"])


def ask(url: str, command: str, *arguments: object) -> object:
    client = redis.Redis.from_url(url, decode_responses=True)
    try:
        return getattr(client, command)(*arguments)
    finally:
        client.close()


def test_server_is_private_has_no_port_and_keeps_a_file(data: Path) -> None:
    with embedded.join_or_start(data) as use:
        socket = server.Home(data).socket()
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700 and stat.S_ISSOCK(socket.stat().st_mode)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        config = ask(use.url, "config_get", "*")
        wanted = {"port": "0", "appendonly": "yes", "save": "", "maxmemory-policy": "noeviction"}
        assert {name: config[name] for name in wanted} == wanted
        assert Path(config["dir"]) == server.Home(data).dir


def test_start_is_quick(data: Path) -> None:
    began = time.monotonic()
    with embedded.join_or_start(data):
        assert time.monotonic() - began < 1.0 + slack_s(began)


def test_starters_at_the_same_time_make_one_server(data: Path) -> None:
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(user(data)) for _ in range(4)]
        urls = {url_of(each) for each in users}
        assert len(urls) == 1
        log = server.Home(data).log.read_text()
        assert log.count("Ready to accept connections") == 1


def test_last_one_out_stops_it_and_the_data_stays(data: Path) -> None:
    with user(data) as one:
        url = url_of(one)
        first = run_id(url)
        with user(data, "hold") as other:
            assert url_of(other) == url
            ask(url, "set", "kept", "yes")
            leave(one)
            assert run_id(url) == first
            leave(other)
            assert not lives(data)
    with embedded.join_or_start(data) as use:
        assert ask(use.url, "get", "kept") == "yes" and run_id(use.url) != first


def test_process_that_forgets_to_close_leaves_at_its_exit(data: Path) -> None:
    with user(data, "start", "forgets") as one:
        assert url_of(one)
        leave(one)
    assert one.returncode == 0 and not lives(data)


def test_server_left_by_a_killed_user_is_adopted(data: Path) -> None:
    with user(data) as one:
        url = url_of(one)
        first = run_id(url)
        one.kill()
        one.wait()
        assert lives(data) and run_id(url) == first
        with embedded.join_or_start(data) as use:
            assert (use.url, run_id(use.url)) == (url, first)
        assert not lives(data)


def test_killed_server_is_replaced_and_its_socket_too(data: Path) -> None:
    with embedded.join_or_start(data) as use:
        ask(use.url, "set", "kept", "yes")
        first = run_id(use.url)
        pid = int(str(ask(use.url, "info", "server")["process_id"]))
        os.kill(pid, signal.SIGKILL)
        while lives(data):
            time.sleep(0.01)
        assert server.Home(data).socket().exists()
        with embedded.join_or_start(data) as again:
            assert run_id(again.url) != first and ask(again.url, "get", "kept") == "yes"
            use.close()
            assert lives(data)


def test_pid_written_in_a_file_is_never_killed(data: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        with embedded.join_or_start(data):
            (server.Home(data).dir / "valkey.pid").write_text(str(bystander.pid))
        assert not lives(data) and bystander.poll() is None
        bystander.communicate(b"\n")


def test_join_starts_and_creates_nothing(data: Path) -> None:
    assert embedded.join(data) is None and not data.exists()
    embedded.join_or_start(data).close()
    assert embedded.join(data) is None
    with pytest.raises(RedisRefused, match="no PocketFleet server runs in"):
        embedded.hold(data)


def test_closing_twice_or_in_a_forked_child_stops_nothing(data: Path) -> None:
    with embedded.join_or_start(data) as use, embedded.join_or_start(data) as other:
        other.close()
        other.close()
        assert ask(use.url, "ping")
        child = os.fork()
        if child == 0:
            use.close()
            embedded._close_all()
            os._exit(0 if server.server_lives(server.Home(data)) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert ask(use.url, "ping")


def test_forked_child_that_lives_on_does_not_keep_the_server(data: Path) -> None:
    use = embedded.join_or_start(data)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        use.close()
        assert not lives(data)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_child_process_does_not_inherit_the_use(data: Path) -> None:
    use = embedded.join_or_start(data)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        use.close()
        assert not lives(data)
        child.communicate(b"\n")


def test_long_data_directory_gets_a_private_socket_elsewhere(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = data / ("x" * 60) / ("y y#é" * 12)
    temp = data.parent / "tmp"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    with embedded.join_or_start(long) as use:
        socket = server.Home(long).socket()
        assert socket.is_relative_to(temp.resolve()) and len(str(socket).encode()) < 104
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        # one who sees another TMPDIR finds it all the same
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        joined = embedded.join(long)
        assert joined and joined.url == use.url and ask(joined.url, "ping")
        joined.close()


def test_directory_with_odd_letters_works(data: Path) -> None:
    with embedded.join_or_start(data / 'a b"\\%41#?*[é') as use:
        assert ask(use.url, "ping")


def test_moved_directory_is_still_found(data: Path) -> None:
    with user(data) as one:
        first = run_id(url_of(one))
        moved = data.with_name("moved")
        data.rename(moved)
        with embedded.join_or_start(moved) as use:
            assert run_id(use.url) == first
            one.kill()
            one.wait()
    assert not lives(moved)


@pytest.mark.parametrize("remade", [False, True])
@pytest.mark.parametrize("folder", ["", "x" * 90])
def test_last_one_out_stops_it_also_where_its_directory_was_deleted(
    data: Path, remade: bool, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(data.parent))  # for the socket of a long one
    data = data / folder
    with contextlib.ExitStack() as stack:
        use = embedded.join_or_start(data)
        other = embedded.join_or_start(data)
        client = stack.enter_context(redis.Redis.from_url(use.url, single_connection_client=True))
        client.ping()
        shutil.rmtree(data)
        again = stack.enter_context(embedded.join_or_start(data)) if remade else None
        use.close()
        assert client.ping(), "another one uses it"
        other.close()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        assert again is None or ask(again.url, "ping")


def test_copied_directory_is_a_server_of_its_own(data: Path) -> None:
    copy = data.with_name("copy")
    with embedded.join_or_start(data) as use:
        ask(use.url, "set", "kept", "yes")
        subprocess.run(["cp", "-r", str(data), str(copy)], check=True, stderr=subprocess.DEVNULL)
        with embedded.join_or_start(copy) as other:
            assert run_id(other.url) != run_id(use.url) and ask(other.url, "get", "kept") == "yes"


def test_directory_of_somebody_else_or_a_link_is_refused(data: Path) -> None:
    data.mkdir()
    (data / "elsewhere").mkdir()
    (data / "redis").symlink_to("elsewhere")
    with pytest.raises(RedisRefused, match="is not a directory of this user: remove it"):
        embedded.join_or_start(data)
    (data / "redis").unlink()


def test_directory_that_cannot_be_used_is_named(data: Path) -> None:
    data.write_text("a file")
    with pytest.raises(SettingsError, match=r"POCKETFLEET_DATA_DIR='.*' cannot be used"):
        embedded.join_or_start(data)


def test_server_that_cannot_start_says_its_last_word(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_config", lambda listen: "port 0\nnonsense yes\n")
    with pytest.raises(
        RedisRefused, match=r"did not start \(.*\): see .*valkey\.log, or set POCKETFLEET_REDIS_URL"
    ):
        embedded.join_or_start(data)
    assert not lives(data)


def test_broken_data_is_reported_and_kept(data: Path) -> None:
    with embedded.join_or_start(data) as use:
        ask(use.url, "set", "kept", "yes")
    increment = next(server.Home(data).dir.glob("appendonlydir/*.incr.aof"))
    increment.write_bytes(b"rubbish" + increment.read_bytes())
    with pytest.raises(RedisRefused, match=r"did not start \(.*Bad file format"):
        embedded.join_or_start(data)
    assert increment.read_bytes().startswith(b"rubbish")


def test_without_the_wheel_the_sentence_says_what_to_set(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RedisRefused, match="not installed: set POCKETFLEET_REDIS_URL"):
        embedded.join_or_start(data)


def test_hanging_server_is_refused_and_never_doubled(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded.join_or_start(data) as use:
        pid = int(str(ask(use.url, "info", "server")["process_id"]))
        monkeypatch.setattr(server, "START_S", 0.5)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(RedisRefused, match=r"does not answer within 0\.5 s"):
                embedded.join_or_start(data)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_server_whose_socket_was_deleted_says_how_it_is_ended(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = embedded.join_or_start(data)
    monkeypatch.setattr(server, "START_S", 0.5)
    monkeypatch.setattr(server, "STOP_S", 0.1)
    ask(use.url, "set", "kept", 1)
    Path(use.url.removeprefix("unix://")).unlink()
    with pytest.raises(RedisRefused, match=r"redis\.sock is gone, so nobody reaches it; end it, ") as refusal:
        embedded.join_or_start(data)
    use.close()
    (kill,) = re.findall(r"kill \$\(cat .*\)", str(refusal.value))
    subprocess.run(["sh", "-c", kill], check=True)
    while lives(data):
        time.sleep(0.01)
    monkeypatch.undo()
    with embedded.join_or_start(data) as again:
        assert ask(again.url, "get", "kept") == "1"


def test_own_environment_does_not_live_on_in_the_server(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "canary-9")
    with embedded.join_or_start(data) as use:
        pid = ask(use.url, "info", "server")["process_id"]
        environment = Path(f"/proc/{pid}/environ")
        assert not environment.exists() or b"canary-9" not in environment.read_bytes()


def test_place_without_a_url_is_the_embedded_one_and_its_worker_holds_it_too(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    run = find_redis(FleetSettings(data_dir=data), start=True)
    assert run.shown == f"the embedded server in {data.resolve()}"
    worker = find_redis(FleetSettings(data_dir=data, redis_url=run.url), start=False)
    run.close()
    assert ask(worker.url, "ping")
    reader = find_redis(FleetSettings(data_dir=data), start=False)
    worker.close()
    assert ask(reader.url, "ping")
    reader.close()
    assert not lives(data)


def test_place_with_another_socket_does_not_touch_the_embedded_one(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    with embedded.join_or_start(data):
        place = find_redis(FleetSettings(data_dir=data, redis_url="unix:///other.sock"), start=True)
        assert place.embedded is None
        place.close()
        assert lives(data)

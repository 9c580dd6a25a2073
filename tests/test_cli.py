"""The command line as a newcomer meets it: real processes in an empty folder, the server of our own."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from limiter import embedded
from limiter.server import Home, server_lives
from limiter.view import GateView
from pocketfleet.__main__ import main
from producer.progress import Progress
from tests import servers

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0

USERS = """
import asyncio, logging, os
from pathlib import Path
from pocketflow import AsyncNode, Node
from pocketfleet import ThrottledAsyncParallelBatchFlow


class Fetch(AsyncNode):
    async def exec_async(self, _):
        await asyncio.sleep(self.params.get("s", 0))
        print("fetching", self.params["user_id"])
        logging.getLogger("mine").info("fetched")
        with open("ledger.txt", "a") as ledger:
            ledger.write(f"{self.params['user_id']}\\n")

    async def post_async(self, shared, prep_res, exec_res):
        if str(self.params["user_id"]) == "13":
            raise ValueError("unlucky")
        shared.setdefault("seen", {})[str(self.params["user_id"])] = True
        return "store"


class Store(Node):
    def post(self, shared, prep_res, exec_res):
        return "done"


class Paint(AsyncNode):
    async def exec_async(self, _):
        print("\\x1b[2J\\x1b[31mred\\x1b[0m\\tand\\x07 [item 7] 10%\\r\\x1b]0;title\\x1b\\\\ 90%\\ttab\\r")
        logging.getLogger("pocketfleet.worker").info("our own news")
        logging.getLogger("mine").warning("log\\x1b[1A up")
        os.write(1, b"past python \\x1b[5Aup\\n")
        raise ValueError("bad\\x1b[2J")


class Stop(AsyncNode):
    async def exec_async(self, _):
        x = self.params["user_id"] * 2
        breakpoint()
        print("x is", x)


class StopInThread(Node):
    def exec(self, _):
        x = self.params["user_id"] * 2
        breakpoint()
        print("x is", x)


class Count(AsyncNode):
    async def post_async(self, shared, prep_res, exec_res):
        shared["last"] = self.params["user_id"]


class Users(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"user_id": each, "s": shared.get("s", 0)} for each in shared["user_ids"]]

    async def post_async(self, shared, prep_res, results):
        Path("post.txt").write_text(repr((prep_res, sorted(shared.get("seen", {})))))
        return len(results)


class Unlucky(Users):
    async def post_async(self, shared, prep_res, results):
        return shared["seen"]


class Closed(Users):
    async def on_worker_start(self):
        raise ConnectionError("the database is closed")


fetch = Fetch()
fetch - "store" >> Store()
flow = Users(start=fetch, max_concurrent_flows=3)
unlucky = Unlucky(start=fetch)
closed = Closed(start=fetch)
paint = Users(start=Paint())
stop = Users(start=Stop())
stop_in_thread = Users(start=StopInThread())
count = Users(start=Count())
strict = Users(start=Count(), conflicts="fail")
"""


class Folder:
    """An empty folder with `users.py` in it, and what is typed there."""

    def __init__(self, path: Path, url: str = "") -> None:
        self.path = path
        kept = {name: value for name, value in os.environ.items() if not name.startswith("POCKETFLEET_")}
        self.env = kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        if url:
            self.env["POCKETFLEET_REDIS_URL"] = url
        (path / "users.py").write_text(USERS)

    def words(self, line: str) -> list[str]:
        first, *rest = shlex.split(line)
        return [sys.executable, *(("-m", "pocketfleet") if first == "pocketfleet" else (first,)), *rest]

    def type(self, line: str, answers: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(line),
            cwd=self.path,
            env=self.env,
            input=answers,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def ask(self, line: str) -> subprocess.CompletedProcess[str]:
        """The same in this process, which is quick: for commands that start nothing."""
        out, err = io.StringIO(), io.StringIO()
        given = {name: value for name, value in self.env.items() if name.startswith("POCKETFLEET_")}
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            for name in [name for name in os.environ if name.startswith("POCKETFLEET_")]:
                patch.delenv(name)
            for name, value in {**given, "COLUMNS": "100"}.items():
                patch.setenv(name, value)
            patch.chdir(self.path)
            patch.setattr(sys, "argv", shlex.split(line))
            patch.setattr(sys, "path", list(sys.path))
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.modules.pop("users", None)
        return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())

    def start(self, line: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(line),
            cwd=self.path,
            env=self.env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text().splitlines() if path.exists() else []

    def batch_id(self) -> str:
        (home,) = [path for path in (self.path / ".pocketfleet/batches").iterdir() if path.is_dir()]
        return home.name


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def shared_folder(tmp_path: Path) -> Iterator[Folder]:
    """With a Redis of the user's own."""
    with servers.running("valkey") as url:
        yield Folder(tmp_path, url)


def until(true: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# --- run ------------------------------------------------------------------------------------------------


def test_run_shows_each_line_by_item_writes_a_line_per_item_and_says_what_failed(folder: Folder) -> None:
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1,13,3]' --workers 2 --output out.jsonl")

    assert done.returncode == 1
    assert done.stdout == ""
    said = done.stderr.splitlines()
    batch = folder.batch_id()
    assert said[0] == f"flow users:flow under limit users.flow (3 at a time), batch {batch}"
    assert {"[item 0] fetching 1", "[item 1] fetching 13", "[item 2] fetching 3"} <= set(said)
    assert "[item 0] INFO mine fetched" in said
    assert "[item 1] failed in Fetch: ValueError: unlucky" in said
    assert not [line for line in said if "worker.serves" in line or "worker serves" in line]
    counts, output, retry, logs, result = said[-5:]
    assert re.fullmatch(r"2 completed, 1 failed in \d+\.\d s", counts)
    assert output == "one line per item: out.jsonl"
    assert retry.startswith(
        f"retry what failed: pocketfleet batch retry {batch} --failed && pocketfleet run "
    )
    assert retry.endswith(f" --batch {batch}")
    assert logs == f"what the workers printed: .pocketfleet/logs/{batch}/worker-*.log"
    assert result == "result: 3"
    written = "".join(path.read_text() for path in (folder.path / ".pocketfleet/logs" / batch).iterdir())
    assert f"[{batch}:1] fetching 13" in written
    assert "worker serves flow users:flow under limit users.flow" in written
    records = {record["index"]: record for record in map(json.loads, folder.lines("out.jsonl"))}
    assert [records[index]["status"] for index in range(3)] == ["completed", "failed", "completed"]
    assert records[0]["params"] == {"user_id": 1, "s": 0}
    assert records[0]["action"] == "done"
    assert records[0]["changed"] == {"seen": {"1": True}}
    assert records[1]["error"]["message"] == "unlucky"


def test_without_workers_one_is_started_per_core(folder: Folder) -> None:
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1]'")
    assert done.returncode == 0, done.stderr
    logs = list((folder.path / ".pocketfleet/logs" / folder.batch_id()).iterdir())
    assert len(logs) == len(os.sched_getaffinity(0))
    assert f"one line per item: .pocketfleet/output/{folder.batch_id()}.jsonl" in done.stderr


def test_workers_0_runs_here_with_whole_traces(folder: Folder) -> None:
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1,13]' --workers 0")
    assert done.returncode == 1
    assert "[item 0] fetching 1" in done.stdout
    assert "[item 1] Traceback (most recent call last):" in done.stderr
    assert re.search(r'\[item 1\]   File ".*users.py", line \d+, in post_async', done.stderr)
    assert "worker.serves" not in done.stderr
    assert not (folder.path / ".pocketfleet/logs").exists()


@pytest.mark.parametrize("target", ["users:stop", "users:stop_in_thread"])
def test_breakpoints_of_many_items_get_one_prompt_at_a_time(target: str, folder: Folder) -> None:
    done = folder.type(
        f"pocketfleet run {target} --set 'user_ids=[4,5,6]' --workers 0", "p 'it is', x\nc\n" * 3
    )
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stdout.splitlines() if "it is" in line]
    assert sorted(int(re.findall(r"\d+", line)[-1]) for line in asked) == [8, 10, 12]
    assert sorted(re.findall(r"x is (\d+)", done.stdout)) == ["10", "12", "8"]
    for line in asked:  # each session is whole: its own item, its own value
        number, value = re.findall(r"\d+", line)
        assert int(value) == 2 * (4 + int(number))


@pytest.mark.parametrize("target", ["users:stop", "users:stop_in_thread"])
def test_quitting_the_debugger_stops_the_run_and_fails_no_item(target: str, folder: Folder) -> None:
    line = f"pocketfleet run {target} --set 'user_ids=[4,5,6]' --workers 0 --batch b"
    done = folder.type(line, "q\n")
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped; go on with: pocketfleet run")
    assert done.stdout.count("(Pdb)") == 1
    again = folder.type(line, "c\nc\nc\n")
    assert again.returncode == 0, again.stderr
    assert sorted(re.findall(r"x is (\d+)", again.stdout)) == ["10", "12", "8"]


def test_a_log_that_cannot_be_opened_ends_the_run_in_a_sentence(folder: Folder) -> None:
    logs = folder.path / ".pocketfleet/logs"
    (logs / "b/worker-1.log").mkdir(parents=True)
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1]' --workers 1 --batch b")
    said = "pocketfleet: cannot write .pocketfleet/logs/b/worker-1.log: is a directory"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)
    shutil.rmtree(logs)
    logs.touch()
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1]' --workers 1 --batch b")
    said = "pocketfleet: cannot write .pocketfleet/logs/b: not a directory"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


def test_a_log_that_takes_no_more_is_said_once_and_stops_nothing(folder: Folder) -> None:
    logs = folder.path / ".pocketfleet/logs/b"
    logs.mkdir(parents=True)
    (logs / "worker-1.log").symlink_to("/dev/full")
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[1,2,3]' --workers 1 --batch b")
    assert (done.returncode, "3 completed in" in done.stderr) == (0, True), done.stderr
    said = "cannot write .pocketfleet/logs/b/worker-1.log: no space left on device; what workers print is not"
    assert done.stderr.count(said) == 1
    assert "[item 2] fetching 3" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_while_items_are_read_from_a_silent_pipe(
    folder: Folder, sent: signal.Signals
) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"user_id": 1}\n')
    running = folder.start("pocketfleet run users:flow --params -", stdin=reading)
    os.close(reading)
    batches = folder.path / ".pocketfleet/batches"
    until(lambda: batches.is_dir() and any(batches.glob("+writing*")), "it reads")
    running.send_signal(sent)
    said, _ = running.communicate(timeout=PATIENCE_S)  # the pipe is still open
    assert (running.returncode, said.splitlines()[1:]) == (130, ["stopped; nothing was enqueued"])
    os.close(writing)


def test_items_of_a_pipe_that_stays_open_are_enqueued_once_there_are_enough(folder: Folder) -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"user_id": 1}\n{"user_id": 2}\n[]\n')
    running = folder.start("pocketfleet run users:flow --params - --first 2 --workers 1", stdin=reading)
    os.close(reading)
    said, _ = running.communicate(timeout=PATIENCE_S)
    assert (running.returncode, "2 completed in" in said) == (0, True), said
    os.close(writing)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_the_command_that_goes_on_with_what_is_missing(
    sent: signal.Signals, folder: Folder
) -> None:
    ids = json.dumps(list(range(12)), separators=(",", ":"))
    running = folder.start(f"pocketfleet run users:flow --set user_ids={ids} --set s=0.5 --workers 1")
    until(lambda: len(folder.lines("ledger.txt")) >= 3, "no item ran")
    running.send_signal(sent)
    said, _ = running.communicate(timeout=PATIENCE_S)

    assert running.returncode == 130, said
    last = said.splitlines()[-1]
    assert re.match(r"stopped( at \d+ of 12)?; go on with: pocketfleet run users:flow ", last)
    again = folder.type(last.partition("go on with: ")[2])
    assert again.returncode == 0, again.stderr
    assert "12 completed" in again.stderr
    ran = folder.lines("ledger.txt")
    assert set(ran) == {str(number) for number in range(12)}
    assert len(ran) <= 12 + 3  # only what ran when it was stopped runs again


def test_first_takes_some_items_and_the_same_batch_takes_the_rest(folder: Folder) -> None:
    line = "pocketfleet run users:flow --set 'user_ids=[1,2,3,4]' --workers 0 --batch b --output out.jsonl"
    some = folder.type(f"{line} --first 2")
    assert some.returncode == 0, some.stderr
    assert sorted(folder.lines("ledger.txt")) == ["1", "2"]
    rest = folder.type(line)
    assert rest.returncode == 0, rest.stderr
    assert sorted(folder.lines("ledger.txt")) == ["1", "2", "3", "4"]
    assert "4 completed" in rest.stderr
    assert len(folder.lines("out.jsonl")) == 4


@pytest.mark.parametrize("name", ["precious.txt", "precious.csv"])
def test_a_file_of_somebody_else_is_refused_as_output_and_stays(name: str, folder: Folder) -> None:
    precious = folder.path / name
    precious.write_text("my notes\n")
    line = f"pocketfleet run users:flow --set 'user_ids=[1]' --workers 0 --batch b --output {name}"
    done = folder.type(line)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[1:] == [
        f"pocketfleet: --output {name} exists, and batch b did not write it: name another file, or delete it"
    ]
    assert precious.read_text() == "my notes\n"
    assert not (folder.path / "ledger.txt").exists()
    assert not list((folder.path / ".pocketfleet/batches").glob("*"))
    precious.unlink()
    assert folder.type(line).returncode == 0
    written = precious.read_text()
    again = folder.type(line)
    assert (again.returncode, precious.read_text()) == (0, written), again.stderr
    other = folder.type(line.replace("--batch b", "--batch other"))
    assert (other.returncode, precious.read_text()) == (2, written), "another batch wrote it"


def test_a_file_that_another_run_has_written_meanwhile_is_refused_as_output_and_stays(folder: Folder) -> None:
    reading, writing = os.pipe()
    line = "pocketfleet run users:flow --params - --workers 0 --batch b --output out.jsonl"
    running = folder.start(line, stdin=reading)
    os.close(reading)
    batches = folder.path / ".pocketfleet/batches"
    until(lambda: batches.is_dir() and any(batches.glob("+writing*")), "it reads")
    (folder.path / "out.jsonl").write_text("the lines of another batch\n")
    os.write(writing, b'{"user_id": 1}\n')
    os.close(writing)
    said, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 2, said
    assert "--output out.jsonl exists, and batch b did not write it" in said
    assert folder.lines("out.jsonl") == ["the lines of another batch"]
    assert not (folder.path / "ledger.txt").exists()


def test_items_left_by_an_earlier_batch_are_announced(folder: Folder) -> None:
    ids = json.dumps(list(range(9)), separators=(",", ":"))
    running = folder.start(f"pocketfleet run users:flow --set user_ids={ids} --set s=1.5 --workers 0")
    until(lambda: folder.lines("ledger.txt"), "no item ran")
    time.sleep(0.5)  # the first three have ended, the next three run
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, said
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[50]' --workers 0 --batch other")
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"(\d) items? of earlier batches wait for users:flow: these workers run them too", done.stderr
    )
    assert found, done.stderr
    assert 1 <= int(found[1]) <= 9


def test_params_come_from_a_file_or_standard_input_and_prep_is_not_asked(folder: Folder) -> None:
    (folder.path / "p.csv").write_text("user_id,name\n7,a\n8,b\n")
    (folder.path / "p.jsonl").write_text('{"user_id": 1}\n{"user_id": 2}\n')
    for line, answers in (
        ("--params p.csv", ""),
        ("--params p.jsonl --first 1", ""),
        ("--params -", '{"user_id": 9}\n'),
    ):
        (folder.path / "out.jsonl").unlink(missing_ok=True)
        done = folder.type(f"pocketfleet run users:flow {line} --workers 0 --output out.jsonl", answers)
        assert done.returncode == 0, done.stderr
    assert sorted(folder.lines("ledger.txt")) == ["1", "7", "8", "9"]
    assert json.loads(folder.lines("out.jsonl")[0])["params"] == {"user_id": 9}


def test_no_items_is_a_sentence_and_post_async_is_still_asked(folder: Folder) -> None:
    done = folder.type("pocketfleet run users:flow --set 'user_ids=[]' --workers 2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[1:] == ["there were no items, so nothing ran", "result: 0"]
    assert folder.lines("post.txt") == ["([], [])"]


def test_what_post_async_raises_is_one_sentence_after_the_counts(folder: Folder) -> None:
    done = folder.type("pocketfleet run users:unlucky --set 'user_ids=[13]' --workers 1")
    assert done.returncode == 1
    assert "0 completed, 1 failed" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"pocketfleet: users:unlucky: post_async raised KeyError: 'seen' \(users.py, line ", last)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(workers: int, folder: Folder) -> None:
    done = folder.type(f"pocketfleet run users:closed --set 'user_ids=[1]' --workers {workers}")
    assert done.returncode == 2
    assert "ConnectionError: the database is closed (users.py, line " in done.stderr.splitlines()[-1]
    assert ("Traceback" in done.stderr) == (workers == 0)
    assert done.stderr.count("Traceback") <= 1


def test_a_conflict_is_shown_at_once_and_fail_stops_the_batch(folder: Folder) -> None:
    shown = folder.type("pocketfleet run users:count --set 'user_ids=[1,2]' --workers 0")
    assert shown.returncode == 0, shown.stderr
    assert (
        "conflict: items 0 and 1 both changed shared['last'], and the last item in input order wins"
        in shown.stderr
    )
    stopped = folder.type("pocketfleet run users:strict --set 'user_ids=[1,2]' --workers 0")
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith(
        "pocketfleet: stopped, as conflicts='fail' asks: items 0 and 1 both changed shared['last']: write"
    )


def test_on_a_terminal_the_progress_is_one_line_below_what_nodes_print(folder: Folder) -> None:
    ids = json.dumps(list(range(9)), separators=(",", ":"))
    leader, follower = pty.openpty()
    folder.env |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    running = subprocess.Popen(
        folder.words(f"pocketfleet run users:flow --set user_ids={ids} --set s=0.4 --workers 1 --batch b"),
        cwd=folder.path,
        env=folder.env,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    seen = _all_of(leader)
    assert running.wait(PATIENCE_S) == 0, seen
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    pictures = [line for line in re.split(r"[\r\n]+", plain) if line.startswith("users:flow ")]
    assert any("· 1 worker start" in line for line in pictures), plain
    assert any("level: 3 of 3 at a time" in line for line in pictures), plain
    assert max(map(len, pictures)) < 80
    assert [line for line in pictures if "9/9" in line]
    assert "[item 8] fetching 8" in plain
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("workers", [0, 1])
def test_what_nodes_print_cannot_command_the_terminal(workers: int, folder: Folder) -> None:
    done = folder.type(f"pocketfleet run users:paint --set 'user_ids=[1]' --workers {workers}")
    said = done.stdout + done.stderr
    if workers == 0:  # nobody reads along what goes to the terminal past Python
        said = said.replace("past python \x1b[5Aup", "")
    else:
        assert "[worker 1] past python up" in said
    assert "[item 0]  90%\ttab\n" in said
    assert "WARNING mine log up" in said
    assert "our own news" not in said
    assert "ValueError: bad" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", said), repr(said)


def _all_of(leader: int) -> str:
    """What a terminal gets until the last process has let go of it."""
    data, deadline = b"", time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ready, _, _ = select.select([leader], [], [], 1.0)
        try:
            piece = os.read(leader, 65536) if ready else b"-"
        except OSError:  # Linux says so when nobody has the other end
            piece = b""
        if not piece:
            break
        data += piece if ready else b""
    os.close(leader)
    return data.decode(errors="replace")


# --- enqueue, worker and the commands that look ---------------------------------------------------------


def test_enqueue_prints_the_id_alone_and_workers_of_another_time_do_the_rest(shared_folder: Folder) -> None:
    put = shared_folder.ask("pocketfleet enqueue users:flow --set 'user_ids=[1,13]'")
    assert put.returncode == 0, put.stderr
    batch = put.stdout.removesuffix("\n")
    assert batch == shared_folder.batch_id()
    said = put.stderr.splitlines()
    assert said.pop(2).startswith("plan: as long as one run takes, which plan --seconds can say, 3 at a time")
    assert said == [
        f"flow users:flow under limit users.flow (3 at a time), batch {batch}",
        "no worker serves users:flow; start one: pocketfleet worker users:flow",
        "2 of 2 items enqueued",
    ]
    twice = shared_folder.ask(f"pocketfleet enqueue users:flow --set 'user_ids=[1,13]' --batch {batch}")
    assert twice.stderr.splitlines()[-1] == "0 of 2 items enqueued, 2 were there already"
    waits = shared_folder.ask(f"pocketfleet batch status {batch}")
    nobody = "no worker serves users:flow; start one: pocketfleet worker users:flow"
    assert (waits.returncode, waits.stdout) == (0, f"{batch}: 0 of 2 done; {nobody}\n")

    worked = shared_folder.type("pocketfleet worker users:flow users:flow --burst --max-jobs 1")
    assert worked.returncode == 0, worked.stderr
    greeting = (
        "worker serves flow users:flow under limit users.flow (max_concurrent=3, per minute=no limit) at "
    )
    assert worked.stdout.startswith(greeting)
    assert f"[{batch}:0] fetching 1\n" in worked.stdout

    over = shared_folder.ask(f"pocketfleet batch status {batch}")
    retry = f"retry what failed: pocketfleet batch retry {batch} --failed"
    assert (over.returncode, over.stdout) == (1, f"{batch}: 2 of 2 done: 1 completed, 1 failed; {retry}\n")
    told = json.loads(shared_folder.ask(f"pocketfleet batch status {batch} --json").stdout)
    assert told["batch"] == batch
    assert told["limit"] == "users.flow"
    assert (told["count"], told["left"], told["completed"], told["failed"]) == (2, 0, 1, 1)
    assert abs(told["created"] - time.time()) < 3600


def test_a_retry_in_the_embedded_server_names_what_runs_it_there(folder: Folder) -> None:
    line = "pocketfleet run users:flow --set 'user_ids=[13]' --workers 0 --batch b"
    assert folder.type(line).returncode == 1
    again = folder.type("pocketfleet batch retry b --failed")
    assert (again.returncode, again.stdout.split(";")[0]) == (0, "1 item enqueued again")
    assert again.stderr == (
        "no worker serves users:flow, and none can by itself, as no POCKETFLEET_REDIS_URL is set: "
        "run it with pocketfleet run users:flow ... --batch b, or set one and enqueue there\n"
    )
    assert "1 failed in" in folder.type(line).stderr, "it works"
    assert folder.lines("ledger.txt") == ["13", "13"]


def test_the_last_user_of_the_embedded_server_takes_leave_of_it_before_it_ends(folder: Folder) -> None:
    (folder.path / ".pocketfleet").mkdir()
    with embedded.join_or_start(folder.path / ".pocketfleet"):
        worker = folder.start("pocketfleet worker users:flow")
        assert worker.stdout is not None
        until(lambda: "worker serves" in worker.stdout.readline(), "it serves")
    worker.terminate()
    said, _ = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0, said
    assert embedded.join(folder.path / ".pocketfleet") is None


def test_a_waiter_and_a_burst_worker_see_a_killed_run_to_its_end(folder: Folder) -> None:
    run = folder.start(
        "pocketfleet run users:flow --set user_ids=[1,2,3,4,5] --set s=1 --workers 0 --batch b"
    )
    until(lambda: folder.lines("ledger.txt"), "it runs")
    run.kill()
    run.communicate(timeout=PATIENCE_S)
    waiter = folder.start("pocketfleet batch wait b")
    until(lambda: server_lives(Home(folder.path / ".pocketfleet")), "the waiter has a server")
    done = folder.type("pocketfleet worker users:flow --burst")
    assert done.returncode == 0, done.stderr
    said, _ = waiter.communicate(timeout=PATIENCE_S)
    assert waiter.returncode == 0, said
    assert "b: 5 of 5 done: 5 completed" in said


def test_workers_and_limits_are_shown_while_a_worker_lives(shared_folder: Folder) -> None:
    nobody = shared_folder.ask("pocketfleet workers --check")
    assert (nobody.returncode, nobody.stdout) == (1, "no worker of this host lives\n")
    assert json.loads(shared_folder.ask("pocketfleet workers --json").stdout) == []

    worker = shared_folder.start("pocketfleet worker users:flow users:unlucky")
    try:
        until(lambda: shared_folder.ask("pocketfleet workers --check").returncode == 0, "no worker lives")
        (info,) = json.loads(shared_folder.ask("pocketfleet workers --json").stdout)
        assert (info["pid"], info["flows"]) == (worker.pid, ["users:flow", "users:unlucky"])
        assert {"host", "running", "version", "limits"} <= set(info)
        table = shared_folder.ask("pocketfleet workers").stdout
        assert "users:flow, users:unlucky" in " ".join(table.split())
        limits = json.loads(shared_folder.ask("pocketfleet limits show --json").stdout)
        assert [(view["name"], view["max_concurrent"]) for view in limits] == [
            ("users.flow", 3),
            ("users.unlucky", 5),
        ]
        one = shared_folder.ask("pocketfleet limits show users:flow")
        assert one.returncode == 0
        assert "users.flow" in one.stdout
        assert "users.unlucky" not in one.stdout
        put = shared_folder.ask("pocketfleet enqueue users:flow --set 'user_ids=[1]' --batch b")
        assert "no worker serves" not in put.stderr
        mistyped = shared_folder.ask("pocketfleet limits clear users:folw")
        assert mistyped.returncode == 2
        assert mistyped.stderr.startswith(
            "pocketfleet: limit 'users.folw' is not known here; did you mean 'users.flow'? (known: "
        )
        mistyped = shared_folder.ask("pocketfleet limits pause users.flwo --for 1s")
        assert mistyped.returncode == 0
        assert mistyped.stdout.endswith(
            "no process uses it now; it is kept and holds when one comes; did you mean 'users.flow'?\n"
        )
    finally:
        worker.terminate()
        said, _ = worker.communicate(timeout=PATIENCE_S)
    assert worker.returncode == 0, said
    assert shared_folder.ask("pocketfleet workers --check").returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is judged by its process id")
def test_a_worker_that_was_killed_does_not_pass_for_a_living_one(shared_folder: Folder) -> None:
    worker = shared_folder.start("pocketfleet worker users:flow")
    until(lambda: shared_folder.ask("pocketfleet workers --check").returncode == 0, "no worker lives")
    worker.kill()
    # not waited for: what is left of it still has its id
    until(lambda: Path(f"/proc/{worker.pid}/stat").read_text().split()[2] == "Z", "it ends")
    assert shared_folder.ask("pocketfleet workers --check").returncode == 1
    worker.communicate(timeout=PATIENCE_S)
    assert shared_folder.ask("pocketfleet workers --check").returncode == 1
    assert json.loads(shared_folder.ask("pocketfleet workers --json").stdout) == []


def test_a_worker_takes_its_settings_from_a_file(shared_folder: Folder) -> None:
    (shared_folder.path / ".env").write_text("POCKETFLEET_FLOWS=users:flow\nPOCKETFLEET_BURST=true\n")
    done = shared_folder.type("pocketfleet worker")
    assert done.returncode == 0, done.stderr
    assert "flow users:flow under limit users.flow" in done.stdout


# --- from Python ----------------------------------------------------------------------------------------

CALL = "print(asyncio.run(flow.run_on_fleet({'user_ids': [1, 2]}, workers=1)), flow.stats['completed_flows'])"


def test_a_script_and_a_module_of_a_package_start_workers_that_find_their_flow(folder: Folder) -> None:
    body = f"import asyncio\nfrom users import Users, fetch\nflow = Users(start=fetch)\n\nif __name__ == '__main__':\n    {CALL}\n"
    (folder.path / "script.py").write_text(body)
    (folder.path / "pkg").mkdir()
    (folder.path / "pkg/__init__.py").touch()
    (folder.path / "pkg/mod.py").write_text(body)
    (folder.path / "sub").mkdir()
    (folder.path / "sub/apart.py").write_text(body)
    (folder.path / "sub/users.py").write_text(USERS)
    for line, name in (
        ("script.py", "script-flow"),
        ("-m pkg.mod", "pkg-mod-flow"),
        ("sub/apart.py", "apart-flow"),
    ):
        done = folder.type(line)
        assert (done.returncode, done.stdout) == (0, "2 2\n"), done.stderr
        assert "[item 0] fetching 1" in done.stderr
        assert list((folder.path / ".pocketfleet/batches").glob(f"{name}-*"))


def test_a_script_without_its_guard_is_told_so_and_starts_no_endless_chain(folder: Folder) -> None:
    (folder.path / "script.py").write_text(
        f"import asyncio\nfrom users import Users, fetch\nflow = Users(start=fetch)\n{CALL}\n"
    )
    done = folder.type("script.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "script:flow: its module calls run_on_fleet when imported; put that under if __name__ == '__main__':"
    )


def test_a_local_flow_runs_here_and_without_a_worker_the_fleet_says_so_at_once(folder: Folder) -> None:
    (folder.path / "script.py").write_text(
        """
import asyncio
from users import Users, fetch

flow = Users(start=fetch)


def main():
    class Local(Users):
        pass

    print(asyncio.run(Local(start=fetch).run_async({"user_ids": [1, 2]})))
    asyncio.run(nobody())


async def nobody():
    try:
        async with asyncio.timeout(1.5):
            await flow.run_on_fleet({"user_ids": [1]})
    except TimeoutError:
        print("waited")


main()
"""
    )
    done = folder.type("script.py")
    assert done.stdout.splitlines()[-2:] == ["2", "waited"], done.stderr
    unserved, left = done.stderr.splitlines()
    assert unserved == "no worker serves script:flow; start one: pocketfleet worker script:flow"
    assert re.fullmatch(r"batch (\S+) goes on without us; follow it: pocketfleet batch wait \1", left)


# --- the help, and the line in all its states -----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["--version", "run", "worker", "enqueue", "plan", "batch", "limits", "workers"]),
        (
            "run",
            [
                "--set",
                "--shared",
                "--params",
                "--batch",
                "--first",
                "--key",
                "--weight",
                "--workers",
                "--output",
            ],
        ),
        ("enqueue", ["--set", "--shared", "--params", "--batch", "--first", "--key", "--weight"]),
        ("worker", ["--max-jobs", "--burst"]),
        ("workers", ["--json", "--check"]),
        ("plan", ["--set", "--shared", "--params", "--first", "--seconds", "--json"]),
        ("batch", ["list", "status", "wait", "results", "retry", "cancel", "lost", "prune"]),
        ("batch list", ["--json"]),
        ("batch status", ["ID", "--json"]),
        ("batch wait", ["ID", "--output", "--json"]),
        ("batch results", ["ID", "--failed", "--json"]),
        ("batch retry", ["ID", "--failed", "--json"]),
        ("batch cancel", ["ID", "--json"]),
        ("batch lost", ["ID", "--resubmit", "--json"]),
        ("batch prune", ["--json"]),
        ("limits", ["show", "set", "clear", "pause", "resume", "reset", "holders", "doctor"]),
        ("limits show", ["--json"]),
        ("limits set", ["--max-concurrent", "--max-per-minute", "--by", "--json"]),
        ("limits pause", ["--for", "--by", "--json"]),
    ],
)
def test_each_help_names_every_option(
    line: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pocketfleet", *line.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert f"Usage: pocketfleet {line}".rstrip() in shown
    assert all(word in shown for word in words), shown


def test_the_version_is_the_one_that_is_installed(folder: Folder) -> None:
    done = folder.ask("pocketfleet --version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"pocketfleet {version('pocketfleet')}\n"


def test_importing_pocketfleet_waits_for_no_room(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    done = folder.type(
        '-c \'import sys, pocketfleet; print([name for name in ("redis", "pydantic", "arq") if name in sys.modules])\''
    )
    assert done.stdout == "[]\n", done.stderr


def gate(**values: Any) -> GateView:
    given: dict[str, Any] = {
        "name": "users.flow",
        "max_concurrent": 5,
        "min_concurrent": 5,
        "max_per_window": 60,
        "window_s": 60.0,
        "lease_s": 15.0,
        "level": 5.0,
        "in_use": 3,
        "used": 20,
        "waiting_processes": 0,
        "processes": 2,
        "waiting_jobs": {},
        "paused_for_s": 0.0,
        "closed_for_s": 0.0,
        "next_start_s": 0.0,
        "served": True,
    }
    return GateView(**(given | values))


@pytest.mark.parametrize(
    ("workers", "view", "said"),
    [
        (2, gate(used=60, next_start_s=12.34), "window: 60 of 60 starts in 60 s, next in 12.3 s"),
        (2, gate(in_use=5), "level: 5 of 5 at a time"),
        (2, gate(paused_for_s=30.0), "pause asked for by the provider, 30 s more"),
        (2, gate(paused_for_s=4.0, halted=True), "pause after refusals at the lowest level, 4 s more"),
        (2, gate(closed_for_s=9.0), "cold start: admits again in 9 s"),
        (0, gate(), "no worker serves users:flow"),
        (2, gate(in_use=1), "as fast as the workers go"),
    ],
)
def test_the_line_says_what_holds_the_batch_back(workers: int, view: GateView, said: str) -> None:
    progress = Progress("users:flow", "users.flow", 100)
    progress.workers, progress.gate, progress.sent = workers, view, 100
    assert progress.held_back().startswith(said)
    assert progress.line().partition("; ")[2].startswith(said)


def test_the_line_tells_starting_workers_from_missing_ones_and_names_the_last_runs() -> None:
    progress = Progress("users:flow", "users.flow", 4, workers=4)
    progress.workers, progress.sent = 0, 4
    assert progress.held_back() == "4 workers start"
    progress.workers, progress.gate = 4, gate(in_use=3)
    progress.count(True)
    assert progress.held_back() == "the last 3 run"
    progress.trouble = "Redis does not answer (ConnectionError)"
    assert progress.held_back() == progress.trouble


@pytest.mark.parametrize("width", [20, 39, 60, 79, 80, 110, 200])
def test_the_picture_fits_any_terminal_and_keeps_the_counts(width: int) -> None:
    progress = Progress("users:flow", "users.flow", 100_000)
    progress.workers, progress.sent, progress.gate = 4, 90_000, gate(in_use=5)
    for number in range(1234):
        progress.count(number % 5 > 0)
    picture = progress.picture(width)
    assert picture.cell_len <= width
    assert "\n" not in picture.plain
    assert picture.plain.startswith("users:flow"[:width])
    if width >= 60:
        assert "1234/100000" in picture.plain
        assert "level: 5 of 5 at a time" in picture.plain

"""Bad input gets one sentence and an exit code; nothing is enqueued and no secret is repeated."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

from pocketfleet.__main__ import main
from tests import servers

ROOT = Path(__file__).resolve().parents[1]
CANARY = "c4n4ry-of-a-password"

USERS = """
import datetime
from pocketflow import AsyncFlow, AsyncNode
from pocketfleet import LimitsError, ThrottledAsyncParallelBatchFlow


class Fetch(AsyncNode):
    async def exec_async(self, _):
        raise SystemExit("a run started")


fetch = Fetch()


class Users(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return [{"user_id": each} for each in shared["user_ids"]]


class Prepared(ThrottledAsyncParallelBatchFlow):
    async def prep_async(self, shared):
        return PREPARED[shared["kind"]]()


def seventh_fails():
    for number in range(20):
        if number == 7:
            raise ValueError("the seventh")
        yield {"n": number}


async def seventh_fails_too():
    for params in seventh_fails():
        yield params


PREPARED = {
    "dict": lambda: {"a": 1},
    "forgotten": lambda: None,
    "text": lambda: "abc",
    "number": lambda: 5,
    "texts": lambda: [{"a": 1}, "b"],
    "set": lambda: [{"a": 1}, {"a": {1}}],
    "nan": lambda: [{"a": [1, float("nan")]}],
    "date": lambda: [{"a": {"b": datetime.date(2026, 1, 1)}}],
    "key": lambda: [{1: "a"}],
    "long": lambda: [{"a": 2**64}],
    "large": lambda: [{"a": "x" * 300_000}],
    "gen": seventh_fails,
    "agen": seventh_fails_too,
}

flow = Users(start=fetch)
prepared = Prepared(start=fetch)
empty = Users()


class OneByOne(Users):
    async def _orch_async(self, shared, params=None):
        return await super()._orch_async(shared, params)


one_by_one = OneByOne(start=fetch)
plain = AsyncFlow(start=fetch)
twin = Users(start=fetch, name="same")
other_twin = Users(start=fetch, name="same")
one_limit = Users(start=fetch, limit="shared")
other_limit = Users(start=fetch, limit="shared", max_concurrent_flows=7)
number = 7


def users_with(**values):
    return lambda: Users(start=fetch, **values)


zero = users_with(max_concurrent_flows=0)
negative = users_with(max_flows_per_minute=-1)
nan = users_with(max_concurrent_flows=float("nan"))
text = users_with(max_flows_per_minute="60")
bad_limit = users_with(limit="a b")
bad_name = users_with(name="users:flow")
long_name = users_with(name="n" * 129)
bad_word = users_with(max_flow_per_minute=3)
broken = lambda: 1 / 0


def wants(argument):
    return flow


async def promise():
    return flow
"""

FILES = {
    "users.py": USERS,
    "raises.py": "import users\nusers.nothing_here\n",
    "misspelt.py": "def flow(:\n",
    "needs.py": "import nobody_has_this\n",
    "runs.py": "import asyncio, users\nasyncio.run(users.flow.run_on_fleet({'user_ids': [1]}))\n",
    "good.jsonl": '{"user_id": 1}\n',
    "bad.jsonl": '{"user_id": 1}\n\n{"user_id": 2\n',
    "list.jsonl": "[1]\n",
    "bad.csv": "user_id,name\n1,a\n2\n",
    "none.jsonl": "\n",
    "items.txt": "1\n",
    "list.json": "[1]",
    "store.json": '{"user_ids": [1]}',
    "bad.json": '{"user_ids": [1}',
}


@dataclass
class Case:
    """One command line, its exit code and what the sentence must say (a regular expression)."""

    line: str
    says: str
    code: int = 2
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return re.sub(r"[^A-Za-z0-9:=.-]+", "-", f"{self.line} {' '.join(self.env)}")[:60]


GIVEN = "--set user_ids=[1]"
NOTHING = r".*\. Nothing was enqueued\.$"
FLOW_WANTED = r"name a ThrottledAsyncParallelBatchFlow; did you mean users:flow\?$"


def prepares(kind: str, says: str) -> Case:
    return Case(f'enqueue users:prepared --set kind="{kind}"', says + NOTHING)


TABLE = [
    # the target
    Case("run users", "^users: is not a target; write it as module:attribute, such as users:flow$"),
    Case("run user:flow", r"there is no module user; did you mean users:flow\?$"),
    Case("worker zzz:flow", "there is no module zzz in .* or on the path$"),
    Case("run raises:flow", r"module raises cannot be imported: AttributeError: .* \(raises.py, line 2\)$"),
    Case("run misspelt:flow", r"module misspelt cannot be imported: SyntaxError: .*\(misspelt.py, line 1\)$"),
    Case("enqueue needs:flow", "ModuleNotFoundError: No module named 'nobody_has_this'"),
    Case("worker runs:flow", "its module calls run_on_fleet when imported; put that under if __name__"),
    Case("run users:flwo", r"module users has no 'flwo'; did you mean users:flow\?$"),
    Case("run users:number", "is an int, not a flow; " + FLOW_WANTED),
    Case("enqueue users:fetch", "is a Fetch; " + FLOW_WANTED),
    Case("worker users:plain", "is an AsyncFlow; " + FLOW_WANTED),
    Case("run users:empty", r"Users has no start node; make it with start=; did you mean users:flow\?$"),
    Case("run users:Users", r"Users has no start node; make it with start=; did you mean users:flow\?$"),
    Case(
        "worker users:one_by_one",
        "OneByOne has an _orch_async of its own, and workers walk its graph without",
    ),
    Case("run users:broken", "failed when it was called: ZeroDivisionError: division by zero"),
    Case("run users:wants", "needs arguments; name a flow, or a factory that takes none$"),
    Case("run users:promise", "is an async function; name a flow, or a factory that is not async$"),
    Case("worker users:flow nothing", "^nothing: is not a target"),
    Case(
        "worker", "^worker: no flow is named; write pocketfleet worker users:flow, or set POCKETFLEET_FLOWS$"
    ),
    Case("worker users:twin users:other_twin", "has the same name 'same' as users:twin; give it a name=$"),
    Case("worker users:one_limit users:other_limit", "give limit 'shared' two different values; use one$"),
    # limits and names
    Case("run users:zero", "^max_concurrent_flows=0 cannot hold: use a whole number from 1 to 1,000,000$"),
    Case("worker users:negative", "^max_flows_per_minute=-1 cannot hold: use a whole number"),
    Case("enqueue users:nan", "^max_concurrent_flows=nan cannot hold"),
    Case("run users:text", "^max_flows_per_minute='60' cannot hold"),
    Case("run users:bad_limit", "^limit name 'a b' cannot be used: use 1 to 128 letters, digits"),
    Case("run users:bad_name", "^flow name 'users:flow' cannot be used: use 1 to 128 letters"),
    Case("run users:long_name", "^flow name 'n+' cannot be used: use 1 to 128 letters"),
    Case("run users:bad_word", "TypeError: Users has no keyword 'max_flow_per_minute' "),
    Case(f"run users:flow {GIVEN} --batch a/b", "^batch name 'a/b' cannot be used: use 1 to 128 letters"),
    Case(f"enqueue users:flow {GIVEN} --batch {'b' * 129}", "^batch name 'b+' cannot be used"),
    Case("batch status ..:", r"^batch name '\.\.:' cannot be used"),
    Case("limits show a/b", "^limit name 'a/b' cannot be used"),
    # params
    prepares("forgotten", "^prep_async returned None: return the list of param dicts"),
    prepares("dict", "^prep_async returned a dict; return a list of dicts"),
    prepares("text", "^prep_async returned a str; return a list of dicts"),
    prepares("number", "^prep_async returned a int; return a list of dicts"),
    prepares("texts", "^item 1 of prep_async is of type str, not dict; pass one dict of params per item"),
    prepares("set", "^item 1 of prep_async: 'a' is a set, which would arrive as a list; pass a list"),
    prepares("nan", r"^item 0 of prep_async: 'a'\[1\] is NaN, which is not equal to itself; pass None"),
    prepares("date", r"^item 0 of prep_async: 'a'\['b'\] is a date, which cannot travel"),
    prepares("key", "^item 0 of prep_async: the key 1 is of type int, not str; use text keys"),
    prepares("long", "^item 0 of prep_async: 'a' is an integer past 64 bits; pass it as text"),
    prepares("large", "^item 0 of prep_async takes 300,008 bytes encoded, 262,144 are allowed"),
    prepares("gen", r"^users:prepared: prep_async raised ValueError: the seventh \(users.py, line \d+\)"),
    prepares("agen", r"^users:prepared: prep_async raised ValueError: the seventh \(users.py, line \d+\)"),
    Case(
        "run users:flow",
        "^users:flow: prep_async raised KeyError: 'user_ids' .*; give it with --set user_ids=VALUE" + NOTHING,
    ),
    # files and --set
    Case("enqueue users:flow --params bad.jsonl", "^bad.jsonl line 3, column 14: not JSON"),
    Case("run users:flow --params list.jsonl", "^list.jsonl line 1: holds a list; write one JSON object"),
    Case("run users:flow --params bad.csv", "^bad.csv line 3: cells: 1, in the header 2"),
    Case("enqueue users:flow --params none.jsonl", "^none.jsonl holds no items; write one per line$"),
    Case("enqueue users:flow --params no.jsonl", "^no.jsonl: no such file or directory; check its path$"),
    Case("enqueue users:flow --params items.txt", "^'items.txt': cannot tell its format; name it .jsonl"),
    Case("run users:flow --shared list.json", "^list.json holds a list; it must hold one JSON object$"),
    Case("run users:flow --shared bad.json", "^bad.json line 1, column 16: not JSON"),
    Case(f"run users:flow --shared store.json {GIVEN}", "^'user_ids' is given by --set and by --shared"),
    Case("run users:flow --set name=bob", """: 'bob' is not JSON; text needs quotes: --set 'name="bob"'$"""),
    Case("run users:flow --set user_ids", "^--set user_ids: write it as --set key=VALUE, VALUE being JSON$"),
    Case(f"run users:flow {GIVEN} {GIVEN}", "'user_ids' is set twice; keep one$"),
    Case("run users:flow --set user_ids=[NaN]", "NaN is not a finite number; use null or text$"),
    Case(f"run users:flow {GIVEN} --output users.py/x", "^--output users.py/x cannot be written: "),
    Case(
        f"run users:flow {GIVEN} --output results/deep/x.csv",
        r"^--output results/deep/x\.csv cannot be written: there is no folder results/deep; make it first "
        r"\(mkdir -p results/deep\)$",
    ),
    Case(f"run users:flow {GIVEN} --output .", r"^--output \. cannot be written: Is a directory$"),
    Case(
        f"run users:flow {GIVEN} --output /dev/null",
        "^--output /dev/null is a device or a pipe: name a file$",
    ),
    # the words of the command line
    Case("wrun", r"^No such command 'wrun'\. Did you mean 'run'\? \(see pocketfleet --help\)$"),
    Case("run", r"^Missing argument 'TARGET' \(see pocketfleet run --help\)$"),
    Case(
        "run users:flow --wrkers 2",
        r"^No such option: --wrkers .*--workers.* \(see pocketfleet run --help\)$",
    ),
    Case("run users:flow --workers -1", "^Invalid value for '--workers': "),
    Case("run users:flow --workers many", "^Invalid value for '--workers': "),
    Case("run users:flow --first 0", "^Invalid value for '--first': "),
    Case("worker users:flow --max-jobs 0", "^Invalid value for '--max-jobs': "),
    Case("limits show nobody", r"^limit 'nobody' is not known here \(known: none\)$"),
    Case("limits doctor nobody", r"^limit 'nobody' is not known here \(known: none\)$"),
    Case("limits resume nobody", "^limit 'nobody' is not known here"),
    Case("limits set x", "^nothing to set: give max_concurrent .--max-concurrent., max_per_minute"),
    Case("limits set x --max-concurrent 0", "^max_concurrent=0 cannot hold: use a whole number from 1"),
    Case("limits set x --max-concurrent few", "^max_concurrent='few' cannot hold: use a whole number"),
    Case("limits set x --max-per-minute -4", "^max_per_minute='-4' cannot hold: use a whole number"),
    Case("limits pause x --for soon", "^--for='soon' cannot hold: use a time such as 30s, 5m or 2h"),
    Case("limits pause x --for 0s", "^--for='0s' cannot hold"),
    Case("limits pause a/b", "^limit name 'a/b' cannot be used"),
    Case("limits pause", r"^Missing argument 'NAME' \(see pocketfleet limits pause --help\)$"),
    Case("batch status nobody", "^batch 'nobody' is not known here$"),
    # settings
    Case("workers", "^POCKETFLEET_LEASE_S='0' cannot hold: use a number from 1", env={"LEASE_S": "0"}),
    Case("worker users:flow", "^POCKETFLEET_MAX_JOBS='x' cannot hold: use a whole", env={"MAX_JOBS": "x"}),
    Case("limits show", "^POCKETFLEET_DATA_DIR=' ' is empty", env={"DATA_DIR": " "}),
    Case(
        f"run users:flow {GIVEN}",
        r"^POCKETFLEET_REDIS_URL=\(an unreadable address\) is no Redis address: use redis://",
        env={"REDIS_URL": f"nonsense:{CANARY}"},
    ),
    Case(
        f"enqueue users:flow {GIVEN}",
        "^POCKETFLEET_REDIS_URL=redis://10.9.8.7/0 would leave this machine without encryption",
        env={"REDIS_URL": f"redis://me:{CANARY}@10.9.8.7/0"},
    ),
    Case(
        "workers",
        "a password that holds one of .* must be percent-encoded",
        env={"REDIS_URL": f"redis://me:a/{CANARY}@10.9.8.7/0"},
    ),
]


COMMANDS = (f"run users:flow {GIVEN}", f"enqueue users:flow {GIVEN}", "worker users:flow", "workers")
COMMANDS += ("limits show", "limits pause x", "limits doctor x", "batch status b")


def refused(says: str, url: str) -> list[Case]:
    """What every command that needs Redis says of one that cannot be used."""
    return [Case(line, says, 3, {"REDIS_URL": url}) for line in COMMANDS]


UNREACHABLE = [
    *refused("^Redis at redis://127.0.0.1:1/0 cannot be reached ", f"redis://:{CANARY}@127.0.0.1:1/0"),
    *refused("^Redis at unix:///nowhere/s cannot be reached ", "unix:///nowhere/s"),
]
NO_SERVER = [
    Case(
        line,
        r"^no Redis is set and no PocketFleet server runs in \.pocketfleet: set POCKETFLEET_REDIS_URL",
        3,
    )
    for line in COMMANDS[1:]
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with servers.running("valkey") as url:
        yield url


@pytest.fixture(scope="module")
def strict() -> Iterator[str]:
    """A server with a password and users of few rights; its socket's path."""
    with servers.running("valkey") as url, redis.Redis.from_url(url) as admin:
        admin.execute_command("ACL", "SETUSER", "elsewhere", "on", "~other:*", "&*", "+@all", f">{CANARY}")
        admin.execute_command(
            *("ACL", "SETUSER", "scriptless", "on", "~*", "&*", "+@all", "-eval", "-evalsha", f">{CANARY}")
        )
        admin.execute_command("ACL", "SETUSER", "deaf", "on", "~*", "resetchannels", "+@all", f">{CANARY}")
        admin.config_set("requirepass", CANARY)
        yield url.removeprefix("unix://")


@pytest.fixture
def newcomer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Case], tuple[object, str]]]:
    """Types a command in a folder of a newcomer's; returns the exit code and what was printed."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in [name for name in os.environ if name.startswith("POCKETFLEET_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def type_in(case: Case, url: str = "") -> tuple[object, str]:
        with monkeypatch.context() as patch:
            for name, value in {"REDIS_URL": url, **case.env}.items():
                if value:
                    patch.setenv(f"POCKETFLEET_{name}", value)
            patch.setattr(sys, "argv", ["pocketfleet", *case.line.split()])
            try:
                main()
            except SystemExit as end:
                return end.code, ""
        raise AssertionError("main returned")

    yield type_in  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def judge(case: Case, code: object, printed: str) -> None:
    lines = [line for line in printed.splitlines() if line and not re.match(r"flow \S+ under limit ", line)]
    assert len(lines) == 1, printed
    sentence = lines[0].removeprefix("pocketfleet: ")
    assert re.search(case.says, sentence), sentence
    assert code == case.code
    assert CANARY not in printed


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_bad_input_gets_one_sentence_and_nothing_is_enqueued(
    case: Case, server: str, newcomer: Callable[..., tuple[object, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = newcomer(case, server)
    out, err = capsys.readouterr()
    judge(case, code, out + err)
    with redis.Redis.from_url(server) as client:
        assert client.keys("*") == []
    assert not [path for path in Path(".pocketfleet").glob("batches/*") if path.is_dir()]


@pytest.mark.parametrize("case", UNREACHABLE + NO_SERVER, ids=str)
def test_redis_that_is_not_there_ends_with_3(
    case: Case, newcomer: Callable[..., tuple[object, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = newcomer(case)
    out, err = capsys.readouterr()
    judge(case, code, out + err)
    assert not Path(".pocketfleet/redis").exists()


WRONG = "refuses the user or password: correct them in POCKETFLEET_REDIS_URL"
RIGHTS = r"does not let this user work \(.*\): give it the rights that the README lists"


@pytest.mark.parametrize(
    ("user", "says", "lines"),
    [
        (f":{CANARY}-not@", WRONG, COMMANDS),
        ("", WRONG, COMMANDS),
        (f"elsewhere:{CANARY}@", RIGHTS, COMMANDS),
        (f"scriptless:{CANARY}@", RIGHTS, COMMANDS),
        (f"deaf:{CANARY}@", RIGHTS, ["worker users:flow"]),
    ],
    ids=["wrong password", "no password", "other keys", "no scripts", "no channels"],
)
def test_redis_that_refuses_us_ends_with_3_and_the_password_stays_unsaid(
    user: str,
    says: str,
    lines: list[str],
    strict: str,
    newcomer: Callable[..., tuple[object, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, _, password = user.rstrip("@").partition(":")
    query = "&".join(f"{key}={value}" for key, value in (("username", name), ("password", password)) if value)
    for line in lines:
        case = Case(line, says, 3, {"REDIS_URL": f"unix://{strict}" + (f"?{query}" if query else "")})
        code, _ = newcomer(case)
        out, err = capsys.readouterr()
        judge(case, code, out + err)
    with redis.Redis(unix_socket_path=strict, password=CANARY) as admin:
        assert admin.keys("*") == []


def typed(directory: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POCKETFLEET_")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env=kept | {"PYTHONPATH": str(ROOT)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


ARQ = ("-m", "arq", "worker.main.WorkerSettings")


@pytest.mark.parametrize(
    ("own", "ahead", "words"),
    [
        ("worker.py", None, ("-m", "pocketfleet", "worker", "worker:flow")),
        ("limiter.py", None, ("-m", "pocketfleet", "run", "users:flow")),
        ("producer/__init__.py", None, ("-m", "pocketfleet", "enqueue", "users:flow")),
        ("elsewhere/worker/__init__.py", True, ("-m", "pocketfleet", "worker", "users:flow")),
        ("elsewhere/worker/__init__.py", False, ("-m", "pocketfleet", "workers")),
        ("elsewhere/worker/__init__.py", False, ARQ),
        ("elsewhere/limiter/__init__.py", True, ("-c", "from pocketfleet import limit")),
    ],
)
def test_a_module_called_like_one_of_our_rooms_is_named(
    own: str, ahead: bool | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "users.py").write_text(USERS)
    (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / own).write_text("from users import flow\n")
    path = [str(ROOT)]
    if ahead is not None:
        path.insert(0 if ahead else 1, str(tmp_path / "elsewhere"))

    done = typed(tmp_path, *words, PYTHONPATH=os.pathsep.join(path), POCKETFLEET_FLOWS="users:flow")

    room = next(room for room in ("worker", "limiter", "producer") if room in own)
    sentence = done.stderr.strip().splitlines()[-1]
    assert f"{own} has the name of PocketFleet's own '{room}'" in sentence
    assert done.returncode == (1 if words[0] == "-c" else 2)
    assert "Traceback" not in done.stderr or words[0] == "-c"


def test_a_target_in_a_folder_called_like_one_of_our_rooms_is_refused(
    server: str, newcomer: Callable[..., tuple[object, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("worker").mkdir()
    Path("worker/tasks.py").write_text("from users import flow\n")
    case = Case("worker worker.tasks:flow", "'worker' is PocketFleet's own; name a module of yours$")
    code, _ = newcomer(case, server)
    judge(case, code, "".join(capsys.readouterr()))


@pytest.mark.parametrize("name", ["REDIS_URL", "FLOWS"])
def test_arqs_own_command_refuses_as_ours_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS)
    with servers.running("valkey") as url:
        env = {"POCKETFLEET_REDIS_URL": url, "POCKETFLEET_FLOWS": "users:flow"}
        env[f"POCKETFLEET_{name}"] = {"REDIS_URL": "unix:///nowhere/s", "FLOWS": "users:flwo"}[name]
        done = typed(tmp_path, *ARQ, **env)
    assert done.returncode == {"REDIS_URL": 3, "FLOWS": 2}[name]
    assert "Traceback" not in done.stderr
    wanted = {"REDIS_URL": "cannot be reached", "FLOWS": "did you mean users:flow?"}[name]
    assert wanted in done.stderr.strip().splitlines()[-1]


def test_a_batch_taken_up_with_other_params_is_refused_at_the_first_that_differs(
    server: str, newcomer: Callable[..., tuple[object, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with redis.Redis.from_url(server) as client:
        try:
            assert newcomer(Case("enqueue users:flow --set user_ids=[1,2,3] --batch b", ""), server)[0] == 0
            waiting = client.zcard("pocketfleet:{users.flow}:queue:users:flow")
            capsys.readouterr()
            for ids, says in (
                ("[1,5,3]", "^batch 'b' was enqueued with other params: item 1 differs"),
                ("[1,2]", "^batch 'b' was enqueued with 3 items, and these are only 2"),
            ):
                case = Case(f"enqueue users:flow --set user_ids={ids} --batch b", says)
                code, _ = newcomer(case, server)
                judge(case, code, "".join(capsys.readouterr()))
            case = Case(
                "enqueue users:prepared --params good.jsonl --batch b",
                "^batch 'b' belongs to flow users:flow, not to users:prepared; use another --batch",
            )
            code, _ = newcomer(case, server)
            judge(case, code, "".join(capsys.readouterr()))
            assert client.zcard("pocketfleet:{users.flow}:queue:users:flow") == waiting == 3
        finally:
            client.flushall()


def test_a_flow_without_a_name_is_refused_by_what_enqueues(
    server: str, newcomer: Callable[..., tuple[object, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketfleet import LimitsError, ProducerError

    monkeypatch.syspath_prepend(str(Path.cwd()))
    users = importlib.import_module("users")
    monkeypatch.setenv("POCKETFLEET_REDIS_URL", server)
    nameless = users.Users(start=users.fetch)
    with pytest.raises(LimitsError, match=r"found under no name.*give it a name="):
        asyncio.run(nameless.run_on_fleet({"user_ids": [1]}, workers=0))
    nowhere = users.Users(start=users.fetch, name="mine")
    with pytest.raises(ProducerError, match="workers=2 cannot start: flow 'mine' stands in no module"):
        asyncio.run(nowhere.run_on_fleet({"user_ids": [1]}, workers=2))
    with redis.Redis.from_url(server) as client:
        assert client.keys("*") == []


def test_a_process_that_may_open_next_to_no_files_says_so(tmp_path: Path) -> None:
    command = f"ulimit -n 5; exec {sys.executable} -m pocketfleet batch list"
    env = {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = (
        "pocketfleet: too many open files: this process may have 5 at a time; raise that with ulimit -n 1024"
    )
    assert (done.returncode, said in done.stderr.splitlines()) == (2, True), done.stderr

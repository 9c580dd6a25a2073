"""The demo (`make demo`): 100 users on four worker processes, and how the fleet compares.

First the user pipeline through the real command, five users at a time, with what the API itself
counted beside what the fleet recorded. Then the same 100 users, two calls of 0.5 s each, without a
limit, 5 at a time and 10 at a time, against an API that answers 429 above 10 requests at a time.

It takes about 45 s, uses the Redis of POCKETFLEET_REDIS_URL or else the embedded server, and ends
everything it started, also on Ctrl-C (exit 130) and SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from pocketflow import AsyncParallelBatchFlow
from rich.console import Console
from rich.table import Table

from examples.users import flow as users
from examples.users import nodes
from pocketfleet import limit

ROOT = Path(__file__).resolve().parents[1]
USERS_FILE = ROOT / "examples" / "users" / "users.json"
USER_IDS: list[int] = json.loads(USERS_FILE.read_text())["user_ids"]
FLOWS = ("examples.users.flow:flow", "examples.users.flow:ten")
WORKERS = 4
API_CONCURRENT = 10
CALL_S = 0.5
FIRST_CALL_S = 0.25  # the first part shows the limit, not the clock
READY_S = 30.0
END_S = 10.0

console = Console()


class DemoFailed(Exception):
    """The demo cannot go on; the text says what to look at."""


def main() -> int:
    os.chdir(ROOT)  # the children import `examples` from here, and share one embedded server
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        run_100_users()
        asyncio.run(compare())
    except KeyboardInterrupt:
        return 130
    except DemoFailed as failure:
        console.print(f"demo: {failure}", style="red", markup=False)
        return 1
    return 0


def run_100_users() -> None:
    """The real command, its live progress on this terminal; then both accounts in one table."""
    output = _data_dir() / "demo.jsonl"
    output.unlink(missing_ok=True)
    with api(FIRST_CALL_S) as url:
        console.rule(f"{len(USER_IDS)} users, 5 at a time, on {WORKERS} worker processes")
        command = ["run", FLOWS[0], "--shared", str(USERS_FILE), "--workers", str(WORKERS)]
        with child("pocketfleet", *command, "--output", str(output)) as process:
            code = process.wait()
        account = httpx.get(url + "/account").json()
    if code:
        raise DemoFailed(f"`pocketfleet run` ended with exit code {code}; its own words stand above")
    console.print(accounts(account, [json.loads(line) for line in output.read_text().splitlines()]))


def accounts(api: dict[str, Any], ours: list[dict[str, Any]]) -> Table:
    """What the API counted, beside the limit the fleet was to keep and the outcomes it recorded."""
    completed = sum(line["status"] == "completed" for line in ours)
    calls = sum(len(line["nodes"]) for line in ours)
    table = Table(title="Two accounts of one batch", title_justify="left")
    for column in ("", "the API counted", "the fleet says"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "users at a time", f"at most {api['peak_users']}", f"limit {users.flow.max_concurrent_flows}"
    )
    table.add_row("requests at a time", f"at most {api['peak_running']}", "one per user")
    table.add_row("flows", f"{api['flows_started']} started", f"{completed} completed")
    table.add_row("requests", f"{api['served']} answered", f"{calls} nodes run")
    table.add_row("answers of 429", str(api["refused"]), f"{len(ours) - completed} flows failed")
    return table


async def compare() -> None:
    """Unthrottled, 5 and 10 at a time against one API; the workers already wait when the clock starts."""
    table = Table(title=f"{len(USER_IDS)} users x two calls of {CALL_S:g} s", title_justify="left")
    table.caption = "ideal is the API's own time; measured adds HTTP, which shares this machine's cores"
    for column in ("", "ideal", "measured", "failed", "429s", "at a time"):
        table.add_column(column, justify="right" if column else "left")
    with api(CALL_S) as url:
        os.environ["USERS_API_URL"] = url
        console.rule(f"against an API that refuses more than {API_CONCURRENT} requests at a time")
        await measure(table, url, "unthrottled", unthrottled, len(USER_IDS))
        # Holding a permit keeps the embedded server up, which workers join but do not start.
        async with limit("demo", max_concurrent=1):
            with contextlib.ExitStack() as workers:
                await wait_for_workers([workers.enter_context(waiting_worker()) for _ in range(WORKERS)])
                await measure(table, url, "5 at a time", lambda: on_fleet(users.flow), 5)
                await measure(table, url, "10 at a time", lambda: on_fleet(users.ten), 10)
    console.print(table)


async def measure(table: Table, url: str, title: str, run: Any, at_a_time: int) -> None:
    """Add one row: the time around `run`, from enqueue to last outcome, and the API's account of it."""
    ideal_s = 2 * CALL_S * len(USER_IDS) / at_a_time
    async with httpx.AsyncClient(base_url=url) as client:
        await client.post("/account/reset")
        console.print(f"{title}: ideal {ideal_s:g} s ...")
        began = time.perf_counter()
        completed = await run()
        took_s = time.perf_counter() - began
        account = (await client.get("/account")).json()
    failed = len(USER_IDS) - completed
    took = f"{took_s:.2f} s ({took_s / ideal_s:.3f} x)"
    cells = (failed, account["refused"], account["peak_users"])
    table.add_row(title, f"{ideal_s:g} s", took, *map(str, cells))
    console.print(f"{title}: {took}, {completed} completed, {failed} failed")


async def on_fleet(flow: Any) -> int:
    completed: int = await flow.run_on_fleet({"user_ids": USER_IDS}, workers=None)
    return completed


class Unthrottled(AsyncParallelBatchFlow):  # type: ignore[type-arg]  # generic in its stubs only
    """Plain PocketFlow: every user at once, in this process."""

    async def prep_async(self, shared: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"user_id": user_id} for user_id in shared["user_ids"]]


async def unthrottled() -> int:
    """How many users were fetched. The first 429 raises; the other users' tasks run on and are awaited."""
    shared: dict[str, Any] = {"user_ids": USER_IDS}
    before = asyncio.all_tasks()
    nodes.open_client()
    try:
        with contextlib.suppress(httpx.HTTPStatusError):
            await Unthrottled(start=users.profile).run_async(shared)
        if rest := asyncio.all_tasks() - before:
            await asyncio.wait(rest)
    finally:
        await nodes.close_client()
    return len(shared.get("orders", {}))


@contextlib.contextmanager
def api(delay_s: float) -> Iterator[str]:
    """The example API in a process of its own; yields its URL and sets USERS_API_URL for children."""
    options = ["--port", "0", "--concurrent", str(API_CONCURRENT), "--delay", str(delay_s), "--quiet"]
    with child("examples.api.server", *options, stdout=subprocess.PIPE, process_group=0) as process:
        url = process.stdout.readline().strip() if process.stdout else ""
        if not url:
            raise DemoFailed("the example API did not start; its own words stand above")
        os.environ["USERS_API_URL"] = url
        yield url


@contextlib.contextmanager
def waiting_worker() -> Iterator[subprocess.Popen[str]]:
    """One `pocketfleet worker` of both flows; what it prints goes to demo-workers.log."""
    with (
        (_data_dir() / "demo-workers.log").open("a") as log,
        child("pocketfleet", "worker", *FLOWS, stdout=log, stderr=log, process_group=0) as process,
    ):
        yield process


async def wait_for_workers(workers: list[subprocess.Popen[str]]) -> None:
    """Return when `pocketfleet workers` lists every one of them."""
    console.print(f"starting {len(workers)} workers ...")
    missing = {worker.pid for worker in workers}
    deadline = time.monotonic() + READY_S
    while missing:
        if time.monotonic() > deadline or any(worker.poll() is not None for worker in workers):
            log = _data_dir() / "demo-workers.log"
            raise DemoFailed(f"{len(missing)} of {len(workers)} workers did not get ready; see {log}")
        missing -= await listed_pids()


async def listed_pids() -> set[int]:
    command = (sys.executable, "-m", "pocketfleet", "workers", "--json")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    listing, _ = await process.communicate()
    return set(pids_in(json.loads(listing or b"[]")))


def pids_in(listing: Any) -> Iterator[int]:
    """Every number called `pid` in what `pocketfleet workers --json` printed."""
    if isinstance(listing, dict):
        if isinstance(listing.get("pid"), int):
            yield listing["pid"]
        listing = list(listing.values())
    if isinstance(listing, list):
        for entry in listing:
            yield from pids_in(entry)


@contextlib.contextmanager
def child(module: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`python -m module` until the block ends: then SIGTERM, and SIGKILL if that is not enough.

    With `process_group=0` a Ctrl-C on the terminal does not reach it: it outlives those that need it.
    """
    with subprocess.Popen([sys.executable, "-m", module, *arguments], text=True, **options) as process:
        try:
            yield process
        except KeyboardInterrupt:
            if "process_group" not in options:  # it was interrupted too, and may be handing back its runs
                _give_time(process)
            raise
        finally:
            process.terminate()
            try:
                _give_time(process)
            finally:
                process.kill()


def _give_time(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)


def _data_dir() -> Path:
    """Where the demo keeps its files: beside the embedded server's, outside version control."""
    path = Path(os.environ.get("POCKETFLEET_DATA_DIR", ".pocketfleet"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())

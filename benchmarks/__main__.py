"""`python -m benchmarks [NAME...] [--quick] [--markdown FILE] [--plots FOLDER]`: measure and show the table."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from benchmarks import server
from benchmarks.bench import Bench
from benchmarks.plot import draw
from benchmarks.report import Result, markdown, show

NAMES = (
    "seed_table",
    "noop_flows",
    "handoff",
    "dispatch",
    "idle",
    "permits",
    "enqueue",
    "footprint",
    "gather",
    "adaptive",
)


def main() -> None:
    asked = _arguments()
    console = Console(width=None if os.environ.get("COLUMNS") or os.isatty(1) else 160)
    with server.running() as (url, kind), tempfile.TemporaryDirectory(prefix="pfbench") as home:
        bench = Bench(url, Path(home), quick=asked.quick)
        about = _about(kind, bench)
        console.print(about, highlight=False, markup=False)
        results = [_measured(bench, name, console) for name in asked.names or NAMES]
    show(results, console)
    if asked.markdown:
        Path(asked.markdown).write_text(markdown(results, about))
    for path in draw(results, asked.plots):
        console.print(f"drawn: {path}", highlight=False)
    if any(result.failed for result in results):
        raise SystemExit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Measure speed and memory against peers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="one repetition, fewer items: a look only")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    parser.add_argument("--plots", metavar="FOLDER", type=Path, default=Path("build/benchmarks"))
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no measurement {unknown[0]!r}; use some of {', '.join(NAMES)}")
    return asked


def _measured(bench: Bench, name: str, console: Console) -> Result:
    """One measurement; one that breaks is told of and does not cost the others."""
    began = time.monotonic()
    try:
        result: Result = import_module(f"benchmarks.{name}").measure(bench)
    except Exception as error:
        console.print_exception()
        return Result(
            name, failed=True, notes=[f"{name} could not be measured: {type(error).__name__}: {error}"]
        )
    bench.say(f"{name} took {time.monotonic() - began:.0f} s")
    return result


def _about(kind: str, bench: Bench) -> str:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("arq", "redis", "self-limiters"))
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {kind} on loopback TCP without persistence, "
        f"{versions}; median [least-most] of {bench.repetitions}, peers in turn"
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()

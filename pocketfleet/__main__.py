"""The `pocketfleet` command: each room brings its own part of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the command line; whatever a user got wrong ends in one sentence and an exit code."""
    try:
        from pocketfleet import LimiterError, ProducerError, RedisRefused, WorkerError
    except ImportError as error:
        if "PocketFleet's own" not in str(error):
            raise
        _end(error, 2)
    try:
        _app()()
    except RedisRefused as error:
        _end(error, 3)
    except (LimiterError, ProducerError, WorkerError) as error:
        _end(error, getattr(error, "exit_code", 2))


def _end(error: Exception, code: int) -> None:
    print(f"pocketfleet: {error}", file=sys.stderr)
    raise SystemExit(code)


def _app() -> typer.Typer:
    import typer

    from limiter.commands import limits
    from producer.commands import batches, enqueue, run
    from worker.commands import worker, workers

    app = typer.Typer(
        help="One limit, many worker processes, for PocketFlow's batch flows.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(run)
    app.command()(worker)
    app.command()(enqueue)
    app.add_typer(batches, name="batch")
    app.add_typer(limits, name="limits")
    app.command()(workers)
    return app


if __name__ == "__main__":
    main()

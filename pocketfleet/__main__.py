"""The `pocketfleet` command: each room brings its own part of it."""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer

NAME = "pocketfleet"


def main() -> None:
    """Run the command line; whatever a user got wrong ends in one sentence and an exit code."""
    from pocketfleet import _refuse_shadows
    from pocketfleet.streams import stand

    stand()
    gc.set_threshold(50_000, 10, 10)  # what is imported is no garbage: a tenth of a command's start
    try:
        _refuse_shadows(os.getcwd())
    except ImportError as error:  # nothing of ours can be imported now
        print(f"{NAME}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        code = _app()(prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # as in `pocketfleet ... | head`: nobody reads on; typer says 1 as well
        _leave_pipes()
        raise SystemExit(1) from None
    except Exception as error:
        _explain(error)
    raise SystemExit(code or 0)


def _leave_pipes() -> None:
    """Python writes what is left at its end: let it, where nobody minds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _explain(error: Exception) -> NoReturn:
    """End with the sentence of an error that is meant for people; let any other one through."""
    from redis.exceptions import RedisError

    from limiter.errors import LimiterError, RedisRefused
    from limiter.printable import printable
    from limiter.trouble import UNKNOWN, words
    from producer.errors import ProducerError
    from worker.errors import WorkerError

    if isinstance(error, RedisRefused):
        _end(str(error), 3)
    if isinstance(error, (LimiterError, ProducerError, WorkerError)):
        _end(str(error), getattr(error, "exit_code", 2))
    if isinstance(error, RedisError):
        if (known := words(error)) != UNKNOWN:
            _end(f"Redis {known}; the same command goes on where this one stopped", 3)
        # redis-py puts the whole command, data included, in front of what the server said
        said = printable(str(error).rpartition("caused error: ")[2])
        _end(f"Redis stopped serving us ({type(error).__name__}: {said:.200})", 3)
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        most = os.sysconf("SC_OPEN_MAX")
        _end(
            f"too many open files: this process may have {most} at a time; raise that with ulimit -n 1024", 2
        )
    if hasattr(error, "format_message"):
        _explain_usage(error)
    raise error


def _explain_usage(error: Exception) -> NoReturn:
    """What typer has to say about the words of the command line."""
    context = getattr(error, "ctx", None)
    sentence = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        raise SystemExit(2)
    command = context.command_path if context else NAME
    _end(f"{sentence.rstrip('.')} (see {command} --help)", getattr(error, "exit_code", 2))


def _end(sentence: str, code: int) -> NoReturn:
    from limiter.printable import plain

    print(plain(f"{NAME}: {sentence}"), file=sys.stderr)
    raise SystemExit(code)


def _app() -> typer.Typer:
    import typer

    from limiter.commands import limits
    from producer.batch_commands import batches
    from producer.commands import enqueue, plan, run
    from worker.commands import worker, workers

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", is_eager=True, callback=_print_version, help="Print the version and end"
        ),
    ) -> None:
        """One limit, many worker processes, for PocketFlow's batch flows."""

    app.command()(run)
    app.command()(worker)
    app.command()(enqueue)
    app.command()(plan)
    app.add_typer(batches, name="batch")
    app.add_typer(limits, name="limits")
    app.command()(workers)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        from worker.presence import our_version

        print(NAME, our_version())
        raise SystemExit(0)


if __name__ == "__main__":
    main()

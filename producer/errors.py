"""What the producer refuses, and in which words. A command that meets one ends with exit code 2."""

from __future__ import annotations

from typing import Any

from limiter.printable import printable


class ProducerError(Exception):
    """Base of every error the producer raises. Its text is meant for people."""


class ParamsError(ProducerError, ValueError):
    """One item's params cannot travel. Carries `index` and the `path` of the entry, such as `'user'[2]`."""

    def __init__(self, sentence: str, *, index: int, path: str = "") -> None:
        super().__init__(sentence)
        self.index = index
        self.path = path


class InputError(ProducerError, ValueError):
    """A file or a `--set` on the command line cannot be read. Carries `source` and `line` (0: none)."""

    def __init__(self, sentence: str, *, source: str = "", line: int = 0) -> None:
        super().__init__(sentence)
        self.source = source
        self.line = line


class SpoolError(ProducerError):
    """A batch's spool cannot be written, found, read or had for oneself. Carries `batch`."""

    def __init__(self, sentence: str, *, batch: str = "") -> None:
        super().__init__(sentence)
        self.batch = batch


class WorkersError(ProducerError):
    """The workers of a run cannot go on. `exit_code` is the worker's own, or 1."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class UsersFault(ProducerError):
    """The flow's own `prep_async` or `post_async` raised, told on the command line."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class FlowFailed(ProducerError):
    """Stands in the results for a run that did not complete. Carries `index`, `status` and `failure`."""

    def __init__(self, index: int, status: str, failure: Any) -> None:
        reason = f": {failure.type}: {failure.message}" if failure else ""
        where = f" in {failure.node}" if failure and failure.node else ""
        super().__init__(printable(f"item {index} {status}{where}{reason}", 3000))
        self.index = index
        self.status = status
        self.failure = failure

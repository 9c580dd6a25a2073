"""What the worker refuses, and in which words."""

from __future__ import annotations


class WorkerError(Exception):
    """Base of the worker's errors. Its text is one sentence meant for people."""


class TargetError(WorkerError, ValueError):
    """A target such as `users:flow` does not lead to a flow. Carries `target`. Exit code 2."""

    def __init__(self, target: str, sentence: str) -> None:
        super().__init__(f"{target}: {sentence}")
        self.target = target

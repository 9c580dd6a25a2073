"""What a batch gave: a result per item in input order, and what the runs changed, in the caller's store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from producer.errors import FlowFailed, ProducerError
from producer.flows import ThrottledAsyncParallelBatchFlow
from producer.follow import Ended
from producer.merge import Conflict, Merger
from producer.spool import Spool
from worker import codec
from worker.contract import ABORTED, COMPLETED, LOST, Failure


class ConflictError(ProducerError):
    """Two runs changed one entry and the flow says conflicts="fail". Carries `conflict`."""

    exit_code = 1

    def __init__(self, conflict: Conflict) -> None:
        said = str(conflict).replace(", and the last item in input order wins", "")
        super().__init__(f"stopped, as conflicts='fail' asks: {said}")
        self.conflict = conflict


class Gathering:
    """Takes the outcomes of one batch in any order.

    Attributes:
        results: the last action of each run, a `FlowFailed` where one did not complete, None while it has
            not ended.
        completed, failed: how many ended, and how.
        refusals: how often runs were refused; successes: runs completed since one that was refused.
        conflicts: entries that runs changed differently and no rule joined.
        replaced: whether an item has ended again, so that what the merged store has of it is out of date: what
            counts is to be gathered anew.
    """

    def __init__(self, flow: ThrottledAsyncParallelBatchFlow, shared: Any, spool: Spool) -> None:
        self.results: list[Any] = [None] * spool.count
        self.completed = self.failed = self.refusals = self.successes = 0
        self.replaced = False
        self._ended = bytearray(spool.count)
        self._strict = flow.conflicts == "fail"
        base = spool.base()
        store = shared if isinstance(shared, dict) else {}
        self._merger = Merger(store, codec.decode(base) if base else {}, flow.merge)

    @property
    def conflicts(self) -> int:
        return self._merger.conflicts

    @property
    def kept_local(self) -> set[Any]:
        """Keys of the caller's store that runs wrote to in vain: the batch's store has none of them."""
        return self._merger.kept_local

    def take(self, ended: Ended) -> tuple[FlowFailed | None, Conflict | None]:
        """Take an item's outcome; returns its failure, and the batch's first conflict where it makes that.

        An item that was retried meanwhile may end again: its last outcome counts.

        Raises:
            ConflictError: the flow stops at a conflict.
        """
        outcome = ended.outcome
        if self._ended[ended.index]:
            self._forget(ended.index)
        self._ended[ended.index] = 1
        failed = None
        refusals = outcome.attempts.get("refusals", 0)
        self.refusals += refusals
        self.successes = (0 if refusals else self.successes) + (outcome.status == COMPLETED)
        if outcome.status == COMPLETED:
            self.completed += 1
            self.results[ended.index] = outcome.action
        else:
            self.failed += 1
            failed = FlowFailed(ended.index, outcome.status, outcome.failure)
            self.results[ended.index] = failed
        conflict = self._merger.add(ended.index, outcome.difference)
        if conflict is not None and self._strict:
            raise ConflictError(conflict)
        return failed, conflict

    def _forget(self, index: int) -> None:
        self.replaced = True
        if isinstance(self.results[index], FlowFailed):
            self.failed -= 1
        else:
            self.completed -= 1

    def finish(self, lost: Iterable[int]) -> Conflict | None:
        """Put everything into the caller's store; returns a conflict that only the end brought up.

        Items that have not ended were lost, those in `lost`, or were cancelled.
        """
        for index in lost:
            self._unended(index, LOST, "Redis lost it before it ended")
        index = self._ended.find(0)
        while index >= 0:
            self._unended(index, ABORTED, "its batch was cancelled before it ran")
            index = self._ended.find(0, index + 1)
        before = self._merger.first
        self._merger.finish()
        return self._merger.first if before is None else None

    def _unended(self, index: int, status: str, words: str) -> None:
        kind = "Lost" if status == LOST else "Cancelled"
        self.results[index] = FlowFailed(index, status, Failure(kind, words))
        self._ended[index] = 1

"""The flow classes that users subclass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketflow import AsyncParallelBatchFlow

from limiter.current import current_process
from limiter.errors import LimitsError
from limiter.held import refuse_held
from limiter.limits import Limits, checked_count, checked_float, checked_name, checked_pacing
from limiter.pump import Pump
from limiter.refusal import Hook
from producer.errors import FlowFailed, ProducerError
from producer.found_name import found_name, made_name
from worker.contract import FOUND_NAME, limit_of
from worker.keywords import set_keywords
from worker.registry import refuse_while_importing

if TYPE_CHECKING:
    from producer.enqueued import Batch

__all__ = ["FlowFailed", "ThrottledAsyncParallelBatchFlow", "found_name"]


class ThrottledAsyncParallelBatchFlow(AsyncParallelBatchFlow):  # type: ignore[type-arg]
    """Runs its node graph once per param dict of `prep_async`, under limits that hold across the fleet.

    Class attributes, each also a keyword:
        max_concurrent_flows: runs at a time in the whole fleet (5).
        max_flows_per_minute: starts in any 60 s in the whole fleet, or None (None).
        pacing: "burst" (starts as fast as the minute allows, default) or "even" (spread over it, for
            providers that count by the second).
        name: the flow's name; default: the `module:attribute` it is found under.
        limit: name of its limit, shared by every flow that names it; default: the flow's name.
        local_keys: keys of the shared store that stay where they are (clients, connections): they travel
            neither to the workers nor in a checkpoint.
        merge: `merge(key, mine, theirs)` joins an entry that several runs changed differently.
        conflicts: "last" (the last item in input order wins, default) or "fail" (stop the batch).
        keep_result_s: seconds arq's own result of each job is kept (0: not).
        refusal_patience_s: seconds for which a run may go on being refused before it fails (3600).
        retry_refused: with `run_async`, a run that the API refused waits and starts over instead of
            ending with that refusal as its result (on the fleet it always goes back and resumes).
        overloaded: status 529, and 503 without a `Retry-After`, count as refusals too (False).
        is_refusal: `is_refusal(error)` says what else is one, or is none; see below.
        inline_sync_nodes: run sync nodes on the event loop instead of in a thread of the run.
        checkpoint: on the fleet, save a run after each node, so that another worker goes on there (True).
        flow_timeout_s: on the fleet, seconds the nodes of one attempt may run before it fails; waiting for
            the queue, the gate or Redis does not count (None).
        on_lost_lease: what a worker that has not reached Redis for its lease does with the node that runs:
            "finish" (default) lets it end, "cancel" cancels it, for limits that must hold at any price.
        quarantine_after: how often its process may die under a run that is alone in it, before the run is
            quarantined (1). A run is alone after the second death of a process it shared.

    `is_refusal`, a method or a keyword, is asked about each error that ends a node, then about what stands
    behind it. A `RateLimitHit` (with its `retry_after`) or True: the API refused. False: it did not,
    whatever the status says, and the run fails. None: the other rules decide.

    `await flow.run_async(shared)` runs the flows in this process; `await flow.run_on_fleet(shared)`
    has the fleet's workers run them. `flow.stats` tells the counts afterwards.

    Raises:
        LimitsError: a value that cannot hold, at construction.
    """

    max_concurrent_flows: int = 5
    max_flows_per_minute: int | None = None
    pacing: str = "burst"
    name: str | None = None
    limit: str | None = None
    local_keys: Iterable[str] = ()
    merge: Callable[[Any, Any, Any], Any] | None = None
    conflicts: str = "last"
    keep_result_s: float = 0
    refusal_patience_s: float = 3600
    overloaded: bool = False
    is_refusal: Hook | None = None
    inline_sync_nodes: bool = False
    checkpoint: bool = True
    flow_timeout_s: float | None = None
    on_lost_lease: str = "finish"
    quarantine_after: int = 1
    retry_refused: bool = False
    window_s: float = 60.0

    _keywords: tuple[str, ...] = (
        "max_concurrent_flows",
        "max_flows_per_minute",
        "pacing",
        "name",
        "limit",
        "local_keys",
        "merge",
        "conflicts",
        "keep_result_s",
        "refusal_patience_s",
        "overloaded",
        "is_refusal",
        "inline_sync_nodes",
        "checkpoint",
        "flow_timeout_s",
        "on_lost_lease",
        "quarantine_after",
        "retry_refused",
        "window_s",
    )

    def __init__(self, start: Any = None, **values: Any) -> None:
        super().__init__(start=start)
        set_keywords(self, self._keywords, values)
        self._check()
        self._completed = self._failed = self._rate_limits = self._successes = 0
        self._level: int | None = None
        self._reset_asked = False

    def _check(self) -> None:
        checked_count(self.max_concurrent_flows, "max_concurrent_flows")
        checked_count(self.max_flows_per_minute, "max_flows_per_minute", none_ok=True)
        checked_pacing(self.pacing, self.max_flows_per_minute, "max_flows_per_minute")
        for key in ("name", "limit"):
            value = getattr(self, key)
            if value is not None:
                checked_name(value, "flow" if key == "name" else key)
        checked_count(self.quarantine_after, "quarantine_after")
        for key, words in (("conflicts", ("last", "fail")), ("on_lost_lease", ("finish", "cancel"))):
            value = getattr(self, key)
            if value not in words:
                text = f"{key}={value!r} cannot hold: use '{words[0]}' or '{words[1]}'"
                raise LimitsError(text, key=key, value=value)
        if self.flow_timeout_s is not None:
            checked_float(self.flow_timeout_s, "flow_timeout_s", 0.001, 1e9)

        if not isinstance(self.overloaded, bool):
            raise LimitsError(
                f"overloaded={self.overloaded!r} cannot hold: use True or False",
                key="overloaded",
                value=self.overloaded,
            )
        if self.is_refusal is not None and not callable(self.is_refusal):
            raise LimitsError(
                f"is_refusal={self.is_refusal!r} cannot hold: give a function of one error",
                key="is_refusal",
                value=self.is_refusal,
            )

    # --- hooks -------------------------------------------------------------------------------------

    async def on_worker_start(self) -> None:
        """Open what runs need (clients, pools), once per worker process. Override it."""

    async def on_worker_stop(self) -> None:
        """Close it. Override it."""

    def save_entry(self, key: Any, value: Any) -> Any:
        """Override it to keep an entry of the shared store that cannot travel in checkpoints all the same.

        Return plain values from which `load_entry(key, saved)` makes it again (a path, bytes, an address),
        or NotImplemented for what you do not know.
        """
        return NotImplemented

    def load_entry(self, key: Any, saved: Any) -> Any:
        """Override it with `save_entry`: make the entry from what that returned."""
        raise NotImplementedError(f"{type(self).__name__} has a save_entry and no load_entry")

    # --- names and limits --------------------------------------------------------------------------

    def fleet_name(self, found_under: str | None = None) -> str:
        """The flow's name: `name`, else the target it was found under.

        Raises:
            LimitsError: it has no name, or cannot have the one it was found under.
        """
        if self.name is not None:
            return self.name
        found = found_under or found_name(self)
        if found is None or not FOUND_NAME.fullmatch(found):
            raise LimitsError(
                f"this {type(self).__name__} was found under {found or 'no name'}, so workers could not find it: "
                "give it a name= and keep it in a module of yours",
                key="name",
                value=found,
            )
        return found

    def fleet_limits(self, flow_name: str, lease_s: float) -> Limits:
        """The limit the flow runs under."""
        return Limits(
            self.limit or limit_of(flow_name),
            max_concurrent=self.max_concurrent_flows,
            max_per_window=self.max_flows_per_minute,
            even=checked_pacing(self.pacing, self.max_flows_per_minute, "max_flows_per_minute"),
            window_s=self.window_s,
            lease_s=lease_s,
        )

    def _own_name(self) -> str:
        """The name in its own process, where a flow found under none may run too."""
        if self.name is not None:
            return self.name
        found = found_name(self)
        if found is not None and FOUND_NAME.fullmatch(found):
            return found
        return made_name(self, [(key, getattr(self, key)) for key in self._keywords])

    # --- running -----------------------------------------------------------------------------------

    async def _run_async(self, shared: Any) -> Any:
        """PocketFlow's `run_async`: every run in this process, under the fleet-wide limit."""
        from producer.local_run import LocalRun

        refuse_while_importing("run_async")
        given = await self.prep_async(shared)
        if given is None:
            raise ProducerError("prep_async returned None: return the list of param dicts")
        prepared = list(given)
        process = await current_process()
        limits = self.fleet_limits(self._own_name(), process.lease_s)
        refuse_held((limits.name,))
        pump = process.pump(limits)
        if self._reset_asked:
            self._reset_asked = False
            pump.reset_level()
        run = LocalRun(self, pump, shared)
        try:
            results = await run.go(prepared)
        finally:
            self._completed, self._failed = run.completed, run.failed
            self._rate_limits += run.refused
            self._successes = run.successes if run.refused else self._successes + run.successes
            self._heard(pump)
        return await self.post_async(shared, prepared, results)

    def _heard(self, pump: Pump) -> None:
        """What the gate last said; an adaptive flow keeps the level."""

    def reset_limiter(self) -> None:
        """Forget this flow's statistics and ask, with the next run, for the level to return to initial.

        Never forgets a start or a slot in use.
        """
        self._completed = self._failed = self._rate_limits = self._successes = 0
        self._level = None
        self._reset_asked = True

    def reset_flow_limiter(self) -> None:
        """The reference's name for `reset_limiter`."""
        self.reset_limiter()

    async def run_on_fleet(
        self,
        shared: Any,
        *,
        batch: str | None = None,
        workers: int | None = None,
        output: str | Path | None = None,
        key: str = "",
        weight: float = 1.0,
    ) -> Any:
        """Have the fleet run the flows; return what `post_async(shared, prep_res, results)` returns.

        Enqueues one job per param dict of `prep_async`, follows the batch, and merges what each run
        changed into `shared`. `results` holds the last action of each run in input order, and a
        `FlowFailed` for each that did not complete.

        Args:
            batch: id of the batch; the same id again runs only what is missing. Default: a new one.
            workers: None uses the workers that are there, 0 runs them in this process, n starts n.
            output: a file that gets one line per item as it ends, .jsonl or .csv.
            key: the params' entry that identifies an item when the batch is run again; '' = its position.
            weight: the batch's share of the limit among other batches: 2 gets twice as much as 1.

        Cancelled, it says the batch's id. Workers that are there go on with it; what workers of its own
        have not begun leaves the queue, and the same id goes on with it later.

        Raises:
            ParamsError, LimitsError, SettingsError: something cannot be used; nothing was enqueued.
            RedisRefused: Redis cannot be reached or refuses us.
        """
        from producer.fleet_run import FleetRun

        run = FleetRun(self, shared, batch=batch, workers=workers, output=output, key=key, weight=weight)
        try:
            return await run.go()
        finally:
            self._completed, self._failed = run.completed, run.failed
            self._rate_limits += run.refusals
            self._successes = run.successes if run.refusals else self._successes + run.successes
            self._level = run.level if run.level is not None else self._level

    async def enqueue(
        self, shared: Any, *, batch: str | None = None, key: str = "", weight: float = 1.0
    ) -> Batch:
        """Put one job per param dict of `prep_async` into the queue, for workers that run elsewhere.

        Nothing is merged and `post_async` is not called: `async for outcome in batch` and
        `await batch.results()` tell what became of the items, `run_on_fleet(shared, batch=batch.id)`
        follows and merges.

        Args:
            batch, key, weight: as `run_on_fleet` has them.

        Raises:
            ParamsError, LimitsError, SettingsError, SpoolError: something cannot be used; nothing was enqueued.
            RedisRefused: Redis cannot be reached or refuses us.
        """
        from producer.enqueued import Batch
        from producer.fleet_run import FleetRun

        run = FleetRun(self, shared, batch=batch, key=key, weight=weight)
        spool = await run.enqueue_only()
        return Batch(run.batch, spool.flow, spool.count)

    @property
    def stats(self) -> dict[str, Any]:
        """Limits and counts of the last run."""
        return {
            "max_concurrent_flows": self.max_concurrent_flows,
            "max_flows_per_minute": self.max_flows_per_minute,
            "completed_flows": self._completed,
            "failed_flows": self._failed,
        }

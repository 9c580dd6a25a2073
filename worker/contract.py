"""What producer and worker agree on: names, ids, keys, the job's payload and its outcome."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from arq.constants import job_key_prefix

from limiter.keys import GateKeys
from limiter.limits import Limits, checked_name
from limiter.refusal import Hook
from worker import codec

JOB_ID = re.compile(r"\{([A-Za-z0-9_.-]{1,128})\}:([A-Za-z0-9_.-]{1,128}):(\d{1,15})")
FOUND_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}(:[A-Za-z0-9_.-]{1,128})?")

COMPLETED, FAILED, ABORTED, QUARANTINED, LOST = "completed", "failed", "aborted", "quarantined", "lost"
STATUSES = (COMPLETED, FAILED, ABORTED, QUARANTINED, LOST)


def job_id(limit: str, batch: str, index: int) -> str:
    """The id of item `index`; it carries the limit's hash tag.

    >>> job_id("users", "b1", 7)
    '{users}:b1:7'
    """
    return f"{{{limit}}}:{batch}:{index}"


def split_job_id(job: str) -> tuple[str, str, int]:
    """Limit, batch and index of an id that `job_id` made.

    >>> split_job_id("{users}:b1:7")
    ('users', 'b1', 7)
    """
    match = JOB_ID.fullmatch(job)
    if match is None:
        raise ValueError(f"not a job id: {job!r}")
    return match[1], match[2], int(match[3])


def limit_of(flow_name: str) -> str:
    """The limit a flow has when it names none: its own name with ':' as '.'.

    >>> limit_of("users:flow")
    'users.flow'
    """
    return flow_name.replace(":", ".")


def queue_key(limit: str, flow: str) -> str:
    """The sorted set in which the jobs of one flow under one limit wait (arq's queue name)."""
    return GateKeys(limit).queue(flow)


def payload_key(job: str) -> str:
    """Where a job's payload stands until it is done (arq's job key)."""
    return job_key_prefix + job


def encode_job(flow: str, params: dict[str, Any], enqueue_ms: int, retry: int = 0) -> bytes:
    """arq's own job record, in msgpack: `arq.jobs.deserialize_job` with our codec reads it.

    A retried item has arq's number of the try: 2 for its first retry.
    """
    number = retry + 1 if retry else None
    return codec.encode({"t": number, "f": flow, "a": (params,), "k": {}, "et": enqueue_ms})


class Job(msgspec.Struct):
    """A decoded payload: the flow's name, the param dict, when it was enqueued (ms since 1970), which retry."""

    flow: str
    params: dict[str, Any]
    enqueue_ms: int
    retry: int = 0


class _Record(msgspec.Struct):
    f: str
    a: tuple[dict[str, Any]]
    et: int
    t: int | None = None


_records = msgspec.msgpack.Decoder(_Record)


def decode_job(payload: bytes) -> Job:
    """Raises `msgspec.DecodeError` (a ValueError) on anything that `encode_job` did not write."""
    try:
        record = _records.decode(payload)
    except RecursionError:
        raise msgspec.DecodeError("nested too deep") from None
    return Job(record.f, record.a[0], record.et, max(0, (record.t or 1) - 1))


class Failure(msgspec.Struct, omit_defaults=True):
    """Why a run failed, in plain text: an exception's type and message, its node, a short trace."""

    type: str
    message: str
    node: str = ""
    trace: str = ""


class Outcome(msgspec.Struct, omit_defaults=True):
    """How one attempt of one run ended.

    Attributes:
        status: one of `STATUSES`.
        action: the run's last action, as the reference's results hold it (None if it cannot travel).
        difference: what the run changed in the shared store, also before it failed; see `worker.difference`.
        failure: set unless the status is `completed`.
        attempts: how often the run was begun, by what ended it: `tries` (it ended by itself, this time included),
            `deaths` (its process died under it), `refusals` (a rate limit), `hand_backs` (its worker left).
            Empty for a run that was begun once.
        notes: what else there is to say, such as why it started over.
        nodes: name and seconds of each node that ran.
        left_behind: paths of entries of the shared store that could not travel.
        started, ended: seconds since 1970 on the worker's clock, for display only.
        retry: how often the item had been retried when it was enqueued; None where nobody read its payload.
    """

    status: str
    action: Any = None
    difference: dict[Any, Any] = {}
    failure: Failure | None = None
    attempts: dict[str, int] = {}
    nodes: list[tuple[str, float]] = []
    left_behind: list[str] = []
    notes: list[str] = []
    host: str = ""
    started: float = 0.0
    ended: float = 0.0
    retry: int | None = None


_outcomes = msgspec.msgpack.Decoder(Outcome)
encode_outcome = msgspec.msgpack.Encoder().encode


def decode_outcome(data: bytes) -> Outcome:
    """Raises `msgspec.DecodeError` on anything that is no outcome."""
    return _outcomes.decode(data)


def checked_batch(batch: object) -> str:
    """`batch` as it came, or a `LimitsError` that says which characters an id may have."""
    return checked_name(batch, "batch")


class FleetFlow(Protocol):
    """All that a worker knows of a flow; `producer.flows` has the class that fulfils it.

    Attributes:
        start_node, params, get_next_node: PocketFlow's own.
        keep_result_s: seconds arq's result record is kept; 0 = not at all.
        refusal_patience_s: seconds after its first refusal in which a run may go on being refused.
        inline_sync_nodes: run sync nodes on the event loop instead of in a thread of the run.
        checkpoint: save a run after each node.
        flow_timeout_s: seconds the nodes of one attempt may run; None = any.
        on_lost_lease: "finish" lets the node that runs end, "cancel" cancels it, once the lease is lost.
        quarantine_after: how often its process may die under a run that is alone in it.
        local_keys: keys of the shared store that stay where they are: in no checkpoint either.
        overloaded, is_refusal: what else counts as a refusal, as in `limiter.refusal.recognised`.
    """

    start_node: Any
    params: dict[str, Any]
    keep_result_s: float
    refusal_patience_s: float
    inline_sync_nodes: bool
    checkpoint: bool
    flow_timeout_s: float | None
    on_lost_lease: str
    quarantine_after: int
    local_keys: Iterable[str]
    overloaded: bool
    is_refusal: Hook | None

    def get_next_node(self, curr: Any, action: Any) -> Any: ...

    def fleet_name(self, found_under: str | None) -> str:
        """The flow's name: its own, else the one it was found under."""

    def fleet_limits(self, flow_name: str, lease_s: float) -> Limits:
        """The limit it runs under."""

    def save_entry(self, key: Any, value: Any) -> Any:
        """Plain values from which `load_entry` makes an entry that cannot travel; NotImplemented = none."""

    def load_entry(self, key: Any, saved: Any) -> Any:
        """The entry again."""

    async def on_worker_start(self) -> None:
        """Open what runs need, once per worker process."""

    async def on_worker_stop(self) -> None:
        """Close it."""

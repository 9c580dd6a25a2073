"""Every key of a gate, with its lifetime. All carry the limit's hash tag, so one slot holds them.

| key | type | holds | lifetime |
| --- | --- | --- | --- |
| gate | hash | the state (see `gate.lua`), one record and one last answer per process | 7 days after the last call of a gate with flows, else max(window, 2 leases) + 60 s |
| leases | zset | process -> end of its lease, us | as gate |
| starts | list | latest moments at which the runs of the window may start, us, oldest first | as gate |
| tickets | zset | process that waits for the gate -> ticket | as gate |
| flows | set | names of the flows whose workers have called | as gate |
| idle:FLOW | zset | process that found no job of FLOW -> when, us | as gate |
| queue:FLOW | zset | job id -> place, or parked (2^52: waits for a time; 2^52 + n: claimed by process n) | until the job is done |
| later | zset | job id -> due time, us; the job is parked in its queue too | until due |
| jobs | hash | job id -> record from first claim to done | until the job is done |
| saved | hash | job id -> checkpoint of its run | until the job is done |
| nested | hash | process -> how many of its runs have long waited for this gate inside others | some seconds after the last word |
| events | stream | what happened to the limit, about 1,000 entries | 7 days after the last entry |
| samples | list | 'time admissions peak level' every 5 s in which somebody calls, 240 of them | as gate |
| override | string | the operator's values and pause | none while something in it lasts, then 7 days |
| batch:B, done:B, out:B, base:B | hash, bitmap, stream, string | a batch: counts, done bits, outcomes, shared store | its own `keep` (POCKETFLEET_KEEP_S, 7 days by default) after its last outcome |
| blobs:B, retries:B | hash | outcomes too large for a call, 'index:attempt' -> outcome; item -> how often it was retried | as batch:B |
| kept:B:I | string | a checkpoint too large for a call | until the job is done |
| blob:B:I:A, kept:B:I:A | string | an outcome, a checkpoint too large for a call, until its call is heard | 7 days |
| arq:job:ID, arq:in-progress:ID | string | payload; claimed by | until done; while claimed |
| arq:result:ID | string | arq's result record, where a flow sets `keep_result_s` | that long |

Beside the limits, without a tag:

| key | type | holds | lifetime |
| --- | --- | --- | --- |
| pocketfleet:batches | hash | batch -> its limit and flow | none: every enqueue and `batch list` drop those that are gone |
| pocketfleet:workers, pocketfleet:worker:P | zset, string | workers that live | a few leases of silence |
| pocketfleet:health:HOST, pocketfleet:control... | string | what arq's host process says of itself | a few leases of silence |
"""

from __future__ import annotations

ROOT = "pocketfleet:"
BATCHES = ROOT + "batches"
WORKERS = ROOT + "workers"


def wake_channel(process: str) -> str:
    """The pub/sub channel on which one process is woken: '<limit> <us to wait>', '<limit> abort <attempt> <job>'."""
    return f"{ROOT}wake:{process}"


def worker_key(process: str) -> str:
    """What one living worker says of itself; expires with two leases of silence."""
    return f"{ROOT}worker:{process}"


class GateKeys:
    """The keys of one limit. `gate` is `pocketfleet:{name}:gate`; the others stand beside it."""

    def __init__(self, limit: str) -> None:
        self.limit = limit
        self.root = f"{ROOT}{{{limit}}}:"
        self.gate = self.root + "gate"
        self.leases = self.root + "leases"
        self.starts = self.root + "starts"
        self.tickets = self.root + "tickets"
        self.later = self.root + "later"
        self.jobs = self.root + "jobs"
        self.flows = self.root + "flows"
        self.nested = self.root + "nested"
        self.override = self.root + "override"
        self.events = self.root + "events"
        self.samples = self.root + "samples"

    @property
    def all(self) -> list[str]:
        """KEYS of every script, in the order `gate.lua` names them; the others it computes."""
        return [
            self.gate,
            self.leases,
            self.starts,
            self.tickets,
            self.later,
            self.jobs,
            self.flows,
            self.override,
        ]

    def queue(self, flow: str) -> str:
        return f"{self.root}queue:{flow}"

    def idle(self, flow: str) -> str:
        return f"{self.root}idle:{flow}"

    def batch(self, batch: str) -> str:
        return f"{self.root}batch:{batch}"

    def done(self, batch: str) -> str:
        return f"{self.root}done:{batch}"

    def out(self, batch: str) -> str:
        return f"{self.root}out:{batch}"

    def base(self, batch: str) -> str:
        return f"{self.root}base:{batch}"

    def kept(self, batch: str, index: int) -> str:
        return f"{self.root}kept:{batch}:{index}"

    def blob(self, batch: str, index: int, attempt: int) -> str:
        return f"{self.root}blob:{batch}:{index}:{attempt}"

    def blobs(self, batch: str) -> str:
        return f"{self.root}blobs:{batch}"

    def retries(self, batch: str) -> str:
        return f"{self.root}retries:{batch}"

    def of_batch(self, batch: str) -> list[str]:
        """Every key that a batch has for itself."""
        return [
            self.batch(batch),
            self.done(batch),
            self.out(batch),
            self.base(batch),
            self.blobs(batch),
            self.retries(batch),
        ]

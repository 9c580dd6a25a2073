"""What the limiter refuses, and in which words."""

from __future__ import annotations


class LimiterError(Exception):
    """Base of every error the limiter raises. Its text is one sentence meant for people."""


class LimitsError(LimiterError, ValueError):
    """A limit's name or one of its numbers cannot hold. Carries `key` and `value` as typed."""

    def __init__(self, sentence: str, *, key: str = "", value: object = None) -> None:
        super().__init__(sentence)
        self.key = key
        self.value = value


class SettingsError(LimiterError, ValueError):
    """A setting from the environment or `.env` is out of its bounds."""


class RedisRefused(LimiterError):
    """Redis cannot be reached, or refuses us (password, ACL), when a command starts. Exit code 3."""


class AdmissionTimeout(LimiterError, TimeoutError):
    """Not admitted within the time the caller gave. Carries `limit`, `timeout_s` and `refused_by`."""

    def __init__(self, limit: str, timeout_s: float, refused_by: str) -> None:
        super().__init__(
            f"no permit for '{limit}' within {timeout_s:g} s (last refused by {refused_by or 'nothing'})"
        )
        self.limit = limit
        self.timeout_s = timeout_s
        self.refused_by = refused_by


class LeaseLost(LimiterError):
    """The lease ran out while a block held a permit; the block was cancelled."""

    def __init__(self, limit: str) -> None:
        super().__init__(
            f"the lease on '{limit}' ran out: Redis did not answer in time, so the block was ended"
        )
        self.limit = limit


class LimitClosed(LimiterError):
    """The event loop is ending, or its process was closed: nothing is admitted here any more. Carries `limit`,
    where one is known.
    """

    def __init__(self, limit: str = "") -> None:
        what = f"limit '{limit}'" if limit else "a limit"
        super().__init__(
            f"{what} cannot be taken here any more: this event loop is ending and has given everything back; take "
            "it before the loop's tasks are cancelled"
        )
        self.limit = limit


class HeldAlready(LimiterError):
    """The run asks for a gate it is inside of already. Carries `limit`."""

    def __init__(self, limit: str) -> None:
        super().__init__(
            f"this run holds '{limit}' already (by an outer limit(), its node or its flow), so waiting for it "
            "again could wait for ever: take it once, around everything it protects"
        )
        self.limit = limit


class WaitCircle(LimiterError, TimeoutError):
    """Gates wait for each other. Carries `gates`, of which this wait held the first and wanted the second, and
    these two as `held` and `wanted`.
    """

    def __init__(self, gates: tuple[str, ...], waited_s: float) -> None:
        held, wanted, *others = gates
        steps = [f"every slot of '{held}' is held by a run that waits for '{wanted}'"]
        for this, following in zip((wanted, *others), (*others, held), strict=True):
            steps.append(f"every slot of '{this}' by one that waits for '{following}'")
        names = ", ".join(f"'{name}'" for name in gates)
        super().__init__(
            f"after {waited_s:.0f} s: {', '.join(steps[:-1])}, and {steps[-1]}, so this wait was ended: take them "
            f"in the same order everywhere, or together with limit({names})"
        )
        self.gates = gates
        self.held = held
        self.wanted = wanted

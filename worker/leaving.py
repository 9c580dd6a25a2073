"""A run that leaves this process without an outcome: refused, handed back, aborted, or never started."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING

from limiter.sync import Entry
from worker.contract import ABORTED, FAILED, Failure, Outcome
from worker.record import settle
from worker.refused import Refused
from worker.registry import ServedFlow

if TYPE_CHECKING:
    from worker.run import Run

log = logging.getLogger("pocketfleet.worker")

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0


async def go_back(run: Run, served: ServedFlow, refused: Refused) -> Outcome | None:
    """A refused run goes back to its place and resumes there; it is not a failure and not a try."""
    hit, answer = refused.hit, run.pump.answer
    now_s = answer.now / 1e6 if answer else 0.0
    keeping = run.kept(served)
    counted = keeping.counted = keeping.counted.refused_again(now_s, hit.retry_after or 0.0)
    if not hit.fed:  # else a gate inside the run has learnt of it, and the flow's level stays
        run.pump.refuse(run.claimed.attempt, hit.retry_after or 0.0)
    if now_s - counted.refused_at - counted.forgiven_s > served.flow.refusal_patience_s:
        for_s = served.flow.refusal_patience_s
        text = f"refused for longer than refusal_patience_s={for_s:g}: {hit}"
        return Outcome(FAILED, failure=Failure("RateLimitHit", text[:2000], run.node))
    delay_s = hit.retry_after or min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(run.claimed.refusals, 10))
    if not hit.retry_after:
        delay_s *= random.uniform(0.5, 1.0)
    first = await keeping.refused(run.step, run.shared, refused)
    log.info("run.refused job=%s node=%s again_in_s=%.1f", run.claimed.id, run.node, delay_s)
    settle(run, "refuse", round(delay_s * 1e6), first)
    run.ending = "refused"
    return None


def give_back_unstarted(run: Run) -> None:
    if run.ending != "lost":
        entry = Entry(run.claimed.id, run.claimed.attempt, run.flow_number, "back")
        run.pump.return_job(entry, run.stamp, late=not run.ending)


async def give_up(run: Run, served: ServedFlow) -> None:
    """It was stopped: handed back it takes with it what the gate does not know yet."""
    if run.ending == "hand":
        settle(run, "hand", first=await run.kept(served).handed_back(run.step, run.shared))
    else:
        leave_as_saved(run)


def leave_as_saved(run: Run) -> None:
    """It was stopped, also while it was on its way to the gate. Nothing is left to say of one that is no longer
    ours, whose slot went with the claim, nor of one that was refused."""
    if run.ending == "aborted":
        settle(run, ABORTED)  # whoever cancelled the batch has recorded it; this frees the slot
    elif run.ending == "hand":
        settle(run, "hand")

"""An outcome on its way to the gate."""

from __future__ import annotations

from worker.contract import COMPLETED, Outcome, decode_outcome, encode_outcome
from worker.record import fitted


def test_of_an_outcome_too_large_for_redis_the_largest_entries_stay_behind_and_are_named() -> None:
    store = {"text": "x" * 3000, "page": {"of": "y" * 2000}, "count": 1}
    outcome = Outcome(COMPLETED, "done", {"=": store, "+": {"log": ["z" * 1000]}}, left_behind=["'photo'"])
    whole = encode_outcome(outcome)
    assert fitted(outcome, len(whole)) == whole

    back = decode_outcome(fitted(outcome, 2000))
    assert (back.status, back.action) == (COMPLETED, "done")
    assert back.difference == {"=": {"count": 1}, "+": {"log": ["z" * 1000]}}
    assert back.left_behind == ["'photo'", "'text'", "'page'"]
    assert list(store) == ["text", "page", "count"], "the run's own store stays as it is"

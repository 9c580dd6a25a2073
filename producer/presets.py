"""Ready-made limits with the reference's documented values."""

from __future__ import annotations

from typing import Any

from limiter.errors import LimitsError


def _fixed(flows: int, per_minute: int) -> dict[str, Any]:
    return {"max_concurrent_flows": flows, "max_flows_per_minute": per_minute}


def _adaptive(
    initial: int, low: int, high: int, backoff: float, threshold: int, factor: float
) -> dict[str, Any]:
    return {
        "initial_concurrent_flows": initial,
        "min_concurrent_flows": low,
        "max_concurrent_flows": high,
        "backoff_factor": backoff,
        "recovery_threshold": threshold,
        "recovery_factor": factor,
    }


class FlowPresets:
    """Keywords of a flow class: `UserFlow(start=node, **FlowPresets.MODERATE)`."""

    CONSERVATIVE = _fixed(5, 30)
    MODERATE = _fixed(10, 60)
    AGGRESSIVE = _fixed(20, 120)
    BATCH_PROCESSING = _fixed(15, 100)
    DATA_PIPELINE = _fixed(10, 50)
    REALTIME = _fixed(5, 300)
    HEAVY_PROCESSING = _fixed(3, 20)
    ADAPTIVE_CONSERVATIVE = _adaptive(5, 2, 15, 0.5, 20, 1.2)
    ADAPTIVE_MODERATE = _adaptive(10, 3, 30, 0.5, 15, 1.3)
    ADAPTIVE_AGGRESSIVE = _adaptive(20, 5, 50, 0.6, 10, 1.4)
    # Ours: what came nearest to an API's capacity in the benchmark (docs/backoff.md).
    ADAPTIVE_GENTLE = _adaptive(5, 1, 64, 0.95, 10, 1.2) | {"recovery": "additive"}

    @classmethod
    def get(cls, name: str) -> dict[str, Any]:
        """The preset of that name, in any case: a copy.

        Raises:
            LimitsError: there is none; the sentence lists those there are.
        """
        found = getattr(cls, str(name).upper(), None)
        if not isinstance(found, dict):
            raise LimitsError(
                f"there is no preset {name!r}: use {', '.join(cls.list_presets())}", key="preset", value=name
            )
        return dict(found)

    @classmethod
    def list_presets(cls) -> dict[str, str]:
        """Every preset's name, with its values in words."""
        return {
            name: ", ".join(f"{key}={value}" for key, value in values.items())
            for name, values in vars(cls).items()
            if isinstance(values, dict)
        }

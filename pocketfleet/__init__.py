"""PocketFleet: one limit, many worker processes, for PocketFlow's batch flows. Import from here only."""

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from importlib.machinery import PathFinder as _PathFinder
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limiter.errors import (
        AdmissionTimeout,
        HeldAlready,
        LeaseLost,
        LimitClosed,
        LimiterError,
        LimitsError,
        RedisRefused,
        SettingsError,
        WaitCircle,
    )
    from limiter.limit import limit
    from limiter.operate import limits
    from limiter.permit import Permit
    from limiter.refusal import RateLimitHit
    from producer.adaptive import AdaptiveThrottledBatchFlow
    from producer.enqueued import Batch, ItemOutcome, ItemsLost
    from producer.errors import FlowFailed, InputError, ParamsError, ProducerError, SpoolError
    from producer.flows import ThrottledAsyncParallelBatchFlow
    from producer.presets import FlowPresets
    from worker.errors import TargetError, WorkerError
    from worker.nodes import AdaptiveThrottledNode, ThrottledParallelBatchNode

__all__ = [
    "AdaptiveThrottledBatchFlow",
    "AdaptiveThrottledNode",
    "AdmissionTimeout",
    "Batch",
    "FlowFailed",
    "FlowPresets",
    "HeldAlready",
    "InputError",
    "ItemOutcome",
    "ItemsLost",
    "LeaseLost",
    "LimitClosed",
    "LimiterError",
    "LimitsError",
    "ParamsError",
    "Permit",
    "ProducerError",
    "RateLimitHit",
    "RedisRefused",
    "SettingsError",
    "SpoolError",
    "TargetError",
    "ThrottledAsyncParallelBatchFlow",
    "ThrottledParallelBatchNode",
    "WaitCircle",
    "WorkerError",
    "limit",
    "limits",
]

_ROOMS = ("limiter", "worker", "producer")
_HOMES = {
    "limiter.errors": (
        "AdmissionTimeout",
        "HeldAlready",
        "LeaseLost",
        "LimitClosed",
        "LimiterError",
        "LimitsError",
        "RedisRefused",
        "SettingsError",
        "WaitCircle",
    ),
    "limiter.limit": ("limit",),
    "limiter.operate": ("limits",),
    "limiter.permit": ("Permit",),
    "limiter.refusal": ("RateLimitHit",),
    "producer.adaptive": ("AdaptiveThrottledBatchFlow",),
    "producer.enqueued": ("Batch", "ItemOutcome", "ItemsLost"),
    "producer.errors": ("FlowFailed", "InputError", "ParamsError", "ProducerError", "SpoolError"),
    "producer.flows": ("ThrottledAsyncParallelBatchFlow",),
    "producer.presets": ("FlowPresets",),
    "worker.errors": ("TargetError", "WorkerError"),
    "worker.nodes": ("AdaptiveThrottledNode", "ThrottledParallelBatchNode"),
}


def __getattr__(name: str) -> Any:
    """Names are imported at their first use, so that `pocketfleet --help` waits for none of them."""
    for home, names in _HOMES.items():
        if name in names:
            _refuse_shadows()
            globals()[name] = value = getattr(_import_module(home), name)
            return value
    raise AttributeError(f"module 'pocketfleet' has no attribute {name!r} (it has: {', '.join(__all__)})")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _refuse_shadows(*more: str) -> None:
    """Our rooms are top-level packages: a module of the same name would hide them, or be hidden.

    Looks along the import path and in `more` directories.

    Raises:
        ImportError: names the file.
    """
    home = _Path(__file__).resolve().parent.parent
    for room in _ROOMS:
        loaded = getattr(_sys.modules.get(room), "__file__", None)
        specs = [_PathFinder.find_spec(room, [entry]) for entry in [*_sys.path, *more]]
        for found in (loaded, *(spec.origin for spec in specs if spec)):
            if found and not _is_ours(_Path(found).resolve(), home):
                raise ImportError(f"{found} has the name of PocketFleet's own '{room}': rename it", name=room)


def _is_ours(found: _Path, home: _Path) -> bool:
    """In this copy of PocketFleet, or in another one (a clone beside an installed wheel)."""
    beside = found.parent.parent
    return found.name == "__init__.py" and (beside == home or (beside / "pocketfleet/__init__.py").is_file())

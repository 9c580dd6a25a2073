"""PocketFleet: one limit, many worker processes, for PocketFlow's batch flows. Import from here only."""

from __future__ import annotations

import sys as _sys
from pathlib import Path as _Path


def _refuse_shadows() -> None:
    """Our rooms are top-level packages: a module of the same name would hide them, or be hidden."""
    home = _Path(__file__).resolve().parent.parent
    for room in ("limiter", "worker", "producer"):
        for entry in _sys.path:
            for found in (_Path(entry or ".") / f"{room}.py", _Path(entry or ".") / room / "__init__.py"):
                if found.is_file() and not found.resolve().is_relative_to(home / room):
                    raise ImportError(
                        f"{found.resolve()} has the name of PocketFleet's own '{room}': rename it"
                    )


_refuse_shadows()

from limiter.errors import (  # noqa: E402
    AdmissionTimeout,
    LeaseLost,
    LimiterError,
    LimitsError,
    RedisRefused,
    SettingsError,
)
from limiter.permit import Permit, limit  # noqa: E402
from producer.errors import InputError, ParamsError, ProducerError, SpoolError  # noqa: E402
from producer.flows import FlowFailed, ThrottledAsyncParallelBatchFlow  # noqa: E402
from worker.errors import TargetError, WorkerError  # noqa: E402

__all__ = [
    "AdmissionTimeout",
    "FlowFailed",
    "InputError",
    "LeaseLost",
    "LimiterError",
    "LimitsError",
    "ParamsError",
    "Permit",
    "ProducerError",
    "RedisRefused",
    "SettingsError",
    "SpoolError",
    "TargetError",
    "ThrottledAsyncParallelBatchFlow",
    "WorkerError",
    "limit",
]

"""A worker's settings: POCKETFLEET_… in the environment or `.env`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from limiter.settings import FleetSettings


class WorkerSettings(FleetSettings):
    """What `pocketfleet worker` and `arq worker.main.WorkerSettings` read."""

    flows: str | None = Field(
        None, description="Flows to serve, comma-separated, such as users:flow,more:flow"
    )
    max_jobs: int = Field(100, ge=1, le=10_000, description="Most runs at a time in one process")
    drain_s: float = Field(
        30, ge=0, le=86_400, description="Seconds runs may go on after SIGTERM before they are handed back"
    )
    burst: bool = Field(False, description="true: end when nothing of the flows waits or runs anywhere")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log line shown: DEBUG, INFO, WARNING or ERROR"
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

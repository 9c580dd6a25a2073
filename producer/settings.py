"""A producer's settings: POCKETFLEET_… in the environment or `.env`."""

from __future__ import annotations

from pydantic import Field

from worker.settings import WorkerSettings


class ProducerSettings(WorkerSettings):
    """What `run`, `enqueue` and `run_on_fleet` read."""

    max_param_bytes: int = Field(
        262_144, ge=64, le=16_777_216, description="Bytes one item's params may have, encoded"
    )
    keep_s: float = Field(
        604_800,
        ge=60,
        le=31_536_000,
        description="Seconds for which a batch's outcomes, manifest and logs are kept after its end",
    )
    memory_patience_s: float = Field(
        600,
        ge=1,
        le=604_800,
        description="Seconds an enqueue waits for memory in Redis while nothing makes room there",
    )

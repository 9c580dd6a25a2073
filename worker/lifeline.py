"""A pipe from the process that started a worker: when it closes, the starter is gone."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.fleet_worker import FleetWorker

VARIABLE = "POCKETFLEET_LIFELINE"
"""Holds the descriptor of the pipe's reading end."""


def watch_lifeline(worker: FleetWorker) -> None:
    """When the starter's end of the pipe closes, hand back what runs and leave at once."""
    given = os.environ.pop(VARIABLE, "")
    if not given.isdigit():
        return
    descriptor, loop = int(given), asyncio.get_running_loop()

    def closed() -> None:
        if os.read(descriptor, 64) == b"":
            loop.remove_reader(descriptor)
            worker.stop(at_once=True)

    os.set_blocking(descriptor, False)
    loop.add_reader(descriptor, closed)

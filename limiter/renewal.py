"""Leases kept by a thread, so that user code which blocks the event loop keeps its slots and jobs.

The thread renews a pump's lease when the pump itself has not been answered for 0.4 lease, again each time that
0.4 of it are over, and stops doing so when the loop has been stuck for longer than the stall limit: such a process
counts as dead. A pump that holds nothing and was told to call later is silent, not stuck.
"""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import ReadOnlyError, RedisError

from limiter.keys import GateKeys
from limiter.script import sync_script
from limiter.sync import RENEW

if TYPE_CHECKING:
    from limiter.process import Process
    from limiter.pump import Pump

log = logging.getLogger("pocketfleet.limiter")


class Renewal:
    """A daemon thread with a client of its own. `stop()` ends it, as does the loop once it is closed."""

    def __init__(self, process: Process, client: Redis, lease_s: float, stall_limit_s: float) -> None:
        self._process = process
        self._client = client
        self._script = sync_script(client, RENEW)
        self._lease_s = lease_s
        self._stall_limit_s = stall_limit_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pocketfleet-renewal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._lease_s / 15) and not self._process.loop.is_closed():
            for pump in list(self._process.pumps.values()):
                if self._is_due(pump, monotonic()):
                    self._renew(pump.name)
        self._client.close()

    def _is_due(self, pump: Pump, now: float) -> bool:
        """Whether the lease is to be renewed here, since the pump should have done it."""
        silent_s = now - pump.calls.spoke_at
        if not pump.calls.joined or not 0.4 * self._lease_s < silent_s < self._stall_limit_s:
            return False
        if not pump.held and now < pump.alarm.due:
            return False
        return pump.slots.lease_until - now < 0.6 * self._lease_s - pump.margin_s

    def _renew(self, limit: str) -> None:
        sent = monotonic()
        try:
            lease_us = int(self._script(keys=GateKeys(limit).all, args=[self._process.id, ""]))
        except (RedisError, OSError) as error:
            log.debug("lease.not_renewed limit=%s error=%s", limit, type(error).__name__)
            if isinstance(error, ReadOnlyError):
                self._client.connection_pool.disconnect()  # that was the primary once
            return
        pump = self._process.pumps.get(limit)
        if pump is None:
            return
        if lease_us > 0:
            slots = pump.slots
            slots.lease_until = max(slots.lease_until, pump.lease_end(sent, lease_us / 1e6))
        else:
            self._process.call_soon(pump.kick)

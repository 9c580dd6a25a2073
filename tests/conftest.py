"""Settings of every test: Hypothesis judges what is drawn, never how long a busy machine took for it."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

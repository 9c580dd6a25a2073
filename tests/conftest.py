"""Settings of every test: Hypothesis judges what is drawn, never how long a busy machine took for it, and the
processes that tests start, several hundred, keep their bytecode. Compiling all of ours anew is two thirds of
what a start costs.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

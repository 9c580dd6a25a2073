"""Settings of every test: Hypothesis judges what is drawn, never how long a busy machine took for it, and the
processes that tests start, several hundred, keep their bytecode. Compiling all of ours anew is two thirds of
what a start costs. Ctrl-C works in them, also where whoever started the tests ignores it, as a shell does
for what it runs in the background.
"""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
signal.signal(signal.SIGINT, signal.default_int_handler)

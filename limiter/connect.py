"""Which Redis this process uses: the one that is set, else the server of our own."""

from __future__ import annotations

from dataclasses import dataclass, field

from limiter import embedded
from limiter.address import redacted
from limiter.errors import RedisRefused
from limiter.settings import FleetSettings, checked_url


@dataclass
class Place:
    """An address to connect to. `url` may hold a password, `shown` is the text for people.

    Close it after the last client: the embedded server then stops if nobody else uses it.
    """

    url: str = field(repr=False)
    shown: str
    embedded: embedded.Embedded | None = field(default=None, repr=False)

    def close(self) -> None:
        if self.embedded:
            self.embedded.close()


def find_redis(settings: FleetSettings, *, start: bool) -> Place:
    """The Redis of `settings`, else the embedded server of its data directory; does not connect.

    A process that was given the embedded server's own address (a worker of a `run`) counts among its
    users too, so the server stays until the last of them has left.

    Args:
        start: start the embedded server if it does not run; else only a living one is joined.

    Raises:
        RedisRefused: no Redis is set and no server runs (with `start`: it cannot run).
        SettingsError: the address or the data directory cannot be used.
    """
    if settings.redis_url is not None:
        if settings.redis_url.get_secret_value() == embedded.address(settings.data_dir):
            return _place(embedded.hold(settings.data_dir))
        url = checked_url(settings)
        return Place(url, redacted(url))
    joined = embedded.join_or_start(settings.data_dir) if start else embedded.join(settings.data_dir)
    if joined is None:
        raise RedisRefused(
            f"no Redis is set and no PocketFleet server runs in {settings.data_dir}: "
            "set POCKETFLEET_REDIS_URL, or start one here with pocketfleet run"
        )
    return _place(joined)


def _place(joined: embedded.Embedded) -> Place:
    return Place(joined.url, f"the embedded server in {joined.data_dir}", joined)

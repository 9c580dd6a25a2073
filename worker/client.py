"""The same address, as arq's own host process wants it."""

from __future__ import annotations

from typing import Any

from arq.connections import RedisSettings
from redis.asyncio.connection import SSLConnection, parse_url

from limiter.address import redacted

SSL_OPTIONS = ("ssl_keyfile", "ssl_certfile", "ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_data")


class _Settings(RedisSettings):
    """arq prints its settings with the password in them; these do not."""

    shown = ""

    def __repr__(self) -> str:
        return f"RedisSettings({self.shown})"


def arq_settings(url: str) -> RedisSettings:
    """arq's settings for a URL of `limiter.settings.checked_url`.

    Unlike `RedisSettings.from_dsn` it decodes the credentials, keeps the TLS options and checks the
    server's name. arq's pool has no time-out for answers: open our own clients for everything else.
    """
    given: dict[str, Any] = dict(parse_url(url))
    tls = given.get("connection_class") is SSLConnection
    verified = given.get("ssl_cert_reqs", "required") == "required"
    settings = _Settings(
        host=given.get("host", "localhost"),
        port=given.get("port", 6379),
        unix_socket_path=given.get("path"),
        database=given.get("db", 0),
        username=given.get("username"),
        password=given.get("password"),
        ssl=tls,
        ssl_check_hostname=tls and given.get("ssl_check_hostname", verified),
        conn_timeout=2,
        **{name: given[name] for name in SSL_OPTIONS if name in given},
    )
    settings.shown = redacted(url)
    return settings

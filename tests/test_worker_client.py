"""arq's host process gets the same server, decoded, verified, and without showing the password."""

from __future__ import annotations

import asyncio

from arq.connections import create_pool

from tests import servers
from worker.client import arq_settings


def test_credentials_and_tls_options_arrive_decoded() -> None:
    settings = arq_settings("rediss://me:p%40ss%2Fw@db.example:6380/2?ssl_ca_certs=/ca.pem")
    assert (settings.host, settings.port, settings.database) == ("db.example", 6380, 2)
    assert (settings.username, settings.password) == ("me", "p@ss/w")
    assert settings.ssl and settings.ssl_check_hostname and settings.ssl_ca_certs == "/ca.pem"
    assert settings.ssl_cert_reqs == "required"


def test_verification_switched_off_in_the_url_stays_off() -> None:
    assert not arq_settings("rediss://h?ssl_cert_reqs=none").ssl_check_hostname
    assert not arq_settings("rediss://h?ssl_check_hostname=false").ssl_check_hostname


def test_repr_shows_the_address_and_no_password() -> None:
    settings = arq_settings("redis://me:p%40ss@localhost:7/1")
    assert repr(settings) == "RedisSettings(redis://localhost:7/1)" == str(settings)


def test_arq_connects_through_a_unix_socket() -> None:
    async def scene(url: str) -> None:
        pool = await create_pool(arq_settings(url))
        assert await pool.ping()
        await pool.aclose()

    with servers.running("valkey") as url:
        asyncio.run(scene(f"{url}?db=3"))

"""TLS to a real server: the certificate and the name in it are checked, and nothing is sent to anybody else."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from limiter.check import checked_connection
from limiter.client import open_client, open_sync_client
from limiter.errors import RedisRefused
from limiter.line import Line
from limiter.settings import FleetSettings, checked_url
from tests import servers
from tests.fleet import site
from tests.test_acl import FLOW

PASSWORD, TYPED = "p@ss:w/%rd", "p%40ss%3Aw%2F%25rd"


@dataclass
class Secured:
    """A server that speaks TLS, known as `localhost` by a certificate of `ca`."""

    port: int
    ca: Path
    other_ca: Path
    directory: Path

    def url(self, host: str = "localhost", **options: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://:{TYPED}@{host}:{self.port}/0?{query}"


def openssl(directory: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True)


def certificates(directory: Path) -> None:
    """Two authorities, and a certificate of the first for the name localhost alone."""
    for name in ("ca", "other"):
        openssl(
            directory,
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),  # Python 3.13 asks for it
            *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        )
    openssl(
        directory,
        *("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
        *("-keyout", "server.key", "-out", "server.csr"),
    )
    (directory / "names").write_text(
        "subjectAltName=DNS:localhost\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    openssl(
        directory,
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-days", "2", "-extfile", "names", "-out", "server.crt"),
    )


def speaks_tls(kind: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        words = [servers.binary(kind), "--port", "0", "--tls-port", "1", "--dir", name]
        found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        # a build with TLS complains of the missing certificate, one without of the option
        return "tls-cert-file" in found.stdout + found.stderr


@pytest.fixture(scope="module")
def secured() -> Iterator[Secured]:
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificates, and is not installed here")
    kind = next((each for each in reversed(servers.REAL) if speaks_tls(each)), "")
    if not kind:
        pytest.skip("no server here was built with TLS; Debian's redis-server is")
    from tests.faults import free_port

    with tempfile.TemporaryDirectory(prefix="pf") as name:
        directory, port = Path(name), free_port()
        certificates(directory)
        process = servers.start(
            kind,
            directory,
            *("--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", "ca.crt"),
            *("--tls-cert-file", "server.crt", "--tls-key-file", "server.key", "--bind", "127.0.0.1"),
        )
        with redis.Redis(unix_socket_path=str(directory / "s")) as client:
            client.config_set("requirepass", PASSWORD)
        try:
            yield Secured(port, directory / "ca.crt", directory / "other.crt", directory)
        finally:
            process.terminate()
            process.wait(10)


def asked(url: str) -> None:
    """What every command does first."""

    async def go() -> None:
        settings = FleetSettings(redis_url=url)  # type: ignore[arg-type]
        client = open_client(checked_url(settings))
        try:
            await checked_connection(client, "rediss://there")
        finally:
            await client.aclose()

    asyncio.run(go())


def test_the_right_name_with_a_certificate_of_a_known_authority_is_trusted(secured: Secured) -> None:
    url = secured.url(ssl_ca_certs=secured.ca)
    asked(url)
    with open_sync_client(url) as client:
        assert client.ping()


def test_another_name_for_the_same_certificate_is_refused(secured: Secured) -> None:
    with pytest.raises(RedisRefused, match=r"certificate that does not hold.*mismatch.*127.0.0.1") as refused:
        asked(secured.url("127.0.0.1", ssl_ca_certs=secured.ca))
    assert PASSWORD not in str(refused.value) and TYPED not in str(refused.value)
    with (
        open_sync_client(secured.url("127.0.0.1", ssl_ca_certs=secured.ca)) as client,
        pytest.raises(redis.ConnectionError),
    ):
        client.ping()


def test_an_unknown_authority_is_refused(secured: Secured) -> None:
    for url in (secured.url(), secured.url(ssl_ca_certs=secured.other_ca)):
        with pytest.raises(RedisRefused, match="certificate that does not hold"):
            asked(url)


def test_a_fleet_runs_over_tls_also_its_host_process(secured: Secured) -> None:
    with site({"users.py": FLOW}, embedded=True) as here:
        url = secured.url(ssl_ca_certs=secured.ca)
        run = here.pocketfleet("run", "users:flow", "--workers", "1", POCKETFLEET_REDIS_URL=url)
        assert run.code() == 0, run.output()
        arq = here.arq("users:flow", "--burst", POCKETFLEET_REDIS_URL=url)
        assert arq.code() == 0, arq.output()
        assert TYPED not in run.output() + arq.output() and PASSWORD not in run.output() + arq.output()
        wrong = here.arq("users:flow", "--burst", POCKETFLEET_REDIS_URL=secured.url("127.0.0.1"))
        assert wrong.code() == 3
        assert wrong.output().count("\n") == 1 and "certificate" in wrong.output()


def test_answers_of_many_records_come_whole_and_each_to_its_call(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.line.source", lambda path: "return ARGV[1]")

    async def go() -> None:
        client = open_client(secured.url(ssl_ca_certs=secured.ca))
        line = Line(client, Path("echo.lua"))
        for size in (1, 20_000, 100_000, 3, 1_000_000):  # a record holds at most 16 KiB
            sent = os.urandom(size)
            assert await line.call(["k"], [sent]) == sent, f"{size} bytes"
        await line.close()
        await client.aclose()

    asyncio.run(go())

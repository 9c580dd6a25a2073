"""The address of Redis as it is typed: read with care, shown without its secrets."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from redis.asyncio.connection import parse_url

from limiter.errors import SettingsError

PREFIX = "POCKETFLEET_"
URL_NAME = PREFIX + "REDIS_URL"
SCHEMES = ("redis", "rediss", "unix")
UNREADABLE = "(an unreadable address)"
ENCODE = "a password that holds one of @ : / % # ? must be percent-encoded"
# Options of redis-py that a URL may set; the others would change what our calls rely on.
URL_OPTIONS = (
    "client_name",
    "db",
    "health_check_interval",
    "password",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_timeout",
    "ssl_ca_certs",
    "ssl_ca_data",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_ciphers",
    "ssl_keyfile",
    "username",
)


def checked_address(url: str, *, allow_plaintext: bool = False, password_file: Path | None = None) -> str:
    """`url` as every client of redis-py reads it, with the password of `password_file` if it has none.

    Raises:
        SettingsError: it cannot be used, or would send everything in the clear to another host; one
            sentence, never with any part of a password.
    """
    url = url.strip()
    shown = f"{URL_NAME}={redacted(url)}"
    options = _checked_options(url, shown)
    _checked_place(url, shown)
    if not allow_plaintext:
        _refuse_open_line(url, options, shown)
    if not options.get("password") and password_file:
        return _with_password(url, _password_in(password_file))
    return _rebuilt(url)


def redacted(url: str) -> str:
    """The address in `url` without credentials and options.

    >>> redacted("rediss://me:p%40ss@db.example:6380/2?ssl_ca_certs=ca.pem")
    'rediss://db.example:6380/2'
    >>> redacted("redis://:pa/ss@db.example")  # a raw '/' in a password: nothing of it may show
    '(an unreadable address)'
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return UNREADABLE
    strayed = "@" in parts.path + parts.query + parts.fragment or parts.fragment
    if parts.scheme not in SCHEMES or strayed or not url.isprintable():
        return UNREADABLE
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    if not host:
        return UNREADABLE
    place = f"[{host}]" if ":" in host else host
    path = parts.path if parts.path[1:].isdecimal() else ""
    return f"{parts.scheme}://{place}{f':{port}' if port else ''}{path}"


def _checked_options(url: str, shown: str) -> dict[str, Any]:
    """What redis-py reads from the URL, or a sentence. Its own texts may hold parts of a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
        asked = parse_qs(parts.query, keep_blank_values=True)
    except ValueError:
        raise SettingsError(f"{shown} has no readable host and port: {ENCODE}") from None
    if parts.scheme not in SCHEMES or not url.lower().startswith(parts.scheme + "://"):
        raise SettingsError(f"{shown} is no Redis address: use redis://, rediss:// or unix://")
    if parts.fragment or "@" in parts.path or not url.isprintable() or port == 0:
        raise SettingsError(f"{shown} cannot be read: {ENCODE}, and a port is from 1 to 65535")
    unknown = sorted(set(asked) - set(URL_OPTIONS))
    if unknown:
        raise SettingsError(f"{shown} has an option we do not know: use only {', '.join(URL_OPTIONS)}")
    try:
        return dict(parse_url(url))
    except (ValueError, TypeError):
        raise SettingsError(f"{shown} has an option that cannot hold: db and time-outs are numbers") from None


def _checked_place(url: str, shown: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if parts.hostname or len(parts.path) < 2:
            raise SettingsError(f"{shown} names no socket: write unix:///path/of/the.sock with three slashes")
        return
    if not parts.hostname:
        raise SettingsError(f"{shown} names no host: write {parts.scheme}://host:6379/0; {ENCODE}")
    if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise SettingsError(
            f"{shown} has no number as its database: end the address with /0, or with nothing"
        )


def _refuse_open_line(url: str, options: dict[str, Any], shown: str) -> None:
    """Passwords and params travel in the clear, or to whoever answers, only where the user says so."""
    parts = urlsplit(url)
    unsafe = f"or set {PREFIX}ALLOW_PLAINTEXT=1 if everybody on that network may read along"
    if parts.scheme == "redis" and not _is_loopback(parts.hostname or ""):
        raise SettingsError(f"{shown} would leave this machine without encryption: use rediss://, {unsafe}")
    verified = options.get("ssl_cert_reqs", "required") == "required" and options.get(
        "ssl_check_hostname", True
    )
    if parts.scheme == "rediss" and not verified:
        raise SettingsError(f"{shown} does not check who answers: leave the ssl_ options away, {unsafe}")


def _is_loopback(host: str) -> bool:
    """
    >>> _is_loopback("localhost"), _is_loopback("127.0.0.9"), _is_loopback("::1"), _is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _password_in(file: Path) -> str:
    name = f"{PREFIX}REDIS_PASSWORD_FILE={str(file)!r}"
    try:
        password = file.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise SettingsError(f"{name} is not UTF-8 text: write the password into it as text") from None
    except OSError as error:
        raise SettingsError(
            f"{name} cannot be read ({error.strerror}): correct the path or its rights"
        ) from None
    if not password:
        raise SettingsError(f"{name} is empty: write the password into it, or remove the variable")
    return password


def _with_password(url: str, password: str) -> str:
    user, _, place = urlsplit(url).netloc.rpartition("@")
    return _rebuilt(url, f"{user.partition(':')[0]}:{quote(password, safe='')}@{place}")


def _rebuilt(url: str, netloc: str | None = None) -> str:
    """The same URL as both clients of redis-py read it: the scheme in small letters, `//` kept."""
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc if netloc is None else netloc}{parts.path}{query}"

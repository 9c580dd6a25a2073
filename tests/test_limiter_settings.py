"""Settings hold, or one sentence names the variable as it is typed; no secret ever shows."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from redis.asyncio.connection import parse_url

from limiter import unread
from limiter.address import checked_address, redacted
from limiter.connect import find_redis
from limiter.errors import RedisRefused, SettingsError
from limiter.settings import FleetSettings, checked_url, load, settings_table
from producer.settings import ProducerSettings
from worker.lifeline import VARIABLE
from worker.settings import WorkerSettings

SECRET = "canary-7"


class WiderSettings(FleetSettings):
    """As the worker's room adds its own."""

    jobs: int = Field(10, ge=1, le=50, description="Runs at a time")
    flows: list[str] = Field([], description="Names of flows")
    colour: Literal["red", "green"] = Field("red", description="Of lines")
    name: str = Field(..., description="Text")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("POCKETFLEET_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_without_any_variable_the_defaults_hold() -> None:
    settings = load()
    assert (settings.lease_s, settings.stall_limit_s, settings.redis_url) == (15, 300, None)
    assert settings.data_dir == Path(".pocketfleet") and not settings.allow_plaintext


def test_env_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("POCKETFLEET_LEASE_S=20\nPOCKETFLEET_STALL_LIMIT_S=30\nOTHER=1\n")
    monkeypatch.setenv("POCKETFLEET_LEASE_S", "25")
    settings = load()
    assert (settings.lease_s, settings.stall_limit_s) == (25, 30)


def test_paths_and_env_file_stay_where_they_were_when_the_directory_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("POCKETFLEET_DATA_DIR=data\nPOCKETFLEET_REDIS_PASSWORD_FILE=password\n")
    at_first = load()
    assert (at_first.data_dir, at_first.redis_password_file) == (Path("data"), Path("password"))
    first = Path.cwd()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path(".env").write_text("POCKETFLEET_DATA_DIR=other\n")
    then = load()
    assert (then.data_dir, then.redis_password_file) == (first / "data", first / "password")
    monkeypatch.chdir(first)
    assert load().data_dir == Path("data")


def test_a_log_level_may_be_written_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETFLEET_LOG_LEVEL", "debug")
    assert load(WorkerSettings).log_level == "DEBUG"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("LEASE_S", "abc", "POCKETFLEET_LEASE_S='abc' cannot hold: use a number from 1 to 300"),
        ("LEASE_S", "0.5", "POCKETFLEET_LEASE_S='0.5' cannot hold"),
        ("LEASE_S", "nan", "POCKETFLEET_LEASE_S='nan' cannot hold"),
        ("STALL_LIMIT_S", "1e9", "to 86400"),
        ("ALLOW_PLAINTEXT", "perhaps", "use true or false"),
        ("REDIS_URL", " ", "POCKETFLEET_REDIS_URL is empty: give it a value, or remove the variable"),
        ("JOBS", "1.5", "POCKETFLEET_JOBS='1.5' cannot hold: use a whole number from 1 to 50"),
        ("FLOWS", "a,b", "POCKETFLEET_FLOWS cannot be read: write its value as JSON"),
        ("UNSET", "x", "POCKETFLEET_NAME is not set: use text"),
        ("COLOUR", "blue", "POCKETFLEET_COLOUR='blue' cannot hold: use red or green (Of lines)"),
    ],
)
def test_what_does_not_hold_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    if name != "UNSET":
        monkeypatch.setenv("POCKETFLEET_NAME", "n")
    monkeypatch.setenv(f"POCKETFLEET_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load(WiderSettings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_env_file_is_one_sentence() -> None:
    Path(".env").write_bytes(b"POCKETFLEET_LEASE_S=\xff\n")
    with pytest.raises(SettingsError, match=r"^\.env cannot be read \(not UTF-8 text\)"):
        load()


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "_told", False)


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("POCKETFLEET_REDIS_UR", "is no setting and is not read: did you mean POCKETFLEET_REDIS_URL?"),
        ("pocketfleet_max_job", "did you mean POCKETFLEET_MAX_JOBS?"),
        ("POCKETFLEET_COLOUR", "is no setting and is not read: see the README's table"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_a_mistyped_name_is_told_once_without_its_value(
    name: str, says: str, in_file: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if in_file:
        Path(".env").write_text(f"{name}={SECRET}\n")
    else:
        monkeypatch.setenv(name, SECRET)
    load()
    load()
    told = capsys.readouterr().err
    assert told.startswith(f"pocketfleet: {name.upper()} ") and says in told
    assert told.count("\n") == 1 and SECRET not in told


@pytest.mark.usefixtures("untold")
def test_every_setting_and_our_own_words_to_processes_are_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    above = set(ProducerSettings.model_fields) - set(FleetSettings.model_fields)
    assert {name.lower() for name in unread.ABOVE} == above
    for name, value in {
        **{variable: "1" for variable, _, _ in settings_table(ProducerSettings)},
        VARIABLE: "7",
        "POCKETFLEET_REDIS_PORT": "tcp://10.0.0.1:6379",
        "POCKETFLEET_REDIS_SERVICE_HOST": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for cls in (FleetSettings, ProducerSettings):
        with contextlib.suppress(SettingsError):  # "1" is no value of each
            load(cls)
    assert capsys.readouterr().err == ""


def test_no_repr_shows_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETFLEET_REDIS_URL", f"redis://:{SECRET}@localhost")
    settings = load()
    assert SECRET not in repr(settings) + str(settings) + repr(settings.model_dump())


def test_table_names_each_setting_once_with_its_default() -> None:
    rows = settings_table(FleetSettings, WiderSettings)
    names = [row[0] for row in rows]
    assert len(names) == len(set(names)) and names[-1] == "POCKETFLEET_NAME"
    assert ("POCKETFLEET_ALLOW_PLAINTEXT", "false") in [(row[0], row[2]) for row in rows]
    assert all(row[1] for row in rows)
    assert {row[0]: row[2] for row in rows}["POCKETFLEET_LEASE_S"] == "15"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://:{SECRET}@host", "no Redis address"),
        (SECRET, "no Redis address"),
        (f"redis://:{SECRET}/x@localhost", "must be percent-encoded"),
        (f"redis://:{SECRET}#x@localhost", "must be percent-encoded"),
        (f"redis://:{SECRET}?x@localhost", "must be percent-encoded"),
        (f"redis://{SECRET}/x@localhost:6379", "must be percent-encoded"),
        (f"redis://me:{SECRET}@localhost:99999", "no readable host and port"),
        (f"redis://me:{SECRET}@localhost:0", "from 1 to 65535"),
        (f"redis://:{SECRET}@", "names no host"),
        (f"redis://:{SECRET}@localhost/one", "no number as its database"),
        (f"redis://:{SECRET}@localhost?db=one", "cannot hold"),
        (f"redis://:{SECRET}@localhost?retry_on_timeout=1", "option we do not know"),
        (f"unix://relative.sock?password={SECRET}", "three slashes"),
        ("redis:localhost", "no Redis address"),
    ],
)
def test_bad_address_is_refused_without_its_password(url: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        checked_address(url)
    text = str(caught.value)
    assert says in text and text.startswith("POCKETFLEET_REDIS_URL=")
    assert SECRET not in text and SECRET not in repr(caught.value.__cause__)


@pytest.mark.parametrize(
    "url",
    [
        "redis://db.example:6379/0",
        "redis://10.0.0.1",
        "rediss://db.example?ssl_cert_reqs=none",
        "rediss://db.example?ssl_check_hostname=false",
    ],
)
def test_open_line_to_another_host_needs_the_users_word(url: str) -> None:
    with pytest.raises(SettingsError, match="POCKETFLEET_ALLOW_PLAINTEXT=1"):
        checked_address(url)
    assert checked_address(url, allow_plaintext=True) == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://127.0.0.1:6379/1",
        "redis://[::1]:6379",
        "rediss://db.example/2?ssl_ca_certs=/ca.pem",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_good_address_stays_as_it_is(url: str) -> None:
    assert checked_address(f" {url}\n") == url


def test_scheme_in_capitals_is_written_small_as_both_clients_want_it() -> None:
    assert checked_address("REDIS://localhost:6379") == "redis://localhost:6379"


@pytest.mark.parametrize(
    ("url", "user"),
    [("redis://me@localhost:6379/1", "me"), ("redis://localhost", None), ("unix:///a b.sock?db=2", None)],
)
def test_password_file_is_merged_encoded_and_decodes_to_itself(
    url: str, user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("password").write_text("p@ss/w:r%d #?é\n")
    monkeypatch.setenv("POCKETFLEET_REDIS_URL", url)
    monkeypatch.setenv("POCKETFLEET_REDIS_PASSWORD_FILE", "password")
    read = parse_url(checked_url(load()))
    assert read["password"] == "p@ss/w:r%d #?é"
    assert read.get("username") == user
    assert read.get("db") == parse_url(url).get("db") and read.get("path") == parse_url(url).get("path")


def test_password_of_the_url_wins_over_the_file() -> None:
    assert (
        checked_address("redis://:p%40ss@localhost", password_file=Path("absent"))
        == "redis://:p%40ss@localhost"
    )


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b" \n", "is empty"), (b"\xff", "UTF-8")]
)
def test_useless_password_file_is_named(content: bytes | None, says: str) -> None:
    if content is not None:
        Path("password").write_bytes(content)
    with pytest.raises(SettingsError, match=f"POCKETFLEET_REDIS_PASSWORD_FILE='password' .*{says}"):
        checked_address("redis://localhost", password_file=Path("password"))


def test_shown_address_has_no_credentials() -> None:
    assert redacted("redis://me:p%40ss@[::1]:6379/3?db=1") == "redis://[::1]:6379/3"
    assert redacted("unix://:pw@/run/redis.sock?password=pw") == "unix:///run/redis.sock"
    assert redacted("redis://ho\x1bst") == "(an unreadable address)"


def test_nothing_set_and_nothing_running_says_what_to_do() -> None:
    with pytest.raises(
        RedisRefused, match=r"no Redis is set and no PocketFleet server runs in \.pocketfleet: set"
    ):
        find_redis(load(), start=False)
    assert not Path(".pocketfleet").exists()


def test_place_of_a_set_url_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETFLEET_REDIS_URL", f"redis://:{SECRET}@localhost:1")
    place = find_redis(load(), start=True)
    assert SECRET in place.url and place.shown == "redis://localhost:1" and SECRET not in repr(place)
    place.close()

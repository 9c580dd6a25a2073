"""Settings from the environment or `.env`, each with its unit and its bounds.

`load` turns whatever does not hold into one sentence that names the variable as it is typed.
"""

from __future__ import annotations

import os
import typing
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, overload

import annotated_types
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableSetting

from limiter.address import PREFIX, URL_NAME, checked_address
from limiter.errors import SettingsError
from limiter.unread import tell_once

S = TypeVar("S", bound="FleetSettings")


class FleetSettings(BaseSettings):
    """What every process of the fleet reads. Rooms above add fields in a subclass; see `load`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        extra="ignore",
        hide_input_in_errors=True,
    )

    redis_url: SecretStr | None = Field(
        None,
        description="Address of Redis or Valkey: redis://, rediss:// (TLS) or unix://; "
        "without it a server of our own runs in the data directory",
    )
    redis_password_file: Path | None = Field(
        None, description="Path of a file that holds the password, used if the URL has none"
    )
    allow_plaintext: bool = Field(
        False, description="true or false: whether redis:// without TLS may leave this machine"
    )
    data_dir: Path = Field(
        Path(".pocketfleet"), description="Path of the directory for spools and the server of our own"
    )
    lease_s: float = Field(
        15, ge=1, le=300, description="Seconds a process keeps its slots and jobs without a word"
    )
    stall_limit_s: float = Field(
        300, ge=1, le=86_400, description="Seconds user code may block the event loop before the lease ends"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        # An empty variable is most often a forgotten one, and a fleet without its URL would not share a limit.
        if isinstance(value, str) and not value.strip():
            raise ValueError("is empty: give it a value, or remove the variable")
        return value

    @field_validator("data_dir", "redis_password_file")
    @classmethod
    def _at_home(cls, value: Path | None) -> Path | None:
        return _kept_in_place(value.expanduser()) if value else value


def current_directory() -> Path | None:
    """None where it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


@lru_cache
def _first_directory() -> Path | None:
    """Where this process was when it first read a setting."""
    return current_directory()


def _kept_in_place(path: Path) -> Path:
    """What `path` was at first, also where user code has gone to another directory since; short until then."""
    first = _first_directory()
    return path if first is None or first == current_directory() else first / path


@overload
def load() -> FleetSettings: ...
@overload
def load(cls: type[S]) -> S: ...
def load(cls: type[Any] = FleetSettings) -> Any:
    """The settings of `cls` from the environment, else from `.env` in the current directory.

    That is the one in which this process first asked, for relative paths as well. A variable that begins like a
    setting and is none is told once, on standard error.

    Raises:
        SettingsError: something does not hold; one sentence, without the value of a secret.
    """
    try:
        env_file = _kept_in_place(Path(".env"))
        in_file = DotEnvSettingsSource(cls, env_file=env_file).env_vars
        tell_once([*os.environ, *in_file], cls.model_fields)
        return cls(_env_file=env_file)
    except ValidationError as error:
        wrong = [_wrong(cls, each) for each in error.errors(include_url=False)]
        raise SettingsError("; ".join(wrong)) from None
    except UnreadableSetting as error:
        name = next((name for name in cls.model_fields if f'"{name}"' in str(error)), "")
        raise SettingsError(f"{_variable(cls, name)} cannot be read: write its value as JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f".env cannot be read ({why}): mend it, or remove it") from None


def settings_table(*classes: type[FleetSettings]) -> list[tuple[str, str, str]]:
    """Name, description (with the unit) and default of every setting, each once, in order."""
    rows: dict[str, tuple[str, str, str]] = {}
    for cls in classes:
        for name, field in cls.model_fields.items():
            variable = _variable(cls, name)
            rows.setdefault(variable, (variable, field.description or "", _shown(field.get_default())))
    return list(rows.values())


def checked_url(settings: FleetSettings) -> str:
    """The URL to connect to, password included: for clients, never for people.

    Raises:
        SettingsError: no usable address, or one that would send everything in the clear to another
            host; never with the password.
    """
    if settings.redis_url is None:
        raise SettingsError(f"{URL_NAME} is not set: set it to redis://, rediss:// or unix://")
    return checked_address(
        settings.redis_url.get_secret_value(),
        allow_plaintext=settings.allow_plaintext,
        password_file=settings.redis_password_file,
    )


def _variable(cls: type[BaseSettings], field: str) -> str:
    return (str(cls.model_config.get("env_prefix", "")) + field).upper()


def _wrong(cls: type[BaseSettings], error: Any) -> str:
    """One validation error as `NAME=value: what it should be`."""
    name = str(error["loc"][0]) if error["loc"] else ""
    field = cls.model_fields.get(name)
    own = error.get("ctx", {}).get("error")
    if field is None:
        return str(own or error["msg"])
    variable = _variable(cls, name)
    if error["type"] == "missing":
        return f"{variable} is not set: {_wanted(field)}"
    secret = "Secret" in str(field.annotation)
    shown = variable if secret else f"{variable}={error['input']!r:.80}"
    if own is not None:
        return f"{shown} {own}"
    return f"{shown} cannot hold: {_wanted(field)}"


def _wanted(field: FieldInfo) -> str:
    """What a field takes, from its type and bounds."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    types = [field.annotation, *typing.get_args(field.annotation)]
    words = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    kind = next((text for each, text in kinds.items() if each in types), " or ".join(words) or "text")
    low = next((str(rule.ge) for rule in field.metadata if isinstance(rule, annotated_types.Ge)), "")
    high = next((str(rule.le) for rule in field.metadata if isinstance(rule, annotated_types.Le)), "")
    bounds = f" from {low} to {high}" if low and high else f" from {low} up" if low else ""
    return f"use {kind}{bounds}" + (f" ({field.description})" if field.description else "")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else "none" if default is None else str(default)

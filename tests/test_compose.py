"""compose.yaml, the Dockerfile and .dockerignore keep what the README promises of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SECRET = "/run/secrets/redis_password"
OURS = ("worker", "producer")
ALL = ("redis", *OURS)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return content


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined, comments left out."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def arguments(dockerfile: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in dockerfile if name == instruction]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


def redis_script(compose: dict[str, Any]) -> str:
    """The shell script that starts Redis, as the container sees it."""
    shell, flag, script = compose["services"]["redis"]["command"]
    assert (shell, flag) == ("sh", "-c")
    return str(script).replace("$$", "$")


def test_there_are_redis_worker_and_producer_and_nothing_else(compose: dict[str, Any]) -> None:
    assert sorted(compose["services"]) == sorted(ALL)


def test_no_service_publishes_a_port(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert not {"ports", "network_mode"} & set(service)


def test_redis_is_reached_through_the_private_network_only(compose: dict[str, Any]) -> None:
    assert compose["networks"]["private"]["internal"] is True
    assert compose["services"]["redis"]["networks"] == ["private"]
    for name in OURS:
        assert "private" in compose["services"][name]["networks"]


def test_redis_image_is_named_by_a_version_tag(compose: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+[a-z0-9.-]*", compose["services"]["redis"]["image"])


def test_redis_keeps_an_append_only_file_on_a_volume_and_evicts_nothing(compose: dict[str, Any]) -> None:
    script = redis_script(compose)

    assert "--appendonly yes" in script
    assert "--maxmemory-policy noeviction" in script
    assert re.search(r'--maxmemory "\$MAXMEMORY"', script)
    assert compose["services"]["redis"]["environment"]["MAXMEMORY"]
    assert compose["services"]["redis"]["volumes"] == ["redis-data:/data"]
    assert "--dir /data" in script
    assert "redis-data" in compose["volumes"]


def test_password_comes_from_a_secret_file(compose: dict[str, Any]) -> None:
    assert list(compose["secrets"]["redis_password"]) == ["file"]
    for name in ALL:
        assert compose["services"][name]["secrets"] == ["redis_password"]
    for name in OURS:
        environment = compose["services"][name]["environment"]
        assert environment["POCKETFLEET_REDIS_PASSWORD_FILE"] == SECRET
        assert "@" not in environment["POCKETFLEET_REDIS_URL"]


def test_password_is_in_no_command_line(compose: dict[str, Any]) -> None:
    first_line, *rest = redis_script(compose).splitlines()
    check = compose["services"]["redis"]["healthcheck"]["test"][1]

    assert SECRET not in first_line
    assert f'requirepass "$(cat {SECRET})"' in rest
    assert check.startswith("REDISCLI_AUTH=") and " -a " not in check and "--pass" not in check


def test_redis_and_workers_have_health_checks_and_wait_for_redis(compose: dict[str, Any]) -> None:
    assert "redis-cli ping" in compose["services"]["redis"]["healthcheck"]["test"][1]
    assert compose["services"]["worker"]["healthcheck"]["test"] == [
        "CMD",
        "pocketfleet",
        "workers",
        "--check",
    ]
    for name in OURS:
        assert compose["services"][name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_workers_scale(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]

    assert re.fullmatch(r"\$\{FLEET_WORKERS:-\d+\}", worker["deploy"]["replicas"])
    assert "container_name" not in worker and "hostname" not in worker
    assert worker["restart"] == "unless-stopped"


def test_worker_gets_more_time_to_stop_than_it_takes_to_drain(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]

    assert seconds(worker["stop_grace_period"]) > float(worker["environment"]["POCKETFLEET_DRAIN_S"])


def test_commands_are_those_of_the_readme(compose: dict[str, Any]) -> None:
    worker, producer = (compose["services"][name] for name in OURS)
    assert worker["command"] == "worker"
    assert worker["environment"]["POCKETFLEET_FLOWS"] == "${POCKETFLEET_FLOWS:-users:flow}"
    assert producer["command"] == ["enqueue", "users:flow", "--set", "user_ids=[1,2,3]"]


def test_users_folder_is_mounted_read_only_where_the_command_runs(compose: dict[str, Any]) -> None:
    for name in OURS:
        service = compose["services"][name]
        mount = next(one for one in service["volumes"] if isinstance(one, dict))
        assert mount["type"] == "bind" and mount["read_only"] is True
        assert mount["target"] == service["working_dir"] == "/app/flows"
        assert "${FLEET_FLOWS_DIR:-" in mount["source"]


def test_producer_is_a_one_shot_that_keeps_its_spool_on_a_volume(compose: dict[str, Any]) -> None:
    producer = compose["services"]["producer"]

    assert producer["profiles"] == ["producer"]
    assert producer["restart"] == "no"
    assert f"producer-data:{producer['environment']['POCKETFLEET_DATA_DIR']}" in producer["volumes"]
    assert "producer-data" in compose["volumes"]


def test_workers_data_directory_is_writable_on_a_read_only_file_system(compose: dict[str, Any]) -> None:
    assert compose["services"]["worker"]["environment"]["POCKETFLEET_DATA_DIR"].startswith("/tmp/")


@pytest.mark.parametrize("name", ALL)
def test_containers_have_no_rights_they_do_not_need(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]

    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp:mode=1777"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)


def test_dockerfile_builds_from_python_by_version_tag(dockerfile: list[tuple[str, str]]) -> None:
    for image in arguments(dockerfile, "FROM"):
        assert re.match(r"python:3\.\d+-slim-[a-z]+( AS \w+)?$", image)


def test_every_install_is_hashed_or_ours(dockerfile: list[tuple[str, str]]) -> None:
    installs = [run for run in arguments(dockerfile, "RUN") if "pip install" in run]

    assert any("--require-hashes -r requirements/runtime.txt" in run for run in installs)
    for run in installs:
        assert "--require-hashes" in run or "--no-deps --no-index /dist" in run
    wheels = [run for run in arguments(dockerfile, "RUN") if "pip wheel" in run]
    assert all("--no-deps" in run and "--no-build-isolation" in run for run in wheels)


def test_image_runs_pocketfleet_without_root(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any]
) -> None:
    (user,) = arguments(dockerfile, "USER")

    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert user == compose["services"]["worker"]["user"]
    assert arguments(dockerfile, "WORKDIR")[-1] == compose["services"]["worker"]["working_dir"]
    assert json.loads(arguments(dockerfile, "ENTRYPOINT")[0]) == ["pocketfleet"]


def test_producers_volume_belongs_to_the_images_user(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any]
) -> None:
    folder = compose["services"]["producer"]["environment"]["POCKETFLEET_DATA_DIR"]

    assert any(
        f"install -d -o 10001 -g 10001 -m 0700 {folder}" in run for run in arguments(dockerfile, "RUN")
    )


def test_build_context_holds_only_what_is_copied(dockerfile: list[tuple[str, str]]) -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copies = [rest.split()[:-1] for rest in arguments(dockerfile, "COPY") if not rest.startswith("--from")]

    assert next(rule for rule in rules if not rule.startswith("#")) == "*"
    assert {source.split("/")[0] for sources in copies for source in sources} == kept
    for name in kept:
        assert (ROOT / name).exists(), f"{name} is copied by the Dockerfile and is not there"


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a redis-server")
def test_redis_starts_as_written_and_wants_the_password(compose: dict[str, Any], tmp_path: Path) -> None:
    from redis import Redis
    from redis.exceptions import AuthenticationError

    (tmp_path / "password").write_text("0123abcd\n")
    socket = tmp_path / "redis.sock"
    script = redis_script(compose).replace(SECRET, str(tmp_path / "password"))
    script = script.replace("--dir /data", f"--dir {tmp_path} --port 0 --unixsocket {socket}")
    server = subprocess.Popen(
        ["sh", "-c", script], env={**os.environ, "MAXMEMORY": "64mb"}, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with Redis(unix_socket_path=str(socket)) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        with Redis(unix_socket_path=str(socket), password="0123abcd") as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert client.config_get("maxmemory") == {"maxmemory": str(64 * 2**20)}
            assert client.info("server")["process_id"] == server.pid, "the shell must give way to Redis"
    finally:
        server.terminate()
        assert server.wait(timeout=10) == 0

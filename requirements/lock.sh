#!/bin/sh
# Write the locks anew: every version pinned, every file hashed, for Python 3.11 to 3.14, Linux and macOS.
# No registry's address is written; pip uses the one it is set up for. Run by `make lock`.
set -eu
cd "$(dirname "$0")/.."

tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
"${PYTHON:-python3}" -m venv "$tool"
"$tool/bin/python" -m pip --quiet --disable-pip-version-check install "${UV:-uv}"

lock() {
    out=$1
    shift
    "$tool/bin/uv" --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-annotate --no-emit-package pocketfleet --upgrade --output-file "$out" "$@"
}

lock requirements/dev.txt --extra test --extra check pyproject.toml requirements/build.in
# The others follow dev.txt, so that what is tested is what runs.
lock requirements/runtime.txt --constraint requirements/dev.txt pyproject.toml
lock requirements/build.txt --constraint requirements/dev.txt requirements/build.in
lock requirements/bench.txt --constraint requirements/dev.txt \
    --extra test --extra check --extra bench pyproject.toml requirements/build.in
lock requirements/peers.txt requirements/peers.in

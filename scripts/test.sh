#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, the wheel on its own, and the tests.
# Run: bash scripts/test.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/_install.sh
source scripts/_install.sh

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# The wheel's own recipes must do: it is imported from a bare folder, in a directory with nothing in it.
check_wheel() {
    local python="$PWD/.venv/bin/python"
    rm -rf build/lib build/bdist.* # modules that are gone would come back in the wheel
    "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$scratch" .
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$scratch/site" "$scratch"/peftctl-*.whl
    mkdir "$scratch/empty"
    (
        cd "$scratch/empty"
        export PYTHONPATH="$scratch/site"
        "$python" -c "import peftctl; assert peftctl.__file__.startswith('$scratch/site'), peftctl.__file__"
        "$python" -m peftctl recipes copy lora my.yaml
        "$python" -m peftctl recipes schema > schema.json
        "$python" -m peftctl train my.yaml --dry-run
    )
}

install_peftctl dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python scripts/fetch_demo_models.py
check_wheel
# Two processes, a thread each; a file stays in one, with all that its tests share. Files go in their own order: by the
# number of tests the few that start processes would come last, one after the other. `-n 0` behind it takes one process.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25 "$@"

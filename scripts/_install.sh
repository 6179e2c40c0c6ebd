# Sourced from the clone's root by quickstart.sh and test.sh: a virtual environment in .venv with peftctl in it.

# Print what an install depends on, so that an unchanged environment is left alone.
install_key() {
    .venv/bin/python - <<'PY'
import hashlib
import pathlib
import sys

parts = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "setup.py", "scripts/constraints.txt")]
print(hashlib.sha256(b"\0".join([sys.version.encode(), str(pathlib.Path.cwd()).encode(), *parts])).hexdigest())
PY
}

# install_peftctl [EXTRA]: installs this clone into .venv, with an extra; does nothing where that has been done.
install_peftctl() {
    local extra="${1:-}" python="${PYTHON:-python3}" key stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: peftctl needs Python 3.11 or newer, '$python' is $("$python" --version 2>&1);" \
            "name another one: PYTHON=python3.12 bash $0" >&2
        return 1
    fi
    # A folder that was moved or whose Python is gone has a broken interpreter link.
    .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
    key="$(install_key)"
    stamp=".venv/peftctl-installed${extra:+-$extra}"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]]; then
        return 0
    fi
    echo "Installing peftctl${extra:+ [$extra]} into .venv (some minutes the first time)"
    local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt)
    "${pip[@]}" torch setuptools wheel
    # DeepSpeed's build imports torch, so it needs the environment that it goes into; its kernels build on first use.
    DS_BUILD_OPS=0 "${pip[@]}" --no-build-isolation --editable ".${extra:+[$extra]}"
    echo "$key" >"$stamp"
    if [[ -n "$extra" ]]; then
        echo "$key" >.venv/peftctl-installed # an extra comes on top of everything else
    fi
}

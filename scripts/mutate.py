"""Put a deliberate fault into each method's code and see its tests fail: a check of the tests, not of the code.

    python scripts/mutate.py [NAME ...] [--jobs N]

For every tests/mutations/NAME.patch the sources are copied to a temporary directory, the patch is applied there, and
tests/methods/test_NAME.py runs. Each patch gives one line: `caught` where a test failed, `MISSED` where all passed,
`error` where the patch does not apply or the tests can't be collected. Exit status 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("peftctl", "tests", "recipes", "configs", "scripts", "pyproject.toml", "README.md")
_FAILED = re.compile(r"^FAILED (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What came of one patch.

    Args:
        name: The patch and the test file.
        outcome: `caught`, `MISSED` or `error`.
        detail: The first test that failed, or what went wrong.
    """

    name: str
    outcome: str
    detail: str

    def __str__(self) -> str:
        return f"{self.outcome:<6}  {self.name}: {self.detail}"


def patches(root: Path) -> list[str]:
    """Return the names of all patches."""
    return sorted(path.stem for path in (root / "tests" / "mutations").glob("*.patch"))


def judge(name: str, root: Path = ROOT) -> Verdict:
    """Apply one patch to a copy of the sources and run the method's tests there."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as place:
        copy = Path(place) / "copy"
        _copy_sources(root, copy)
        applied = _run(["git", "apply", str(root / "tests" / "mutations" / f"{name}.patch")], copy)
        if applied.returncode:
            return Verdict(name, "error", _last_line(applied.stderr))
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"tests/methods/test_{name}.py"]
        tests = _run([sys.executable, "-m", "pytest", *arguments], copy)
    failed = _FAILED.search(tests.stdout)
    if tests.returncode == 0:
        return Verdict(name, "MISSED", _last_line(tests.stdout))
    if tests.returncode != 1 or failed is None:  # 2 and more: nothing was collected, or pytest was stopped
        return Verdict(name, "error", _last_line(tests.stdout + tests.stderr))
    return Verdict(name, "caught", failed[1].split("::", 1)[-1])


def _copy_sources(root: Path, copy: Path) -> None:
    copy.mkdir()
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, copy / name)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Judge the patches that are named, or all; print one line each and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="patches without .patch; left out, all")
    parser.add_argument("--jobs", type=int, default=1, help="patches at a time")
    options = parser.parse_args(arguments)
    known = patches(root)
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"no such patch: {', '.join(unknown)}; there are: {', '.join(known)}")
    verdicts = []
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        for verdict in pool.map(partial(judge, root=root), options.names or known):
            print(verdict, flush=True)
            verdicts.append(verdict)
    return int(any(verdict.outcome != "caught" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())

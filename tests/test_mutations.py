"""Every method has a deliberate fault on file that still applies, and scripts/mutate.py tells caught from missed."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from peftctl.methods import registry

ROOT = Path(__file__).parents[1]
PATCHES = sorted((ROOT / "tests/mutations").glob("*.patch"))


def by_stem(path):
    return path.stem


def test_every_method_has_a_mutation_and_tests_that_must_catch_it():
    names = {path.stem for path in PATCHES}
    assert set(registry.names()) <= names
    assert [name for name in sorted(names) if not (ROOT / f"tests/methods/test_{name}.py").is_file()] == []


@pytest.mark.parametrize("path", PATCHES, ids=by_stem)
def test_it_says_what_it_breaks_and_touches_only_the_package(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    changed = re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE)
    assert changed and all(re.fullmatch(r"peftctl/[\w/]+\.py", name) for name in changed)


@pytest.mark.parametrize("path", PATCHES, ids=by_stem)
def test_it_applies(path):
    done = subprocess.run(["git", "apply", "--check", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- scripts/mutate.py ---------------------------------------------------------------------------------------------

PATCH = """# {name}: another answer
diff --git a/peftctl/answer.py b/peftctl/answer.py
--- a/peftctl/answer.py
+++ b/peftctl/answer.py
@@ -1 +1 @@
-ANSWER = {old}
+ANSWER = {new}
"""


@pytest.fixture
def mutate(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mutate")


@pytest.fixture
def repository(tmp_path):
    """A package of one line with a test, and four patches of it."""
    for name in ("peftctl", "tests/methods", "tests/mutations"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "peftctl/answer.py").write_text("ANSWER = 42\n")
    test = "from peftctl.answer import ANSWER\n\ndef test_it():\n    assert ANSWER > 40\n"
    for name, old, new in (("caught", 42, 7), ("missed", 42, 43), ("stale", 41, 7), ("broken", 42, "((")):
        (tmp_path / f"tests/methods/test_{name}.py").write_text(test)
        (tmp_path / f"tests/mutations/{name}.patch").write_text(PATCH.format(name=name, old=old, new=new))
    return tmp_path


def test_a_patch_is_caught_missed_or_an_error(repository, mutate, capsys):
    assert mutate.main(["--jobs", "2"], repository) == 1
    broken, caught, missed, stale = capsys.readouterr().out.splitlines()
    assert caught == "caught  caught: test_it"
    assert missed.startswith("MISSED  missed: ")
    assert stale.startswith("error   stale: ") and "patch does not apply" in stale
    assert broken.startswith("error   broken: ")
    assert (repository / "peftctl/answer.py").read_text() == "ANSWER = 42\n"


def test_all_caught_is_success_and_unknown_names_are_refused(repository, mutate, capsys):
    assert mutate.main(["caught"], repository) == 0
    with pytest.raises(SystemExit):
        mutate.main(["cought"], repository)
    assert "no such patch: cought; there are: broken, caught, missed, stale" in capsys.readouterr().err

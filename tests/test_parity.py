"""Every method's layer equals an independent computation of its paper's equations, and a wrong one is reported."""

import inspect
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from scripts import parity
from scripts.parity import __main__ as script
from scripts.parity._core import Difference, Fixture, Values, compare

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = Fixture(seed=1, source="none", shapes="none", config={})


@pytest.fixture(autouse=True)
def one_thread():
    """Small products only: other threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def naive_values(name):
    module = parity.load(name)
    return module.naive(module.given())


@pytest.mark.parametrize("name", parity.names())
def test_a_method_equals_its_paper(name):
    module = parity.load(name)
    found = compare(module.FIXTURE, module.ours(module.given()), naive_values(name))
    assert found.equal, f"{found.names}: outputs {found.outputs:.1e}, gradients {found.gradients:.1e}"


@pytest.mark.parametrize("name", parity.names())
def test_a_fixture_says_where_its_numbers_come_from_and_why_it_allows_more(name):
    fixture = parity.load(name).FIXTURE
    assert "arXiv" in fixture.source and fixture.shapes
    assert fixture.tolerance <= 1e-9 or (fixture.reason and fixture.tolerance <= 1e-5)


@pytest.mark.parametrize("name", parity.names())
def test_the_same_seed_gives_the_same_numbers_and_another_others(name, monkeypatch):
    module = parity.load(name)
    first, again = module.given(), module.given()
    assert all(torch.equal(first[key], again[key]) for key in first)
    monkeypatch.setattr(module, "FIXTURE", replace(module.FIXTURE, seed=module.FIXTURE.seed + 1))
    other = module.given()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def names_in(code):
    """Return the names that a function reads, also in what is defined inside of it."""
    inner = (names_in(part) for part in code.co_consts if inspect.iscode(part))
    return {*code.co_names}.union(*inner)


def origins(function, seen):
    """Return the modules of all that a function of scripts/parity uses, and of what that uses."""
    names = names_in(function.__code__)
    for value in [function.__globals__.get(name) for name in names]:
        parts = [value, *(getattr(value, name, None) for name in names)] if inspect.ismodule(value) else [value]
        for part in parts:
            origin = part.__name__ if inspect.ismodule(part) else getattr(part, "__module__", None) or ""
            if (origin, id(part)) in seen or not origin.startswith(("scripts.", "peftctl", "tests.")):
                continue
            seen.add((origin, id(part)))
            if inspect.isfunction(part):
                origins(part, seen)
    return {origin for origin, _ in seen}


@pytest.mark.parametrize("name", parity.names())
def test_the_naive_side_knows_nothing_of_the_product(name):
    module = parity.load(name)
    reached = origins(module.naive, set()) | origins(module.given, set())
    assert not {o for o in reached if o.startswith(("peftctl", "tests.")) or o.endswith("._product")}
    assert {"scripts.parity._product", "peftctl.methods.registry"} <= origins(module.ours, set())


# -- a wrong value is reported -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["outputs", "gradients"])
def test_a_wrong_naive_value_is_reported_as_differing(kind, monkeypatch, capsys):
    module = parity.load("lora")
    naive = module.naive

    def wrong(given):
        right = naive(given)
        values = dict(getattr(right, kind))
        name = sorted(values)[0]
        values[name] = values[name].clone()
        values[name].view(-1)[0] += 1e-6
        return replace(right, **{kind: values})

    monkeypatch.setattr(module, "naive", wrong)
    found = parity.compared("lora")
    assert not found.equal and len(found.names) == 1 and found.names[0].startswith(kind)
    assert not script.report("lora")
    assert "DIFFERS in " + found.names[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", parity.names())
def test_no_fixture_compares_what_a_fault_of_a_thousandth_would_not_change(name):
    module, naive = parity.load(name), naive_values(name)
    for kind in ("outputs", "gradients"):
        values = getattr(naive, kind)
        assert values
        for key, value in values.items():
            shifted = {
                **values,
                key: value + 1e-3 * (value.abs().max() if value.any() else 1) if value.numel() else value,
            }
            assert not compare(module.FIXTURE, replace(naive, **{kind: shifted}), naive).equal, key


@pytest.mark.parametrize(
    "ours",
    [
        {"y": torch.ones(3)},  # another shape
        {"y": torch.tensor([1.0, math.nan])},
        {},  # missing
        {"y": torch.ones(2), "z": torch.ones(2)},  # one too many
    ],
)
def test_other_shapes_names_and_nan_are_infinitely_far(ours):
    found = compare(FIXTURE, Values({}, ours), Values({}, {"y": torch.ones(2)}))
    assert not found.equal and found.gradients == math.inf


def test_differences_are_shares_of_the_largest_entry():
    found = compare(FIXTURE, Values({"y": torch.tensor([4.0, 0.5])}, {}), Values({"y": torch.tensor([4.0, 0.0])}, {}))
    assert found == Difference(0.125, 0.0, ("outputs.y",))


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_method_from_wherever_it_is_run(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "parity"), "lora"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("lora ") and "equal" in line and "2106.09685" in line and "seed 2106" in line


def test_the_command_fails_where_a_method_differs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parity", "lora"])
    monkeypatch.setattr(script, "report", lambda name: False)
    with pytest.raises(SystemExit, match="differing: lora"):
        script.main()


def test_the_command_names_the_fixtures_where_it_is_given_another(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity", "lroa"])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and "no fixture for lroa" in capsys.readouterr().err

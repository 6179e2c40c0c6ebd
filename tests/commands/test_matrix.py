"""What the table of methods and engines refuses, and how it is shown; that it is right is tested by trial elsewhere."""

import json

import pytest

import peftctl
from peftctl.errors import UsageError
from peftctl.methods import _matrix
from tests.commands.helpers import write_recipe
from tests.commands.test_cli import run

ZERO = ["backend.name=deepspeed", "backend.config=configs/deepspeed/{}.json"]


@pytest.fixture
def cells(monkeypatch):
    """A matrix of our own: method -> cells."""

    def use(**methods):
        rows = {name: {"code": "", "cells": row} for name, row in methods.items()}
        monkeypatch.setattr(_matrix, "rows", lambda: rows)

    return use


def prepared(tmp_path, tiny_dir, world_size, *overrides):
    from peftctl.commands.prepare import prepare

    return prepare(peftctl.load_recipe(write_recipe(tmp_path, tiny_dir), overrides), world_size=world_size)


@pytest.mark.parametrize(
    ("cell", "world_size", "overrides"),
    [
        ("float32/ddp", 2, []),
        ("float32/zero2", 1, [part.format("zero2") for part in ZERO]),
        ("float32/zero3", 2, [part.format("zero3_offload") for part in ZERO]),
        ("bfloat16/ddp", 2, ["model.dtype=bfloat16"]),
        ("float32/ddp", 2, ["model.dtype=bfloat16"]),  # what float32 can't do, no other storage can
    ],
)
def test_what_has_failed_is_refused_with_its_reason(tmp_path, tiny_dir, cells, cell, world_size, overrides):
    cells(lora={"float32/ddp": "", "float32/zero2": "", "float32/zero3": "", cell: "straight: losses differ by 1"})
    engine = cell.split("/")[1]
    with pytest.raises(UsageError, match=f"backend: lora does not work through {_matrix.ENGINES[engine]} on a .* base"):
        prepared(tmp_path, tiny_dir, world_size, *overrides)


def test_what_holds_and_what_has_not_been_tried_is_not_refused(tmp_path, tiny_dir, cells):
    cells(lora={"float32/ddp": "", "float32/zero2": "straight: hangs"})
    prepared(tmp_path, tiny_dir, 2)
    prepared(tmp_path, tiny_dir, 1)
    cells()
    prepared(tmp_path, tiny_dir, 2)


def test_check_refuses_for_the_processes_that_it_plans_for(capsys, tmp_path, tiny_dir, cells):
    cells(lora={"float32/ddp": "straight: hangs"})
    path = write_recipe(tmp_path, tiny_dir)
    assert run(capsys, "check", path)[0] == 0
    code, _, err = run(capsys, "check", path, "--processes", "2")
    assert code == 2 and "straight: hangs" in err and "methods --matrix" in err


def test_the_matrix_is_shown_with_its_reasons(capsys, cells):
    cells(lora={"float32/single": "", "nf4/ddp": ""}, adalora={"float32/single": "", "float32/ddp": "resume: NaN"})
    code, out, _ = run(capsys, "methods", "--matrix")
    assert code == 0 and "adalora float32/ddp: resume: NaN" in out
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["method", "base", *_matrix.ENGINES],
        ["lora", "float32", "yes", *"–––––"], ["lora", "nf4", "–", "yes", *"––––"],
        ["adalora", "float32", "yes", "no", *"––––"],
    ]  # fmt: skip
    code, out, _ = run(capsys, "methods", "--matrix", "--json")
    assert json.loads(out)["methods"]["adalora"]["float32/ddp"] == "resume: NaN"
    code, _, err = run(capsys, "methods", "lora", "--matrix")
    assert code == 2 and "leave the name out" in err


def test_a_method_names_the_engines_that_it_holds_through(capsys, cells):
    cells(lora={"float32/single": "", "float32/ddp": "straight: hangs", "nf4/zero3": ""})
    code, out, _ = run(capsys, "methods", "lora")
    assert code == 0 and "single (float32), zero3 (nf4)" in out and "ddp" not in out

"""Recipes on disk for tests that run commands as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


def write_rows(path, count=24, first=0):
    """Write chat rows whose answer is the number in the question."""
    rows = [
        {"messages": [{"role": "user", "content": f"answer with {i}"}, {"role": "assistant", "content": str(i)}]}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder, tiny_dir, method=None, **sections):
    """Write a recipe over the tiny model into a folder, with its data; return its path."""
    write_rows(folder / "train.jsonl")
    write_rows(folder / "eval.jsonl", count=6, first=100)
    content = {
        "model": {"name_or_path": str(tiny_dir), "dtype": "float32"},
        "method": method or {"name": "lora", "r": 4, "dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 2,
        },
    }  # fmt: skip
    for section, keys in sections.items():
        content.setdefault(section, {}).update(keys)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def peftctl(*arguments, env=None, cwd=None, input=None):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "peftctl", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd or REPOSITORY, input=input,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200", **(env or {})}, timeout=300,
    )  # fmt: skip

"""`peftctl merge`: fold an adapter into its base, gated on the held-out rows of its own recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftctl.artifacts.load import locate
from peftctl.artifacts.merge import merge as fold
from peftctl.backends import device as devices
from peftctl.commands.recipes import load_recipe
from peftctl.data.dataset import encode_all, load_examples
from peftctl.errors import PeftctlError
from peftctl.models.aliases import cache_root
from peftctl.models.load import load_tokenizer

PROBE_ROWS = 16


def merge(target: str, output: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Merge, compare with the unmerged model on held-out rows, and return the figures of the gate."""
    devices.start_process()
    return asdict(fold(target, output, dtype=dtype, rows=_held_out(target)))


def _held_out(target: str) -> list[list[int]] | None:
    """Return token ids of held-out rows where the target knows its recipe and the data are still there."""
    recipe_path = locate(target).recipe
    if recipe_path is None:
        return None
    try:
        recipe = load_recipe(recipe_path)
        examples = load_examples(recipe.data, recipe.train.seed)
        tokenizer = load_tokenizer(recipe.model)
        rows, _ = encode_all((examples.eval or examples.train)[:PROBE_ROWS], tokenizer, recipe.data, cache=cache_root())
    except PeftctlError:  # the data moved away: the gate has probe sentences of its own
        return None
    return [row.input_ids for row in rows]

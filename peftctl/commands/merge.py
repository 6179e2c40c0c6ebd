"""`peftctl merge`: fold an adapter into its base, gated on the held-out rows of its own recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftctl.artifacts.belonging import adapter_digest, finished_adapter, refuse_other_base, refuse_unmergeable
from peftctl.artifacts.load import base_section, locate
from peftctl.artifacts.merge import merge as fold
from peftctl.artifacts.merge_order import merge_in_order
from peftctl.backends import device as devices
from peftctl.commands.recipes import load_recipe
from peftctl.data.dataset import encode_all
from peftctl.data.examples import load_examples
from peftctl.errors import PeftctlError
from peftctl.models.aliases import cache_root
from peftctl.models.load import load_tokenizer

PROBE_ROWS = 16


def merge(targets: Sequence[str], output: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Merge, compare with the unmerged model on held-out rows, and return the figures of the gate.

    Args:
        targets: Run or adapter directories; several are merged in order, each into the result of the one before.
        output: Model directory to write.
        dtype: To store the weights in; left out, the base's stored type.
    """
    devices.start_process()
    if len(targets) == 1:
        return asdict(fold(targets[0], output, dtype=dtype, rows=held_out(targets[0])))
    adapters = [finished_adapter(target, "merge") for target in targets]
    section = base_section(adapters[0])
    earlier: list[str] = []
    for adapter in adapters:
        refuse_unmergeable(adapter, "merge")
        if earlier:
            refuse_other_base(adapter, section, earlier, "merge", beside=True)
        earlier.append(adapter_digest(adapter))
    rows = [row for target in targets for row in held_out(target) or ()]
    results = [asdict(result) for result in merge_in_order(adapters, output, dtype=dtype, rows=rows or None)]
    return results[-1] | {"layers": sum(result["layers"] for result in results)}


def held_out(target: str) -> list[list[int]] | None:
    """Return token ids of held-out rows where the target knows its recipe and the data are still there."""
    recipe_path = locate(target).recipe
    if recipe_path is None:
        return None
    try:
        recipe = load_recipe(recipe_path)
        examples = load_examples(recipe.data, recipe.train.seed)
        tokenizer = load_tokenizer(recipe.model)
        probes = (examples.eval or examples.train)[:PROBE_ROWS]
        rows, _ = encode_all(probes, tokenizer, recipe.data, cache_root(), recipe.model.task)
    except PeftctlError:  # the data moved away: the gate has probe sentences of its own
        return None
    return [row.input_ids for row in rows]

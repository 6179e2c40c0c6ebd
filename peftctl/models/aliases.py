"""Short names of the demo models: `smollm2-135m` is the copy that was fetched here, else the hub's model."""

from __future__ import annotations

import os
from pathlib import Path

ALIASES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}

# Without any one of these a folder can't be loaded as a model with its tokenizer.
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cache_root() -> Path:
    """Return the folder of everything that peftctl keeps between runs: `PEFTCTL_CACHE`, else `~/.cache/peftctl`."""
    moved = os.environ.get("PEFTCTL_CACHE")
    return Path(moved).expanduser() if moved else Path.home() / ".cache" / "peftctl"


def model_dir(alias: str) -> Path:
    """Return where the demo model `alias` is kept, whether or not it has been fetched."""
    return cache_root() / "models" / alias


def is_fetched(alias: str) -> bool:
    """Tell whether the demo model `alias` lies in the cache, complete."""
    folder = model_dir(alias)
    return all((folder / name).is_file() for name in _NEEDED)


def resolve(name: str) -> str:
    """Return what to load: for an alias its cached folder, else its hub id; other names stay as they are."""
    if name not in ALIASES:
        return name
    return str(model_dir(name)) if is_fetched(name) else ALIASES[name]

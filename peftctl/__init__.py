"""peftctl: fine-tune language models from YAML recipes.

The public names load on first use, so that `import peftctl` and `peftctl --help` need no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_recipe": "peftctl.commands.recipes",
    "train": "peftctl.commands.train",
    "evaluate": "peftctl.commands.evaluate",
    "merge": "peftctl.artifacts.merge",
    "export": "peftctl.artifacts.export",
    "load": "peftctl.artifacts.load",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'peftctl' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)

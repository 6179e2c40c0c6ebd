"""Shapes of well-known large models, shipped in shapes/, so that a recipe can be checked and planned without them.

A file holds the model's names and the keys of its config.json that decide shapes. A model whose architecture is Python
code on the hub has no configuration class here; its file lists its modules instead, `*` standing for the block number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_FOLDER = Path(__file__).with_name("shapes")


@dataclass(frozen=True)
class Shape:
    """The shapes of one model.

    Args:
        names: Hub ids that have them.
        config: Keys of config.json.
        public: Whether the weights can be had at all.
        chat_template: Whether the tokenizer has one.
        modules: Name -> [class in torch.nn, its arguments...], for a model with code of its own; else empty.
        input: Name of the input embeddings among `modules`.
        output: Name of the output head among `modules`.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    public: bool = True
    chat_template: bool = False
    modules: Mapping[str, list[Any]] | None = None
    input: str = ""
    output: str = ""

    @property
    def remote_code(self) -> bool:
        """Whether the model itself can only be built by the Python code that comes with it."""
        return self.modules is not None

    def build(
        self, auto_class: Any, dtype: torch.dtype, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> PreTrainedModel:
        """Return the model on the meta device.

        Args:
            auto_class: The library's class of the task, e.g. AutoModelForCausalLM.
            dtype: Of the weights.
            changes: Keys of the configuration on top.

        Raises:
            ValueError: The architecture has no such task.
        """
        import torch
        from transformers import AutoConfig

        if self.modules is not None:
            return _listed(self, dtype)
        with torch.device("meta"):
            return auto_class.from_config(AutoConfig.for_model(**{**self.config, **changes}), dtype=dtype)


def find(name: str) -> Shape | None:
    """Return the shapes of the model of this hub id, in any case; None where none are shipped."""
    return _all().get(name.strip("/").lower())


@cache
def _all() -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for file in sorted(_FOLDER.glob("*.json")):
        content = json.loads(file.read_bytes())
        shape = Shape(**content | {"names": tuple(content["names"])})
        found |= {name.lower(): shape for name in shape.names}
    return found


def _listed(shape: Shape, dtype: torch.dtype) -> PreTrainedModel:
    """Return a tree of modules with the listed names, without a forward pass."""
    from torch import nn
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    class Config(PreTrainedConfig):
        model_type = shape.config["model_type"]

    class Listed(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = Config

        def get_input_embeddings(self) -> nn.Module:
            return self.get_submodule(shape.input)

        def get_output_embeddings(self) -> nn.Module:
            return self.get_submodule(shape.output)

    assert shape.modules is not None
    model = Listed(Config(**{key: value for key, value in shape.config.items() if key != "model_type"}))
    for pattern, (kind, *arguments) in shape.modules.items():
        for number in range(shape.config["num_hidden_layers"] if "*" in pattern else 1):
            module = getattr(nn, kind)(*arguments, device="meta", dtype=dtype)
            _place(model, pattern.replace("*", str(number)), module)
    return model


def _place(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module under its name; what has numbers under it becomes a list."""
    from torch import nn

    *parents, leaf = name.split(".")
    for here, below in zip(parents, [*parents[1:], leaf], strict=True):
        if here not in model._modules:
            model.add_module(here, nn.ModuleList() if below.isdigit() else nn.Module())
        model = model.get_submodule(here)
    model.add_module(leaf, module)

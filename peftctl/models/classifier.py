"""Models that name a class of a text (`seq_cls`) or of each word (`token_cls`): a backbone, and a head of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftctl.recipe.schema import Task

if TYPE_CHECKING:
    from torch import nn

_SUFFIXES: dict[str, Task] = {"ForSequenceClassification": "seq_cls", "ForTokenClassification": "token_cls"}


@dataclass(frozen=True)
class Head:
    """What a head must be made for.

    Args:
        labels: Names of the classes, by index.
        pad_token_id: The token that rows are padded with: decoders read the class off the last other one.
    """

    labels: Sequence[str]
    pad_token_id: int | None = None

    def config(self) -> dict[str, Any]:
        """Return keys of the model's configuration."""
        names = dict(enumerate(self.labels))
        pad = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}, **pad}


def task_of_class(name: str) -> Task | None:
    """Return the classification task of a class of the library by its name; None for a language model's."""
    return next((task for suffix, task in _SUFFIXES.items() if name.endswith(suffix)), None)


def classification_task(model: Any) -> Task | None:
    """Return what a loaded classifier does, also inside a PeftModel; None for a language model."""
    return task_of_class(type(bare(model)).__name__)


def bare(model: Any) -> Any:
    """Return the model without the PeftModel around it."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def labels_of(model: Any) -> list[str]:
    """Return the names of a classifier's classes, by index."""
    names = model.config.id2label
    return [names[i] for i in range(len(names))]


def backbone_of(model: Any) -> nn.Module:
    """Return a classifier without its head, or a language model as it is."""
    if classification_task(model) is None:
        return model
    found: nn.Module = model.get_submodule(model.base_model_prefix)
    return found


def head_names(model: Any) -> list[str]:
    """Return the names of a classifier's modules outside its backbone; none for language models."""
    if classification_task(model) is None:
        return []
    children = model.named_children()
    return [name for name, child in children if name != model.base_model_prefix and list(child.parameters())]

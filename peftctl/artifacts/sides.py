"""The weights of anything that can be compared: whole models, adapters on their base, checkpoints of a run.

An adapter's W is made one layer at a time: its tuner layers stand on a base without weights, and only the layer that is
asked for gets its stored weight and is merged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftctl.artifacts.load import attach, base_section, head_of, load_base
from peftctl.artifacts.locate import Artefact
from peftctl.artifacts.ranks import virtual_tokens
from peftctl.errors import ArtifactError, UsageError
from peftctl.models.load import language_task
from peftctl.models.stored import StoredWeights
from peftctl.recipe.schema import ModelSection

Shape = tuple[int, ...]


class Side:
    """A whole model.

    Args:
        target: As the user wrote it.
        stored: Its weights, or those of its base.
    """

    def __init__(self, target: str, stored: StoredWeights):
        from transformers.pytorch_utils import Conv1D

        self.target = target
        self.stored = stored
        self.shapes: Mapping[str, Shape] = stored.shapes
        modules = stored.model.named_modules()
        self.transposed = {f"{name}.weight" for name, module in modules if isinstance(module, Conv1D)}
        """Weights stored (d_in, d_out)."""

    def origin(self, name: str) -> tuple[str, str]:
        """Return where a weight comes from: what has the same origin is the same tensor."""
        return self.stored.place, self.stored.owner[name]

    def get(self, name: str) -> torch.Tensor:
        """Return a weight in float32, on the CPU."""
        return self.stored.get(name)


class AdaptedSide(Side):
    """A base with something trained on it. Rows of new tokens are left out: they have nothing to be compared with.

    Args:
        target: As the user wrote it.
        stored: The base's weights.
        model: A PeftModel, or a model some of whose parameters were trained; the others may be empty.
    """

    def __init__(self, target: str, stored: StoredWeights, model: Any):
        from peft import PeftModel

        super().__init__(target, stored)
        self._layers: dict[str, tuple[nn.Module, str]] = {}
        self._copies: dict[str, torch.Tensor] = {}
        if isinstance(model, PeftModel):
            # On a base with values, what has values need not be trained.
            self._collect(model.get_base_model(), plain=any(_is_empty(p) for p in model.parameters()))
        else:
            self._collect(model, plain=True)

    def origin(self, name: str) -> tuple[str, str]:
        """Return where a weight comes from; trained ones from here."""
        trained = name in self._layers or name in self._copies
        return (f"trained:{self.target}", name) if trained else super().origin(name)

    def get(self, name: str) -> torch.Tensor:
        """Return a weight in float32, on the CPU: W + s B A where an adapter changes it."""
        if name in self._copies:
            return self._copies[name].detach().float()[: self.shapes[name][0]]
        if name in self._layers:
            return self._merged(name)
        return super().get(name)

    def _collect(self, base: nn.Module, *, plain: bool) -> None:
        """Find the trained layers, by the names that their weights have in the base; `plain`: parameters too."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for path, module in trained_units(base):
            if isinstance(module, BaseTunerLayer):
                for name, _ in module.get_base_layer().named_parameters():
                    self._layers[f"{path}.{name}"] = (module, path)
            else:
                self._copies |= {_join(path, name): p for name, p in module.named_parameters()}
        if plain:
            trained = {
                name: p for name, p in base.named_parameters() if name in self.stored.shapes and not _is_empty(p)
            }
            self._copies |= trained
        foreign = (self._layers.keys() | self._copies.keys()) - self.stored.shapes.keys()
        if foreign:
            raise ArtifactError(f"{self.target}: trains {min(foreign)}, which its base model does not have")

    def _merged(self, name: str) -> torch.Tensor:
        """Return one weight of a tuner layer's base with the adapter in it."""
        layer, path = self._layers[name]
        empty = {n: p for n, p in layer.get_base_layer().named_parameters() if _is_empty(p)}  # type: ignore[operator]
        alone: Any = copy.deepcopy(layer, {id(p): p for p in empty.values()}).float()
        base = alone.get_base_layer()
        for own, parameter in empty.items():
            stored = self.stored.get(f"{path}.{own}")
            new_rows = stored.new_zeros(parameter.shape[0] - stored.shape[0], *stored.shape[1:])
            set_parameter(base, own, torch.cat([stored, new_rows]))
        try:
            while alone is not base:  # several tuner layers can stand on one module
                alone.merge()
                alone = alone.base_layer
        except (NotImplementedError, AttributeError) as error:
            raise UsageError(
                f"{self.target}: adapters of this type can't be merged, so there is no weight to compare"
            ) from error
        return dict(base.named_parameters())[name.removeprefix(f"{path}.")].detach()[: self.shapes[name][0]]


def side_of(artefact: Artefact) -> Side:
    """Return the weights of an artefact.

    Args:
        artefact: A run, adapter or model, with its small files here (`locate.fetched`).

    Raises:
        UsageError: It changes no weight: a prompt, or a template.
        ArtifactError: Files are damaged, or the base is another one.
    """
    if not artefact.is_adapter:
        section = ModelSection(name_or_path=str(artefact.folder or artefact.target))
        task = artefact.manifest.get("task") or language_task(section)
        return Side(artefact.target, StoredWeights(section.model_copy(update={"task": task})))
    if not artefact.has_weights or artefact.folder is None:
        raise UsageError(f"{artefact.target}: is a template without weights; there is nothing to compare")
    if virtual_tokens(artefact.folder):
        raise UsageError(f"{artefact.target}: is a prompt: it adds tokens and changes no weight that could be compared")
    stored = StoredWeights(base_section(artefact), head_of(artefact))
    require_base(artefact, stored)
    model = _on_hollow_base(artefact, stored)
    if model is None:  # a part of the adapter is not in its file but made from the base
        model = attach(load_base(artefact, dtype="float32"), artefact)
    return AdaptedSide(artefact.target, stored, model)


def checkpoint_side(target: str, section: ModelSection, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Side:
    """Return the weights at a checkpoint of a run.

    Args:
        target: The checkpoint, for messages.
        section: The base model of its run.
        model: What the run trained, on the meta device; its trained tensors are put into it.
        tensors: The trained tensors, by their names in it.

    Raises:
        ArtifactError: They are not those of the model.
        UsageError: The method keeps parts of its adapter elsewhere.
    """
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise ArtifactError(f"{target}: holds tensors that the recipe's model does not have, e.g. {wrong[0]}")
    for name, tensor in tensors.items():
        set_parameter(model, name, tensor)
    if _incomplete(model):
        raise UsageError(
            f"{target}: this method keeps a part of its adapter outside of checkpoints; compare finished runs instead"
        )
    return AdaptedSide(target, StoredWeights(section), model)


def require_base(artefact: Artefact, stored: StoredWeights) -> None:
    """Raise an ArtifactError where the stored weights are not those that an adapter was trained on."""
    expected = artefact.manifest.get("base", {}).get("fingerprint")
    if expected is not None and stored.fingerprint() != expected:
        load_base(artefact)  # decides, with what only a loaded model shows, and explains


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter."""
    place, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(place), leaf, nn.Parameter(value, requires_grad=False))


def _on_hollow_base(artefact: Artefact, stored: StoredWeights) -> Any:
    """Return the adapter on a base without weights; None where a tensor of it is not in its file."""
    try:
        model = attach(_hollow(stored.model), artefact)
    except ArtifactError:
        return None  # loading it on its base explains what is wrong, if anything is
    return None if _incomplete(model) else model


def _hollow(model: nn.Module) -> Any:
    """Return a copy of a model whose parameters take no memory: one NaN, repeated, on the CPU.

    On the meta device peft would move an adapter's tensors there too, and lose them.
    """
    hollow = {
        id(p): nn.Parameter(torch.tensor(math.nan).expand(p.shape), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, hollow)  # in which every parameter has its copy already; tied ones stay tied


def _is_empty(parameter: torch.Tensor) -> bool:
    """Tell whether a parameter of a base stands for a stored weight; rows of new tokens are appended to such too."""
    return parameter.is_meta or bool(parameter[(0,) * parameter.dim()].isnan())


def _incomplete(model: nn.Module) -> bool:
    """Tell whether a tensor of a tuner layer or of a trained copy is without values, or came from an empty base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for _, module in trained_units(model):
        tensors = list(module.state_dict(keep_vars=True).values())
        if isinstance(module, BaseTunerLayer):
            base = {id(tensor) for tensor in module.get_base_layer().state_dict(keep_vars=True).values()}
            tensors = [tensor for tensor in tensors if id(tensor) not in base]
        if any(tensor.is_meta or tensor.isnan().any() for tensor in tensors):
            return True
    return False


def trained_units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name in the base, module) of every tuner layer and of every trained copy of a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        yield path, module.token_adapter
    elif isinstance(module, AuxiliaryTrainingWrapper):
        yield path, module.modules_to_save["default"]
    elif isinstance(module, BaseTunerLayer):
        yield path, module
    else:
        for name, child in module.named_children():
            yield from trained_units(child, _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

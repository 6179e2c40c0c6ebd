"""The product's side: a method applied to a tiny Llama in float64, one layer of it, or steps with an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftctl.methods import registry
from peftctl.methods.base import Context, StepInfo
from peftctl.recipe.schema import DataSection, Source
from scripts.parity._core import Fixture, Given, Values, differentiate, leaf
from scripts.parity._llama import HEADS, INNER, KEY_HEADS, VOCABULARY, WIDTH
from tests.methods.helpers import recipe
from tests.tiny import tiny_llama

TRAIN = {"weight_decay": 0.0}


def attach(name: str, fixture: Fixture, model: Any = None, sources: int = 0) -> tuple[Any, Any]:
    """Apply a method with the fixture's section; return it and the model, in training mode and float64.

    Args:
        name: Of the method.
        fixture: Holds the section.
        model: The base; left out, `tiny_llama`.
        sources: How many `data.sources` the recipe has; 0 is a `data.train`.
    """
    kind = registry.get(name)
    config = kind.Config(**fixture.config)  # type: ignore[arg-type]
    method = kind(config)
    base = tiny_llama(dtype="float64") if model is None else model
    torch.manual_seed(fixture.seed)
    whole = recipe(config, **TRAIN)
    if sources:
        data = DataSection(sources=[Source(path=f"{i}.jsonl") for i in range(sources)])
        whole = whole.model_copy(update={"data": data})
    return method, method.apply(base, Context(whole)).double().train()


def small_llama(given: Given) -> Any:
    """The library's Llama with the drawn weights of `_llama.weights`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 1 + max(int(name.split(".")[2]) for name in given if name.startswith("model.layers."))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    weights = {name: tensor for name, tensor in given.items() if name.startswith("model.") and name.endswith(".weight")}
    model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


def put(values: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> None:
    """Write the fixture's numbers where the product keeps its own; shapes must be the same."""
    with torch.no_grad():
        for name, place in places.items():
            if place.shape != values[name].shape:
                raise ValueError(f"{name}: the product has shape {tuple(place.shape)}, the paper {values[name].shape}")
            place.copy_(values[name])


def lora_layer(model: Any, given: Given, name: str = "model.layers.1.mlp.gate_proj") -> tuple[Any, dict[str, Tensor]]:
    """Return a LoRA layer that holds the fixture's W, A and B, and its A and B."""
    layer = model.get_submodule(f"base_model.model.{name}")
    factors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    put(given, {"W": layer.get_base_layer().weight, **{n: p for n, p in factors.items() if n in given}})
    return layer, factors


def passed(layer: Any, given: Given, trained: Mapping[str, Tensor]) -> Values:
    """Pass x through a layer and g back; gradients of what trains in it, which must be all, and of x."""
    missing = {n for n, p in layer.named_parameters() if p.requires_grad and all(p is not q for q in trained.values())}
    if missing:
        raise ValueError(f"trains beside {', '.join(trained)}: {', '.join(missing)}")
    x = leaf(given["x"])
    y = layer(x)
    return Values({"y": y}, differentiate(y, given["g"], {**trained, "x": x}))


def gradients_of(tensors: Mapping[str, Tensor], suffix: object = "") -> dict[str, Tensor]:
    """Copies of the gradients that a backward pass has left, by their names and a suffix."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.grad is None:
            raise ValueError(f"{name} has no gradient")
        found[f"{name}{suffix}"] = tensor.grad.clone()
    return found


def forget_nothing(parameters: Any) -> None:
    """What a callback is given where no optimizer is."""


class Steps:
    """Optimizer steps as the trainer makes them, with the method's groups and callbacks.

    Args:
        method: Applied to the model.
        model: In training.
        total: Steps of the run.
        lr: Of AdamW, without a schedule.
    """

    def __init__(self, method: Any, model: Any, total: int, lr: float):
        self.model, self.total, self.count = model, total, 0
        train = recipe(method.config, **TRAIN, learning_rate=lr).train
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = method.param_groups(model, train) or [{"params": parameters, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)
        self.callbacks = method.callbacks(model)
        self._call("stage_begins")

    def step(self) -> None:
        """Step on the gradients that are there."""
        self._call("before_optimizer")
        self.optimizer.step()
        self._call("after_optimizer")
        self.optimizer.zero_grad()
        self.count += 1
        self._call("after_step")

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(StepInfo(self.count, self.total, self.model, self._forget))

    def _forget(self, parameters: Any) -> None:
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)


def linear_layer(model: Any, name: str) -> Any:
    """Return what the method has made of a module of the base."""
    return model.get_submodule(f"base_model.model.{name}")


@dataclass(frozen=True)
class Supervised:
    """Stands for a forward pass whose cross-entropy is known."""

    total: Tensor

    def cross_entropy(self) -> Tensor:
        """Return it."""
        return self.total

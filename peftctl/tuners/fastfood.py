"""Random projections of one small vector into the weights of many layers, as a tuner of peft: intrinsic dimension.

    y = (W + Δ) x + b,   vec(Δ) = λ_g P z,   P: (D, len z) of each layer, z: shared by all, D = d_out d_in

P is a Fastfood projection (`fastfood_projection.py`) into the entries of the weight as it is stored. Each layer has one
of its own, drawn on the CPU from the seed and the layer's place in `order`; it is not saved. W is never changed. For
the backward pass, a layer keeps x and Δ in the type of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftctl.errors import ArtifactError
from peftctl.tuners.fastfood_projection import Projection, blank, draw, fingerprint

TYPE = "PEFTCTL_FASTFOOD"
"""What adapter_config.json calls this tuner."""


@dataclass
class FastfoodConfig(PeftConfig):
    """Settings that are saved with the adapter: with z and λ they are all of it.

    Args:
        d: Entries of z and λ together.
        projection_seed: What B, Π and G are drawn from.
        order: Full names of the layers; a layer's place is part of its seed.
        groups: Of each layer in `order`, which entry of λ scales it; empty where there is no λ.
        check: See `fingerprint`; another version of torch may draw other numbers from a seed.
        target_modules: The names in `order`, as other tools look for them here.
        exclude_modules: Not used.
        modules_to_save: Modules that train whole beside z.
    """

    d: int = 1000
    projection_seed: int = 0
    order: list[str] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    check: str = ""
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        self.target_modules = list(self.order)

    @property
    def scales(self) -> int:
        """m, entries of λ."""
        return len(set(self.groups))


class Shared(nn.ParameterDict):
    """Vectors that many layers read, by adapter.

    A layer gets a copy, by a call: engines that divide weights gather those of a module around its forward, no others.
    """

    __call__ = nn.Module.__call__  # type: ignore[assignment]  # a ParameterDict's own refuses

    def forward(self, adapter_name: str) -> torch.Tensor:
        """Return a copy of a vector."""
        return self[adapter_name].clone()


class FastfoodLayer(nn.Module, BaseTunerLayer):
    """A linear layer, also a quantised one, with a projection of z added to its weight.

    Args:
        base_layer: The layer.
        shared: z and λ of all adapters, which belong to the tuner: every layer has the same.
    """

    adapter_layer_names = ("fastfood_z", "fastfood_scale")
    other_param_names = ("projections",)

    def __init__(self, base_layer: nn.Module, shared: tuple[Shared, Shared]):
        super().__init__()
        self.base_layer = base_layer
        self.projections = nn.ModuleDict()
        self.groups: dict[str, int] = {}
        self._shared = shared  # in a tuple, which keeps them from being this layer's own
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[torch.Tensor] = []

    @property
    def fastfood_z(self) -> Shared:
        """Adapter -> z, (d - m,)."""
        return self._shared[0]

    @property
    def fastfood_scale(self) -> Shared:
        """Adapter -> λ, (m,); adapters without λ are not in it."""
        return self._shared[1]

    def update_layer(self, adapter_name: str, config: FastfoodConfig, place: int) -> None:
        """Add an adapter.

        Raises:
            ArtifactError: This version of torch draws another projection than the adapter was trained with.
        """
        weight: Any = self.get_base_layer().weight
        length = config.d - config.scales
        without = weight.device.type == "meta"
        drawn = blank(self.size, length) if without else draw(config.projection_seed, place, self.size, length)
        if place == 0 and config.check and not without and fingerprint(drawn) != config.check:
            raise ArtifactError(
                f"this version of torch, {torch.__version__}, draws another projection from the seed "
                f"{config.projection_seed} than the one the adapter was trained with; use that version"
            )
        self.projections[adapter_name] = Projection(drawn, self.size, weight.device)
        self.groups[adapter_name] = config.groups[place] if config.groups else 0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def size(self) -> int:
        """D."""
        rows, columns = _shape(self.get_base_layer())
        return rows * columns

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return Δ as the weight is stored: (d_out, d_in), of a Conv1D (d_in, d_out); in float32 or wider."""
        z = self.fastfood_z(adapter_name)
        scale = z.new_ones(())
        if adapter_name in self.fastfood_scale:
            scale = self.fastfood_scale(adapter_name)[self.groups[adapter_name]]
        return self.projections[adapter_name](z, scale).view(_shape(self.get_base_layer()))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return (W + Δ) x + b for x of shape (..., d_in), the sum of all active adapters' Δ."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        turned = isinstance(self.get_base_layer(), Conv1D)
        for name in self.active_adapters:
            if name in self.projections:
                delta = self.get_delta_weight(name).to(x.dtype)
                result = result + functional.linear(x, delta.T if turned else delta).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add Δ to W, rounded once.

        Raises:
            NotImplementedError: W is quantised.
            ValueError: The sum would not be finite, and `safe_merge` is set.
        """
        weight: Any = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise NotImplementedError("a quantised weight can't take up an adapter")
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.projections:
                continue
            delta = self.get_delta_weight(name).detach()
            new = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(new).all():
                raise ValueError(f"the adapter {name} has values that are not finite")
            self._before_merge.append(weight.data)
            weight.data = new
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back W, exactly."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.get_base_layer().weight.data = self._before_merge.pop()

    def __repr__(self) -> str:
        return "fastfood." + super().__repr__()


class FastfoodModel(BaseTuner):
    """Puts a `FastfoodLayer` around every layer of `order`, and owns z and λ."""

    prefix = "fastfood_"
    tuner_layer_cls = FastfoodLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # peft's name and type
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Make z = 0 and λ = 1 of an adapter, and the layers around it."""
        if "fastfood_z" not in self._modules:
            self.fastfood_z, self.fastfood_scale = Shared(), Shared()
        config: Any = self.peft_config[adapter_name]
        device = next(model.parameters()).device
        self.fastfood_z[adapter_name] = nn.Parameter(torch.zeros(config.d - config.scales, device=device))
        if config.scales:
            self.fastfood_scale[adapter_name] = nn.Parameter(torch.ones(config.scales, device=device))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config.order

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = peft_config.order.index(current_key)
        if isinstance(target, FastfoodLayer):
            target.update_layer(adapter_name, peft_config, place)
            return
        layer = FastfoodLayer(target, (self.fastfood_z, self.fastfood_scale))
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, place)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # peft looks for tensors inside of the layers; z and λ are outside of them.
        own = tuple(f"base_model.{kind}.{adapter_name}" for kind in ("fastfood_z", "fastfood_scale"))
        return {name: tensor for name, tensor in state_dict.items() if name in own}


def layers(peft_model: Any) -> Iterator[tuple[str, FastfoodLayer]]:
    """Yield the layers with their names in the base model."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, FastfoodLayer):
            yield name, module


def _shape(layer: Any) -> tuple[int, int]:
    """Return the shape of a layer's weight before any quantisation."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)

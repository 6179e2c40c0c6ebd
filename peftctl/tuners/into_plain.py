"""Turn adapters of other kinds into plain bottleneck adapters that compute the same outside of training."""

from __future__ import annotations

from typing import Any

import torch

from peftctl.tuners.bottleneck import BottleneckLayer
from peftctl.tuners.perceptrons import Perceptron


def into_plain(peft_model: Any) -> Any:
    """Replace every adapter, in place, by a `Perceptron` of what its `plain_tensors` returns; return the model."""
    config = peft_model.peft_config["default"]
    config.kind, config.options = "plain", {}
    for layer in peft_model.modules():
        if isinstance(layer, BottleneckLayer):
            with torch.no_grad():
                tensors: dict[str, torch.Tensor] = layer.bottleneck_adapter["default"].plain_tensors()  # type: ignore[operator]
            with torch.device("meta"):  # nothing is drawn
                plain = Perceptron(tensors["down.weight"].shape[1], config)
            plain.load_state_dict(tensors, assign=True)
            layer.bottleneck_adapter["default"] = plain.train(layer.training)
    return peft_model

"""A LoRA factor B of which only some rows exist, for training a part of a fused projection such as q and v of a qkv.

    W x + s B A x,   B: (d_out, r) zero outside the chosen rows

Only the chosen rows are parameters, so nothing can move the others: no gradient, no weight decay. Its state is the
full B, zeros included, which is what plain peft reads as an ordinary adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftctl.errors import UsageError


def keep_rows(layer: Any, rows: Sequence[int]) -> None:
    """Let only these rows of B train in a LoRA layer of peft whose adapter is new, in place."""
    layer.lora_B["default"] = ChosenRows(layer.lora_B["default"], rows)


class ChosenRows(nn.Module):
    """Stands in for the `nn.Linear(r, d_out, bias=False)` that holds B.

    Args:
        full: What it replaces; its chosen rows are taken over.
        rows: The chosen rows of d_out, ascending.
    """

    index: torch.Tensor

    def __init__(self, full: nn.Linear, rows: Sequence[int]):
        super().__init__()
        self.out_features, self.in_features = full.weight.shape
        index = torch.tensor(rows, device=full.weight.device)
        self.register_buffer("index", index, persistent=False)
        self.rows = nn.Parameter(full.weight.detach()[index].clone())

    @property
    def weight(self) -> torch.Tensor:
        """B as (d_out, r), with a graph to the chosen rows."""
        return self.rows.new_zeros(self.out_features, self.in_features).index_copy(0, self.index, self.rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return B x for x of shape (..., r)."""
        return functional.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the chosen rows of a full B; the others must be zero."""
        key = prefix + "weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        full = state_dict[key].to(self.rows)
        if full.shape != (self.out_features, self.in_features):
            error_msgs.append(f"{key}: expected {(self.out_features, self.in_features)}, found {tuple(full.shape)}")
            return
        if full.index_fill(0, self.index.to(full.device), 0.0).any():
            raise UsageError(f"method.parts: {key} of the adapter changes rows of other parts; give the same parts")
        with torch.no_grad():
            self.rows.copy_(full[self.index])

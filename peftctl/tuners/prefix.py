"""Keys and values that stand before those of the text in every attention layer, and what makes them in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from peftctl.errors import UsageError


@dataclass(frozen=True)
class CacheShape:
    """What attention layers keep of a token.

    Args:
        layers: L, layers that attend to earlier tokens; of an encoder-decoder, those of the decoder.
        heads: h_kv, key-value heads of a layer.
        head_dim: d_h.
    """

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers a token has in one layer's keys, h_kv d_h."""
        return self.heads * self.head_dim

    @property
    def row(self) -> int:
        """Numbers a token has in all keys and values, 2 L h_kv d_h."""
        return 2 * self.layers * self.width


class TrainedPrefix(nn.Module):
    """A table of keys and values, or a small network that makes one, in the place of peft's encoder.

    peft runs the network once a row of the batch, has no dropout, and hands the rows of its table to the layers of an
    encoder-decoder in twos: layers i and i + L/2 would share a prefix, and half the table would have no gradient.

    Args:
        tokens: n, length of the prefix.
        shape: Of the model's cache.
        hidden: m, width of the network; None trains the table itself.
        dropout: On the keys and values, drawn for each row of a batch, in training only.
        std: Of the table's normal distribution.
        paired: The stored rows leave room for cross-attention, which peft cuts off: for encoder-decoders.
    """

    def __init__(
        self, tokens: int, shape: CacheShape, *, hidden: int | None, dropout: float, std: float, paired: bool
    ) -> None:
        super().__init__()
        self.shape = shape
        self.paired = paired
        self.embedding = nn.Embedding(tokens, shape.row if hidden is None else shape.width)
        nn.init.normal_(self.embedding.weight, std=std)
        self.transform: nn.Sequential | None = None
        if hidden is not None:
            self.transform = nn.Sequential(nn.Linear(shape.width, hidden), nn.Tanh(), nn.Linear(hidden, shape.row))
        self.dropout = nn.Dropout(dropout)

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """Return the stored rows for a batch, (batch, n, row), of which `PeftModel.get_prompt` makes a cache.

        Args:
            prefix: (batch, n), the numbers 0 to n - 1.
        """
        return self.dropout(self.stored_rows().expand(len(prefix), -1, -1))

    def rows(self) -> torch.Tensor:
        """Return the keys and values, (n, 2 L h_kv d_h), layer by layer, in each the keys first."""
        table = self.embedding.weight
        return table if self.transform is None else self.transform(table)

    def stored_rows(self) -> torch.Tensor:
        """Return the rows as peft's flat table has them, (n, row), or (n, 2 row) where `paired`."""
        rows = self.rows()
        if not self.paired:
            return rows
        of_layer = rows.unflatten(1, (self.shape.layers, 2 * self.shape.width))
        return torch.cat([of_layer, torch.zeros_like(of_layer)], dim=2).flatten(1)

    @torch.no_grad()
    def start_from(self, rows: torch.Tensor) -> None:
        """Make `rows()` these keys and values, (n, 2 L h_kv d_h): a network gets the last layer nearest to its own.

        For n <= m rows it has a solution without error, W + (K - rows())^T pinv(H)^T, H being what the layer reads.
        """
        network: Any = self.transform
        if network is None:
            self.embedding.weight.copy_(rows)
            return
        read, last = network[:-1](self.embedding.weight), network[-1]
        change = torch.linalg.pinv(read.cpu().double()) @ (rows - self.rows()).cpu().double()
        last.weight.add_(change.T.to(last.weight))


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """Return what the attention layers of a base model keep of a token, found by running one token through it.

    Raises:
        UsageError: Its attention does not read keys and values from a cache, or its layers differ.
    """
    what = f"method.name: the {model.config.model_type} architecture takes no prefix"
    try:
        pairs = keys_and_values(model, [0])
        shapes = {tuple(part.shape[1::2]) for pair in pairs for part in pair}
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{what}: its attention reads no cache of keys and values") from error
    if not pairs:
        raise UsageError(f"{what}: its attention reads no cache of keys and values")
    if len(shapes) != 1:
        found = ", ".join(map(str, sorted(shapes)))
        raise UsageError(f"{what}: expected keys and values of one shape (heads, width) in all layers, found {found}")
    heads, head_dim = shapes.pop()
    return CacheShape(len(pairs), heads, head_dim)


@torch.no_grad()
def keys_and_values(model: PreTrainedModel, ids: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of every layer at some tokens, each (1, h_kv, tokens, d_h).

    Args:
        model: A base model; of an encoder-decoder the decoder reads the tokens, and the encoder the first one.
        ids: The tokens.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    cache = DynamicCache()
    if model.config.is_encoder_decoder:
        both = EncoderDecoderCache(cache, DynamicCache())
        # A mask of its own: BART looks at the values of the one that it would make, and shapes have none.
        seen = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool, device=model.device).tril()
        model.base_model(
            input_ids=tokens[:, :1], decoder_input_ids=tokens, decoder_attention_mask=seen, past_key_values=both
        )
    else:
        model.base_model(input_ids=tokens, past_key_values=cache)
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def as_rows(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return keys and values of n tokens as the rows of a prefix, (n, 2 L h_kv d_h), float32."""
    slices = torch.stack([part[0] for pair in pairs for part in pair])  # (2 L, h_kv, n, d_h)
    return slices.permute(2, 0, 1, 3).flatten(1).float()


def flatten_prefix(model: PeftModel) -> None:
    """Replace what made the prefix in training by peft's flat table of its rows, in place."""
    trained: Any = model.prompt_encoder["default"]
    rows = trained.stored_rows().detach()
    flat = PrefixEncoder(model.peft_config["default"]).to(rows.device)
    flat.embedding.weight.data.copy_(rows)
    model.prompt_encoder["default"] = flat.train(trained.training)

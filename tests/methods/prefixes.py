"""What the tests of prefix methods share."""

from unittest.mock import patch

import torch
from transformers import DynamicCache, EncoderDecoderCache

from peftctl.methods.base import Context
from tests.methods.helpers import recipe
from tests.tiny import tiny_tokenizer

IDS = torch.arange(5, 29).reshape(2, 12)


def context(task="causal_lm"):
    made = recipe()
    return Context(made.model_copy(update={"model": made.model.model_copy(update={"task": task})}), tiny_tokenizer())


def attached(method, model, task="causal_lm", seed=0):
    """Apply a method with a fixed seed; the model is in eval mode."""
    torch.manual_seed(seed)
    return method.apply(model, context(task)).eval()


def encoder(model):
    return model.prompt_encoder["default"]


def inputs(model, ids=IDS):
    """Return a batch whose second row ends in padding."""
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask}
    return batch | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def slices(rows, shape, batch=1):
    """Return a prefix layer by layer as (keys, values), each (batch, h_kv, n, d_h), written out."""
    split = rows.view(len(rows), shape.layers, 2, shape.heads, shape.head_dim)
    return [
        tuple(split[:, layer, part].permute(1, 0, 2).expand(batch, -1, -1, -1) for part in (0, 1))
        for layer in range(shape.layers)
    ]


def behind_prefix(base, rows, shape, batch):
    """Return what a base answers whose cache holds these keys and values: what every prefix method must equal."""
    size = len(batch["input_ids"])
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(slices(rows, shape, size)):
        cache.update(keys, values, layer)
    if base.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
        return base(**batch, past_key_values=cache).logits
    mask = torch.cat([torch.ones(size, len(rows), dtype=torch.long), batch["attention_mask"]], dim=1)
    return base(**batch | {"attention_mask": mask}, past_key_values=cache).logits


def gradient_of_rows(model, batch):
    """Return the gradient of the keys and values themselves, (n, 2 L h_kv d_h)."""
    made = encoder(model).rows().detach().requires_grad_()
    with patch.object(encoder(model), "rows", lambda: made):
        model(**batch).logits.float().square().mean().backward()
    return made.grad

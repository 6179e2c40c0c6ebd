"""A Llama's weights, drawn: what fixtures of whole models start from."""

from __future__ import annotations

import torch

from scripts.parity._core import normal

VOCABULARY, WIDTH, INNER, HEADS, KEY_HEADS = 40, 16, 24, 4, 2
FLOAT32 = "the library computes norms and rotary angles in float32, also in a float64 model"


def weights(draw: torch.Generator, layers: int) -> dict[str, torch.Tensor]:
    """Draw every weight of a tied Llama by the checkpoint's names; norms around 1."""
    head = WIDTH // HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KEY_HEADS * head, WIDTH),
        "self_attn.v_proj": (KEY_HEADS * head, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    drawn = {"model.embed_tokens.weight": normal(draw, VOCABULARY, WIDTH)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        drawn |= {f"{at}.{name}.weight": normal(draw, *shape, scale=0.3) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            drawn[f"{at}.{name}.weight"] = 1 + normal(draw, WIDTH, scale=0.1)
    drawn["model.norm.weight"] = 1 + normal(draw, WIDTH, scale=0.1)
    return drawn

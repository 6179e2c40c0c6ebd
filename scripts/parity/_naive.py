"""Elementary pieces of the naive side: AdamW, a Llama, attention from a table of who may see whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from scripts.parity._core import total

Allowed = Callable[[int, int, int], bool]
"""(query head, position that asks, position that answers) -> whether it is seen."""


class AdamW:
    """Algorithm 2 of arXiv 1711.05101 without decay; `forget` empties its state."""

    def __init__(self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.lr, self.betas, self.eps = lr, betas, eps
        self.forget()

    def forget(self) -> None:
        """Begin anew: moments and step count."""
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.count = 0

    def step(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values after one step."""
        self.count += 1
        new = {}
        for name, value in values.items():
            gradient = gradients[name]
            zero = torch.zeros_like(value)
            self.first[name] = self.betas[0] * self.first.get(name, zero) + (1 - self.betas[0]) * gradient
            self.second[name] = self.betas[1] * self.second.get(name, zero) + (1 - self.betas[1]) * gradient**2
            mean = self.first[name] / (1 - self.betas[0] ** self.count)
            square = self.second[name] / (1 - self.betas[1] ** self.count)
            new[name] = value - self.lr * mean / (square.sqrt() + self.eps)
        return new


def lora_gradients(A: Tensor, B: Tensor, scale: float, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The chain rule for y = W x + scale B A x: W's own gradient is not needed."""
    full = total(torch.outer(back, here) for back, here in zip(g.flatten(0, -2), x.flatten(0, -2), strict=True))
    return {"A": scale * B.T @ full, "B": scale * full @ A.T}


def softmax(logits: Tensor) -> Tensor:
    """Along the last dimension."""
    powers = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def causal(head: int, asks: int, answers: int) -> bool:
    """Every position sees itself and what came before."""
    return answers <= asks


def rotate(vector: Tensor, position: float, theta: float) -> Tensor:
    """Rotary embedding of one head: pairs (i, i + half) turned by position * theta^(-2 i / width)."""
    half = vector.shape[-1] // 2
    angles = [position * theta ** (-i / half) for i in range(half)]
    cos, sin = (torch.tensor([f(angle) for angle in angles], dtype=vector.dtype) for f in (math.cos, math.sin))
    a, b = vector[:half], vector[half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Allowed, factor: float, theta: float) -> Tensor:
    """Attention over explicit pairs.

    Args:
        q: (seq, heads, width).
        k: (seq, key-value heads, width), each for the same number of query heads in a row.
        v: As k.
        allowed: Who sees whom.
        factor: Positions are divided by it (linear interpolation).
        theta: The base of the rotary frequencies.

    Returns:
        (seq, heads * width).
    """
    length, heads, width = q.shape
    share = heads // k.shape[1]
    answers = [
        torch.stack([rotate(k[j, group], j / factor, theta) for j in range(length)]) for group in range(k.shape[1])
    ]
    rows = []
    for i in range(length):
        columns = []
        for head in range(heads):
            ask = rotate(q[i, head], i / factor, theta)
            seen = [j for j in range(length) if allowed(head, i, j)]
            weights = softmax(answers[head // share][seen] @ ask / width**0.5)
            columns.append(weights @ v[seen, head // share])
        rows.append(torch.cat(columns))
    return torch.stack(rows)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return weight * x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()


def llama(
    weights: Mapping[str, Tensor],
    ids: Tensor,
    heads: int,
    *,
    linear: Callable[[str, Tensor], Tensor] | None = None,
    allowed: Allowed = causal,
    factor: float = 1.0,
    theta: float = 10000.0,
    eps: float = 1e-6,
) -> Tensor:
    """Return (batch, seq, vocabulary) of a Llama (Touvron et al. 2023, arXiv 2302.13971) with tied embeddings.

    Args:
        weights: By the checkpoint's names.
        ids: (batch, seq).
        heads: Query heads; those of keys and values follow from the shapes.
        linear: Computes a named linear layer instead of `x W^T`.
        allowed: Who sees whom in attention.
        factor: Of linear position interpolation.
        theta: Base of the rotary frequencies.
        eps: Of the norms.
    """

    def plain(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    apply = linear or plain
    embedding = weights["model.embed_tokens.weight"]
    width = embedding.shape[1] // heads
    blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    rows = []
    for row in ids:
        x = embedding[row]
        for block in range(blocks):
            at = f"model.layers.{block}"
            normed = norm(x, weights[f"{at}.input_layernorm.weight"], eps)
            q, k, v = (apply(f"{at}.self_attn.{n}_proj", normed).unflatten(-1, (-1, width)) for n in "qkv")
            x = x + apply(f"{at}.self_attn.o_proj", attend(q, k, v, allowed, factor, theta))
            normed = norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
            gate = apply(f"{at}.mlp.gate_proj", normed)
            inner = gate / (1 + torch.exp(-gate)) * apply(f"{at}.mlp.up_proj", normed)
            x = x + apply(f"{at}.mlp.down_proj", inner)
        rows.append(norm(x, weights["model.norm.weight"], eps) @ embedding.T)
    return torch.stack(rows)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over positions of -log p(next token); (batch, seq, vocabulary) and (batch, seq) -> ()."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, expected in zip(logits, labels, strict=True):
        for t in range(len(expected) - 1):
            total = total - torch.log(softmax(row[t])[expected[t + 1]])
    return total

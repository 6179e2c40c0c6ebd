"""Forward passes that compute logits only at positions whose next token carries a label.

The logits of the other positions do not enter the loss, so leaving them out changes neither the loss nor a gradient; it
saves their share of the head's matrix product and of (batch x seq x vocab) memory. A pre-hook on the output
embeddings picks the rows, so the model's own code (a LoRA on the head, soft-capping, logit scales) runs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
_CHUNK = 1024
"""Rows of logits that are widened to float32 at a time."""


@dataclass(frozen=True)
class Supervised:
    """The supervised positions of a batch, row after row.

    Args:
        logits: (n, vocab), of the positions *before* the supervised tokens.
        labels: (n,), the supervised tokens.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    def cross_entropy(self) -> torch.Tensor:
        """Return the scalar sum of cross-entropies, in float32 or wider; 0, still with a graph, where n is 0."""
        return _SummedCrossEntropy.apply(self.logits, self.labels)

    def correct(self) -> torch.Tensor:
        """Return the scalar number of labels that have the highest logit."""
        return (self.logits.argmax(dim=-1) == self.labels).sum()


def supervised_forward(model: Any, batch: Mapping[str, torch.Tensor]) -> Supervised:
    """Run a causal language model and return its logits at supervised positions.

    Token 0 of a row is never supervised, whatever its label: a plain model has nothing to predict it from.

    Args:
        model: A causal language model, also inside a PeftModel; prompts that lengthen the sequence are fine.
        batch: input_ids, attention_mask and labels, (batch, seq), padded on either side; further fields are passed on.

    Returns:
        n = number of labels[:, 1:] that are not -100.
    """
    labels = batch["labels"]
    # Found once and early: every look-up by a mask would make the host wait for the device.
    row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    places = _Places(row, position, labels.shape[1])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _rows_before_head(model, places) as hooked:
        logits = model(**inputs, use_cache=False).logits
    # A model that has no head module, or does not call it, returns all positions.
    chosen = logits.squeeze(0) if hooked else places.pick(logits)
    return Supervised(chosen, labels[row, position + 1].to(chosen.device))


@dataclass(frozen=True)
class _Places:
    """Where the supervised tokens' predecessors are: (n,) rows, (n,) positions in rows of `seq` tokens."""

    row: torch.Tensor
    position: torch.Tensor
    seq: int

    def pick(self, states: torch.Tensor) -> torch.Tensor:
        """Pick (n, d) of (batch, prompt + seq, d): prompt methods lengthen rows on the left."""
        length = states.shape[1]
        flat = self.row * length + (length - self.seq) + self.position
        return states.flatten(0, 1).index_select(0, flat.to(states.device))


@contextmanager
def _rows_before_head(model: Any, places: _Places) -> Iterator[list[bool]]:
    """Let the model's head see only these places; the yielded list is empty until that has happened."""
    happened: list[bool] = []

    def pick(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3:
            return None
        happened.append(True)
        # (1, n, d): code after the head may index logits as (batch, seq, vocab).
        return (places.pick(args[0]).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        yield happened
    finally:
        if handle is not None:
            handle.remove()


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ logsumexp(z) - z[label], whose backward pass keeps (n,) log-sums instead of a float32 copy of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sums = [torch.logsumexp(_wide(rows), dim=-1) for rows in logits.split(_CHUNK)]
        log_sums = torch.cat(sums)
        ctx.save_for_backward(logits, labels, log_sums)
        return (log_sums - logits.gather(1, labels[:, None])[:, 0].to(log_sums.dtype)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logits, labels, log_sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for first in range(0, len(logits), _CHUNK):
            rows = slice(first, first + _CHUNK)
            chunk = (_wide(logits[rows]) - log_sums[rows, None]).exp_()
            chunk.scatter_add_(1, labels[rows, None], -torch.ones_like(log_sums[rows, None]))
            gradient[rows] = chunk.mul_(upstream)
        return gradient, None


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()

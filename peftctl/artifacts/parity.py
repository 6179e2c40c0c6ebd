"""The merge gate: does the merged model, read back from disk, answer like base plus adapter?

All logits here are computed in float32, whatever the weights are stored in, so that three causes of a difference can
be told apart and each has its own limit:

1. folding in float32: only the order of summation changes. A wrong scale or a layer left out shows here, also where
   the adapter's effect is smaller than what a half type rounds away.
2. writing and reading back: nothing may change.
3. casting to the stored type: what the type loses, by its number of mantissa bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftctl.errors import ArtifactError

# Relative RMS difference of logits that float32 summation explains. Measured: 8e-7 on a tiny Llama, 1.2e-6 on
# SmolLM2-135M with all 210 linear layers adapted; there one missing k_proj of an adapter that hardly moved (B of size
# 3e-4) makes 1.7e-5, of one that has trained for a while (1e-2) 5.5e-4.
EXACT = 1e-5

# Mean KL(unmerged || merged), in nats, that rounding every weight once explains. Measured on the same two: float32
# 1e-8, float16 6e-7 and 1.3e-6, bfloat16 4e-5 and 7e-5; the room above is for deeper models and bases stored wider.
ROUNDED = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 2e-2}

PROBES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Write a short reply to a customer who asks where the parcel is.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}',
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Seven times eight is fifty-six; twelve minus five is seven.",
)


@dataclass(frozen=True)
class Parity:
    """How two sets of logits of the same rows differ.

    Args:
        max_delta: Largest absolute difference of a logit.
        relative: RMS of the difference over RMS of the reference.
        kl: Mean over positions of KL(reference || other), in nats.
        top1_agreement: Share of positions with the same most likely class.
        positions: How many were compared.
    """

    max_delta: float
    relative: float
    kl: float
    top1_agreement: float
    positions: int


def compare(reference: torch.Tensor, other: torch.Tensor) -> Parity:
    """Compare logits.

    Args:
        reference: (positions, classes), float32.
        other: The same shape.

    Raises:
        ArtifactError: The shapes differ.
    """
    if reference.shape != other.shape:
        raise ArtifactError(f"the merged model's logits are {tuple(other.shape)}, expected {tuple(reference.shape)}")
    delta = other - reference
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return Parity(
        max_delta=float(delta.abs().max()),
        relative=float(delta.square().mean().sqrt() / reference.square().mean().sqrt()),
        kl=float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0.0)),  # keeps NaN, unlike max()
        top1_agreement=float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        positions=len(reference),
    )


def require_exact(parity: Parity, what: str) -> None:
    """Raise where two computations in float32 differ by more than the order of summation; NaN never passes.

    Raises:
        ArtifactError: `what` is wrong.
    """
    if not parity.relative <= EXACT:
        raise ArtifactError(
            f"merge refused: {what}: logits differ by {parity.relative:.2e} of their size (limit {EXACT:.0e}), "
            f"at most by {parity.max_delta:.3g}; nothing was written"
        )


def require_close(parity: Parity, dtype: str) -> None:
    """Raise where the stored type changes the answers more than its rounding explains; NaN never passes.

    Raises:
        ArtifactError: It does.
    """
    if not parity.kl <= ROUNDED[dtype]:
        raise ArtifactError(
            f"merge refused: stored as {dtype} the model answers differently from base plus adapter: mean KL "
            f"{parity.kl:.2e} (limit {ROUNDED[dtype]:.0e}), top-1 agreement {parity.top1_agreement:.1%}; "
            "nothing was written; take a wider --dtype"
        )


def probe_rows(tokenizer: object, rows: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Return the rows to compare on: those given, else fixed sentences."""
    if rows:
        return [list(row) for row in rows]
    return [list(ids) for ids in tokenizer(list(PROBES))["input_ids"]]  # type: ignore[operator]

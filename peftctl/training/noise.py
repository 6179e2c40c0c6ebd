"""NEFTune: noise on the input embeddings makes fine-tuning generalise better (Jain et al. 2023, arXiv 2310.05914).

    x' = x + alpha / sqrt(L d) * e,  e ~ uniform(-1, 1) of shape (L, d)

L is the length of the row itself, as in the paper and its predecessor FreeLB. The library's own hook takes the length
that the batch is padded to, so that a row's noise would depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peftctl.errors import RunError


@contextmanager
def noisy_embeddings(model: Any, attention_mask: torch.Tensor, alpha: float) -> Iterator[None]:
    """Add noise to what the input embedding returns at its first call in this block; padding gets none.

    The first call is the one that reads the batch's tokens: in an encoder-decoder, that of the encoder. Layers that
    are recomputed in the backward pass lie behind it, so the noise is drawn once.

    Args:
        model: A language model, also inside a PeftModel.
        attention_mask: (batch, seq), of the tokens.
        alpha: Size of the noise; 0 adds none and draws nothing.

    Raises:
        RunError: The model computed without calling its embedding.
    """
    if not alpha:
        yield
        return
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    called = False

    def add(_: torch.nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor | None:
        nonlocal called
        if called:
            return None
        called = True
        return embedded + _noise(attention_mask, embedded.shape[-1], alpha).to(embedded.dtype)

    handle = reader.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise RunError("train.neftune_noise: this model does not call its input embedding; remove it")


def _noise(attention_mask: torch.Tensor, d: int, alpha: float) -> torch.Tensor:
    """Return (batch, seq, d) float32."""
    scale = alpha * attention_mask / (attention_mask.sum(dim=1, keepdim=True) * d).sqrt()
    return torch.empty(*attention_mask.shape, d, device=attention_mask.device).uniform_(-1, 1) * scale[..., None]

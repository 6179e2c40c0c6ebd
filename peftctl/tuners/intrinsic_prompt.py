"""A prompt that is decoded from a few coordinates, and the autoencoder that learns the decoder from other prompts."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM
from torch import nn

from peftctl.tuners.prompts import TaskPromptsForSeq2SeqLM

SUBSPACE, INTRINSIC, PROMPT = STAGES = ("subspace", "intrinsic", "prompt")
"""What trains: the autoencoder; z; the prompt itself."""
_SPREAD = 0.02
"""Standard deviation of z at the start, as in the authors' code."""


class IntrinsicPrompt(nn.Module):
    """z -> prompt, in the place of peft's table; it takes the rows of source tasks through the whole autoencoder.

    Args:
        shape: (n, d) of a prompt.
        dim: Of z.
        hidden: Width of the decoder's middle layer.
        prompts: (tasks, n, d), those that the autoencoder learns from; None where the decoder is given later.
    """

    prompts: torch.Tensor | None
    table: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], dim: int, hidden: int, prompts: torch.Tensor | None) -> None:
        super().__init__()
        self.shape, size = shape, shape[0] * shape[1]
        self.stage = SUBSPACE
        self.encoder: nn.Linear | None = nn.Linear(size, dim)
        self.decoder = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, size))
        self.z = nn.Parameter(torch.empty(dim).normal_(std=_SPREAD), requires_grad=False)
        self.register_parameter("table", None)
        self.register_buffer("prompts", None if prompts is None else prompts.flatten(1), persistent=False)
        self._error: torch.Tensor | None = None
        if prompts is None:
            self.go_on(INTRINSIC)

    def forward(self, rows: int, task_ids: torch.Tensor | None) -> torch.Tensor:
        """Return the prompts of a batch, (rows, n, d).

        Args:
            rows: Of the batch.
            task_ids: (rows,), the source task of each; others, and None, read what z decodes to.
        """
        own = self.prompt() if self.table is None else self.table
        if self.stage != SUBSPACE or task_ids is None:
            return own.expand(rows, -1, -1)
        made = self.reconstructed()
        assert self.prompts is not None  # at this stage
        self._error = (made.flatten(1) - self.prompts).square().mean()
        is_source = (task_ids >= 0) & (task_ids < len(made))
        return torch.cat([made, own[None]])[torch.where(is_source, task_ids, len(made))]

    def prompt(self) -> torch.Tensor:
        """Return what z decodes to, (n, d)."""
        return self.decoder(self.z).view(self.shape)

    def reconstructed(self) -> torch.Tensor:
        """Return the source tasks' prompts as the autoencoder makes them, (tasks, n, d)."""
        assert self.encoder is not None  # where it trains
        return self.decoder(self.encoder(self.prompts)).unflatten(1, self.shape)

    def take_error(self) -> torch.Tensor:
        """Return the scalar mean of (P^ - P)^2 over all entries of all prompts, of the last forward pass, once."""
        error, self._error = self._error, None
        assert error is not None  # a forward pass came before
        return error

    def go_on(self, stage: str) -> None:
        """Begin a later stage: only z trains, or only the prompt, from what z decodes to."""
        if self.stage == SUBSPACE != stage:
            self.encoder = self.prompts = None
            self.decoder.requires_grad_(False)
            self.z.requires_grad_(True)
        if stage == PROMPT and self.table is None:
            self.table = nn.Parameter(self.prompt().detach().clone())
            self.z.requires_grad_(False)
        self.stage = stage

    def frozen(self) -> dict[str, torch.Tensor]:
        """Return a copy of what does not train at this stage, by name."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if not p.requires_grad}


class _DecodedPrompts:
    """Lets peft read prompts that depend on the task of the row."""

    prompt_encoder: Any
    active_adapter: Any

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> torch.Tensor:
        """Return the prompts of a batch, (batch, n, d).

        Args:
            batch_size: Rows.
            task_ids: (batch,), the task of each row, counted from 0.
            max_cache_len: Of prefixes; unused.
        """
        return self.prompt_encoder[self.active_adapter](batch_size, task_ids)


class DecodedPromptForCausalLM(_DecodedPrompts, PeftModelForCausalLM):
    """A decoder behind a prompt that is decoded from z."""


class DecodedPromptForSeq2SeqLM(_DecodedPrompts, TaskPromptsForSeq2SeqLM, PeftModelForSeq2SeqLM):
    """An encoder-decoder whose encoder reads a prompt that is decoded from z."""

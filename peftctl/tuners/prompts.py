"""Prompts of several tasks in one batch: peft's multitask prompts with what its forward passes leave out.

peft needs a task for every row of every call, and its encoder-decoder drops `decoder_input_ids` where the prompt is a
multitask one. Here a row without a task (-1, or no `task_ids` at all) gets the prompt of the last task.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModelForCausalLM, PeftModelForSeq2SeqLM


class _TaskPrompts:
    """Lets `get_prompt` do without tasks."""

    prompt_encoder: Any
    active_adapter: Any

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> torch.Tensor:
        """Return the prompts of a batch, (batch, n, d).

        Args:
            batch_size: Rows.
            task_ids: (batch,), the task of each row, counted from 0, or from -1 backwards.
            max_cache_len: Of prefixes; unused.
        """
        encoder = self.prompt_encoder[self.active_adapter]
        if task_ids is None:
            task_ids = torch.full((batch_size,), -1, device=encoder.prefix_task_cols.device)
        return super().get_prompt(batch_size, task_ids % encoder.num_tasks)  # type: ignore[misc]


class TaskPromptsForCausalLM(_TaskPrompts, PeftModelForCausalLM):
    """A decoder behind a prompt that depends on the task of the row."""


class TaskPromptsForSeq2SeqLM(_TaskPrompts, PeftModelForSeq2SeqLM):
    """An encoder-decoder whose encoder reads a prompt that depends on the task of the row."""

    def forward(  # type: ignore[override]  # by name, as everything here calls it
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the base on the prompts and the rows; what the decoder reads is passed on.

        Args:
            input_ids: (batch, seq).
            attention_mask: (batch, seq); left out, all of it is read.
            task_ids: (batch,).
            inputs: Anything else that the base takes.
        """
        embedded = self.word_embeddings(input_ids)  # type: ignore[misc]
        prompts = self.get_prompt(len(input_ids), task_ids).to(embedded.dtype)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.base_model(
            inputs_embeds=torch.cat([prompts, embedded], dim=1),
            attention_mask=torch.cat([mask.new_ones(prompts.shape[:2]), mask], dim=1),
            **inputs,
        )

"""Prompts of several tasks in one batch: peft's multitask prompts with what its forward passes leave out.

peft needs a task for every row of every call, and its encoder-decoder drops `decoder_input_ids` where the prompt is a
multitask one. Here a row without a task (-1, or no `task_ids` at all) gets the prompt of the last task. Prompts of
teachers can stand in for those that train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import MultitaskPromptTuningConfig, PeftModelForCausalLM, PeftModelForSeq2SeqLM, PromptLearningConfig
from torch import nn
from transformers import PreTrainedModel


class _TaskPrompts:
    """Lets `get_prompt` do without tasks."""

    prompt_encoder: Any
    active_adapter: Any
    teaching = False

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
            task_ids = torch.full((batch_size,), -1, device=encoder.embedding.weight.device)
        if self.teaching:
            return encoder.teachers[task_ids % encoder.num_tasks]
        return super().get_prompt(batch_size, task_ids % encoder.num_tasks)  # type: ignore[misc]


@contextmanager
def teaching(model: Any) -> Iterator[None]:
    """Let a model read its teachers' prompts, its encoder's `teachers`: (tasks, n, d), without dropout or a graph."""
    training = model.training
    model.eval()
    model.teaching = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.teaching = False
        model.train(training)


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


class PromptTables(nn.Module):
    """Finished prompts in the place of peft's encoder of several tasks.

    Args:
        prompts: (tasks, n, d).
    """

    def __init__(self, prompts: torch.Tensor):
        super().__init__()
        self.num_tasks = len(prompts)
        self.shape = prompts.shape[1:]
        self.embedding = nn.Embedding.from_pretrained(prompts.flatten(1), freeze=True)

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
        """Return the prompt of every row, (batch, n, d); task_ids: (batch,). All indices are read, in their order."""
        return self.embedding(task_ids.to(self.embedding.weight.device)).unflatten(1, self.shape)


def mixed_prompts(base: PreTrainedModel, settings: PromptLearningConfig, prompts: torch.Tensor) -> _TaskPrompts:
    """Return a PeftModel in which each row of a batch reads the prompt of its `task_ids`.

    Args:
        base: The model that all were trained on.
        settings: Of one of the prompts.
        prompts: (tasks, n, d).
    """
    own = ("task_type", "token_dim", "num_layers", "num_attention_heads")
    config = MultitaskPromptTuningConfig(
        **{name: getattr(settings, name) for name in own},
        num_virtual_tokens=prompts.shape[1],
        num_transformer_submodules=1,
        num_tasks=len(prompts),
        prompt_tuning_init="RANDOM",
    )
    kind = TaskPromptsForSeq2SeqLM if config.task_type == "SEQ_2_SEQ_LM" else TaskPromptsForCausalLM
    model = kind(base, config)
    model.prompt_encoder["default"] = PromptTables(prompts).to(base.device)
    return model.eval()

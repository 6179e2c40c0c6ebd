"""Greedy answers in batches, the same as one by one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from peftctl.data.conversations import Message
from peftctl.data.turns import Chat
from peftctl.errors import DataError, UsageError
from peftctl.evaluation.mode import evaluating
from peftctl.models.rope import reach
from peftctl.recipe.schema import Task

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """Return the greedy answer to every prompt, without the token that ended it.

    Nothing of the model's own generation settings applies but its end tokens. An answer also ends where the model's
    positions do.

    Args:
        model: A causal language model or an encoder-decoder, also inside a PeftModel.
        tokenizer: Gives the padding and end tokens.
        prompts: Token ids, at least one a prompt.
        max_new_tokens: The most tokens of an answer.
        batch_size: Prompts a batch.

    Raises:
        UsageError: A prompt is empty, or leaves no position for an answer.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {i + 1} is empty, and there is nothing to continue")
        refuse_overlong(model, len(prompt), f"prompt {i + 1}")
    room = [min(max_new_tokens, answer_room(model, len(prompt))) for prompt in prompts]
    stops = stop_ids(model, tokenizer)
    # peft counts the positions of learned prompts through padding, so only prompts of one length go together there.
    equal = _virtual_tokens(model) is not None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for (_, most), group in groupby(order, key=lambda i: (len(prompts[i]) if equal else 0, room[i])):
            members = list(group)
            for first in range(0, len(members), batch_size):
                batch = members[first : first + batch_size]
                settings = greedy_settings(model, tokenizer, stops, most)
                for i, answer in zip(batch, _continue(model, [prompts[i] for i in batch], settings), strict=True):
                    answers[i] = answer
    return answers


def prompts_of(model: Any) -> Task:
    """Return the task whose prompts a model answers."""
    return "seq2seq_lm" if model.config.is_encoder_decoder else "causal_lm"


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's, and the chat template's end of turn."""
    of_model = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    found |= set(of_model) if isinstance(of_model, list | tuple) else {of_model}
    return sorted(token for token in found if token is not None)


def position_limit(model: Any) -> int | None:
    """Return how many tokens the model has positions for, those of a learned prompt taken off; None for no limit."""
    positions = reach(model.config)
    return None if positions is None else positions - (_virtual_tokens(model) or 0)


def answer_room(model: Any, prompt_tokens: int) -> int:
    """Return how many tokens of an answer the model has positions for: a decoder of its own counts from 0."""
    limit = position_limit(model)
    if limit is None:
        return sys.maxsize
    return limit if model.config.is_encoder_decoder else limit - prompt_tokens


def refuse_overlong(model: Any, tokens: int, what: str) -> None:
    """Raise a UsageError where the model has no positions for a prompt, or none for an answer behind it."""
    limit = position_limit(model)
    if limit is not None and tokens > limit - (not model.config.is_encoder_decoder):
        raise UsageError(f"{what} has {tokens} tokens, but the model has only {limit} positions; shorten it")


def greedy_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], max_new_tokens: int
) -> GenerationConfig:
    """Return settings of the library that take the likeliest token and nothing else."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stops) or None,
        pad_token_id=pad if pad is not None else (stops[0] if stops else 0),
        decoder_start_token_id=_decoder_start(model),
    )


def _decoder_start(model: Any) -> int | None:
    """Return the token that stands before an answer; None for a decoder that reads the prompt itself."""
    if not model.config.is_encoder_decoder:
        return None
    own = model.generation_config
    found = (own.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), own.bos_token_id)
    return next((token for token in found if token is not None), None)


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Hide the model's generation settings: the library fills gaps of ours from them, penalties and sampling too."""
    from transformers import GenerationConfig

    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, settings in zip(owners, kept, strict=True):
            owner.generation_config = settings


def _continue(model: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig) -> list[list[int]]:
    """Return the new tokens of one batch: prompts that are continued are padded on the left, others on the right."""
    separate = model.config.is_encoder_decoder
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), settings.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = 0 if separate else width - len(prompt)
        ids[row, first : first + len(prompt)] = torch.tensor(prompt)
        mask[row, first : first + len(prompt)] = 1
    device = next(model.parameters()).device
    with without_own_settings(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # peft, of what the library passes it
        output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    stops = set(settings.eos_token_id or ())
    before = 1 if separate else width  # the decoder's start token, or the prompt again
    return [_until(row[before:].tolist(), stops) for row in output]


def _until(ids: list[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the chat template writes behind an answer; None without a template or such a token."""
    if not tokenizer.chat_template:
        return None
    try:
        turn = Chat(tokenizer).turn([Message("user", "a"), Message("assistant", "b")], 1, None, "chat template")
    except DataError:  # it wants other conversations than this one
        return None
    ids = tokenizer(turn.text[turn.start : turn.end], add_special_tokens=False)["input_ids"]
    return None if turn.eos else ids[-1]


def _virtual_tokens(model: Any) -> int | None:
    """Return the length of a learned prompt; None for a model without one."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    return model.active_peft_config.num_virtual_tokens

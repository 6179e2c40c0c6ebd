"""One answer, text piece by text piece, as it is generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from peftctl.evaluation.generation import greedy_settings, stop_ids, without_own_settings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a character of which not all tokens are there yet."""


def stream_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Generator[str, None, None]:
    """Yield an answer in pieces; closing the generator stops the model at its next token.

    Args:
        model: A causal language model or an encoder-decoder, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Token ids, at least one.
        max_new_tokens: The most tokens of the answer.
        temperature: Above 0, draws tokens from the softmax of logits / temperature; 0 takes the likeliest.
    """
    stops = stop_ids(model, tokenizer)
    settings = greedy_settings(model, tokenizer, stops, max_new_tokens)
    if temperature:
        settings.update(do_sample=True, temperature=temperature, top_k=0)
    ids: list[int] = []
    shown = 0
    with closing(_tokens(model, prompt, settings)) as tokens:
        for token in tokens:
            if token in stops:
                break
            ids.append(token)
            text = _decode(tokenizer, ids)
            if len(text) > shown and not text.endswith(_UNFINISHED):
                yield text[shown:]
                shown = len(text)
    if len(rest := _decode(tokenizer, ids)) > shown:
        yield rest[shown:]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # From the first token on: alone, a token may lose the space before it.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _tokens(model: Any, prompt: Sequence[int], settings: GenerationConfig) -> Generator[int, None, None]:
    """Generate in a thread of its own, so that whoever reads can stop it between two tokens."""
    stream, stopped = _TokenQueue(), threading.Event()
    thread = threading.Thread(target=_generate, args=(model, prompt, settings, stream, stopped), daemon=True)
    thread.start()
    try:
        yield from stream
    finally:
        stopped.set()
        thread.join()
    if stream.error is not None:
        raise stream.error


def _generate(
    model: Any, prompt: Sequence[int], settings: GenerationConfig, stream: _TokenQueue, stopped: threading.Event
) -> None:
    try:
        ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
        with without_own_settings(model):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([_Stop(stopped)]),
            )
    except Exception as error:  # raised again in the thread that reads
        stream.error = error
    finally:
        stream.end()


class _TokenQueue(BaseStreamer):
    """Hands generated tokens from one thread to another."""

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.error: Exception | None = None
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take what comes first, the prompt or a decoder's start token, and then each token."""
        if self.prompt_seen:
            self.tokens.put(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        """Let the reader go."""
        self.tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self.tokens.get()) is not None:
            yield token


class _Stop(StoppingCriteria):
    """Ends generation at the next token once the event is set."""

    def __init__(self, stopped: threading.Event):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)

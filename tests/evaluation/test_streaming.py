"""Streamed text: whole characters, the same as at once, and stoppable."""

import threading

import pytest
import torch

from peftctl.evaluation.generation import generate
from peftctl.evaluation.streaming import stream_text
from tests.tiny import tiny_llama, tiny_tokenizer

PROMPT = [17, 40, 8]


def at_once(model, tokenizer, prompt, count):
    (ids,) = generate(model, tokenizer, [prompt], max_new_tokens=count, batch_size=1)
    return tokenizer.decode(ids, skip_special_tokens=True)


def speaking(tokenizer, text):
    """A model that says a text and then ends, whatever it is asked."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model = tiny_llama()

    def say(module, args, output):
        position = args[0].shape[1] if args[0].shape[1] > 1 else None
        say.step = 0 if position else say.step + 1
        output = torch.zeros_like(output)
        output[..., ids[say.step]] = 1
        return output

    model.lm_head.register_forward_hook(say)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"logits_to_keep": 0}), with_kwargs=True
    )
    return model


def test_pieces_make_up_the_answer():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    pieces = list(stream_text(model, tokenizer, PROMPT, max_new_tokens=20))
    assert len(pieces) > 3 and all(pieces)
    assert "".join(pieces) == at_once(model, tokenizer, PROMPT, 20)


def test_characters_come_whole():
    tokenizer = tiny_tokenizer()
    text = "é 😀 naïve\n  two"
    pieces = list(stream_text(speaking(tokenizer, text), tokenizer, PROMPT, max_new_tokens=60))
    assert "".join(pieces) == text
    assert "😀" in "|".join(pieces) and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_the_end():
    tokenizer = tiny_tokenizer()
    count = len(tokenizer("a😀")["input_ids"]) - 1
    pieces = list(stream_text(speaking(tokenizer, "a😀"), tokenizer, PROMPT, max_new_tokens=count))
    assert pieces[0] == "a" and "\N{REPLACEMENT CHARACTER}" in pieces[-1]


def test_closing_stops_the_model():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    own, steps = model.generation_config, []
    model.register_forward_hook(lambda *_: steps.append(1))
    pieces = stream_text(model, tokenizer, PROMPT, max_new_tokens=400)
    next(pieces)
    pieces.close()
    assert len(steps) < 300 and model.generation_config is own
    assert not any("_generate" in thread.name for thread in threading.enumerate())


def test_errors_of_the_model_reach_the_reader():
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def fail(*_):
        raise RuntimeError("boom")

    model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        list(stream_text(model, tokenizer, PROMPT, max_new_tokens=5))


def test_temperature_draws():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    greedy = at_once(model, tokenizer, PROMPT, 12)
    torch.manual_seed(0)
    drawn = {"".join(stream_text(model, tokenizer, PROMPT, max_new_tokens=12, temperature=3.0)) for _ in range(3)}
    assert len(drawn) == 3 and greedy not in drawn
    assert "".join(stream_text(model, tokenizer, PROMPT, max_new_tokens=12, temperature=1e-4)) == greedy

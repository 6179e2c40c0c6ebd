"""Hard prompt: demonstrations in the chat template; nothing trains."""

import copy

import pytest
import torch

from peftctl.data.formats import Example, Message
from peftctl.errors import UsageError
from peftctl.methods.hard_prompt import Config, Method
from tests.methods.helpers import applied, recipe
from tests.tiny import CHATML, tiny_llama, tiny_tokenizer

TRICKY = 'say "no"\nthen {{ braces }} and {% tags %}, é and 😀'


def example(i, answer="yes"):
    return Example(where=f"rows:{i}", messages=[Message("user", f"question {i}"), Message("assistant", answer)])


EXAMPLES = [example(i, TRICKY if i % 2 else "yes") for i in range(8)]


def prepared(shots, seed=0):
    tokenizer = copy.deepcopy(tiny_tokenizer(CHATML))
    settings = recipe(Config(shots=shots), seed=seed)
    Method(Config(shots=shots)).prepare_tokenizer(tokenizer, EXAMPLES, settings)
    return tokenizer


def render(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


ASK = [{"role": "user", "content": "and now?"}]


def test_demonstrations_stand_before_the_request_word_for_word():
    shown = render(prepared(4), ASK)
    plain = render(tiny_tokenizer(CHATML), ASK)
    assert shown.endswith(plain)
    block = shown[: -len(plain)]
    assert block.count("<|im_start|>user\nquestion") == 4
    assert block.count("<|im_start|>assistant\n") == 4
    assert TRICKY in render(prepared(8), ASK)


def test_a_system_message_stays_first():
    shown = render(prepared(2), [{"role": "system", "content": "be brief"}, *ASK])
    assert shown.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nquestion")


def test_without_demonstrations_the_template_is_the_models_own():
    assert prepared(0).chat_template == CHATML


def test_the_seed_decides_which_and_the_same_seed_the_same():
    assert prepared(3, seed=1).chat_template == prepared(3, seed=1).chat_template
    assert prepared(3, seed=1).chat_template != prepared(3, seed=2).chat_template


def test_nothing_trains_and_nothing_changes():
    reference = tiny_llama().state_dict()
    model = applied(Method(Config()), tiny_llama())
    assert not any(p.requires_grad for p in model.parameters())
    assert Method(Config()).count(model) == 0
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())


def test_too_few_rows_to_show_is_refused():
    with pytest.raises(UsageError, match="asked for 9, but only 8 rows"):
        prepared(9)


def test_plain_templates_are_refused():
    settings = recipe(Config()).model_copy(update={"data": recipe().data.model_copy(update={"template": "alpaca"})})
    with pytest.raises(UsageError, match="works on the chat template, got 'alpaca'"):
        Method(Config()).prepare_tokenizer(tiny_tokenizer(CHATML), EXAMPLES, settings)

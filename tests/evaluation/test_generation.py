"""Greedy generation: the same as a plain loop, alone or in a batch, whatever the model's own settings are."""

import warnings

import peft
import pytest
import torch
from transformers import GenerationConfig

from peftctl.errors import UsageError
from peftctl.evaluation.generation import generate, position_limit, stop_ids
from tests.tiny import CHATML, tiny_llama, tiny_opt, tiny_tokenizer

# Lengths 1, 3, 5, 5, 9: several paddings and one equal pair.
PROMPTS = [[17, 40, 8], [99], [200, 201, 5, 6, 7], [12, 13, 14, 15, 16], [50, 51, 52, 53, 54, 55, 56, 57, 58]]


def lora():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), config).eval()


def prompted(kind):
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_llama(), getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()


MODELS = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "lora": lora,
    "prompt": lambda: prompted("PromptTuningConfig"),
    "prefix": lambda: prompted("PrefixTuningConfig"),
}


@torch.no_grad()
def plain_loop(model, prompt, stops, count):
    """Whole forwards, without cache, padding or library generation."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor([ids])
        token = int(model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_batches_equal_a_plain_loop(name):
    model, tokenizer = MODELS[name](), tiny_tokenizer()
    expected = [plain_loop(model, prompt, {2}, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 3  # different answers, so a mix-up would show
    for batch_size in (1, 2, 5):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_stops_before_each_end_token_and_only_there():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    free = [plain_loop(model, prompt, {2}, 12) for prompt in PROMPTS]
    end = free[0][3]
    model.generation_config.eos_token_id = [2, end]
    got = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5)
    assert got == [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert len(got[0]) == free[0].index(end) and any(len(answer) == 12 for answer in got)


def test_stop_ids_come_from_model_tokenizer_and_template():
    model, tokenizer = tiny_llama(), tiny_tokenizer(CHATML.replace("<|im_end|>", "<|pad|>"))
    model.generation_config.eos_token_id = [0, 7]
    assert stop_ids(model, tokenizer) == [0, 2, 3, 7]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tiny_tokenizer(None)) == [2]
    assert stop_ids(model, tiny_tokenizer("{{ raise_exception('no') }}")) == [2]


def test_the_models_own_settings_do_not_apply():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=4, num_beams=3, eos_token_id=2
    )
    model.generation_config = own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=5) == expected
    assert model.generation_config is own


def test_settings_and_modes_come_back_after_an_error(monkeypatch):
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    model.lm_head.eval()
    own = model.generation_config

    def fail(**_):
        assert not model.training
        raise RuntimeError("boom")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="boom"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=5)
    assert model.generation_config is own
    assert model.training and model.model.training and not model.lm_head.training


def test_training_goes_on_after_generation():
    model = tiny_llama().train()
    generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2, batch_size=5)
    ids = torch.tensor([PROMPTS[4]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_answers_end_with_the_positions_alone_or_in_a_batch(build):
    model, tokenizer = build(), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer(None)
    prompts = [[9] * 500, [9] * 508, [9] * 4]
    together = generate(model, tokenizer, prompts, max_new_tokens=10, batch_size=3)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=10, batch_size=1)[0] for prompt in prompts]
    assert together == alone
    assert len(together[1]) <= 4 and max(map(len, together)) <= 10


def test_prompts_that_leave_no_room():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(UsageError, match="prompt 2 has 512 tokens, but the model has only 512 positions"):
        generate(model, tokenizer, [[5], [5] * 512], max_new_tokens=1, batch_size=1)
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        generate(model, tokenizer, [[]], max_new_tokens=1, batch_size=1)
    assert position_limit(prompted("PromptTuningConfig")) == 508


def test_no_prompts():
    assert generate(tiny_llama(), tiny_tokenizer(), [], max_new_tokens=1, batch_size=1) == []

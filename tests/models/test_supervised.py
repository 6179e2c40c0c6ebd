"""Logits at supervised positions: the loss and every gradient equal the plain computation, in float64."""

from types import SimpleNamespace

import pytest
import torch

from peftctl.models.supervised import Supervised, supervised_forward
from tests.tiny import tiny_llama, tiny_opt


def make_batch(seed=0, rows=3, seq=12, side="right"):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 400, (rows, seq), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        pad = slice(seq - 2 * row, seq) if side == "right" else slice(0, 2 * row)
        ids[row, pad], mask[row, pad] = 3, 0
    labels = torch.where((mask == 1) & (torch.rand(ids.shape, generator=generator) < 0.4), ids, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model, batch):
    """Σ cross-entropy from all logits; what supervised_forward must equal."""
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch):
    model = model.double()
    expected_loss = plain(model, batch)
    expected = gradients(model, expected_loss)
    result = supervised_forward(model, batch)
    assert result.logits.shape == (int((batch["labels"][:, 1:] != -100).sum()), 400)
    loss = result.cross_entropy()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    got = gradients(model, loss)
    assert got.keys() == expected.keys() and got
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert any(bool(gradient.abs().sum() > 0) for gradient in got.values())


def peft_lora(targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(tie=False), config)


def prompt_model(kind):
    import peft

    torch.manual_seed(1)
    return peft.get_peft_model(tiny_llama(), getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM"))


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.2,
        max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def cohere():
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        logit_scale=0.3, initializer_range=0.2, max_position_embeddings=64, pad_token_id=3, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    return CohereForCausalLM(config).eval()


def with_saved_head():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(tie=False), config)


@pytest.mark.parametrize(
    "build",
    [
        tiny_llama, lambda: tiny_llama(tie=False), tiny_opt, gemma2, cohere, lambda: peft_lora(["q_proj", "down_proj"]),
        lambda: peft_lora(["q_proj", "lm_head"]), with_saved_head, lambda: prompt_model("PromptTuningConfig"),
        lambda: prompt_model("PrefixTuningConfig"), lambda: prompt_model("PromptEncoderConfig"),
    ],
    ids=[
        "tied", "untied", "opt", "softcap", "logit_scale", "lora", "lora_head", "saved_head", "prompt", "prefix",
        "p_tuning",
    ],
)  # fmt: skip
def test_loss_and_gradients_equal_the_full_logits(build):
    assert_same(build(), make_batch())


def test_left_padding():
    assert_same(tiny_llama(), make_batch(side="left"))


def test_gradient_checkpointing_changes_nothing():
    batch = make_batch()
    model = tiny_llama().double().train()
    expected = gradients(model, supervised_forward(model, batch).cross_entropy())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(model, supervised_forward(model, batch).cross_entropy())
    assert len(runs) == 2  # once more in the backward pass
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-14)


def test_the_head_sees_supervised_positions_only():
    model, batch, seen = tiny_llama(), make_batch(), []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    result = supervised_forward(model, batch)
    handle.remove()
    assert seen == [len(result.labels)] and seen[0] < batch["labels"].numel()


def test_labels_follow_the_logits():
    model, batch = tiny_llama(), make_batch()
    result = supervised_forward(model, batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    place = 0
    for row in range(len(full)):
        for position in range(1, full.shape[1]):
            if batch["labels"][row, position] != -100:
                assert result.labels[place] == batch["labels"][row, position]
                torch.testing.assert_close(result.logits[place], full[row, position - 1])
                place += 1
    assert place == len(result.labels)


class Headless(torch.nn.Module):
    """Computes its logits without a module that get_output_embeddings could return."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def get_output_embeddings(self):
        return None

    def forward(self, **inputs):
        return self.model(**inputs)


class FunctionalHead(Headless):
    """Has a head, but multiplies with its weight instead of calling it."""

    def get_output_embeddings(self):
        return self.model.lm_head

    def forward(self, **inputs):
        hidden = self.model.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=hidden @ self.model.lm_head.weight.T)


@pytest.mark.parametrize("wrapper", [Headless, FunctionalHead])
def test_models_whose_head_is_not_called(wrapper):
    assert_same(wrapper(tiny_llama()), make_batch())


def test_no_hook_stays_behind_after_an_error():
    model, batch = tiny_llama(), make_batch()
    supervised_forward(model, batch)
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(TypeError):
        supervised_forward(model, batch | {"position_ids": "wrong"})
    assert not model.lm_head._forward_pre_hooks


def test_further_fields_reach_the_model():
    model, batch = tiny_llama(), make_batch()
    shifted = torch.arange(12).expand(3, 12) * 2
    moved = supervised_forward(model, batch | {"position_ids": shifted})
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=shifted).logits
    torch.testing.assert_close(moved.logits, full[:, :-1][batch["labels"][:, 1:] != -100])


@pytest.mark.parametrize("seq", [1, 12])
def test_no_supervised_token_gives_zero_with_a_graph(seq):
    model, batch = tiny_llama(), make_batch(seq=12)
    batch = {name: value[:, :seq] for name, value in batch.items()}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    result = supervised_forward(model, batch)
    loss = result.cross_entropy()
    assert result.logits.shape == (0, 400) and loss.item() == 0.0 and result.correct() == 0
    loss.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


def test_the_first_token_is_never_supervised():
    batch = make_batch()
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    expected = int((batch["labels"][:, 1:] != -100).sum())
    for model in (tiny_llama(), prompt_model("PromptTuningConfig")):
        assert len(supervised_forward(model, batch).labels) == expected


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_cross_entropy_over_several_chunks(dtype, rtol):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2500, 7, generator=generator).mul(20).to(dtype).requires_grad_()
    labels = torch.randint(0, 7, (2500,), generator=generator)
    loss = Supervised(logits, labels).cross_entropy()
    assert loss.dtype == torch.float32
    (got,) = torch.autograd.grad(loss * 0.25, logits)
    expected_loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    (expected,) = torch.autograd.grad(expected_loss * 0.25, logits)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-6)
    assert got.dtype == dtype


def test_cross_entropy_derivative_numerically():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 3, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda z: Supervised(z, labels).cross_entropy(), logits)


def test_cross_entropy_keeps_no_float32_copy():
    logits = torch.randn(3000, 50).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        Supervised(logits, torch.zeros(3000, dtype=torch.long)).cross_entropy()
    assert sum(kept) <= logits.nbytes + 3000 * (8 + 4)


def test_correct_counts_hits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 5.0]])
    assert Supervised(logits, torch.tensor([1, 2, 2])).correct() == 2

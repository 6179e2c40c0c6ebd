"""NEFTune's noise and label smoothing: their sizes, that only training has them, and that a resume draws the same."""

import json

import pytest
import torch
from torch.nn import functional

from peftctl.artifacts.checks import probe_logits
from peftctl.data.collate import Collator
from peftctl.errors import Interrupted, RunError
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods import full, last_layers, lora
from peftctl.training.noise import noisy_embeddings
from tests.tiny import tiny_llama, tiny_opt, tiny_tokenizer
from tests.training.helpers import rows, train, trained_tensors, workload
from tests.training.test_resume import StopAt, losses

CONFIG = lora.Config(r=4, target_modules="all-linear")


def batch(lengths=(3, 12), seq=12):
    mask = torch.tensor([[1] * n + [0] * (seq - n) for n in lengths])
    return {"input_ids": torch.full(mask.shape, 7), "attention_mask": mask}


def embedded(model, inputs, alpha):
    """Return what the first layer reads."""
    seen = []
    layer = model.model.layers[0] if hasattr(model.model, "layers") else model.model.decoder.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with noisy_embeddings(model, inputs["attention_mask"], alpha):
        model(**inputs)
    handle.remove()
    return seen[0]


def test_noise_is_scaled_by_each_rows_own_length():
    """Rows of 3 and of 400 tokens in one batch: the bound is alpha / sqrt(L d), and the noise fills it."""
    model, inputs, alpha = tiny_llama(), batch((3, 400), 400), 5.0
    torch.manual_seed(0)
    noise = embedded(model, inputs, alpha) - embedded(model, inputs, 0.0)
    for row, length in enumerate((3, 400)):
        bound = alpha / (length * 32) ** 0.5
        real = noise[row, :length]
        assert real.abs().max() <= bound * (1 + 1e-4) and real.abs().max() > 0.9 * bound
        assert abs(real.mean()) < 0.25 * bound
    assert not noise[0, 3:].any()


def test_padding_does_not_change_a_rows_noise_size():
    model = tiny_llama()
    torch.manual_seed(0)
    alone = embedded(model, batch((3,), 3), 5.0) - embedded(model, batch((3,), 3), 0.0)
    padded = embedded(model, batch((3,), 300), 5.0) - embedded(model, batch((3,), 300), 0.0)
    assert 0.7 < padded[0, :3].abs().max() / alone.abs().max() < 1.4  # a tenth, if padding counted


def test_noise_has_the_variance_of_the_paper():
    torch.manual_seed(0)
    model, inputs = tiny_opt(), batch((12, 12))
    draws = torch.stack([embedded(model, inputs, 3.0) for _ in range(200)])
    expected = 3.0**2 / (12 * 32) / 3  # the variance of uniform(-1, 1) is 1/3
    assert draws.var(dim=0).mean().item() == pytest.approx(expected, rel=0.03)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=3)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("shared", [False, True])
def test_an_encoder_decoder_gets_noise_in_its_encoder_only(shared):
    model, seen = t5(), {"encoder": [], "decoder": []}
    if shared:  # as `resize_token_embeddings` leaves it: encoder and decoder call one module
        model.set_input_embeddings(model.get_input_embeddings())
        assert model.encoder.embed_tokens is model.decoder.embed_tokens
    inputs = batch() | {"decoder_input_ids": torch.full((2, 12), 9)}
    for name, blocks in seen.items():
        block = getattr(model, name).block[0]
        block.register_forward_pre_hook(lambda _, args, blocks=blocks: blocks.append(args[0].detach()))
    for alpha in (0.0, 5.0):
        with noisy_embeddings(model, inputs["attention_mask"], alpha):
            model(**inputs)
    assert not torch.equal(*seen["encoder"])
    assert torch.equal(*seen["decoder"])


@pytest.mark.parametrize("kind", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
def test_noise_reaches_the_model_inside_a_peft_model(kind):
    import peft

    options = {"target_modules": ["q_proj"]} if kind == "LoraConfig" else {"num_virtual_tokens": 3}
    model = peft.get_peft_model(tiny_llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()
    inputs = batch()
    plain = model(**inputs).logits
    with noisy_embeddings(model, inputs["attention_mask"], 5.0):
        noisy = model(**inputs).logits
    assert not torch.equal(noisy, plain)
    assert torch.equal(model(**inputs).logits, plain)


def test_a_model_that_does_not_call_its_embedding_is_refused():
    model, inputs = tiny_llama(), batch()
    vectors = torch.zeros(2, 12, 32)
    with (
        pytest.raises(RunError, match=r"train\.neftune_noise: this model does not call its input embedding"),
        noisy_embeddings(model, inputs["attention_mask"], 5.0),
    ):
        model(inputs_embeds=vectors)
    with pytest.raises(ZeroDivisionError), noisy_embeddings(model, inputs["attention_mask"], 5.0):
        raise ZeroDivisionError
    assert not model.get_input_embeddings()._forward_hooks


def test_no_noise_draws_nothing():
    model, before = tiny_llama(), torch.get_rng_state()
    embedded(model, batch(), 0.0)
    assert torch.equal(torch.get_rng_state(), before)
    embedded(model, batch(), 1.0)
    assert not torch.equal(torch.get_rng_state(), before)


def test_training_draws_noise_and_evaluation_does_not(tmp_path):
    method = lora.Method(CONFIG)
    work = workload(tmp_path, method, max_steps=2, eval_steps=2, neftune_noise=20.0, save_steps=2)
    model, _ = train(work)
    plain, _ = train(workload(tmp_path / "plain", lora.Method(CONFIG), max_steps=2))
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    measured = held_out_loss(model, work.eval_rows, work.collate, 8)["loss"]
    assert next(line["eval_loss"] for line in lines if "eval_loss" in line) == pytest.approx(measured, abs=1e-6)
    assert any(not torch.equal(t, trained_tensors(plain)[n]) for n, t in trained_tensors(model).items())
    model.eval()
    probe = [row.input_ids for row in work.eval_rows[:2]]
    assert torch.equal(probe_logits(model, probe), probe_logits(model, probe))
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_draws_the_same_noise(tmp_path, checkpointing):
    settings = {"max_steps": 5, "neftune_noise": 5.0, "gradient_checkpointing": checkpointing}
    straight = workload(tmp_path / "straight", **settings)
    model, _ = train(straight)
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", **settings, reporter=StopAt(2)))
    resumed = workload(tmp_path / "stopped", **settings)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    assert all(torch.equal(t, trained_tensors(again)[n]) for n, t in trained_tensors(model).items())
    assert losses(resumed.run) == losses(straight.run)


@pytest.mark.parametrize(
    "method",
    [
        lambda: lora.Method(CONFIG),
        lambda: full.Method(full.Config(name="full")),
        lambda: last_layers.Method(last_layers.Config(name="last_layers")),
    ],
    ids=["lora", "full", "last_layers"],
)
def test_gradient_checkpointing_draws_the_noise_once(tmp_path, method):
    settings = {"max_steps": 3, "neftune_noise": 5.0}
    plain, _ = train(workload(tmp_path / "a", method(), **settings))
    checkpointed, _ = train(workload(tmp_path / "b", method(), **settings, gradient_checkpointing=True))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(checkpointed)[name], tensor, rtol=1e-4, atol=1e-6)


def test_smoothed_loss_is_logged_and_the_held_out_loss_is_plain(tmp_path):
    work = workload(tmp_path, lora.Method(CONFIG), max_steps=1, batch_size=24, eval_steps=1, label_smoothing=0.2)
    model, _ = train(work)
    inputs = Collator(tiny_tokenizer(), None)(rows())
    logits = tiny_llama()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100, label_smoothing=0.2
    )
    first, held_out = (json.loads(line) for line in work.run.metrics.read_text().splitlines())
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert held_out["eval_loss"] == pytest.approx(held_out_loss(model, work.eval_rows, work.collate, 8)["loss"])


def test_smoothing_equals_its_gradient_over_accumulated_steps(tmp_path):
    settings = {"max_steps": 3, "label_smoothing": 0.2}
    large, _ = train(workload(tmp_path / "a", lora.Method(CONFIG), batch_size=8, **settings))
    small, _ = train(workload(tmp_path / "b", lora.Method(CONFIG), batch_size=2, gradient_accumulation=4, **settings))
    for name, tensor in trained_tensors(large).items():
        torch.testing.assert_close(trained_tensors(small)[name], tensor, rtol=1e-3, atol=2e-5)

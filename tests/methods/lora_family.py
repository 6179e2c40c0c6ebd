"""What the tests of the LoRA family share."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from peftctl.artifacts.fold import fold
from peftctl.errors import Interrupted
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from tests.methods.helpers import applied
from tests.tiny import tiny_llama, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
KINDS = {"nf4": {"bits": 4}, "int8": {"bits": 8}}


def lora_layers(model):
    return {n.split("base_model.model.")[1]: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def factors(layer):
    """Return W, A and B of a layer."""
    return layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def randomise(model, std=0.1, seed=1):
    """Move every trainable tensor away from where it starts, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
    return model


def double(method, base=tiny_llama):
    """Apply a method in float64, with every trainable tensor moved."""
    return randomise(applied(method, base().double()).double())


def quantized(folder, kind="nf4", dtype="float32"):
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    return load_model(section, device="cpu", quantization=QuantizationSection(**KINDS[kind]))


def smollm2():
    """SmolLM2-135M without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def trainable_count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_identity(method, base):
    """A fresh adapter answers as its base exactly, in evaluation and in training."""
    for training in (False, True):  # 8-bit products themselves differ between the two
        reference = base().train(training)(input_ids=IDS).logits
        assert torch.equal(applied(method, base()).train(training)(input_ids=IDS).logits, reference)


def check_encoder_decoder(method):
    """It starts as a T5, trains what it counts, and learns."""
    labels = torch.arange(30, 50).reshape(2, 10)
    model = applied(method, tiny_t5())
    logits = model(input_ids=IDS, labels=labels).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS, labels=labels).logits, logits)
    # The library's T5 itself is not bit-equal from one copy to the next.
    torch.testing.assert_close(tiny_t5()(input_ids=IDS, labels=labels).logits, logits, rtol=0, atol=1e-5)
    model.train()
    assert trainable_count(model) == method.count(tiny_t5())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def check_frozen_base(method, base=tiny_llama):
    """Training with weight decay moves every trainable tensor and no other, buffers included; nothing else trains."""
    reference = base()(input_ids=IDS).logits
    model = applied(method, base())
    before = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    moves = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) == (name not in moves), name
    model.eval()
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)


def check_resume(folder, make, stop=4, **settings):
    """A run that stops and goes on equals the straight one bit for bit; return the straight one."""
    straight, _ = train(workload(folder / "straight", make(), max_steps=9, weight_decay=0.1, **settings))
    with pytest.raises(Interrupted):
        train(workload(folder / "stopped", make(), max_steps=9, weight_decay=0.1, reporter=StopAt(stop), **settings))
    resumed = workload(folder / "stopped", make(), max_steps=9, weight_decay=0.1, **settings)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    return straight


def check_accumulation(folder, make):
    """Two micro-batches of two rows train as one batch of four does."""
    large, _ = train(workload(folder / "large", make(), max_steps=4, batch_size=4))
    small, _ = train(workload(folder / "small", make(), max_steps=4, batch_size=2, gradient_accumulation=2))
    for name, tensor in trained_tensors(large).items():
        torch.testing.assert_close(trained_tensors(small)[name], tensor, rtol=1e-3, atol=3e-5)


def check_saved(folder, method, base=tiny_llama):
    """Plain peft reads the adapter back and answers alike; merged it answers alike too. Return the folder."""
    model = randomise(applied(method, base())).eval()
    model = method.export(model)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder).eval()
    assert not any(type(m).__module__.startswith("peftctl") for m in again.modules())
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    check_folds(again)
    return folder


def check_folds(model):
    """Folding layer by layer, in float64, changes no logit."""
    model = model.double().eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    base_logits = tiny_llama().double()(input_ids=IDS).logits
    assert (logits - base_logits).abs().max() > 1e-3
    merged, _ = fold(model, torch.float32)
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-9, atol=1e-9)


def kept_for_backward(layer, batch=3, seq=7, dtype=torch.float32):
    """Return the shapes of what a layer keeps of one training forward."""
    torch.manual_seed(0)
    x = torch.randn(batch, seq, layer.in_features, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((tuple(t.shape), t.dtype)) or t, lambda t: t):
        layer.train()(x)
    return kept

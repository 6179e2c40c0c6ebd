"""Leaner norms and gated parts: the equations in float64, the library's own modules, and which of them are replaced."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, T5Config, T5ForConditionalGeneration

from peftctl.models.lean_blocks import Gated, RmsNorm, lean_blocks, lean_forwards
from tests import tiny


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_the_norm_is_the_equation():
    x, w, upstream = numbers(2, 3, 5), numbers(5, seed=1), numbers(2, 3, 5, seed=2).detach()
    naive = w * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 0.01)
    ours = RmsNorm.apply(x, w, 0.01)
    torch.testing.assert_close(ours, naive, rtol=1e-13, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(ours, (x, w), upstream), torch.autograd.grad(naive, (x, w), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: RmsNorm.apply(a, b, 0.3), (x, w))


def test_the_gated_product_is_the_equation():
    g, u, upstream = numbers(4, 6), numbers(4, 6, seed=1), numbers(4, 6, seed=2).detach()
    naive, ours = g * torch.sigmoid(g) * u, Gated.apply(g, u)
    torch.testing.assert_close(ours, naive, rtol=1e-13, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(ours, (g, u), upstream), torch.autograd.grad(naive, (g, u), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def frozen_norm(x, w):
    return RmsNorm.apply(x, w.detach(), 0.1)


def test_a_frozen_weight_gets_no_gradient_and_a_frozen_input_none():
    x, w = numbers(2, 4), numbers(4, seed=1)
    assert torch.autograd.grad(frozen_norm(x, w).sum(), (x, w), allow_unused=True)[1] is None
    plain = functional.rms_norm(x.detach(), (4,), w, 0.1)
    (ours,) = torch.autograd.grad(RmsNorm.apply(x.detach(), w, 0.1).sum(), w)
    torch.testing.assert_close(ours, *torch.autograd.grad(plain.sum(), w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_equals_the_librarys_to_the_last_bit(dtype):
    model = tiny.tiny_llama().to(dtype)
    norm, mlp = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    norm.weight.data.normal_()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    plain = norm(x), mlp(x)
    with lean_blocks(lean_forwards(model)):
        ours = norm(x), mlp(x)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert type(ours[0].grad_fn).__name__ == "RmsNormBackward"


def names(model):
    return {name for name, module in model.named_modules() for other, _ in lean_forwards(model) if module is other}


def test_what_is_replaced_in_a_llama():
    found = names(tiny.tiny_llama())
    assert "model.norm" in found and "model.layers.1.mlp" in found and "model.layers.0.input_layernorm" in found
    assert len(found) == 4 * 2 + 1 + 4


def test_another_equation_is_left_alone():
    gelu = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
                       hidden_act="gelu")  # fmt: skip
    assert not any("mlp" in name for name in names(AutoModelForCausalLM.from_config(gelu)))
    gemma = Gemma2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
                         num_key_value_heads=2, vocab_size=50)  # fmt: skip
    assert not names(AutoModelForCausalLM.from_config(gemma))  # its norms multiply by 1 + w
    assert not names(tiny.tiny_opt())  # LayerNorm has a bias, and a mean


def test_a_norm_by_another_name_is_replaced():
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    assert "encoder.final_layer_norm" in names(T5ForConditionalGeneration(config))


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x):
        return 2 * x


def test_it_is_the_equation_that_counts_and_not_the_name_of_the_parameters():
    assert not lean_forwards(Doubled())


def test_hooks_and_foreign_forwards_stay():
    model = tiny.tiny_llama()
    first, second, *_ = (layer.mlp for layer in model.model.layers)
    seen = []
    first.act_fn.register_forward_hook(lambda *_: seen.append(1))
    second.forward = lambda x: x
    assert not {first, second} & {module for module, _ in lean_forwards(model)}


def test_afterwards_everything_is_as_before_even_after_an_error():
    model = tiny.tiny_llama()
    with pytest.raises(ZeroDivisionError), lean_blocks(lean_forwards(model)):
        assert "forward" in vars(model.model.norm)
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_equal_the_librarys(checkpointing):
    model = tiny.tiny_llama().double().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return {"": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    with lean_blocks(lean_forwards(model)):
        ours = gradients()
    for name, gradient in plain.items():
        # the library's norms compute in float32
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()), msg=name)


def test_less_is_kept_for_the_backward_pass():
    model = tiny.tiny_llama().to(torch.bfloat16)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    ids = torch.randint(4, 400, (4, 60))

    def kept():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss.dtype and sum(storages.values())

    plain = kept()
    with lean_blocks(lean_forwards(model)):
        assert kept() < plain - 4 * 60 * 2 * (2 * 32 * 2)  # two norms a block: 2 bytes a number instead of 4

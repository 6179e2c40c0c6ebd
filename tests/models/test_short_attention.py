"""Attention of short rows against the equation in float64, and against the library's kernel."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftctl.models import short_attention
from peftctl.models.short_attention import Products, attend, short_rows
from tests import tiny


def heads(batch=2, heads=6, kv=2, length=5, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, width), (batch, kv, length, width), (batch, kv, length, width + 1)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def naive(query, key, value, seen, scale):
    """Row by row and head by head."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for b in range(len(query)):
        for h in range(query.shape[1]):
            scores = scale * query[b, h] @ key[b, h // group].T
            weights = scores.masked_fill(~seen[b if len(seen) > 1 else 0, 0], float("-inf")).softmax(-1)
            rows.append(weights @ value[b, h // group])
    return torch.stack(rows).unflatten(0, query.shape[:2])


def seen(batch, length, padding):
    """A causal mask over rows whose last tokens are padding."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    mask[-1, 0, :, length - padding :] = False
    return mask


@pytest.mark.parametrize("kv", [1, 2, 6])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("keeps", [4, 5])
def test_it_is_the_equation(kv, padding, keeps, monkeypatch):
    monkeypatch.setattr(short_attention, "KEEPS", keeps)
    inputs = heads(kv=kv)
    mask = seen(2, 5, padding)
    ours = Products.apply(*inputs, short_attention._added(mask, torch.float64), 0.3)
    theirs = naive(*inputs, mask, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_library_mask_of_numbers_and_none_at_all():
    inputs = heads()
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    torch.testing.assert_close(Products.apply(*inputs, None, 0.5), naive(*inputs, everything, 0.5))
    numbers = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~seen(2, 5, 1), -1e30)
    torch.testing.assert_close(Products.apply(*inputs, numbers, 0.5), naive(*inputs, seen(2, 5, 1), 0.5))


@pytest.mark.parametrize(("keeps", "kept"), [(4, False), (5, True)])
def test_only_short_rows_keep_the_weights(keeps, kept, monkeypatch):
    monkeypatch.setattr(short_attention, "KEEPS", keeps)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        Products.apply(*heads(), None, 0.5)
    assert ((4, 15, 5) in shapes) == kept  # batch x h_kv, group x seq, seq


def test_a_token_that_sees_nothing_gives_numbers():
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    inputs = heads(dtype=torch.bfloat16)
    inputs = [(16 * part).detach().requires_grad_() for part in inputs]
    output = Products.apply(*inputs, short_attention._added(mask, torch.bfloat16), 1.0)
    for part in (output, *torch.autograd.grad(output.sum(), inputs)):
        assert torch.isfinite(part).all()


def ran(model, monkeypatch, batch, dtype=torch.bfloat16, inside=True):
    """Return logits and gradients, and how often our products ran."""
    calls = []
    apply = Products.apply
    monkeypatch.setattr(Products, "apply", lambda *args: calls.append(1) or apply(*args))
    model = model.to(dtype).train()
    model.zero_grad()
    if inside:
        with short_rows():
            logits = model(**batch).logits
    else:
        logits = model(**batch).logits
    logits.float()[batch["attention_mask"].bool()].square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.undo()
    return logits.detach(), grads, len(calls)


def tiny_encoder():
    return tiny.tiny_bert(kind="BertForMaskedLM")


def batch_of(*lengths):
    ids = torch.randint(4, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny_encoder], ids=["decoder", "encoder"])
@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)], ids=["whole", "padded"])
def test_a_model_answers_as_with_the_library_kernel(make, lengths, monkeypatch):
    batch = batch_of(*lengths)
    whole, whole_grads, _ = ran(make(), monkeypatch, batch, torch.float32, inside=False)
    ours, our_grads, calls = ran(make(), monkeypatch, batch)
    theirs, their_grads, none = ran(make(), monkeypatch, batch, inside=False)
    assert calls
    assert none == 0
    real = batch["attention_mask"].bool()
    # No further from float32 than the library's kernel is, but for a margin.
    for exact, a, b in [(whole[real], ours[real], theirs[real])] + [
        (whole_grads[name], our_grads[name], their_grads[name]) for name in whole_grads
    ]:
        off = (b.float() - exact).norm()
        assert (a.float() - exact).norm() <= 2 * off + 1e-3 * exact.norm()


def test_float32_and_long_rows_are_the_library_s(monkeypatch):
    assert ran(tiny.tiny_llama(), monkeypatch, batch_of(9, 5), torch.float32)[2] == 0
    monkeypatch.setattr(short_attention, "LONGEST", 8)
    assert ran(tiny.tiny_llama(), monkeypatch, batch_of(9, 5))[2] == 0


def test_dropout_and_biases_are_the_library_s():
    query, key, value = (part[..., :4] for part in heads(kv=6, dtype=torch.bfloat16))
    module = torch.nn.Module()
    module.is_causal = True
    bias = torch.zeros(1, 6, 5, 5, dtype=torch.bfloat16)
    bias[..., 0] = -1e4
    plain, _ = attend(module, query, key, value, None)
    biased, _ = attend(module, query, key, value, None, position_bias=bias)
    assert not torch.allclose(plain, biased)
    dropped, _ = attend(module, query, key, value, None, dropout=0.9)
    assert not torch.allclose(plain, dropped)


def test_nothing_stays_behind():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyError), short_rows():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
        raise KeyError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before

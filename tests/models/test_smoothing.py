"""Label smoothing: loss and gradients equal torch's own, in float64."""

import pytest
import torch
from torch.nn import functional

from peftctl.models import cross_entropy
from peftctl.models.supervised import Supervised


def logits_and_labels(n, vocab, dtype=torch.float64, scale=5.0):
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab, (n,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.75])
@pytest.mark.parametrize(("n", "chunk"), [(1, 1 << 20), (7, 1 << 20), (2500, 2000), (3, 5)])
def test_loss_and_gradient_equal_torch(n, chunk, smoothing, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", chunk)
    logits, labels = logits_and_labels(n, 11)
    loss = Supervised(logits, labels, smoothing).cross_entropy()
    expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(loss * 0.3, logits)
    (wanted,) = torch.autograd.grad(expected * 0.3, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_loss_is_the_naive_equation():
    logits, labels = logits_and_labels(6, 9)
    log_p = logits.log_softmax(dim=-1)
    picked = log_p[torch.arange(6), labels]
    expected = (-(1 - 0.2) * picked - 0.2 * log_p.mean(dim=-1)).sum()
    torch.testing.assert_close(Supervised(logits, labels, 0.2).cross_entropy(), expected, rtol=1e-12, atol=0)


def test_derivative_numerically():
    logits, labels = logits_and_labels(5, 4, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: Supervised(z, labels, 0.3).cross_entropy(), logits)


def test_bfloat16_logits_are_widened():
    logits, labels = logits_and_labels(1500, 50, torch.bfloat16)
    loss = Supervised(logits, labels, 0.1).cross_entropy()
    expected = functional.cross_entropy(logits.float(), labels, label_smoothing=0.1, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)


def test_backward_keeps_no_float32_copy():
    logits = torch.randn(3000, 50).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        Supervised(logits, torch.zeros(3000, dtype=torch.long), 0.1).cross_entropy()
    assert sum(kept) <= logits.nbytes + 3000 * (8 + 4)


def test_no_supervised_token_gives_zero_with_a_graph():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = Supervised(logits, torch.zeros(0, dtype=torch.long), 0.1).cross_entropy()
    loss.backward()
    assert loss.item() == 0.0

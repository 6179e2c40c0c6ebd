"""OLoRA: A and B hold the first columns of W = Q R; what it shares with PiSSA is in test_starts.py."""

import pytest
import torch

from peftctl.methods.olora import Config, Method
from peftctl.tuners.fixed_factors import base_matrix, layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied


@pytest.fixture(params=["llama", "gpt2"])
def decomposed(request):
    """(W, A_0, B_0) of every layer of a model with Linear layers, and of one with Conv1D, in float64."""
    method = Method(Config(r=5, alpha=15, target_modules="all-linear"))
    model = applied(method, tiny_of(request.param, "cpu"))
    return [
        (base_matrix(m).double(), m.lora_A["default"].weight.double(), m.lora_B["default"].weight.double())
        for _, m in layers(model)
    ]


def test_b_has_orthonormal_columns(decomposed):
    for _, _, b in decomposed:
        torch.testing.assert_close(b.T @ b, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_is_upper_trapezoidal(decomposed):
    for w, a, _ in decomposed:
        assert a.shape == (5, w.shape[1])
        assert not a.tril(-1).any() and a.diagonal().all()


def test_b_a_is_w_in_its_first_columns(decomposed):
    """Q_r R_r: the first r columns of W whole, of the others what lies in their span, whatever s is."""
    for w, a, b in decomposed:
        span = w[:, :5] @ torch.linalg.pinv(w[:, :5])
        torch.testing.assert_close((b @ a)[:, :5], w[:, :5], rtol=0, atol=1e-5)
        torch.testing.assert_close(b @ a, span @ w, rtol=0, atol=1e-5)
        torch.testing.assert_close(b @ b.T, span, rtol=0, atol=1e-5)

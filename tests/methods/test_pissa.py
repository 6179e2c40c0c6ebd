"""PiSSA: A and B hold the largest singular values of W; what it shares with OLoRA is in test_starts.py."""

import pytest
import torch

from peftctl.methods.base import Context
from peftctl.methods.pissa import Config, Method
from peftctl.tuners.fixed_factors import base_matrix, layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe
from tests.tiny import tiny_llama


def method(**keys):
    return Method(Config(**{"r": 4, "target_modules": "all-linear"} | keys))


def decomposed(model):
    """Yield (W, A_0, B_0, s) of every layer, in float64."""
    for _, layer in layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield base_matrix(layer).double(), a.detach().double(), b.detach().double(), layer.scaling["default"]


@pytest.mark.parametrize("alpha", [None, 1.0, 32.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_s_b_a_is_the_principal_part_of_w_for_any_alpha(architecture, alpha):
    model = applied(method(alpha=alpha), tiny_of(architecture, "cpu"))
    for w, a, b, s in decomposed(model):
        u, values, vt = torch.linalg.svd(w)
        torch.testing.assert_close(s * b @ a, u[:, :4] @ values[:4].diag() @ vt[:4], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.linalg.svdvals(w - s * b @ a)[0], values[4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_both_factors_have_the_singular_values_in_equal_parts(alpha):
    """s A A^T = s B^T B = diag(S_1 .. S_r)."""
    model = applied(method(alpha=alpha), tiny_llama())
    for w, a, b, s in decomposed(model):
        values = torch.linalg.svdvals(w)[:4].diag()
        torch.testing.assert_close(s * a @ a.T, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s * b.T @ b, values, rtol=1e-5, atol=1e-5)


def test_the_fast_svd_comes_nearer_with_more_iterations():
    errors = []
    for niter in (0, 2, 16):
        model = applied(method(svd="fast", niter=niter), tiny_llama())
        best = [torch.linalg.svdvals(w)[4] for w, *_ in decomposed(model)]
        rest = [torch.linalg.svdvals(w - s * b @ a)[0] for w, a, b, s in decomposed(model)]
        errors.append(max(float(r / b) - 1 for r, b in zip(rest, best, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05 < errors[0]


def test_the_seed_of_the_recipe_decides_the_fast_svd():
    def first(seed):
        model = method(svd="fast", niter=0).apply(tiny_llama(), Context(recipe(seed=seed)))
        return next(decomposed(model))[1]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_the_exact_svd_knows_no_seed():
    models = [method().apply(tiny_llama(), Context(recipe(seed=seed))) for seed in (1, 2)]
    for (_, a, *_), (_, other, *_) in zip(*map(decomposed, models), strict=True):
        assert torch.equal(a, other)


def test_the_whole_rank_leaves_nothing_frozen():
    model = applied(method(r=16, target_modules=["k_proj"]), tiny_llama())
    for w, a, b, s in decomposed(model):
        torch.testing.assert_close(s * b @ a, w, rtol=0, atol=1e-5)


def test_quantised_bases_are_not_claimed():
    assert not {"4bit", "8bit"} & Method.card.supports

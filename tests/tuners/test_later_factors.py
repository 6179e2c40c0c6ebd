"""Fixed factors that come later: restarts that keep a share or lower the rank, and a base that follows the product."""

import math
from itertools import pairwise

import pytest
import torch

from peftctl.methods.lora import Config, Method
from peftctl.tuners.fixed_factors import FollowedProduct, follow, into_one_adapter, layers, restart
from tests.methods.helpers import applied
from tests.tiny import tiny_llama
from tests.tuners.test_fixed_factors import IDS, drawn, lora, one_layer, randomise

# -- restarts that keep a share, or lower the rank -------------------------------------------------------------------


def update(layer):
    """Return B A + F E of a layer."""
    a, b, fixed = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.fixed_factors
    return (b @ a + (0 if fixed is None else fixed.F @ fixed.E)).detach()


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.7])
def test_a_restart_that_keeps_a_share_leaves_the_sum_and_splits_it(keep):
    model = lora().eval()
    randomise(model)
    layer = one_layer(model)
    a, b = (factor["default"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
    before = update(layer)
    restart(layer, torch.Generator(), keep)
    fixed = layer.fixed_factors
    torch.testing.assert_close(update(layer), before, rtol=0, atol=1e-14)
    torch.testing.assert_close(fixed.F @ fixed.E, (1 - keep) * before, rtol=0, atol=1e-14)
    if keep:  # both alike, not one of them
        torch.testing.assert_close(layer.lora_A["default"].weight, math.sqrt(keep) * a, rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.lora_B["default"].weight, math.sqrt(keep) * b, rtol=0, atol=1e-14)


def test_shares_that_are_kept_add_up_over_restarts():
    model = lora().eval()
    randomise(model)
    layer = one_layer(model)
    before = update(layer)
    for cycle in (1, 2, 3):
        restart(layer, torch.Generator(), 0.4)
        kept = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(kept, 0.4**cycle * before, rtol=0, atol=1e-14)
        torch.testing.assert_close(update(layer), before, rtol=0, atol=1e-14)
        assert len(layer.fixed_factors.E) == 3 * cycle


def test_a_lower_rank_begins_with_zero_rows_whose_gradients_are_zero():
    model = lora(r=4).train()
    randomise(model)
    layer = one_layer(model)
    before = update(layer)
    restart(layer, torch.Generator(), 0.0, 4, 3)
    assert len(layer.fixed_factors.E) == 4
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 32) and a[:3].all() and not a[3:].any() and not b.any()
    with torch.no_grad():
        b[:, :3] = drawn(64, 3)
    layer(drawn(7, 32)).backward(drawn(7, 64, seed=2))
    assert a.grad[:3].all() and b.grad[:, :3].all()
    assert not a.grad[3:].any() and not b.grad[:, 3:].any()
    second = b.detach() @ a.detach()
    restart(layer, torch.Generator(), 0.0, 3, 1)
    fixed = layer.fixed_factors
    assert len(fixed.E) == 4 + 3, "zero rows don't join what is fixed"
    assert a[:1].all() and not a[1:].any()
    torch.testing.assert_close(fixed.F @ fixed.E, before + second, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 3), (4, 3, 1)])
def test_one_adapter_has_only_the_ranks_that_were_trained(ranks):
    model = lora(r=4, alpha=6, alpha_pattern={"up_proj": 7}).eval()
    randomise(model)
    for cycle, (had, begins) in enumerate(pairwise(ranks)):
        for _, layer in layers(model):
            restart(layer, torch.Generator().manual_seed(cycle), 0.0, had, begins)
            with torch.no_grad():
                layer.lora_B["default"].weight[:, :begins] = drawn(layer.out_features, begins, seed=cycle)
    logits = model(IDS).logits
    one = into_one_adapter(model, ranks[-1])
    torch.testing.assert_close(one(IDS).logits, logits, rtol=0, atol=1e-11)
    config = one.peft_config["default"]
    assert (config.r, config.lora_alpha / config.r) == (sum(ranks), pytest.approx(1.5, rel=1e-12))
    assert config.alpha_pattern["up_proj"] / config.r == pytest.approx(7 / 4, rel=1e-12)
    for _, layer in layers(one):
        rank = torch.linalg.matrix_rank(layer.get_delta_weight("default"), tol=1e-9)
        assert rank == len(layer.lora_A["default"].weight) == layer.r["default"] == sum(ranks)


# -- a base that follows the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 2.0])
@pytest.mark.parametrize("training", [True, False])
def test_a_followed_product_is_the_equation_in_float64(training, weight):
    """y = W x + s B A x + lambda s B A x - lambda s B_K A_K x."""
    model = lora().train(training)
    randomise(model)
    layer = one_layer(model)
    first_a, first_b = (factor["default"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
    before = layer(x := drawn(2, 5, 32)).detach()
    follow(layer, weight)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-13)
    randomise(model, seed=5)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    moved = w + weight * 4 * (b @ a - first_b @ first_a)
    torch.testing.assert_close(layer(x), x @ (moved + 4 * b @ a).T, rtol=1e-11, atol=1e-12)


def test_a_followed_product_gives_a_and_b_the_gradients_of_lora_and_x_those_of_the_moved_base():
    model = lora().train()
    randomise(model)
    layer = one_layer(model)
    follow(layer, 2.0)
    randomise(model, seed=5)
    x, upstream = drawn(7, 32).requires_grad_(), drawn(7, 64, seed=2)
    layer(x).backward(upstream)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(a.grad, 4 * b.T @ upstream.T @ x, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(b.grad, 4 * upstream.T @ x @ a.T, rtol=1e-11, atol=1e-12)
    fixed = layer.fixed_factors
    whole = layer.base_layer.weight + 4 * 3 * b @ a - 4 * 2 * fixed.F @ fixed.E
    torch.testing.assert_close(x.grad, upstream @ whole, rtol=1e-11, atol=1e-12)


def test_what_was_learned_since_a_product_is_followed_survives_a_half_type():
    """A and A_K round alike until they differ by a 256th; the difference rounds to a 256th of itself."""

    def product(a, b):
        down, up = (factor.to(torch.bfloat16).double() for factor in FollowedProduct(first, b, 1.0).beside(a, b))
        return up @ down

    first, b, step = drawn(4, 32), drawn(64, 4), drawn(4, 32, seed=9) * 2**-12
    learned, expected = product(first + step, b) - product(first, b), 2 * b @ step
    assert torch.nn.functional.cosine_similarity(learned.flatten(), expected.flatten(), dim=0) > 0.999


def test_a_half_type_does_not_notice_when_a_product_begins_to_be_followed():
    model = applied(Method(Config(r=4, target_modules=["up_proj"])), tiny_llama(dtype="bfloat16")).train()
    randomise(model)
    plain = model(IDS).logits
    for _, layer in layers(model):
        follow(layer, 1.0)
    assert torch.equal(model(IDS).logits, plain)

"""The Fastfood projection against its matrices written out in float64."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftctl.errors import ArtifactError
from peftctl.tuners.fastfood import FastfoodConfig
from peftctl.tuners.fastfood_projection import Projection, draw, fingerprint, hadamard, power_of_two

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SIZES = [(64, 16), (64, 64), (100, 16), (100, 13), (1, 1), (8, 20), (300, 5), (4096, 7)]
"""(D, entries of z): powers of two and not, z longer than a layer, and one entry."""


def naive_hadamard(n):
    """H by its definition: (-1) to the number of ones that i and j share."""
    both = torch.arange(n)[:, None] & torch.arange(n)
    ones = sum((both >> bit) & 1 for bit in range(12))
    return (1 - 2 * (ones % 2)).double()


def naive_matrix(size, length, seed=0, place=0):
    """P = S H G Π H B / (sqrt(n sum G^2) sqrt(D / n)), every factor a matrix of n x n."""
    drawn = draw(seed, place, size, length)
    n = power_of_two(size)
    h, g = naive_hadamard(n), drawn.gaussian.double()
    moves = torch.zeros(n, n, dtype=torch.float64)
    moves[drawn.positions, torch.arange(n)] = 1
    signs = torch.ones(n, dtype=torch.float64)
    signs[: len(drawn.signs)] = drawn.signs.double()  # beyond z they meet zeros
    product = h @ torch.diag(g) @ moves @ h @ torch.diag(signs)
    norm = (n * g.square().sum()).sqrt() * (size / n) ** 0.5
    return product[:size] @ torch.eye(n, length, dtype=torch.float64) / norm


def projection(size, length, seed=0, place=0):
    return Projection(draw(seed, place, size, length), size, CPU)


def one(dtype=torch.float64):
    return torch.ones((), dtype=dtype)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the transform -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 1024])
def test_the_fast_transform_is_the_matrix_and_twice_it_is_n(n):
    x = normal(n)
    torch.testing.assert_close(hadamard(x), naive_hadamard(n) @ x, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(hadamard(hadamard(x)), n * x, rtol=1e-12, atol=1e-10)


def test_the_transform_is_not_rounded_under_autocast():
    x = normal(128).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = hadamard(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, hadamard(x))


@pytest.mark.parametrize(("size", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (576 * 576, 2**19)])
def test_the_next_power_of_two(size, power):
    assert power_of_two(size) == power


# -- P -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "length"), SIZES[:-1])
def test_the_projection_is_the_product_of_its_matrices(size, length):
    matrix, z = naive_matrix(size, length), normal(length)
    torch.testing.assert_close(projection(size, length)(z, one()), matrix @ z, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(projection(size, length)(z, 3 * one()), 3 * matrix @ z, rtol=1e-10, atol=1e-12)
    found = projection(size, length)(z.float(), one(torch.float32))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), matrix @ z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "length"), SIZES)
def test_it_is_linear(size, length):
    p, z, w = projection(size, length), normal(length), normal(length, seed=2)
    mixed = p(0.7 * z - 2 * w, one())
    torch.testing.assert_close(mixed, 0.7 * p(z, one()) - 2 * p(w, one()), rtol=1e-10, atol=1e-12)
    assert not p(torch.zeros(length), one()).any()


def columns(size, length):
    return torch.stack([projection(size, length)(unit, one()) for unit in torch.eye(length, dtype=torch.float64)], 1)


@pytest.mark.parametrize(("size", "length"), [(64, 16), (64, 64), (4096, 7)])
def test_columns_have_norm_one_where_the_size_is_a_power_of_two(size, length):
    torch.testing.assert_close(columns(size, length).norm(dim=0), torch.ones(length).double(), rtol=1e-9, atol=0)


def test_columns_have_about_norm_one_elsewhere():
    norms = columns(3000, 20).norm(dim=0)
    assert norms.min() > 0.9
    assert norms.max() < 1.1
    assert (norms - 1).abs().max() > 1e-4


@pytest.mark.parametrize(("size", "length"), SIZES[:-1])
def test_the_gradient_of_z_is_the_transposed_matrix_times_v_and_that_of_the_scale_is_its_product_with_z(size, length):
    """The references' backward, scaled by 1/sqrt(n) a transform, would be n times too small."""
    matrix, v = naive_matrix(size, length), normal(size, seed=3)
    z, scale = normal(length).requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (v @ projection(size, length)(z, scale)).backward()
    torch.testing.assert_close(z.grad, 1.5 * matrix.T @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scale.grad, v @ matrix @ z.detach(), rtol=1e-9, atol=1e-11)


def test_finite_differences_agree_with_the_gradient():
    p = projection(12, 5)
    z, scale = normal(5).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(p, (z, scale))


def test_as_many_dimensions_as_entries_reach_every_change():
    matrix, target = columns(64, 64), normal(64, seed=5)
    assert torch.linalg.matrix_rank(matrix) == 64
    z = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(projection(64, 64)(z, one()), target, rtol=1e-8, atol=1e-8)


def test_the_backward_pass_keeps_nothing_as_large_as_the_layer():
    p = projection(4096, 16)
    tables = {table.data_ptr() for table in p.buffers()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        p(torch.zeros(16, requires_grad=True), torch.ones((), requires_grad=True))
    assert kept
    assert max(t.numel() for t in kept if t.data_ptr() not in tables) == 16
    assert sum(t.numel() * t.element_size() for t in p.buffers()) == 6 * 4096 + 16


# -- draws ---------------------------------------------------------------------------------------------------------


def test_layers_and_seeds_differ_and_torchs_own_random_state_plays_no_part():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fingerprint(draw(0, 0, 100, 10))
    torch.manual_seed(2)
    assert fingerprint(draw(0, 0, 100, 10)) == first
    assert len({first, *(fingerprint(draw(s, k, 100, 10)) for s, k in [(0, 1), (1, 0), (1, 1), (0, 11)])}) == 5
    torch.manual_seed(1)
    draw(0, 0, 100, 10)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = draw(0, 0, 3000, 10)
    assert drawn.positions.sort().values.tolist() == list(range(4096))
    assert set(drawn.signs.tolist()) <= {-1, 1} and len(drawn.signs) == 16
    assert abs(float(drawn.gaussian.float().std()) - 1) < 0.05


def test_a_fresh_process_draws_the_same():
    code = (
        "import hashlib, torch; from peftctl.tuners.fastfood_projection import draw, Projection\n"
        "p = Projection(draw(7, 3, 1000, 20), 1000, torch.device('cpu'))\n"
        "print(hashlib.sha256(p(torch.arange(20.0), torch.ones(())).numpy().tobytes()).hexdigest())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "5"},
    )  # fmt: skip
    here = projection(1000, 20, seed=7, place=3)(torch.arange(20.0), torch.ones(()))
    assert told.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_a_cast_of_the_model_does_not_round_the_projection():
    p, z = projection(100, 10), normal(10)
    before = p(z, one())
    assert torch.equal(p.bfloat16()(z, one()), before)
    assert torch.equal(p.double()(z, one()), before)
    assert not p.state_dict()


# -- the tuner -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A Linear of 8 x 8 with a bias, and a Conv1D from 8 to 6."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), Conv1D(6, 8)
        self.double()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def tuned(net, z=None, **keys):
    config = FastfoodConfig(**({"d": 9, "order": ["first", "second"], "groups": [0, 1]} | keys))
    model = get_peft_model(net, config).double()
    if z is not None:
        model.base_model.fastfood_z["default"].data = z
        if config.scales:
            model.base_model.fastfood_scale["default"].data = torch.tensor([0.5, -2.0], dtype=torch.float64)
    return model


def test_the_layers_compute_their_weights_plus_their_projections():
    base, x, z = Net(), normal(4, 8, seed=7), normal(7, seed=8)
    first = 0.5 * (naive_matrix(64, 7) @ z).view(8, 8)
    second = -2.0 * (naive_matrix(48, 7, place=1) @ z).view(8, 6)  # a Conv1D stores (d_in, d_out)
    hidden = torch.tanh(x @ (base.first.weight + first).T + base.first.bias)
    expected = hidden @ (base.second.weight + second) + base.second.bias
    model = tuned(Net(), z)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_training_moves_z_and_the_scales_and_nothing_else():
    model = tuned(Net())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.fastfood_z.default",
        "base_model.fastfood_scale.default",
    }
    model(normal(4, 8)).square().sum().backward()
    z, scale = model.base_model.fastfood_z["default"], model.base_model.fastfood_scale["default"]
    assert z.grad.all()
    assert not scale.grad.any()
    without = tuned(Net(), groups=[])
    assert [tuple(p.shape) for p in without.parameters() if p.requires_grad] == [(9,)]


def test_merging_adds_the_projections_and_unmerging_gives_back_the_weights():
    base, x = Net(), normal(4, 8, seed=7)
    model = tuned(Net(), normal(7, seed=8))
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, base.first.weight)
    assert torch.equal(model(x), expected)
    plain = model.merge_and_unload()
    assert type(plain.first) is nn.Linear
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)


def test_merging_refuses_what_is_not_finite_and_quantised_weights():
    model = tuned(Net(), torch.full((7,), torch.inf, dtype=torch.float64))
    with pytest.raises(ValueError, match="not finite"):
        model.base_model.model.first.merge(safe_merge=True)
    layer = tuned(Net()).base_model.model.first
    layer.base_layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="quantised"):
        layer.merge()


def test_two_adapters_have_vectors_and_projections_of_their_own():
    x = normal(4, 8, seed=7)
    model = tuned(Net(), normal(7, seed=8))
    alone = model(x)
    other = FastfoodConfig(d=5, projection_seed=3, order=["second"], groups=[])
    model.add_adapter("other", other)
    assert torch.equal(model(x), alone)
    model.base_model.fastfood_z["other"].data = normal(5, seed=9)
    model.set_adapter("other")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.fastfood_z.other"]
    second = (naive_matrix(48, 5, seed=3) @ normal(5, seed=9)).view(8, 6)
    base = Net()
    expected = torch.tanh(base.first(x)) @ (base.second.weight + second) + base.second.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(x), alone)


def test_a_projection_that_this_torch_draws_differently_is_refused():
    check = fingerprint(draw(0, 0, 64, 7))
    tuned(Net(), check=check)
    with pytest.raises(ArtifactError, match="draws another projection from the seed 0"):
        tuned(Net(), check=check[::-1])


def test_a_saved_adapter_has_d_numbers_and_answers_alike(tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    x, model = normal(4, 8, seed=7), tuned(Net(), normal(7, seed=8))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "base_model.fastfood_z": (7,),
        "base_model.fastfood_scale": (2,),
    }
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, autocast_adapter_dtype=False, **options).double()
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)  # saved vectors load as float32
        assert not [n for n, p in loaded.named_parameters() if p.requires_grad]

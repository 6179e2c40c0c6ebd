"""rsLoRA: alpha / sqrt(r), layer by layer, and all of LoRA beside it."""

import json
import math

import pytest
import torch

from peftctl.methods import lora
from peftctl.methods.rslora import Config, Method
from tests.methods import lora_family as family
from tests.methods.helpers import applied, context
from tests.tiny import tiny_llama, tiny_opt

QV = {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_papers_equation_in_float64(training):
    model = family.double(Method(Config(r=9, alpha=12, target_modules="all-linear"))).train(training)
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    w, a, b = family.factors(layer)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    naive = torch.stack([torch.stack([w @ v + (12 / 3) * (b @ (a @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r", [4, 16, 64])
def test_the_scale_is_alpha_by_the_root_of_r(r):
    model = applied(Method(Config(r=r, alpha=16, **QV)), tiny_llama())
    assert {layer.scaling["default"] for layer in family.lora_layers(model).values()} == {16 / math.sqrt(r)}


def test_a_layer_with_a_rank_or_alpha_of_its_own_has_the_scale_of_both():
    keys = {"r": 4, "alpha": 6, "rank_pattern": {"v_proj": 36}, "alpha_pattern": {r"layers\.0\..*": 3}}
    layers = family.lora_layers(applied(Method(Config(**keys, **QV)), tiny_llama()))
    scales = {name.removeprefix("model.layers."): layer.scaling["default"] for name, layer in layers.items()}
    assert (scales["0.self_attn.q_proj"], scales["0.self_attn.v_proj"]) == (3 / 2, 3 / 6)
    assert (scales["1.self_attn.q_proj"], scales["1.self_attn.v_proj"]) == (6 / 2, 6 / 6)


def test_the_same_factors_move_the_weights_root_of_r_times_as_far_as_loras():
    deltas = []
    for module in (lora, None):
        keys = {"r": 16, "alpha": 8, **QV}
        chosen = Method(Config(**keys)) if module is None else module.Method(module.Config(**keys))
        model = family.double(chosen)
        deltas.append(model.base_model.model.model.layers[2].self_attn.q_proj.get_delta_weight("default"))
    torch.testing.assert_close(deltas[1], 4 * deltas[0], rtol=1e-12, atol=0)


def test_updates_of_random_factors_keep_their_size_over_the_ranks():
    sizes, shrunk = [], []
    for r in (8, 64, 512):
        model = applied(Method(Config(r=r, alpha=16, target_modules=["q_proj"])), tiny_llama())
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        _, a, b = family.factors(layer)
        torch.nn.init.normal_(a)
        torch.nn.init.normal_(b)
        product = torch.linalg.norm(b @ a @ torch.randn(32, 64))
        sizes.append(layer.scaling["default"] * product)
        shrunk.append(16 / r * product)
    assert max(sizes) < 2 * min(sizes)
    assert shrunk[0] > 2 * shrunk[1] > 4 * shrunk[2]


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_starts_as_the_base_exactly(base):
    family.check_identity(Method(Config(target_modules="all-linear")), base)


def test_only_the_factors_move():
    family.check_frozen_base(Method(Config(r=4, **QV)))


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=4)))


def test_the_file_says_it_and_plain_peft_reads_the_scale(tmp_path):
    folder = family.check_saved(tmp_path, Method(Config(r=9, alpha=6, rank_pattern={"v_proj": 4}, **QV)))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_rslora"], config["lora_alpha"]) == ("LORA", True, 6)


def test_count_is_loras():
    assert Method(Config(target_modules="all-linear")).count(family.smollm2()) == 19_537_920
    method = Method(Config(r=5, rank_pattern={"v_proj": 3}, **QV))
    expected = 4 * (5 * 64 + 3 * 48)
    assert method.count(tiny_llama()) == family.trainable_count(applied(method, tiny_llama())) == expected
    bare = tiny_llama().to("meta")
    bare.tie_weights()
    assert family.trainable_count(method.apply(bare, context())) == expected


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    base = lambda: family.quantized(tiny_dir, kind)  # noqa: E731
    family.check_identity(Method(Config(r=4, **QV)), base)
    family.check_frozen_base(Method(Config(r=4, **QV)), base)


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: Method(Config(r=4, dropout=0.1, **QV)))

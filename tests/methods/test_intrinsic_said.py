"""Intrinsic SAID: d numbers over the whole model, their gradients, their file; the projection has its own tests."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftctl.artifacts.fold import fold
from peftctl.artifacts.start import refuse_other_shape
from peftctl.errors import UsageError
from peftctl.methods.base import Context
from peftctl.methods.intrinsic_said import Config, Method
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners.fastfood import layers
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.tuners.test_fastfood import naive_matrix

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**({"d": 60} | keys)))


def parts(model):
    """Return z and λ; None where there is no λ."""
    scales = model.base_model.fastfood_scale
    return model.base_model.fastfood_z["default"], scales["default"] if len(scales) else None


SECTION = ModelSection(name_or_path="tiny", task="seq_cls", dtype="float32")


def classifier():
    return tiny_bert(kind="BertForSequenceClassification", num_labels=3)


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in parts(model):
        if p is not None:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def gradients(model):
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [None if p is None else p.grad for p in parts(model)]


def smollm2():
    """The demo model's shapes, without weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# -- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["said", "did"])
def test_every_weight_is_the_bases_plus_its_blocks_scale_times_its_projection(variant):
    """θ_i = θ_0,i + λ_block P_i z, with P_i written out, by block; also as one plain model."""
    base = tiny_llama().double()
    chosen = method(variant=variant, target_modules=["q_proj", "k_proj"], projection_seed=3)
    model = applied(chosen, tiny_llama().double()).double()
    randomise(model)
    z, scales = parts(model)
    found = dict(layers(model))
    assert list(found) == [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(4) for kind in "qk"]
    for place, name in enumerate(found):
        weight = base.get_submodule(name).weight
        change = (naive_matrix(weight.numel(), len(z), seed=3, place=place) @ z.detach()).view(weight.shape)
        scale = 1.0 if scales is None else scales[place // 2].detach()
        torch.testing.assert_close(found[name].get_delta_weight("default"), scale * change, rtol=1e-9, atol=1e-12)
        weight.data += scale * change
    torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits, rtol=1e-9, atol=1e-9)
    merged, loss = fold(model, torch.float64)
    assert loss.layers == 8
    torch.testing.assert_close(merged(input_ids=IDS).logits, base(input_ids=IDS).logits, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_z_sums_over_all_layers():
    """dL/dz = sum_i λ_i P_i^T dL/dθ_i, with the gradients of the weights of the merged model."""
    model = applied(method(target_modules=["v_proj", "o_proj"]), tiny_llama().double()).double()
    randomise(model)
    z, scales = (p.detach().clone() for p in parts(model))
    found = gradients(model)
    merged, _ = fold(model, torch.float64)
    merged.requires_grad_(True)(input_ids=IDS, labels=IDS).loss.backward()
    for_z, for_scales = torch.zeros_like(z), torch.zeros_like(scales)
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(4) for kind in "vo"]
    for place, name in enumerate(names):
        gradient = merged.get_submodule(name).weight.grad.flatten()
        back = naive_matrix(len(gradient), len(z), place=place).T @ gradient
        for_z += scales[place // 2] * back
        for_scales[place // 2] += back @ z
    torch.testing.assert_close(found[0], for_z, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[1], for_scales, rtol=1e-8, atol=1e-10)


def test_at_first_it_is_the_base_and_only_z_has_a_gradient():
    reference = tiny_llama()(input_ids=IDS).logits
    model = applied(method(), tiny_llama())
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(input_ids=IDS).logits, reference)
    for_z, for_scales = gradients(model)
    assert for_z.all()
    assert not for_scales.any()
    z, scales = parts(model)
    assert not z.any() and bool((scales == 1).all())
    assert {p.dtype for p in (z, scales)} == {torch.float32}


def test_one_dimension_moves_all_layers_along_one_line():
    model = applied(method(d=1, variant="did"), tiny_llama())
    changes = []
    for value in (1.0, -2.5):
        parts(model)[0].data.fill_(value)
        changes.append([layer.get_delta_weight("default") for _, layer in layers(model)])
    assert len(changes[0]) == 28
    for one, other in zip(*changes, strict=True):
        assert one.any()
        torch.testing.assert_close(other, -2.5 * one)


def test_every_layer_and_every_seed_has_another_projection():
    changes = []
    for seed in (0, 1):
        model = applied(method(projection_seed=seed, target_modules=["q_proj", "o_proj"]), tiny_llama())
        parts(model)[0].data.fill_(1.0)
        changes += [layer.get_delta_weight("default").flatten() for _, layer in layers(model)]
    assert len(changes) == 16
    similar = torch.corrcoef(torch.stack(changes)) - torch.eye(16)
    assert similar.abs().max() < 0.2


# -- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{"d": 1000}, {"d": 100}, {"d": 1000, "variant": "did"}])
def test_exactly_d_numbers_train_whatever_the_model(keys):
    for base in (tiny_llama(), tiny_opt(), tiny_t5(), smollm2()):
        chosen = method(**keys)
        counted = chosen.count(base)
        model = applied(chosen, base)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted == keys["d"]


@pytest.mark.parametrize(
    ("make", "scales"), [(tiny_llama, 4), (tiny_opt, 2), (tiny_t5, 2 + 2), (classifier, 2 + 1)]
)  # BERT's pooler is outside of the blocks
def test_every_block_has_a_scale_and_all_outside_of_blocks_has_one(make, scales):
    model = method().apply(make(), Context(recipe().model_copy(update={"model": SECTION})))
    z, found = parts(model)
    assert (len(z), len(found)) == (60 - scales, scales)
    config = model.peft_config["default"]
    blocks = {}
    for name, group in zip(config.order, config.groups, strict=True):
        blocks.setdefault(group, set()).add(next((i for i, part in enumerate(name.split(".")) if part.isdigit()), None))
    assert sorted(blocks) == list(range(scales))
    assert [group for group, found in blocks.items() if None in found] == ([2] if make is classifier else [])


def test_training_moves_z_and_the_scales_and_leaves_every_weight_as_it_was():
    model = applied(method(d=300), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 8, lr=5e-2)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"base_model.fastfood_z.default", "base_model.fastfood_scale.default"}


def test_a_new_head_trains_beside_them():
    base, chosen = classifier(), method()
    counted, head = chosen.count(base), sum(p.numel() for p in base.classifier.parameters())
    model = chosen.apply(base, Context(recipe().model_copy(update={"model": SECTION})))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted == 60 + head
    assert not [name for name in model.peft_config["default"].order if "classifier" in name]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert {n.rsplit(".", 1)[-1] for n in trained} == {"weight", "bias"}


# -- the file ------------------------------------------------------------------------------------------------------


def test_the_file_has_d_numbers_and_the_config_the_seed_and_the_order(tmp_path):
    model = applied(method(projection_seed=5), tiny_llama())
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 60
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "PEFTCTL_FASTFOOD"
    assert (config["d"], config["projection_seed"], len(config["order"])) == (60, 5, 28)
    assert config["order"][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]


@pytest.mark.parametrize("keys", [{"projection_seed": 1}, {"d": 61}, {"variant": "did"}, {"target_modules": "mlp"}])
def test_training_goes_on_from_an_adapter_of_the_same_subspace_only(tmp_path, keys):
    applied(method(), tiny_llama()).save_pretrained(tmp_path)
    start = SimpleNamespace(folder=tmp_path, target="earlier", manifest={"method": "intrinsic_said"})
    with torch.device("meta"):
        base = tiny_llama().to("meta")
    same = SimpleNamespace(method=method().config)
    refuse_other_shape(start, same, applied(method(), base))
    with torch.device("meta"):
        base = tiny_llama().to("meta")
    with pytest.raises(UsageError, match=r"^method\.init_from: earlier has"):
        refuse_other_shape(start, SimpleNamespace(method=method(**keys).config), applied(method(**keys), base))


# -- other types of weights ----------------------------------------------------------------------------------------


def test_a_bfloat16_base_keeps_its_type_and_the_projection_is_not_rounded():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    exact = applied(method(), tiny_llama())
    for each in (model, exact):
        randomise(each)
    pairs = zip(layers(model), layers(exact), strict=True)
    assert all(torch.equal(a.get_delta_weight("default"), b.get_delta_weight("default")) for (_, a), (_, b) in pairs)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base_the_change_is_added_to_what_the_layer_returns(tmp_path, bits):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "model")), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    name = "model.layers.1.mlp.down_proj"
    inner = base.get_submodule(name)
    model = applied(method(), base)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    plain = inner(x)
    layer = dict(layers(model))[name]
    assert torch.equal(layer(x), plain)
    randomise(model)
    torch.testing.assert_close(layer(x), plain + x @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-4)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = run_steps(model, 3)
    assert all(loss == loss for loss in losses)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_scale_for_every_block_must_leave_something_for_z():
    with pytest.raises(
        UsageError, match=r"^method\.d: expected more than 4, one scale a block, got 4; or variant did$"
    ):
        method(d=4).count(tiny_llama())
    assert method(d=4, variant="did").count(tiny_llama()) == 4


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match=r"^method\.target_modules: model\.embed_tokens is an embedding"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


def test_tells_what_the_projections_take():
    base = smollm2()
    # A block: q and o 2^19 each, k and v 2^17 each, gate, up and down 2^20 each; 6 bytes an entry.
    mebibytes = 30 * (2 * 2**19 + 2 * 2**17 + 3 * 2**20) * 6 / 2**20
    assert method().notices(base) == [f"projections: 210 matrices, {mebibytes:,.0f} MiB beside the model"]

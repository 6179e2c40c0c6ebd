"""The Pfeiffer adapter: both variants against the naive equation, where they stand, what trains, and what is saved."""

import json

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.artifacts.load import load
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.pfeiffer import Config, Method
from peftctl.models.anatomy import norms
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners.bottleneck import BottleneckLayer
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import IDS, SMOLLM2, layers, logits, randomise
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

VARIANTS = ["exact", "simple"]


def method(**keys):
    return Method(Config(**{"bottleneck": 6, **keys}))


def post_norm():
    return tiny_bert(kind="BertLMHeadModel", is_decoder=True)


BASES = [tiny_llama, tiny_opt, tiny_t5, tiny_bart, post_norm]


def naive(adapter, x):
    """Return U relu(D x + b1) + b2 for one position."""
    inner = adapter.down.weight @ x + adapter.down.bias
    return adapter.up.weight @ (inner * (inner > 0)) + adapter.up.bias


def watch(module, seen):
    module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))


# -- the equation ---------------------------------------------------------------------------------------------------


def test_exact_on_a_stream_is_the_papers_equation_in_float64():
    model = applied(method(), tiny_llama().double()).double()
    randomise(model)
    layer, seen, states = layers(model)["model.layers.1"], [], []
    block = layer.base_layer
    watch(block.mlp, seen)  # returns h
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))  # x, the residual
    model.get_base_model().model.layers[2].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits(model)
    (_, h), (x, out) = seen[0], states
    for h_row, x_row, got in zip(h.flatten(0, 1), x.flatten(0, 1), out.flatten(0, 1), strict=True):
        y = x_row + h_row
        expected = y + naive(layer.bottleneck_adapter["default"], y)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def bert_states(model):
    """Run BERT; return of the second block h, x (what the feed-forward part reads) and what the block returns."""
    block, seen = model.get_base_model().bert.encoder.layer[1], []
    hooks = [block.intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [block.output.dense.register_forward_hook(lambda _, args, out: seen.append(out))]
    hooks += [block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))]
    logits(model)
    for hook in hooks:
        hook.remove()
    x, h, out = seen
    return h.flatten(0, 1), x.flatten(0, 1), out.flatten(0, 1)


def layer_norm(v, norm):
    centred = v - v.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def test_exact_on_a_post_norm_block_applies_its_norm_twice():
    model = applied(method(), post_norm().double()).double()
    randomise(model)
    layer = layers(model)["bert.encoder.layer.1.output.LayerNorm"]
    adapter, norm = layer.bottleneck_adapter["default"], layer.base_layer
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias, 0, 0.3)
    apart = []
    for h, x, got in zip(*bert_states(model), strict=True):
        expected = layer_norm(h + naive(adapter, layer_norm(h + x, norm)) + x, norm)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        apart.append((layer_norm(h + naive(adapter, h) + x, norm) - expected).abs().max())
    assert min(apart) > 1e-3  # an adapter that reads h, as the simple one does, is another thing


def test_simple_on_a_post_norm_block_reads_what_the_feed_forward_part_returns():
    model = applied(method(variant="simple"), post_norm().double()).double()
    randomise(model)
    layer = layers(model)["bert.encoder.layer.1.output.dense"]
    adapter, norm = layer.bottleneck_adapter["default"], model.get_base_model().bert.encoder.layer[1].output.LayerNorm
    changed, x, out = bert_states(model)
    inner = torch.randn(3, 64, dtype=torch.float64)
    for row, got in zip(inner, layer(inner), strict=True):
        h = layer.base_layer.weight @ row + layer.base_layer.bias
        torch.testing.assert_close(got, h + naive(adapter, h), rtol=1e-12, atol=1e-12)
    expected = torch.stack([layer_norm(a + b, norm) for a, b in zip(changed, x, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_starts_as_the_base_exactly(base, variant):
    reference = logits(base())
    model = applied(method(variant=variant), base())
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode), reference)
    randomise(model)
    assert not torch.equal(logits(model.eval()), reference)


def test_the_down_projection_is_drawn_with_the_librarys_deviation():
    model = applied(method(bottleneck=200), tiny_llama())
    drawn = torch.cat([layer.bottleneck_adapter["default"].down.weight.flatten() for layer in layers(model).values()])
    assert drawn.abs().max() <= 0.04
    assert drawn.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)  # of a normal cut off at two deviations


# -- where adapters stand, and what trains --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_count_on_smollm2s_shapes(variant):
    model = tiny_of("llama", **SMOLLM2)
    assert method(variant=variant, bottleneck=36).count(model) == 30 * (2 * 576 * 36 + 36 + 576) == 1_262_520


@pytest.mark.parametrize(
    ("base", "variant", "expected"),
    [
        (tiny_llama, "exact", {f"model.layers.{i}" for i in range(4)}),
        (tiny_llama, "simple", {f"model.layers.{i}.mlp.down_proj" for i in range(4)}),
        (tiny_opt, "exact", {f"model.decoder.layers.{i}" for i in range(2)}),
        (post_norm, "exact", {f"bert.encoder.layer.{i}.output.LayerNorm" for i in range(2)}),
        (post_norm, "simple", {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}),
        (tiny_t5, "exact", {f"{s}.block.{i}.layer.{n}" for s, n in (("encoder", 1), ("decoder", 2)) for i in range(2)}),
        (
            tiny_bart,
            "exact",
            {f"model.{s}.layers.{i}.final_layer_norm" for s in ("encoder", "decoder") for i in (0, 1)},
        ),
        (tiny_bart, "simple", {f"model.{s}.layers.{i}.fc2" for s in ("encoder", "decoder") for i in (0, 1)}),
    ],
)
def test_one_adapter_in_every_block_and_none_in_attention(base, variant, expected):
    model = applied(method(variant=variant), base())
    assert set(layers(model)) == expected
    # What the names in adapter_config.json select is no more than that: `output.dense` ends attention in BERT too.
    assert sum(isinstance(m, BottleneckLayer) for m in model.modules()) == len(expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = [f"bottleneck_adapter.default.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")]
    assert trainable == {f"base_model.model.{name}.{part}" for name in expected for part in parts}


def test_named_targets_take_adapters_instead_of_feed_forward_parts():
    model = applied(method(variant="simple", target_modules=["o_proj"]), tiny_llama())
    assert set(layers(model)) == {f"model.layers.{i}.self_attn.o_proj" for i in range(4)}


def test_an_unknown_structure_is_an_error_that_says_what_to_take_or_name():
    for architecture in ("mixtral", "mamba"):
        message = rf"{architecture} architecture .* take a variant behind linear layers, and give method.target_modules"
        with pytest.raises(UsageError, match=message):
            method().count(tiny_of(architecture))
        with pytest.raises(UsageError, match=rf"{architecture} architecture .* give method.target_modules: .*, among "):
            method(variant="simple").count(tiny_of(architecture))
    assert method(variant="simple", target_modules=["o_proj"]).count(tiny_of("mixtral")) == 2 * (2 * 32 * 6 + 6 + 32)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [tiny_llama, post_norm])
def test_three_steps_move_all_adapters_and_no_norm(base, variant):
    model = applied(method(variant=variant), base())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    assert not any(p.requires_grad for norm in norms(model).values() for p in norm.parameters(recurse=False))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_disabled_or_unloaded_it_is_the_base(base, variant):
    reference = logits(base())
    model = applied(method(variant=variant), base())
    randomise(model)
    assert not torch.equal(logits(model), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    with pytest.raises(NotImplementedError, match="not linear: no weight of the base can take it up"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), reference)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_it_generates_with_a_cache_as_without(base, variant):
    model = applied(method(variant=variant), base())
    randomise(model)
    keys = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    cached, whole = (model.generate(input_ids=IDS, use_cache=cache, **keys) for cache in (True, False))
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, base().generate(input_ids=IDS, **keys))


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_recorded_hidden_states_are_those_that_the_next_block_reads(base):
    model = applied(method(), base())
    randomise(model)
    seen = []
    for block in list(layers(model).values())[1:]:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        recorded = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(seen) == len(recorded) - 2
    assert all(torch.equal(a, b) for a, b in zip(seen, recorded[1:-1], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", [tiny_llama, post_norm])
def test_recomputed_activations_change_no_gradient(base, variant):
    found = []
    for again in (False, True):
        model = applied(method(variant=variant), base()).train()
        randomise(model)
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_equals_straight(tmp_path, variant):
    straight, _ = train(workload(tmp_path / "a", method(variant=variant), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(variant=variant), max_steps=6, reporter=StopAt(4)))
    work = workload(tmp_path / "b", method(variant=variant), max_steps=6)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


@pytest.mark.parametrize("base", [tiny_llama, post_norm])
def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_not(base):
    model = applied(method(), base().to(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen = []
    for layer in layers(model).values():
        watch(layer, seen)
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]
    assert {(x.dtype, out.dtype) for x, out in seen} == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8}], ids=["nf4", "int8"])
def test_it_trains_over_a_quantised_base(tmp_path, kind, variant):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(**kind))
    reference = logits(base)
    chosen = method(variant=variant)
    expected = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert torch.equal(logits(model.eval()), reference)
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


# -- the artefact ---------------------------------------------------------------------------------------------------


def saved(folder, base, **keys):
    chosen = method(**keys)
    model = applied(chosen, base())
    randomise(model)
    exported = chosen.export(model).eval()
    exported.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    found = json.loads(config.read_text())
    config.write_text(json.dumps(found | {"base_model_name_or_path": str(folder / "base")}))
    return save_tiny(folder / "base", base()), folder / "adapter", logits(exported), found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_plain_peft_loads_it(tmp_path, base, variant):
    _, adapter, reference, config = saved(tmp_path, base, variant=variant)
    placement = {"exact": "around", "simple": "behind"}[variant]
    assert (config["peft_type"], config["placement"]) == ("PEFTCTL_BOTTLENECK", placement)
    model = PeftModel.from_pretrained(base(), adapter).eval()
    assert torch.equal(logits(model), reference)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_peftctl_loads_it_and_a_second_one_beside_it(tmp_path, base):
    _, adapter, reference, _ = saved(tmp_path, base)
    model, _ = load(str(adapter))
    assert torch.equal(logits(model), reference)
    model.load_adapter(str(adapter), "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bottleneck": 0}, "greater than or equal to 1|greater than 0"),
        ({"variant": "parallel"}, "'exact' or 'simple'"),
        ({"target_modules": ["down_proj"]}, "target_modules: linear layers are for variant: simple"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))


def test_the_reference_layer_norm_of_these_tests_is_torchs():
    norm = torch.nn.LayerNorm(32, dtype=torch.float64)
    v = torch.randn(32, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(v, norm), functional.layer_norm(v, (32,), eps=norm.eps))

"""Compacter: sums of Kronecker products behind sublayers, with one factor for the whole model."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peftctl.errors import Interrupted, UsageError
from peftctl.methods.compacter import Config, Method
from peftctl.recipe.schema import ModelSection
from peftctl.tuners.hypercomplex import HypercomplexLayer
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.methods.lora_family import KINDS, quantized, smollm2
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def method(**keys):
    return Method(Config(**{"bottleneck": 8, **keys}))


def layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, HypercomplexLayer)}


def rule_of(model):
    return model.base_model.bottleneck_rule["default"]


def large(model, seed=0):
    """Give every tensor of the adapters values of the order of 1, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "bottleneck_" in name:
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return model


def double(base=tiny_llama, **keys):
    return large(applied(method(**keys), base().double()).double())


def adapter(model, name="model.layers.1.mlp.down_proj"):
    return layers(model)[name].bottleneck_adapter["default"]


def naive(p, rule):
    """Return W^T and b of one P, term by term as the paper writes it."""
    terms = [torch.kron(rule[i], p.s[i] @ p.t[i]) for i in range(len(rule))]
    return sum(terms).T, p.bias


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# -- the equation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "r"), [(1, 1), (1, 3), (2, 2), (4, 1), (8, 2)])
def test_a_matrix_is_the_sum_of_kronecker_products(n, r):
    model = double(hypercomplex=n, rank=r)
    rule = rule_of(model)
    for p, k, m in ((adapter(model).down, 32, 8), (adapter(model).up, 8, 32)):
        w, _ = naive(p, rule)
        torch.testing.assert_close(p.weight(rule), w.T, **EXACT)
        by_index = torch.einsum("iab,ipr,irq->apbq", rule, p.s, p.t).reshape(k, m)
        torch.testing.assert_close(p.weight(rule), by_index, **EXACT)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_layer_is_the_papers_equation_in_float64(activation):
    model = double(tiny_opt, activation=activation)
    layer, rule = layers(model)["model.decoder.layers.1.fc2"], rule_of(model)
    w, b = layer.base_layer.weight, layer.base_layer.bias
    own = layer.bottleneck_adapter["default"]
    (down, b1), (up, b2) = naive(own.down, rule), naive(own.up, rule)
    phi = {
        "gelu_new": lambda v: v * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
        "relu": lambda v: v * (v > 0),
        "silu": lambda v: v / (1 + torch.exp(-v)),
    }[activation]
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    for row, got in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        h = w @ row + b
        torch.testing.assert_close(got, h + up @ phi(down @ h + b1) + b2, rtol=1e-10, atol=1e-9)


def test_one_term_is_a_factored_adapter_times_a_number():
    model = double(hypercomplex=1, rank=3)
    rule, down = rule_of(model), adapter(model).down
    assert rule.shape == (1, 1, 1)
    torch.testing.assert_close(down.weight(rule), rule.item() * down.s[0] @ down.t[0], **EXACT)
    assert torch.linalg.matrix_rank(down.weight(rule)) == 3


@pytest.mark.parametrize(("n", "r"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_are_those_of_the_factors(n, r):
    model = double(hypercomplex=n, rank=r, bottleneck=16)
    rule, down = rule_of(model), adapter(model).down
    for i in range(n):
        term = torch.kron(rule[i], down.s[i] @ down.t[i])
        assert torch.linalg.matrix_rank(term) == torch.linalg.matrix_rank(rule[i]) * r == n * r
    assert torch.linalg.matrix_rank(down.weight(rule)) == min(n * n * r, 16)


# -- one factor for the whole model ---------------------------------------------------------------------------------


def one_rule(model):
    """Assert that all adapters read the tuner's A, which is there once."""
    rule = rule_of(model)
    for layer in layers(model).values():
        assert layer.bottleneck_rule["default"] is rule
        rules, name = layer.bottleneck_adapter["default"]._shared
        assert rules[name].data_ptr() == rule.data_ptr() and rules(name).eq(rule).all()
    assert [n for n, _ in model.named_parameters(remove_duplicate=False) if "rule" in n] == [
        "base_model.bottleneck_rule.default"
    ]
    return rule


def test_all_layers_read_one_tensor_also_of_a_copy_and_in_another_type():
    model = applied(method(), tiny_llama())
    rule = one_rule(model)
    again = copy.deepcopy(model)
    assert one_rule(again) is not rule
    one_rule(again.double())
    assert rule_of(again).dtype == torch.float64 and rule.dtype == torch.float32
    with torch.no_grad():
        rule_of(again).normal_()
    assert not torch.equal(logits(again.float()), logits(model))  # the copy's layers read the copy's


def constant(value, _):
    return value


def test_its_gradient_is_the_sum_of_all_layers_contributions():
    model = double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = rule_of(model).grad
    parts = []
    for name in layers(model):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        for other, layer in layers(alone).items():
            if other != name:  # its A is the same number, and no variable
                own = layer.bottleneck_adapter["default"]
                own._shared = (partial(constant, rule_of(alone).detach().clone()), "default")
        alone(input_ids=IDS, labels=IDS).loss.backward()
        parts.append(rule_of(alone).grad)
    assert len(parts) == 8 and all(part.abs().max() > 0 for part in parts)
    torch.testing.assert_close(found, sum(parts), rtol=1e-9, atol=1e-12)


def test_it_is_saved_once(tmp_path):
    model = large(applied(method(), tiny_llama()))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [(n, t.shape) for n, t in tensors.items() if "rule" in n] == [("base_model.bottleneck_rule", (4, 4, 4))]
    assert len(tensors) == 1 + 8 * 6 + 9
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model.eval()))
    one_rule(again)


def test_several_adapters_have_their_own(tmp_path):
    model = large(applied(method(), tiny_llama())).eval()
    reference = logits(model)
    model.save_pretrained(tmp_path)
    model = large(model, seed=1)
    other = logits(model)
    model.load_adapter(str(tmp_path), "second")
    assert torch.equal(logits(model), other)
    model.set_adapter("second")
    assert torch.equal(logits(model), reference)
    rules = model.base_model.bottleneck_rule
    assert rules["second"].requires_grad is not rules["default"].requires_grad
    model.set_adapter("default")
    model.delete_adapter("second")
    assert list(rules) == ["default"] and torch.equal(logits(model), other)


# -- how it starts, where it stands, what trains --------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_starts_as_the_base_but_for_a_change_of_1e_8(base):
    reference = logits(base().double())
    model = applied(method(), base().double())
    for mode in (model.eval(), model.train()):
        assert 0 < (logits(mode) - reference).abs().max() < 1e-5


def test_factors_are_drawn_as_the_authors_draw_them():
    model = applied(method(bottleneck=256, hypercomplex=8, rank=16, init_std=1e-3), tiny_llama())
    assert rule_of(model).std().item() == pytest.approx(1e-3, rel=0.15)
    drawn = torch.stack([adapter(model, name).down.t for name in layers(model)])  # (8, n, 16, 32)
    limit = 2**0.5 * (6 / (16 + 32)) ** 0.5
    assert drawn.abs().max() <= limit and drawn.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)
    assert not any(adapter(model, name).up.bias.any() for name in layers(model))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_it_stands_behind_sublayers_or_feed_forward_parts_alone(base, plus):
    names = {name.rsplit(".", 1)[-1] for name in layers(applied(method(plus=plus), base()))}
    mlp, attention = {"tiny_llama": ("down_proj", "o_proj"), "tiny_opt": ("fc2", "out_proj"), "tiny_t5": ("wo", "o")}[
        base.__name__
    ]
    assert names == ({mlp} if plus else {mlp, attention})


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5, tiny_bart])
def test_trainable_count_is_the_closed_form(base, plus, norms):
    chosen = method(plus=plus, train_norms=norms, hypercomplex=2, rank=3)
    blocks, crossed, norm_parameters = {
        "tiny_llama": (4, 0, 9 * 32),
        "tiny_t5": (4, 2, 12 * 32),
        "tiny_bart": (4, 2, 12 * 64),
    }[base.__name__]
    adapters = blocks if plus else 2 * blocks + crossed
    expected = adapters * (2 * 3 * (32 + 8) + 8 + 32) + 2**3 + norms * norm_parameters
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_count_on_smollm2_is_the_papers_formula_and_its_norms_come_on_top():
    keys = {"bottleneck": 32, "train_norms": False}
    assert Method(Config(**keys)).count(smollm2()) == 60 * (2 * (576 + 32) + 32 + 576) + 64 == 109_504
    assert Method(Config(**keys, plus=True)).count(smollm2()) == 30 * 1824 + 64
    assert Method(Config()).count(smollm2()) == 109_504 + 61 * 576


def test_without_weights_the_shapes_are_there():
    with torch.device("meta"):
        base = tiny_of("llama")
    model = method().apply(base, context())
    assert rule_of(model).device.type == "meta" and len(layers(model)) == 4


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_three_steps_move_all_that_trains_and_nothing_else(base):
    model = applied(method(), base())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_it_leaves_its_flat_start():
    """The first gradients of s and t are of the order of 1e-8, so A has to grow first, and does."""
    model = applied(method(train_norms=False), tiny_llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert rule_of(model).grad.abs().max() > 10 * max(adapter(model).down.s.grad.abs().max(), 1e-9)
    losses = run_steps(model, 30, lr=3e-3)
    assert losses[-1] < losses[0] - 0.1
    assert rule_of(model).abs().mean() > 1e-2


@pytest.mark.parametrize("norms", [True, False])
def test_disabled_it_is_the_base_with_the_bases_norms(norms):
    reference = logits(tiny_llama())
    model = applied(method(train_norms=norms), tiny_llama())
    run_steps(model, 3)
    model.eval()
    assert not torch.equal(logits(model), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    assert rule_of(model).requires_grad


def test_merging_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="not linear: no weight of the base can take it up"):
        applied(method(), tiny_llama()).merge_and_unload()
    assert not Method.card.mergeable and "not linear" in Method.card.merge_note


def test_stopped_and_resumed_equals_straight(tmp_path):
    straight, _ = train(workload(tmp_path / "a", method(), max_steps=8))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(), max_steps=8, reporter=StopAt(5)))
    work = workload(tmp_path / "b", method(), max_steps=8)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_in_a_half_type_what_trains_is_float32_drawn_as_in_float32():
    wide, model = applied(method(), tiny_llama()), applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(rule_of(model), rule_of(wide)) and torch.equal(adapter(model).up.s, adapter(wide).up.s)
    seen = []
    for layer in layers(model).values():
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_over_a_quantised_base(tmp_path, kind):
    save_tiny(tmp_path)
    base = quantized(tmp_path, kind)
    reference, chosen = logits(base), method()
    expected = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


# -- the artefact ---------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import peftctl.tuners
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits, out)
"""


def test_in_another_process_one_import_makes_plain_peft_load_it(tmp_path):
    base, chosen = save_tiny(tmp_path / "base"), method(rank=2)
    model = large(applied(chosen, tiny_llama()))
    run_steps(model, 2)
    exported = chosen.export(model).eval()
    exported.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["n"], config["rank"]) == ("PEFTCTL_HYPERCOMPLEX", 4, 2)
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(exported))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bottleneck": 30}, "bottleneck: expected a multiple of hypercomplex, 4, got 30; take 28 or 32"),
        ({"bottleneck": 3}, "bottleneck: expected a multiple of hypercomplex, 4, got 3; take 4 "),
        ({"hypercomplex": 0}, "greater than 0"),
        ({"rank": 0}, "greater than 0"),
        ({"init_std": 0}, "greater than 0"),
        ({"activation": "tanh"}, "'gelu_new', 'gelu', 'relu' or 'silu'"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))


def test_a_width_that_n_does_not_divide_is_refused_by_name():
    message = r"method\.hypercomplex: expected a divisor of 32, the width of model\.layers\.0\.self_attn\.o_proj, got 3"
    with pytest.raises(UsageError, match=message):
        method(bottleneck=6, hypercomplex=3).count(tiny_llama())


def test_an_embedding_is_refused():
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding; compacter takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


def test_a_classifiers_head_trains_too():
    base = tiny_bert(kind="BertForSequenceClassification", num_labels=3)
    chosen = method(train_norms=False)
    model = chosen.apply(base, context_of("seq_cls"))
    assert chosen.count(tiny_bert(kind="BertForSequenceClassification", num_labels=3)) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert any("classifier" in n for n, p in model.named_parameters() if p.requires_grad)


def context_of(task):
    section = ModelSection(name_or_path="tiny", dtype="float32", task=task)
    return replace(context(), recipe=recipe().model_copy(update={"model": section}))

"""What PiSSA and OLoRA share: A and B start as a part of W, W stays, and the result is one LoRA of rank 2 r."""

import json

import pytest
import torch

from peftctl.errors import Interrupted, RunError, UsageError
from peftctl.methods import olora, pissa
from peftctl.methods.base import Context
from peftctl.training.checkpoints import read_state
from peftctl.tuners.fixed_factors import base_matrix, layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.tiny import tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
KINDS = {"exact": (pissa, {}), "fast": (pissa, {"svd": "fast", "niter": 4}), "qr": (olora, {})}


@pytest.fixture(params=KINDS)
def make(request):
    """Return a function: keys -> the method."""
    module, own = KINDS[request.param]
    return lambda **keys: module.Method(module.Config(**{"r": 4, "target_modules": "all-linear"} | own | keys))


def factors(layer):
    return layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_the_model_starts_as_the_base_whatever_alpha_is(make, base):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    reference = base()(**inputs).logits
    for alpha in (None, 1.0, 64.0):
        model = applied(make(alpha=alpha), base())
        for mode in (model.eval(), model.train()):
            torch.testing.assert_close(mode(**inputs).logits, reference, rtol=0, atol=1e-5)


def test_half_type_bases_too_and_their_factors_are_computed_in_float32(make):
    reference = tiny_llama(dtype="bfloat16")(input_ids=IDS).logits
    model = applied(make(), tiny_llama(dtype="bfloat16")).eval()
    assert torch.equal(model(input_ids=IDS).logits, reference)
    wide = applied(make(), tiny_llama(dtype="bfloat16").float())
    for (_, narrow), (_, layer) in zip(layers(model), layers(wide), strict=True):
        for ours, theirs in zip(factors(narrow), factors(layer), strict=True):
            assert torch.equal(ours, theirs)


def test_w_is_not_touched_and_disabling_gives_the_base_after_training(make):
    before = {n: p.detach().clone() for n, p in tiny_llama().named_parameters()}
    reference = tiny_llama()(input_ids=IDS).logits
    model = applied(make(), tiny_llama())
    run_steps(model, 3, weight_decay=0.1)
    model.eval()
    assert (model(input_ids=IDS).logits - reference).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)
    plain = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())


def test_both_factors_learn_from_the_first_step(make):
    """Beside LoRA's B = 0 the gradient of A is zero at first."""
    model = applied(make(), tiny_llama()).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for _, layer in layers(model):
        assert layer.lora_A["default"].weight.grad.abs().max() > 0
        assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_trainable_count_is_the_closed_form(make):
    expected = make().count(tiny_llama())
    model = applied(make(), tiny_llama())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert expected == sum(4 * (layer.in_features + layer.out_features) for _, layer in layers(model))


def test_without_weights_the_shapes_are_there(make):
    with torch.device("meta"):
        base = tiny_of("llama")
    model = make().apply(base, context())
    assert all(layer.fixed_factors.E.device.type == "meta" for _, layer in layers(model))


def test_the_start_depends_on_w_and_the_seed_alone(make):
    first, second = applied(make(), tiny_llama(), seed=1), applied(make(), tiny_llama(), seed=2)
    drawn = torch.rand(3)
    for (_, one), (_, other) in zip(layers(first), layers(second), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(factors(one), factors(other), strict=True))
    base = tiny_llama()
    torch.manual_seed(2)
    make().apply(base, Context(recipe(seed=5)))
    assert torch.equal(torch.rand(3), drawn)  # as many numbers were drawn, whatever the seed of the SVD


def test_ranks_of_their_own_start_from_w_too(make):
    chosen = make(rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3.0})
    reference = tiny_llama()(input_ids=IDS).logits
    model = applied(chosen, tiny_llama()).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=0, atol=1e-6)
    one = chosen.export(model)
    assert one.peft_config["default"].rank_pattern == {"q_proj": 14}


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_rank_above_a_side_is_refused_by_name_before_weights_load(make, device):
    message = r"method\.r: expected at most 16 for model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\), got 17; "
    base = tiny_of("llama", device)
    for call in (lambda: make(r=17).count(base), lambda: make(r=17).apply(base, context())):
        with pytest.raises(UsageError, match=message + r".*method\.rank_pattern"):
            call()
    ranks = make(r=17, rank_pattern={"k_proj": 16, "v_proj": 16})
    assert ranks.count(base) > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_from": "runs/a"}, r"twice the rank; name the finished adapter in model\.adapters"),
        ({"parts": ["q"]}, "Extra inputs"),
        ({"init": "gaussian"}, "Extra inputs"),
        ({"dropout": 0.1}, "Extra inputs"),
        ({"alpha": 0.0}, "greater than 0"),
    ],
)
def test_sections_that_can_not_work_are_refused(make, keys, message):
    with pytest.raises(ValueError, match=message):
        make(**keys)


def test_alpha_is_r_where_nothing_is_said(make):
    assert make(r=7).config.alpha == 7
    assert applied(make(r=7), tiny_llama()).peft_config["default"].lora_alpha == 7


def test_embeddings_are_refused(make):
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding"):
        make(target_modules=["embed_tokens"]).count(tiny_llama())


def test_a_broken_base_is_said_to_be_broken(make):
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.up_proj holds NaN or infinity"):
        applied(make(), base)


# -- the result ----------------------------------------------------------------------------------------------------


def test_what_is_exported_at_once_changes_nothing_at_all(make):
    chosen = make(alpha=8.0)
    one = chosen.export(applied(chosen, tiny_llama()).eval())
    for _, layer in layers(one):
        a, b = factors(layer)
        assert not (b @ a).any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_result_is_b_a_minus_its_start_as_one_lora_of_rank_2r(make, architecture):
    chosen = make(alpha=8.0)
    base = tiny_of(architecture, "cpu")
    model = applied(chosen, base)
    start = {name: factors(layer) for name, layer in layers(model)}
    run_steps(model, 4)
    end = {name: factors(layer) for name, layer in layers(model)}
    model.eval()
    logits = model(input_ids=IDS).logits
    one = chosen.export(model)
    settings = one.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.init_lora_weights) == (8, 16, True)
    torch.testing.assert_close(one(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    for name, layer in layers(one):
        (a0, b0), (a, b), (down, up) = start[name], end[name], factors(layer)
        assert layer.scaling["default"] == 2.0
        torch.testing.assert_close(up @ down, b @ a - b0 @ a0, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(up @ down, tol=1e-6) == 8


def test_plain_peft_reads_it_on_the_original_base(make, tmp_path):
    from peft import PeftModel

    chosen = make()
    model = applied(chosen, tiny_llama())
    run_steps(model, 3)
    exported = chosen.export(model.eval())
    logits = exported(input_ids=IDS).logits.detach()
    assert (logits - tiny_llama()(input_ids=IDS).logits).abs().max() > 1e-2
    exported.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 8, 8)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert not list(layers(again))  # none of our classes
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["fast", "qr"])
def test_stopped_and_resumed_equals_straight_bit_by_bit(kind, tmp_path):
    module, own = KINDS[kind]

    def make():
        return module.Method(module.Config(r=4, target_modules="all-linear", **own))

    straight, _ = train(workload(tmp_path / "straight", make(), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", make(), max_steps=6, reporter=StopAt(3)))
    resumed = workload(tmp_path / "stopped", make(), max_steps=6)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    assert torch.equal(make().export(again.eval())(IDS).logits, make().export(straight.eval())(IDS).logits)


def test_a_checkpoint_brings_its_own_start(make, tmp_path):
    """The start is not computed again from W: another machine's decomposition may differ in signs."""
    with pytest.raises(Interrupted):
        train(workload(tmp_path, make(), max_steps=6, reporter=StopAt(3)))
    checkpoint = workload(tmp_path, make()).run.latest_checkpoint()
    logits = []
    for sign in (1, -1):
        model = applied(make(), tiny_llama()).eval()
        for _, layer in layers(model):
            layer.fixed_factors.E.mul_(sign)
        read_state(checkpoint, model, make())
        logits.append(model(input_ids=IDS).logits)
    assert torch.equal(*logits)


def test_new_tokens_train_beside_it(make):
    chosen = make()
    chosen.new_token_ids = [390, 391]
    expected = chosen.count(tiny_llama())
    model = applied(chosen, tiny_llama())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    run_steps(model, 2)
    model.eval()
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(chosen.export(model)(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_classifiers_head_trains_beside_it(make, kind, tmp_path):
    from peft import PeftModel

    task = {"task": "seq_cls" if "Sequence" in kind else "token_cls"}
    model_of = recipe().model.model_copy(update=task)
    chosen, base = make(), tiny_bert(kind=kind, num_labels=3)
    reference, expected = base(input_ids=IDS).logits, chosen.count(base)
    model = chosen.apply(base, Context(recipe().model_copy(update={"model": model_of})))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, reference, rtol=0, atol=1e-5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    logits = model(input_ids=IDS).logits
    chosen.export(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(kind=kind, num_labels=3), tmp_path).eval()
    assert (logits - reference).abs().max() > 1e-2
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


def test_every_matrix_of_the_base_is_the_frozen_rest_plus_the_trained_part(make):
    model = applied(make(alpha=12.0), tiny_llama())
    for _, layer in layers(model):
        a, b = factors(layer)
        fixed = layer.fixed_factors
        rest = base_matrix(layer).double() + 3 * fixed.F.double() @ fixed.E.double()
        torch.testing.assert_close(rest + 3 * b @ a, base_matrix(layer).double(), rtol=0, atol=1e-9)

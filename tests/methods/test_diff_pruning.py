"""DiffPruning: the gates' law, gradients by hand, exactly k entries, what moves in which stage, kills, and masks."""

import copy
import json
import math

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import peftctl
from peftctl.errors import RunError, UsageError
from peftctl.methods.base import Stage, StepInfo
from peftctl.methods.diff_pruning import BERT_LARGE, Config, Method, projected
from peftctl.recipe.schema import TrainSection
from peftctl.tuners import gated_delta
from peftctl.tuners.gated_delta import GatedDelta, into_sparse
from peftctl.tuners.sparse_delta import layers
from tests.commands.helpers import write_recipe
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.stopping import stopped_equals_straight
from tests.tiny import save_tiny, tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload

IDS = torch.arange(1, 25).reshape(2, 12)
GATES, MAIN = Stage("gates", 2), Stage(steps=4)
P = 4 * 32 * (32 + 16 + 16 + 32 + 64 + 64 + 64)


def method(**keys):
    return Method(Config(**{"keep": 0.02, "gates": 0.4, **keys}))


def gated(chosen, base=tiny_llama):
    """Return a model at the beginning of the first stage."""
    model = applied(chosen, base())
    chosen.enter(model, GATES, None)
    return model


def fitted(chosen, base=tiny_llama):
    """Return a model at the beginning of the main stage."""
    model = gated(chosen, base)
    run_steps(model, 3)
    chosen.enter(model, MAIN, None)
    return model


def merged(model):
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


def masks(model):
    return {name: layer.delta_indices["default"].tolist() for name, layer in layers(model)}


def layer_of(shape=(5, 7), structured=False, turned=False, seed="0 x"):
    """Return a gated layer in float64 with random w, and with α about 0, where gates are half open."""
    torch.manual_seed(0)
    base = Conv1D(*shape) if turned else nn.Linear(shape[1], shape[0])
    layer = GatedDelta(base.double().requires_grad_(False), structured, seed).double()
    layer.change.data.normal_()
    layer.alpha.data.normal_()
    if structured:
        layer.alpha_group.data.fill_(0.3)
    return layer


# -- the gates ------------------------------------------------------------------------------------------------------


def samples(alpha, count=200_000):
    """Return gates of one α in training, as the layer draws them: its output is z times 1."""
    base = nn.Linear(count, 1, bias=False).requires_grad_(False)
    base.weight.data.zero_()
    layer = GatedDelta(base, False, "0 x").train()
    layer.change.data.fill_(1.0)
    layer.alpha.data.fill_(alpha)
    with torch.no_grad():
        return layer(torch.ones(1, count)), _z(layer)


def _z(layer):
    return gated_delta._gates(layer.alpha, None, layer._draw()).value.flatten()


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.7, 5.0])
def test_a_gate_is_open_as_often_as_its_law_says_and_lies_between_0_and_1(alpha):
    total, z = samples(alpha)
    assert total.item() == pytest.approx(float(z.sum()), rel=1e-3)
    expected = 1 / (1 + math.exp(-(alpha - math.log(1.5 / 1.5))))
    error = math.sqrt(expected * (1 - expected) / len(z))
    assert abs((z > 0).double().mean().item() - expected) < 3 * error
    assert z.min() >= 0 and z.max() <= 1 and (z == 1).any()
    if alpha < 5:
        assert ((z > 0) & (z < 1)).any() and (z == 0).any()


def test_the_expected_number_is_the_sum_of_the_laws():
    layer = layer_of(structured=True)
    plain = torch.sigmoid(layer.alpha).sum()
    assert layer.expected_open().item() == pytest.approx((plain * torch.sigmoid(torch.tensor(0.3))).item(), rel=1e-6)
    assert layer_of().expected_open().item() == pytest.approx(plain.item(), rel=1e-12)


def test_outside_of_training_gates_are_fixed_and_in_a_step_they_are_the_same():
    layer, x = layer_of(), torch.randn(3, 7, dtype=torch.float64)
    layer.eval()
    z = (torch.sigmoid(layer.alpha) * 3 - 1.5).clamp(0, 1)
    base = layer.base_layer
    expected = functional.linear(x, base.weight + z * layer.change, base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer.train()
    first = layer(x)
    torch.manual_seed(99)
    assert torch.equal(layer(x), first) and not torch.allclose(first, expected)
    layer.step = 1
    second = layer(x)
    assert not torch.allclose(second, first)
    layer.step = 0
    assert torch.equal(layer(x), first)
    assert not torch.allclose(layer_of(seed="1 x").train()(x), first)
    assert not torch.allclose(layer_of(seed="0 y").train()(x), first)


def test_drawing_leaves_the_random_state_of_the_run_alone():
    layer = layer_of().train()
    state = torch.get_rng_state()
    layer(torch.ones(1, 7, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_are_those_of_the_naive_equation(training, structured, turned):
    layer = layer_of(structured=structured, turned=turned).train(training)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    w, alpha, naive = (t.detach().clone().requires_grad_() for t in (layer.change, layer.alpha, x))
    group = layer.alpha_group.detach().clone().requires_grad_() if structured else None
    source = torch.Generator().manual_seed(layer._draw())

    def gate(values):
        noise = torch.rand(values.shape, generator=source).double() if training else None
        logits = values if noise is None else torch.log(noise) - torch.log(1 - noise) + values
        return (torch.sigmoid(logits) * 3.0 - 1.5).clamp(min=0).clamp(max=1)

    z = gate(alpha)
    z = z * gate(group) if structured else z
    base = layer.base_layer
    weight = base.weight + z * w
    expected = functional.linear(naive, weight.T if turned else weight, base.bias)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if training else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(layer(x), expected, **tolerance)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    pairs = [(x.grad, naive.grad), (layer.change.grad, w.grad), (layer.alpha.grad, alpha.grad)]
    if structured:
        pairs.append((layer.alpha_group.grad, group.grad))
    for found, wanted in pairs:
        assert wanted.any()
        torch.testing.assert_close(found, wanted, **tolerance)
    assert base.weight.grad is None


def test_the_backward_pass_keeps_nothing_of_the_weights_size():
    layer = GatedDelta(nn.Linear(64, 64).requires_grad_(False), False, "0 x").train()
    own = {p.data_ptr() for p in layer.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert kept and not [t for t in kept if t.numel() == 64 * 64 and t.data_ptr() not in own]


# -- the first stage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_with_w_0_it_is_the_base(structured):
    model = gated(method(structured=structured))
    for training in (False, True):
        assert torch.equal(model.train(training)(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * P + (28 if structured else 0)


def l0(model, chosen):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}

    class Nothing:
        def cross_entropy(self):
            return torch.zeros(())

    return chosen.loss(model, batch, lambda _: Nothing()).get("l0")


def test_the_penalty_is_scaled_to_the_model_and_a_part_of_its_own():
    chosen = method(penalty=2e-7)
    model = gated(chosen)
    expected = 2e-7 * BERT_LARGE / P * (P * 1 / (1 + math.exp(-5)))
    assert l0(model, chosen).item() == pytest.approx(expected, rel=1e-5)
    free = method(penalty=0)
    assert l0(gated(free), free) is None
    run_steps(model, 2)
    chosen.enter(model, MAIN, None)
    assert l0(model, chosen) is None


def test_a_larger_penalty_leaves_fewer_gates_open():
    """λ = 0 keeps P(z > 0) where it began, at 0.993."""
    found = []
    for penalty in (0, 1e-10, 1e-6):
        chosen = method(penalty=penalty, alpha_learning_rate=0.3)
        model = gated(chosen)
        groups = chosen.param_groups(model, TrainSection(output_dir="run", learning_rate=1e-3))
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        model.train()
        for step in range(14):
            for _, layer in gated_delta.layers(model):
                layer.step = step
            optimizer.zero_grad()
            parts = [model(input_ids=IDS, labels=IDS).loss, l0(model, chosen)]
            sum(part for part in parts if part is not None).backward()
            optimizer.step()
        found.append(sum(layer.expected_open().item() for _, layer in gated_delta.layers(model)) / P)
    assert found[0] > 0.98 and found[0] > found[1] > found[2]


def test_alphas_have_their_rate_and_do_not_decay():
    chosen = method(structured=True)
    model = gated(chosen)
    changes, alphas = chosen.param_groups(model, TrainSection(output_dir="run", weight_decay=0.5))
    assert alphas["lr"] == 0.1 and alphas["weight_decay"] == 0 and len(alphas["params"]) == 2 * 28
    assert "lr" not in changes and changes["weight_decay"] == 0.5 and len(changes["params"]) == 28
    grouped = {id(p) for group in (changes, alphas) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def gradients(batches, checkpointing=False):
    """Return the gradients of a step over some batches, in the first stage."""
    model = gated(method())
    for i, (_, layer) in enumerate(gated_delta.layers(model)):
        layer.change.data.normal_(generator=torch.Generator().manual_seed(i), std=0.02)
        layer.alpha.data.fill_(0.2)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    for ids in batches:
        (model(input_ids=ids, labels=ids).loss * len(ids) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_micro_batches_and_recomputed_activations_see_the_same_gates():
    whole = gradients([IDS])
    for other in (gradients(IDS.split(1)), gradients([IDS], checkpointing=True)):
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_step_reaches_the_gates():
    chosen = method()
    model = gated(chosen)
    (callback,) = chosen.callbacks(model)
    info = StepInfo(7, 9, model, forget=lambda _: None)
    callback.stage_begins(info)
    assert {layer.step for _, layer in gated_delta.layers(model)} == {7}
    assert info.log == {"trainable_parameters": 2 * P}
    callback.after_step(StepInfo(8, 9, model, forget=lambda _: None))
    assert {layer.step for _, layer in gated_delta.layers(model)} == {8}


# -- projection and the main stage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.005, 0.02, 0.31, 1.0])
def test_exactly_k_entries_are_kept_the_largest_of_all(keep):
    chosen = method(keep=keep)
    model = gated(chosen)
    run_steps(model, 3)
    came = {name: layer.kept().flatten() for name, layer in gated_delta.layers(model)}
    logits = model.eval()(input_ids=IDS).logits
    chosen.enter(model, MAIN, None)
    k = math.floor(keep * P)
    found = {name: layer.delta_values["default"].detach() for name, layer in layers(model)}
    assert sum(len(values) for values in found.values()) == k == chosen.count(tiny_llama())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == k
    everything = torch.cat(list(came.values())).abs()
    least = everything.topk(k).values.min()
    mask = masks(model)
    for name, values in found.items():
        assert torch.equal(values, came[name][mask[name]]) and values.abs().min() >= least
    assert not list(gated_delta.layers(model))
    if keep == 1:
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_keeps_a_large_change_out():
    chosen = method(keep=1.5 / P)
    model = gated(chosen)
    found = dict(gated_delta.layers(model))
    shut, opened = found["model.layers.0.mlp.up_proj"], found["model.layers.2.self_attn.q_proj"]
    shut.change.data[3, 4], shut.alpha.data[3, 4] = 9.0, -5.0
    opened.change.data[1, 2] = -0.5
    chosen.enter(model, MAIN, None)
    assert masks(model) == {"model.layers.2.self_attn.q_proj": [32 + 2]}


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_with_decay_clipping_and_accumulation_only_kept_entries_differ(tmp_path, base):
    settings = {"weight_decay": 0.3, "max_grad_norm": 0.1, "gradient_accumulation": 2, "batch_size": 2, "max_steps": 6}
    model, _ = train(workload(tmp_path, method(), **settings), model=base())
    after, mask, moved, reference = merged(model), masks(model), 0, base()
    for name, p in reference.named_parameters():
        changed = (after[name] != p).flatten().nonzero()[:, 0].tolist()
        assert set(changed) <= set(mask.get(name.removesuffix(".weight"), [])), name
        moved += len(changed)
    assert moved > 0.95 * method().count(base())
    with model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference(input_ids=IDS).logits)


def test_merged_it_is_the_base_plus_the_file(tmp_path):
    from safetensors.torch import load_file

    chosen = method()
    model = fitted(chosen)
    run_steps(model, 2)
    after = merged(model)
    logits = model.eval()(input_ids=IDS).logits
    chosen.export(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 2 * chosen.count(tiny_llama())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * 4 * chosen.count(tiny_llama()) + 9000
    for name, p in tiny_llama().named_parameters():
        expected, key = p.detach().clone().flatten(), f"base_model.model.{name.removesuffix('.weight')}.delta_"
        if f"{key}values" in tensors:
            expected[tensors[f"{key}indices"].long()] += tensors[f"{key}values"]
        assert torch.equal(after[name].flatten(), expected), name
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)


def test_a_run_that_can_not_be_projected_is_refused():
    chosen = method()
    with pytest.raises(RunError, match=r"no change came through its gate; raise method\.gates"):
        chosen.enter(gated(chosen), MAIN, None)
    with pytest.raises(RunError, match="a change is not finite"):
        projected({"x": torch.tensor([1.0, torch.inf])}, 1)


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "step"), [("gates", 1), ("gates", 3), ("main", 1), ("main", 3)])
@pytest.mark.parametrize("structured", [False, True])
def test_a_run_that_is_killed_in_any_stage_goes_on(tmp_path, stage, step, structured):
    stopped_equals_straight(tmp_path, lambda: method(structured=structured), stage, step, max_steps=8)


def test_metrics_say_what_each_stage_trains(tmp_path):
    work = workload(tmp_path, method(), max_steps=5)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    said = {line["stage"]: line["trainable_parameters"] for line in lines if "trainable_parameters" in line}
    assert said == {"gates": 2 * P, "main": math.floor(0.02 * P)}
    assert {line["stage"] for line in lines if "l0" in line} == {"gates"}
    (notice,) = method().notices(tiny_llama())
    assert notice.startswith("diff_pruning: 73,728 parameters train in the first 40% of the run, which takes 0.0012 GB")


def test_an_earlier_run_gives_its_mask(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "first").mkdir()
    first = write_recipe(tmp_path / "first", base, {"name": "diff_pruning", "keep": 0.01})
    recipe_of = peftctl.load_recipe(first, ["train.max_steps=4", "eval.metrics=[loss]"])
    peftctl.train(recipe_of)
    run = recipe_of.train.output_dir
    chosen = method(mask_from=run)
    assert [stage.name for stage in chosen.stages(recipe())] == ["main"] and not chosen.notices(tiny_llama())
    assert chosen.inputs() == {"method.mask_from": [run]} and chosen.count(tiny_llama()) == math.floor(0.01 * P)
    model = applied(chosen, tiny_llama())
    chosen.calibrate(model, [])
    before = PeftModel.from_pretrained(tiny_llama(), f"{run}/adapter")
    assert masks(model) == masks(before)
    assert torch.equal(model.eval()(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
    with pytest.raises(UsageError, match=r"is over .* too; give the same target_modules"):
        method(mask_from=run, target_modules=["q_proj"]).count(tiny_llama())
    stopped_equals_straight(tmp_path / "kill", lambda: method(mask_from=run), "main", 2, max_steps=4)


def test_masks_that_can_not_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"method\.mask_from: nowhere holds no adapter .*; give a finished run"):
        method(mask_from="nowhere").count(tiny_llama())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="holds no mask, but an adapter of LORA"):
        method(mask_from=str(tmp_path)).count(tiny_llama())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "PEFTCTL_SPARSE_DELTA", "counts": {"model.layers.0.mlp.up_proj": 2}}'
    )
    chosen = method(mask_from=str(tmp_path))
    model = applied(chosen, tiny_llama())
    with pytest.raises(UsageError, match="can't be read"):
        chosen.calibrate(model, [])


def test_none_of_the_weights_is_refused():
    with pytest.raises(UsageError, match=r"method\.keep: 1e-09 of 36,864 weights is none; raise it"):
        method(keep=1e-9).count(tiny_llama())


def test_the_state_of_one_stage_loads_into_a_model_of_any():
    chosen = method()
    model = fitted(chosen)
    state, tensors = chosen.state_dict(model), trained_tensors(model)
    fresh = applied(chosen, tiny_llama())
    chosen.load_state_dict(fresh, state)
    assert {n: t.shape for n, t in trained_tensors(fresh).items()} == {n: t.shape for n, t in tensors.items()}
    chosen.load_state_dict(fresh, chosen.state_dict(gated(chosen)))
    assert sum(t.numel() for t in trained_tensors(fresh).values()) == 2 * P
    into_sparse(fresh, {"model.layers.0.mlp.up_proj": torch.tensor([5])})
    assert masks(fresh) == {"model.layers.0.mlp.up_proj": [5]}

"""FAR: scores from two checkpoints, which nodes learn, what can and can not move, and a kill in both stages."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

from peftctl.errors import RunError, UsageError
from peftctl.methods.base import Stage
from peftctl.methods.far import Config, Method
from peftctl.recipe.schema import ModelSection, TrainSection
from peftctl.tuners.row_delta import layers, rows_of
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.methods.stopping import stopped_equals_straight
from tests.methods.test_houlsby import SMOLLM2
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_opt
from tests.training.helpers import train, workload

IDS = torch.arange(1, 25).reshape(2, 12)
PRIMING, MAIN = Stage("priming", 2), Stage(steps=4)


def method(**keys):
    return Method(Config(**{"retention": 0.2, "priming": 0.3, **keys}))


def primed(chosen, base=tiny_llama, steps=3):
    """Return a model after priming."""
    model = applied(chosen, base())
    chosen.enter(model, PRIMING, None)
    run_steps(model, steps)
    return model


def reconfigured(chosen, base=tiny_llama, steps=3):
    """Return a model at the beginning of the main stage."""
    model = primed(chosen, base, steps)
    chosen.enter(model, MAIN, None)
    return model.eval()


def feed_forward(base):
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and (".mlp." in n or ".fc" in n)}


def merged(model):
    """Return name -> parameter of the base with the changes written into it."""
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


# -- scores and selection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_learners_are_the_top_of_the_l1_change_between_two_checkpoints(base):
    chosen = method()
    model = primed(chosen, base)
    after, before = merged(model), base()
    chosen.enter(model, MAIN, None)
    found = rows_of(model)
    assert found.keys() == feed_forward(before).keys()
    for name, module in feed_forward(before).items():
        change = (after[f"{name}.weight"] - module.weight).abs().double().sum(1)
        k = -(-2 * len(change) // 10)
        assert found[name].tolist() == sorted(change.topk(k).indices.tolist()), name


def test_the_l1_change_is_neither_that_of_a_sum_nor_a_square():
    """A node with many small changes of both signs outdoes one with a single larger change."""
    chosen = method(retention=1 / 32)
    model = applied(chosen, tiny_llama())
    chosen.enter(model, PRIMING, None)
    for _, layer in layers(model):
        delta = layer.delta_weight["default"].data
        delta[3, :] = 0.1 * (-1.0) ** torch.arange(delta.shape[1])
        delta[9, 0] = 2.0
    chosen.enter(model, MAIN, None)
    assert all(3 in rows and 9 not in rows for rows in rows_of(model).values() if len(rows) == 1)


def test_the_learners_and_the_others_are_a_permutation():
    for name, rows in rows_of(reconfigured(method())).items():
        size = tiny_llama().get_submodule(name).out_features
        others = sorted(set(range(size)) - set(rows.tolist()))
        assert sorted(rows.tolist() + others) == list(range(size)) and rows.tolist() == sorted(set(rows.tolist()))


def test_over_the_whole_model_the_layers_have_other_shares():
    chosen = method(scope="model")
    model = primed(chosen)
    scores = {n: layer.delta_weight["default"].detach().abs().sum(1) for n, layer in layers(model)}
    chosen.enter(model, MAIN, None)
    found = rows_of(model)
    k = sum(-(-2 * len(score) // 10) for score in scores.values())
    best = sorted(((float(a), n, j) for n, score in scores.items() for j, a in enumerate(score)), reverse=True)[:k]
    assert sorted((n, j) for n, rows in found.items() for j in rows.tolist()) == sorted((n, j) for _, n, j in best)
    assert len({len(rows) for rows in found.values()}) > 1


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_an_inner_neuron_is_a_row_of_those_that_read_and_a_column_of_the_one_that_writes(base):
    chosen = method(unit="inner_neuron")
    model = primed(chosen, base)
    after, before = merged(model), base()
    chosen.enter(model, MAIN, None)
    found = rows_of(model)
    parts = {}
    for name, module in feed_forward(before).items():
        change = (after[f"{name}.weight"] - module.weight).abs().double()
        down = name.endswith(("down_proj", "fc2"))
        part = name.rpartition(".")[0]
        parts[part] = parts.get(part, 0) + change.sum(0 if down else 1)
    for name, rows in found.items():
        score = parts[name.rpartition(".")[0]]
        assert rows.tolist() == sorted(score.topk(13).indices.tolist()), name
    run_steps(model, 2)
    final = merged(model)
    for name, module in feed_forward(before).items():
        moved = (final[f"{name}.weight"] != module.weight).nonzero()
        assert set(moved[:, 1 if name.endswith(("down_proj", "fc2")) else 0].tolist()) == set(found[name].tolist())


def test_inner_neurons_of_a_fused_layer_are_refused():
    with pytest.raises(UsageError, match=r"method\.unit: the layers before .*down_proj have another number"):
        method(unit="inner_neuron").count(tiny_of("phi3"))


# -- after reconfiguration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["output_row", "inner_neuron"])
def test_before_training_the_outputs_are_the_base_bit_for_bit(unit):
    model = reconfigured(method(unit=unit))
    assert torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
    assert torch.equal(
        applied(method(unit=unit), tiny_llama()).eval()(input_ids=IDS).logits, model(input_ids=IDS).logits
    )


def test_kept_priming_is_that_of_the_learners():
    chosen = method(keep_priming=True)
    model = primed(chosen)
    before = {n: layer.delta_weight["default"].detach().clone() for n, layer in layers(model)}
    chosen.enter(model, MAIN, None)
    for name, layer in layers(model):
        values = layer.delta_weight["default"]
        assert values.any() and torch.equal(values, before[name][layer.rows("default").long()])
    assert not torch.equal(model.eval()(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


def test_a_head_begins_anew_too_unless_priming_is_kept(tmp_path):
    from peftctl.models.classifier import Head
    from peftctl.models.load import load_model

    def classified(keep, folder):
        torch.manual_seed(0)
        section = ModelSection(name_or_path=str(folder), task="seq_cls", dtype="float32")
        base = load_model(section, dtype="float32", device="cpu", head=Head(["a", "b"], 3))
        chosen = method(keep_priming=keep)
        plain = recipe()
        section = plain.model.model_copy(update={"task": "seq_cls"})
        model = chosen.apply(base, type(context())(plain.model_copy(update={"model": section})))
        chosen.enter(model, PRIMING, None)
        head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
        start = [p.detach().clone() for p in head]
        for p in head:
            p.data += 1
        for _, layer in layers(model):
            layer.delta_weight["default"].data += 1
        chosen.enter(model, MAIN, None)
        assert head and all(p.requires_grad for p in head)
        return [torch.equal(p, old) for p, old in zip(head, start, strict=True)]

    folder = save_tiny(tmp_path, tiny_bert())
    assert all(classified(False, folder)) and not any(classified(True, folder))


def test_frozen_rows_have_no_gradient_and_no_optimizer_state():
    model = reconfigured(method())
    model(input_ids=IDS, labels=IDS).loss.backward()
    graded = {n for n, p in model.named_parameters() if p.grad is not None}
    assert graded == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("base_layer" in name for name in graded)
    assert sum(p.numel() for p in model.parameters() if p.grad is not None) == method().count(tiny_llama())


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_with_decay_clipping_and_accumulation_only_learners_move(tmp_path, base):
    settings = {"weight_decay": 0.3, "max_grad_norm": 0.1, "gradient_accumulation": 2, "batch_size": 2, "max_steps": 6}
    model, _ = train(workload(tmp_path, method(), **settings), model=base())
    after, found, before = merged(model), rows_of(model), base()
    biases = 0
    for name, p in before.named_parameters():
        owner, _, part = name.rpartition(".")
        changed = (after[name] != p).nonzero()
        if owner in found:
            assert set(changed[:, 0].tolist()) == set(found[owner].tolist()), name
            biases += part == "bias"
        else:
            assert not len(changed), name
    assert biases == (4 if base is tiny_opt else 0)


def test_decay_pulls_to_the_base_and_leaves_biases():
    groups = method().param_groups(reconfigured(method(), tiny_opt), TrainSection(output_dir="run", weight_decay=0.5))
    assert {p.ndim: group["weight_decay"] for group in groups for p in group["params"]} == {2: 0.5, 1: 0.0}


def test_all_nodes_are_full_tuning_of_the_feed_forward_layers():
    """rho = 1: the same losses as of the base whose feed-forward layers train, under AdamW."""
    chosen = method(retention=1.0)
    model, base = reconfigured(chosen, tiny_opt), tiny_opt()
    base.requires_grad_(False)
    for module in feed_forward(base).values():
        module.requires_grad_(True)
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert chosen.count(tiny_opt()) == trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert run_steps(model, 5) == pytest.approx(run_steps(base, 5), rel=1e-4)


def test_with_no_learner_it_would_be_the_base_and_that_is_refused():
    with pytest.raises(ValueError, match="greater than 0"):
        Config(retention=0)
    model = reconfigured(method())
    run_steps(model, 2)
    with model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


# -- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "keys", "expected"),
    [
        (tiny_llama, {}, 4 * (2 * 13 * 32 + 7 * 64)),
        (tiny_opt, {}, 2 * (13 * 33 + 7 * 65)),
        (tiny_opt, {"unit": "inner_neuron"}, 2 * (13 * 33 + 13 * 32)),
        (lambda: tiny_of("llama", **SMOLLM2), {"retention": 0.1}, 30 * (2 * 154 * 576 + 58 * 1536)),
        # 0.07 * 100 is a little more than 7 in binary
        (lambda: tiny_of("opt", ffn_dim=100), {"retention": 0.07}, 2 * (7 * 33 + 3 * 101)),
    ],
)  # fmt: skip
def test_the_count_is_that_of_the_main_stage(base, keys, expected):
    chosen = method(**keys)
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    if base is tiny_llama or base is tiny_opt:
        model = reconfigured(chosen, base)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "step"), [("priming", 1), ("priming", 2), ("main", 1), ("main", 3)])
@pytest.mark.parametrize("keys", [{}, {"keep_priming": True, "unit": "inner_neuron"}], ids=["rows", "neurons"])
def test_a_run_that_is_killed_in_any_stage_goes_on(tmp_path, stage, step, keys):
    stopped_equals_straight(tmp_path, lambda: method(**keys), stage, step, max_steps=7)


def test_metrics_say_what_each_stage_trains(tmp_path):
    work = workload(tmp_path, method(), max_steps=7)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    assert [line["stage"] for line in lines if "loss" in line] == ["priming"] * 2 + ["main"] * 5
    said = {line["stage"]: line["trainable_parameters"] for line in lines if "trainable_parameters" in line}
    assert said == {"priming": 4 * 3 * 64 * 32, "main": method().count(tiny_llama())}
    assert method().notices(tiny_llama()) == [
        "far: 24,576 parameters train in the first 30% of the run, to score the nodes"
    ]


def test_what_is_saved_is_as_large_as_the_learners_and_answers_alike(tmp_path):
    from safetensors.torch import load_file

    chosen = method()
    model = reconfigured(chosen)
    run_steps(model, 3)
    model.eval()
    logits = model(input_ids=IDS).logits
    chosen.export(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == chosen.count(tiny_llama()) + 4 * (13 + 13 + 7)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)


def test_lengths_and_primings_that_can_not_work_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"method\.priming: 1 steps leave none of train\.max_steps, 1"):
        method().apply(tiny_llama(), type(context())(recipe(max_steps=1)))
    chosen = method()
    model = applied(chosen, tiny_llama())
    chosen.enter(model, PRIMING, None)
    with pytest.raises(RunError, match=r"far: priming has moved no node; raise method\.priming"):
        chosen.enter(model, MAIN, None)
    next(layers(model))[1].delta_weight["default"].data[0, 0] = torch.nan
    with pytest.raises(RunError, match="not a number"):
        chosen.enter(model, MAIN, None)


def test_a_run_of_epochs_is_divided_by_the_share():
    first, main = method(priming=0.05).stages(recipe(epochs=2))
    assert (first.name, first.steps, main.name, main.steps) == ("priming", 0.05, "main", 0.95)

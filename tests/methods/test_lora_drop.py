"""LoRA-drop: which layers keep a pair of their own, what the others share, and that all begins anew."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel

from peftctl.artifacts.fold import fold
from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import Interrupted, RunError, UsageError
from peftctl.methods.base import Context, Stage, StepInfo
from peftctl.methods.lora_drop import LEAST_ROWS, Config, Method, importance, kept, output_sizes, stratified, unpadded
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.training.checkpoints import read_state
from peftctl.tuners.fixed_factors import layers
from peftctl.tuners.shared_pairs import kinds
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.lora_family import IDS, randomise, smollm2
from tests.methods.test_orthogonal_lora import StopIn
from tests.tiny import save_tiny, tiny_bert, tiny_bloom, tiny_llama, tiny_t5, tiny_tokenizer
from tests.training.helpers import rows, train, trained_tensors, workload

MAIN = Stage()
COLLATE = Collator(tiny_tokenizer())


def method(**keys):
    settings = {"r": 2, "alpha": 4, "target_modules": "all-linear", "threshold": 0.5, "sample_steps": 4}
    return Method(Config(**(settings | keys)))


def batches(stage, made=None, collate=COLLATE):
    return (collate([row]) for row in stage.choose(made or rows(6)))


def chosen_model(chosen, base=tiny_llama, made=None, seed=1):
    """Return a model at the beginning of the second stage, after a first that moved everything."""
    model = randomise(applied(chosen, base()), seed=seed)
    chosen.enter(model, MAIN, partial(batches, made=made))
    return model


def by_name(model):
    return dict(layers(model))


def factors(layer):
    return layer.lora_A["default"], layer.lora_B["default"]


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# -- the choice ----------------------------------------------------------------------------------------------------

SHARES = [0.4, 0.3, 0.15, 0.1, 0.05]


@pytest.mark.parametrize(
    ("shares", "threshold", "expected"),
    [
        (SHARES, 0.9, {0, 1, 2, 3}),
        (SHARES, 0.65, {0, 1}),
        (SHARES, 1.0, {0, 1, 2, 3, 4}),
        (SHARES, 0.4, {0}),
        (SHARES, 0.7, {0, 1}),
        (SHARES, 0.85, {0, 1, 2}),
        (SHARES[::-1], 0.65, {3, 4}),
        ([0.1] * 10, 0.3, {0, 1, 2}),  # 0.1 + 0.1 + 0.1 > 0.3 in floats
        ([0.1] * 10, 0.8, set(range(8))),  # their running sum is below 0.8
        ([0.1] * 10, 1.0, set(range(10))),
        ([0.5, 0.0, 0.5], 1.0, {0, 2}),
        ([1 - 1e-12, 1e-12, 0.0], 1.0, {0, 1}),
        ([1.0], 0.9, {0}),
    ],
)
def test_the_shortest_prefix_of_the_largest_that_reaches_the_threshold_is_kept(shares, threshold, expected):
    assert kept(shares, threshold) == expected


def test_importance_is_the_share_of_the_sum():
    assert importance("q_proj", [2.0, 1.0, 1.0]) == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("sizes", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [float("nan"), float("nan")]])
def test_sizes_without_a_finite_sum_raise(sizes):
    with pytest.raises(RunError, match=r"the adapters of q_proj add .*raise method\.sample_steps"):
        importance("q_proj", sizes)


def test_adapters_that_have_not_learned_raise_instead_of_nan():
    chosen = method()
    model = applied(chosen, tiny_llama())  # B is zero
    assert set(output_sizes(model, batches(MAIN)).values()) == {0.0}
    with pytest.raises(RunError, match="add nothing, so no layer can be chosen"):
        chosen.enter(model, MAIN, batches)


def test_a_run_whose_only_sample_step_is_warm_up_raises(tmp_path):
    with pytest.raises(RunError, match="shorten the warm-up"):
        train(workload(tmp_path, method(sample_steps=1), max_steps=4, warmup_steps=2))


def test_sizes_are_means_over_tokens_of_the_squared_update():
    """Against the equation in float64: every token of every row counts once, and dropout is off."""
    model = randomise(applied(method(dropout=0.5), tiny_llama()).double()).train()
    inputs = {name: [] for name, _ in layers(model)}
    hooks = [
        layer.base_layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name, layer in layers(model)
    ]
    sizes = output_sizes(model, batches(MAIN))
    for hook in hooks:
        hook.remove()
    assert model.training
    for name, layer in layers(model):
        a, b = (factor.weight.detach() for factor in factors(layer))
        tokens = torch.cat([x[0] for x in inputs[name]])
        assert len(tokens) == sum(len(row.input_ids) for row in rows(6))
        squares = [float((2.0 * b @ a @ x).square().sum()) for x in tokens]
        assert sizes[name] == pytest.approx(sum(squares) / len(squares), rel=1e-9)


def test_padding_does_not_count():
    model = randomise(applied(method(), tiny_llama()))
    padded = Collator(tiny_tokenizer(), 64)
    plain, wide = (output_sizes(model, batches(MAIN, collate=collate)) for collate in (COLLATE, padded))
    assert all(wide[name] == pytest.approx(size, rel=1e-6) for name, size in plain.items())


def test_padding_of_what_a_decoder_reads_does_not_count():
    pairs = [EncodedRow(row.input_ids, row.input_ids[:5], row.where, paired=True) for row in rows(3)]
    model = randomise(applied(method(), tiny_t5()))
    padded = Collator(tiny_tokenizer(), 64)
    plain, wide = (output_sizes(model, batches(MAIN, pairs, collate)) for collate in (COLLATE, padded))
    assert all(wide[name] == pytest.approx(size, rel=1e-5) for name, size in plain.items())
    assert unpadded(padded(pairs[:1]), True)["labels"].shape == (1, 5)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_scaling_one_layers_s_by_c_scales_its_size_by_c_squared(factor):
    model = randomise(applied(method(), tiny_llama()).double())
    before = output_sizes(model, batches(MAIN))
    name, last = list(layers(model))[-1]  # nothing that is measured lies behind it
    last.scaling["default"] *= factor
    after = output_sizes(model, batches(MAIN))
    assert after.pop(name) == pytest.approx(factor**2 * before.pop(name), rel=1e-9)
    assert after == pytest.approx(before, rel=1e-12)


def test_the_layers_with_the_largest_outputs_of_their_kind_keep_a_pair_of_their_own():
    chosen = method(threshold=0.6, target_modules=["q_proj", "down_proj"])
    model = randomise(applied(chosen, tiny_llama()))
    named = by_name(model)
    prefix = "base_model.model.model.layers"
    largest = {f"{prefix}.2.self_attn.q_proj", f"{prefix}.1.mlp.down_proj"}
    for name in largest:
        factors(named[name])[1].weight.data *= 30
    chosen.enter(model, MAIN, batches)
    own = {
        name for name, layer in named.items() if sum(factors(layer)[0] is factors(o)[0] for o in named.values()) == 1
    }
    assert own == largest == set(chosen.chosen)


# -- sharing -------------------------------------------------------------------------------------------------------


def test_the_layers_of_a_kind_that_are_not_kept_share_one_pair_and_no_other():
    chosen = method()
    model = chosen_model(chosen)
    found = {}
    for name, layer in layers(model):
        found.setdefault(name.rpartition(".")[2], []).append((name, layer))
    assert len(found) == 7
    for members in found.values():
        own = [layer for name, layer in members if name in chosen.chosen]
        others = [layer for name, layer in members if name not in chosen.chosen]
        assert own and others
        for i in (0, 1):
            assert len({factors(layer)[i].weight.data_ptr() for layer in others}) == 1
            assert len({factors(layer)[i].weight.data_ptr() for _, layer in members}) == len(own) + 1


def test_sharing_never_crosses_kinds_or_shapes():
    """q and o, gate and up have equal shapes and are of different kinds; a pattern makes ranks of one kind differ."""
    chosen = method(rank_pattern={"layers.0.self_attn.q_proj": 4, "layers.1.self_attn.q_proj": 4}, threshold=0.1)
    model = chosen_model(chosen)
    held = {}
    for name, layer in layers(model):
        held.setdefault(id(factors(layer)[0]), []).append(name)
    assert max(map(len, held.values())) == 3
    for names in held.values():
        assert len({name.rpartition(".")[2] for name in names}) == 1
        assert len({by_name(model)[name].r["default"] for name in names}) == 1
    assert sum(name.endswith("q_proj") for name in chosen.chosen) == 2  # one of each rank


def test_encoder_and_decoder_and_cross_attention_share_nothing():
    pairs = [EncodedRow(row.input_ids, row.input_ids[:5], row.where, paired=True) for row in rows(3)]
    model = chosen_model(method(target_modules=["q"], threshold=0.1), tiny_t5, pairs)
    held = {}
    for name, layer in layers(model):
        held.setdefault(id(factors(layer)[0]), set()).add((name.split(".")[2], name.split(".")[-2]))
    assert all(len(places) == 1 for places in held.values())
    assert {place for places in held.values() for place in places} == {
        ("encoder", "SelfAttention"), ("decoder", "SelfAttention"), ("decoder", "EncDecAttention")
    }  # fmt: skip


def test_the_gradient_of_a_shared_pair_is_the_sum_of_the_layers():
    chosen = method()
    model = randomise(chosen_model(chosen).double(), seed=5)
    alone = randomise(applied(method(), tiny_llama()).double())
    for (_, layer), (_, other) in zip(layers(model), layers(alone), strict=True):
        for mine, its in zip(factors(layer), factors(other), strict=True):
            its.weight.data.copy_(mine.weight.data)
    torch.testing.assert_close(model(input_ids=IDS).logits, alone(input_ids=IDS).logits, rtol=0, atol=1e-12)
    for one in (model, alone):
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
    for group in chosen._shared:
        for i in (0, 1):
            summed = sum(factors(by_name(alone)[name])[i].weight.grad for name in group)
            torch.testing.assert_close(factors(by_name(model)[group[0]])[i].weight.grad, summed, rtol=1e-9, atol=1e-12)


def test_shared_layers_stay_equal_while_they_train(tmp_path):
    chosen = method()
    model, _ = train(workload(tmp_path, chosen, max_steps=10, weight_decay=0.1))
    assert chosen._shared
    for group in chosen._shared:
        first, *others = (factors(by_name(model)[name]) for name in group)
        assert first[1].weight.any()
        assert others and all(a is first[0] and b is first[1] for a, b in others)


def test_counts_of_both_stages(tmp_path):
    chosen = method()
    model = applied(chosen, tiny_llama())
    sizes = {name: 2 * (layer.in_features + layer.out_features) for name, layer in layers(model)}
    assert chosen.count(tiny_llama()) == trainable(model) == sum(sizes.values())
    model, _ = train(workload(tmp_path, chosen, max_steps=8))
    own = sum(sizes[name] for name in chosen.chosen)
    shared = sum(sizes[group[0]] for group in chosen._shared)
    assert len(chosen._shared) == 7
    assert trainable(model) == own + shared < sum(sizes.values())


def test_one_kept_and_one_shared_pair_of_smollm2_are_two_of_its_thirty():
    chosen = method(r=8, target_modules=["q_proj"])
    model = applied(chosen, smollm2())
    names = [name for name, _ in layers(model)]
    chosen.load_state_dict(model, {"kept": {names[3]: 1.0}, "shared": [names[:3] + names[4:]]})
    assert trainable(model) == 2 * 8 * (576 + 576)


# -- beginning anew ------------------------------------------------------------------------------------------------


def test_the_second_stage_inherits_nothing():
    """Two first stages that end differently, and choose alike, begin the second one alike."""
    begun = []
    for seed in (1, 2):
        chosen = method(threshold=1.0, modules_to_save=["norm"])
        torch.manual_seed(seed)
        model = chosen_model(chosen, seed=seed)
        begun.append(trained_tensors(model))
        assert all(not factors(layer)[1].weight.any() for _, layer in layers(model))
    assert begun[0].keys() == begun[1].keys()
    assert all(torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())
    first = applied(method(threshold=1.0, modules_to_save=["norm"]), tiny_llama())
    for name, tensor in trained_tensors(first).items():
        assert torch.equal(tensor, begun[0][name]) == ("lora_A" not in name), name


@pytest.mark.parametrize("base", [tiny_llama, tiny_bloom])
def test_the_second_stage_starts_as_the_base(base):
    chosen = method(target_modules=None)
    model = chosen_model(chosen, base).eval()
    assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)


def test_a_classifiers_head_begins_anew():
    made = [EncodedRow(row.input_ids, [i % 3], row.where, classes=True) for i, row in enumerate(rows(6))]
    section = ModelSection(name_or_path="tiny", dtype="float32", task="seq_cls")
    context = Context(recipe().model_copy(update={"model": section}))
    chosen = method()
    model = chosen.apply(_classifier(), context)
    start = trained_tensors(model)
    chosen.enter(randomise(model), MAIN, partial(batches, made=made))
    heads = [name for name in start if "lora_" not in name]
    assert heads and all(torch.equal(trained_tensors(model)[name], start[name]) for name in heads)


def _classifier():
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    config = tiny_bert().config
    config.num_labels = 3
    return BertForSequenceClassification(config)


def test_rows_of_new_tokens_begin_anew():
    chosen = method()
    chosen.new_token_ids = [390, 391]
    model = applied(chosen, tiny_llama())
    start = trained_tensors(model)
    chosen.enter(randomise(model), MAIN, batches)
    new = [name for name in start if "lora_" not in name]
    assert new and all(torch.equal(trained_tensors(model)[name], start[name]) for name in new)


# -- the sample and the stages -------------------------------------------------------------------------------------


def classified(counts):
    return [EncodedRow([5], [label], f"rows:{i}", classes=True) for label, n in counts.items() for i in range(n)]


def test_every_class_gives_its_part_of_the_sample():
    sample = stratified(classified({0: 3000, 1: 900, 2: 100}), 0.1, 0)
    assert [sum(row.labels == [label] for row in sample) for label in range(3)] == [300, 90, 10]


def test_every_source_gives_its_part_of_the_sample():
    made = [EncodedRow([5], [5], f"rows:{i}", source=i % 4 // 3) for i in range(4000)]
    assert [sum(row.source == source for row in stratified(made, 0.1, 0)) for source in (0, 1)] == [300, 100]


@pytest.mark.parametrize(("count", "share", "expected"), [(1000, 0.1, LEAST_ROWS), (150, 0.1, 150), (5000, 0.1, 500)])
def test_a_sample_has_200_rows_at_least_where_there_are_that_many(count, share, expected):
    made = classified({0: count})
    sample = stratified(made, share, 0)
    assert len(sample) == len({id(row) for row in sample}) == expected
    assert [row for row in made if any(row is one for one in sample)] == list(sample)  # in their order


def test_the_seed_draws_the_sample():
    made = classified({0: 1000})
    one, same, other = (stratified(made, 0.1, seed) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize(
    ("length", "train", "steps"),
    [
        (0.2, {"max_steps": 10}, [2, 8]),
        (0.2, {"max_steps": 2}, [1, 1]),
        (3, {"max_steps": 10}, [3, 7]),
        (0.2, {}, [0.2, None]),
        (7, {}, [7, None]),
    ],
)
def test_steps_of_the_stages(length, train, steps):
    stages = method(sample_steps=length).stages(recipe(**train))
    assert [(stage.name, stage.steps) for stage in stages] == list(zip(["sample", "main"], steps, strict=True))


@pytest.mark.parametrize(("length", "whole"), [(10, 10), (0.9, 1)])
def test_a_sample_that_leaves_no_step_is_refused_before_weights_load(length, whole):
    with torch.device("meta"):
        shapes = tiny_llama()
    with pytest.raises(UsageError, match=r"method\.sample_steps: .* leave none of train\.max_steps"):
        method(sample_steps=length).apply(shapes, Context(recipe(max_steps=whole)))


def test_the_first_stage_trains_on_the_sample_and_the_second_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr("peftctl.methods.lora_drop.LEAST_ROWS", 8)
    seen = []
    run = workload(tmp_path, method(), max_steps=10)

    class Watching:
        def __call__(self, given):
            seen.append([row.where for row in given])
            return run.collate(given)

    train(replace(run, collate=Watching(), eval_rows=[]))
    sample = {row.where for row in stratified(run.train_rows, 0.1, 0)}
    first, measured, second = seen[:4], seen[4:12], seen[12:]
    assert len(sample) == 8 and {where for step in first for where in step} == sample
    assert {where for step in measured for where in step} == sample and {len(step) for step in measured} == {1}
    assert len({where for step in second for where in step}) == 24


def test_the_choice_is_in_the_first_line_of_the_second_stage(tmp_path):
    chosen = method()
    run = workload(tmp_path, chosen, max_steps=8)
    model, _ = train(run)
    lines = [json.loads(line) for line in run.run.metrics.read_text().splitlines()]
    (line,) = [line for line in lines if "trainable_parameters" in line]
    assert (line["stage"], line["step"]) == ("main", 5)
    assert line["trainable_parameters"] == trainable(model) and line["kept"] == len(chosen.chosen)
    shares = {name: share for name, share in line.items() if name.startswith("kept.")}
    assert {f"base_model.model.{name[5:]}": share for name, share in shares.items()} == chosen.chosen
    for kind in ("q_proj", "down_proj"):
        assert 0.5 <= sum(share for name, share in shares.items() if name.endswith(kind)) <= 1


# -- a run that stops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "stop", "total"), [("sample", 2, 2), ("sample", 4, 4), ("main", 3, 7)])
def test_stopped_and_resumed_equals_straight_bit_by_bit(tmp_path, stage, stop, total):
    """Within the first stage, at its end, and within the second."""
    keys = {"dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}
    settings = {"max_steps": 9, "weight_decay": 0.1}
    one = method(**keys)
    straight, _ = train(workload(tmp_path / "straight", one, **settings))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(**keys), reporter=StopIn(stage, stop), **settings))
    other = method(**keys)
    resumed = workload(tmp_path / "stopped", other, **settings)
    assert resumed.run.latest_checkpoint().name == f"checkpoint-{total}"
    again, totals = train(resumed, resumed.run.latest_checkpoint())
    assert totals.steps == 9 and (other.chosen, other._shared) == (one.chosen, one._shared) and one._shared
    expected, found = trained_tensors(straight), trained_tensors(again)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_earlier_weights_take_the_sharing_back(tmp_path):
    """A checkpoint of the first stage read into a model of the second."""
    chosen = method()
    with pytest.raises(Interrupted):
        train(workload(tmp_path, chosen, max_steps=8, reporter=StopIn("sample", 2)))
    checkpoint = workload(tmp_path, chosen).run.latest_checkpoint()
    fresh = applied(chosen, tiny_llama())
    read_state(checkpoint, fresh, chosen)
    expected = trained_tensors(fresh)
    model = chosen_model(chosen)
    assert trained_tensors(model).keys() < expected.keys()
    read_state(checkpoint, model, chosen)
    assert trained_tensors(model).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_tensors(model).items())


# -- the result ----------------------------------------------------------------------------------------------------


def all_shared(chosen, base):
    """Return a model in which every kind has one pair for all its layers."""
    model = applied(chosen, base())
    chosen.load_state_dict(model, {"kept": {}, "shared": list(kinds(model).values())})
    return randomise(model, seed=3).eval()


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_the_result_is_an_ordinary_lora_with_a_copy_in_every_layer_and_merges(base, tmp_path):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    chosen = method()
    model = all_shared(chosen, base)
    assert trainable(model) <= chosen.count(base()) / 2
    with torch.no_grad():
        logits = model(**inputs).logits
    chosen.export(model).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert not any(type(m).__module__.startswith("peftctl") for m in again.modules())
    assert sum(p.numel() for n, p in again.named_parameters() if "lora_" in n) == chosen.count(base())
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-6)
    again = again.double()
    with torch.no_grad():
        together = again(**inputs).logits
        assert (together - base().double()(**inputs).logits).abs().max() > 1e-3
        merged, _ = fold(again, torch.float32)
        torch.testing.assert_close(merged(**inputs).logits, together, rtol=1e-9, atol=1e-9)


def test_switched_off_it_is_the_base():
    model = randomise(chosen_model(method()), seed=3).eval()
    reference = tiny_llama()(input_ids=IDS).logits
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)


@pytest.mark.parametrize("bits", [4, 8])
def test_pairs_are_shared_over_a_quantised_base(bits, tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    chosen = method()
    model = chosen_model(chosen, lambda: base)
    assert trainable(model) < chosen.count(tiny_llama())
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(chosen.export(model)(IDS).logits, logits, rtol=0, atol=1e-6)


def test_pairs_are_shared_over_a_bfloat16_base(tmp_path):
    chosen = method()
    model, _ = train(
        workload(tmp_path, chosen, max_steps=8, dtype="bfloat16", gradient_checkpointing=True),
        model=tiny_llama(dtype="bfloat16"),
    )
    assert chosen._shared and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


def test_recomputed_activations_give_a_shared_pair_the_same_gradient():
    found = []
    for recompute in (False, True):
        model = randomise(chosen_model(method()).double(), seed=3).train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_parts_of_a_fused_projection_are_shared():
    chosen = method(target_modules=["query_key_value"], parts=["q", "v"])
    model = all_shared(chosen, tiny_bloom)
    assert trainable(model) == chosen.count(tiny_bloom()) / 2
    run_steps(model, 2)
    model.eval()
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(chosen.export(model)(input_ids=IDS).logits, logits, rtol=0, atol=1e-6)


def test_nothing_is_reported_before_the_choice():
    chosen = method()
    model = applied(chosen, tiny_llama())
    (report,) = chosen.callbacks(model)
    info = StepInfo(0, 4, model, lambda _: None)
    report.stage_begins(info)
    assert info.log == {}


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_from": "runs/a"}, r"begins anew after its first stage; name the finished adapter in model\.adapters"),
        ({"threshold": 0.0}, "greater than 0"),
        ({"threshold": 1.1}, "less than or equal to 1"),
        ({"sample": 1.0}, "less than 1"),
        ({"sample_steps": 0}, "greater than 0"),
        ({"init": "gaussian"}, "kaiming"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match=r"is an embedding; lora_drop takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())

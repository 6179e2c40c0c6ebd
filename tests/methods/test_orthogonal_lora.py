"""O-LoRA: a pair a task, whose A are pushed apart by a penalty that reaches the new A only."""

import copy
import json
import random
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from peftctl.artifacts.fold import fold
from peftctl.data.encode import EncodedRow
from peftctl.errors import DataError, Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.lora import Config as LoraConfig
from peftctl.methods.lora import Method as Lora
from peftctl.methods.orthogonal_lora import Config, Method, factor_norm, overlap, rows_of
from peftctl.models.load import load_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import DataSection, ModelSection, QuantizationSection, Source
from peftctl.training.checkpoints import read_state
from peftctl.tuners.fixed_factors import layers
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.lora_family import IDS, randomise
from tests.tiny import save_tiny, tiny_bert, tiny_bloom, tiny_llama, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt


def method(**keys):
    return Method(Config(**({"r": 2, "alpha": 4, "target_modules": "all-linear"} | keys)))


def work(folder, chosen, tasks=2, **settings):
    """Return a workload whose rows come from as many sources as there are tasks, in turn."""
    made = workload(folder, chosen, **settings)
    sources = [Source(path=f"{i}.jsonl") for i in range(tasks)]
    data = DataSection(sources=sources) if tasks else made.recipe.data
    rows = [replace(row, source=i % tasks) if tasks else row for i, row in enumerate(made.train_rows)]
    return replace(made, recipe=made.recipe.model_copy(update={"data": data}), train_rows=rows)


def next_task(chosen, model):
    """Begin a task by hand."""
    chosen.enter(model, None, None)
    return model


def second_task(chosen, base=tiny_llama):
    """Return a model at the beginning of its second task, with a first pair that has an effect."""
    return next_task(chosen, randomise(next_task(chosen, applied(chosen, base()))))


def pairs(model):
    """Return copies of A and B of every layer."""
    return [(m.lora_A["default"].weight.detach().clone(), m.lora_B["default"].weight.detach().clone())
            for _, m in layers(model)]  # fmt: skip


def earlier_rows(model):
    return [m.fixed_factors.E.clone() for _, m in layers(model)]


def metrics(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


# -- stages --------------------------------------------------------------------------------------------------------


def row(source):
    return EncodedRow([5, 6, 7], [5, 6, 7], "rows:1", source=source)


def test_every_source_is_a_task_in_order_with_its_own_rows():
    rows = [row(1), row(0), row(2), row(1)]
    wanted = recipe().model_copy(update={"data": DataSection(sources=[Source(path=f"{i}.jsonl") for i in range(3)])})
    stages = method().stages(wanted)
    assert [stage.name for stage in stages] == ["task 1", "task 2", "task 3"]
    assert [stage.choose(rows) for stage in stages] == [[rows[1]], [rows[0], rows[3]], [rows[2]]]
    assert {stage.steps for stage in stages} == {None}


@pytest.mark.parametrize("data", [{"train": "a.jsonl"}, {"sources": [Source(path="a.jsonl")]}])
def test_one_source_is_one_task_with_all_rows(data):
    rows = [row(None), row(None)]
    (stage,) = method().stages(recipe().model_copy(update={"data": DataSection(**data)}))
    assert stage.choose(rows) == rows


def test_a_source_without_rows_is_refused():
    with pytest.raises(DataError, match=r"data\.sources\.1: expected rows to train on"):
        rows_of([row(0)], 1)


def test_tasks_train_one_after_another_for_their_share_of_the_steps(tmp_path):
    run = work(tmp_path, method(), tasks=3, max_steps=7)
    model, totals = train(run)
    lines = [(line["step"], line["stage"]) for line in metrics(run.run) if "loss" in line]
    assert lines == [(1, "task 1"), (2, "task 1"), (3, "task 1"), (4, "task 2"), (5, "task 2"), (6, "task 3"),
                     (7, "task 3")]  # fmt: skip
    assert totals.steps == 7 and {len(e) for e in earlier_rows(model)} == {4}


def test_one_task_is_lora_exactly(tmp_path):
    keys = {"r": 2, "alpha": 4, "target_modules": "all-linear"}
    ours, _ = train(work(tmp_path / "a", method(), tasks=0, max_steps=5))
    lora, _ = train(workload(tmp_path / "b", Lora(LoraConfig(**keys)), max_steps=5))
    for name, tensor in trained_tensors(lora).items():
        assert torch.equal(trained_tensors(ours)[name], tensor), name
    assert all(layer.fixed_factors is None for _, layer in layers(ours))


# -- the beginning of a task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_a_new_task_leaves_the_logits_unchanged(base):
    chosen = method()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    model = randomise(next_task(chosen, applied(chosen, base()))).double().eval()
    expected = model(**inputs).logits
    assert (expected - base().double()(**inputs).logits).abs().max() > 1e-2
    torch.testing.assert_close(next_task(chosen, model)(**inputs).logits, expected, rtol=0, atol=1e-9)
    assert all(a.any() and not b.any() for a, b in pairs(model))


def test_the_first_task_starts_as_the_base_and_draws_nothing():
    chosen = method()
    model = applied(chosen, tiny_llama())
    before = pairs(model)
    next_task(chosen, model)
    assert all(torch.equal(a, c) for (a, _), (c, _) in zip(before, pairs(model), strict=True))
    assert torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


def test_every_task_draws_an_a_of_its_own_whatever_the_random_state():
    drawn = []
    for noise in (1, 2):
        chosen = method()
        model = second_task(chosen)
        torch.manual_seed(noise)
        first = [a for a, _ in pairs(model)]
        third = [a for a, _ in pairs(next_task(chosen, model))]
        assert not any(torch.equal(a, c) for a, c in zip(first, third, strict=True))
        drawn.append(third)
    assert all(torch.equal(a, c) for a, c in zip(*drawn, strict=True))


def test_earlier_pairs_are_bit_identical_after_later_tasks(tmp_path):
    """With weight decay, and a penalty that pushes hard."""
    chosen = method(orth_weight=5.0, norm_weight=0.1)
    with pytest.raises(Interrupted):
        train(work(tmp_path / "first", chosen, max_steps=8, weight_decay=0.1, reporter=StopAt(4)))
    checkpoint = work(tmp_path / "first", chosen).run.latest_checkpoint()
    first = applied(chosen, tiny_llama())
    read_state(checkpoint, first, chosen)
    model, _ = train(work(tmp_path / "both", method(orth_weight=5.0, norm_weight=0.1), max_steps=8, weight_decay=0.1))
    for (a, b), (_, layer) in zip(pairs(first), layers(model), strict=True):
        assert torch.equal(layer.fixed_factors.E, a) and torch.equal(layer.fixed_factors.F, b) and b.any()


# -- the penalty ---------------------------------------------------------------------------------------------------


def set_rows(model, earlier, new):
    """Give every layer A rows: (r, d_in) by functions of d_in."""
    for _, layer in layers(model):
        d_in = layer.in_features
        layer.fixed_factors.E.copy_(earlier(d_in))
        layer.lora_A["default"].weight.data.copy_(new(d_in))
    return model


def test_the_penalty_of_orthonormal_rows_is_r_against_themselves_and_0_against_a_complement():
    chosen = method(r=8, target_modules=["q_proj"])
    model = second_task(chosen).double()
    count = len(list(layers(model)))

    def basis(d_in):
        generator = torch.Generator().manual_seed(d_in)
        return torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64))[0].T

    set_rows(model, lambda d: basis(d)[:8], lambda d: basis(d)[:8])
    assert overlap(model).item() == pytest.approx(8.0 * count, abs=1e-6)
    set_rows(model, lambda d: basis(d)[:8], lambda d: basis(d)[8:16])
    assert overlap(model).item() < 1e-6


def test_the_penalty_is_the_sum_of_absolute_products_with_all_earlier_rows():
    """Against the paper's loop over tasks, rows and targets, in float64; the authors' code has no squares."""
    chosen = method(r=3)
    model = next_task(chosen, randomise(second_task(chosen), seed=2)).double()
    expected = 0.0
    for _, layer in layers(model):
        assert len(layer.fixed_factors.E) == 6
        for earlier in layer.fixed_factors.E.split(3):
            for one in earlier:
                for other in layer.lora_A["default"].weight.detach():
                    expected += abs(float(one @ other))
    assert overlap(model).item() == pytest.approx(expected, rel=1e-12)


def test_the_norms_are_those_of_the_factors_that_train():
    model = randomise(second_task(method()), seed=2).double()
    expected = sum(float(p.detach().pow(2).sum().sqrt()) for p in model.parameters() if p.requires_grad)
    assert factor_norm(model).item() == pytest.approx(expected, rel=1e-12)


def test_a_norm_of_zero_has_a_gradient():
    """B is zero where a task begins."""
    model = second_task(method())
    factor_norm(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_gradient_of_the_penalty_reaches_the_new_a_only_and_is_that_of_the_equation():
    model = second_task(method()).double()
    overlap(model).backward()
    named = {name for name, p in model.named_parameters() if p.grad is not None}
    assert named == {name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    for _, layer in layers(model):
        a, e = layer.lora_A["default"].weight, layer.fixed_factors.E
        assert not e.requires_grad
        torch.testing.assert_close(a.grad, (e @ a.detach().T).sign().T @ e, rtol=1e-12, atol=1e-12)


def largest_product(model):
    with torch.no_grad():
        return max(
            float((layer.fixed_factors.E @ layer.lora_A["default"].weight.T).abs().max()) for _, layer in layers(model)
        )


@pytest.mark.parametrize(("weight", "falls"), [(5.0, True), (0.0, False)])
def test_with_a_large_weight_the_largest_product_falls_tenfold_and_without_it_does_not(weight, falls):
    chosen = method(orth_weight=weight, target_modules=["q_proj"])
    model = second_task(chosen).train()
    start = largest_product(model)
    assert start > 0.1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 80)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    for _ in range(80):
        optimizer.zero_grad()
        sum(chosen.loss(model, batch, lambda given: supervised_forward(model, given)).values()).backward()
        optimizer.step()
        schedule.step()
    assert (largest_product(model) < start / 10) == falls


def test_the_penalty_is_in_the_loss_from_the_second_task_on_and_never_in_the_held_out_loss(tmp_path):
    chosen = method(orth_weight=0.5)
    run = work(tmp_path, chosen, max_steps=6, eval_steps=3, learning_rate=1e-3)
    model, _ = train(run)
    lines = [line for line in metrics(run.run) if "loss" in line]
    for line in lines:
        assert ("orthogonality" in line) == (line["stage"] == "task 2")
        if "orthogonality" in line:
            assert line["loss"] == pytest.approx(line["loss_loss"] + line["orthogonality"], rel=1e-5)
    last = [line["eval_loss"] for line in metrics(run.run) if "eval_loss" in line][-1]
    with torch.no_grad():
        model.eval()
        parts = [supervised_forward(model, run.collate([held_out])) for held_out in run.eval_rows]
        expected = sum(float(part.cross_entropy()) for part in parts) / sum(len(part.labels) for part in parts)
    assert last == pytest.approx(expected, rel=1e-4)


def test_the_parts_carry_their_weights(tmp_path):
    chosen = method(orth_weight=0.25, norm_weight=0.125)
    model = randomise(second_task(chosen), seed=3)
    batch = work(tmp_path, chosen).collate(work(tmp_path, chosen).train_rows[:2])
    parts = chosen.loss(model, batch, lambda given: supervised_forward(model, given))
    assert list(parts) == ["loss", "orthogonality", "factor_norm"]
    assert parts["orthogonality"].item() == pytest.approx(0.25 * overlap(model).item())
    assert parts["factor_norm"].item() == pytest.approx(0.125 * factor_norm(model).item())


def test_the_first_task_has_the_norms_and_no_penalty(tmp_path):
    chosen = method(norm_weight=0.1)
    model = next_task(chosen, applied(chosen, tiny_llama()))
    batch = work(tmp_path, chosen).collate(work(tmp_path, chosen).train_rows[:2])
    assert list(chosen.loss(model, batch, lambda given: supervised_forward(model, given))) == ["loss", "factor_norm"]


def test_micro_batches_add_up_to_the_penalty_of_one(tmp_path):
    """The penalty counts once a step, in however many parts the batch comes."""
    one, _ = train(work(tmp_path / "a", method(), max_steps=4, batch_size=4, max_grad_norm=0.0))
    runs = work(tmp_path / "b", method(), max_steps=4, batch_size=2, gradient_accumulation=2, max_grad_norm=0.0)
    two, _ = train(runs)
    first = [line["orthogonality"] for line in metrics(runs.run) if "orthogonality" in line]
    single = [line["orthogonality"] for line in metrics(work(tmp_path / "a", method()).run) if "orthogonality" in line]
    assert first == pytest.approx(single, rel=1e-3)
    for name, tensor in trained_tensors(one).items():
        torch.testing.assert_close(trained_tensors(two)[name], tensor, rtol=1e-3, atol=3e-5)


# -- a run that stops ----------------------------------------------------------------------------------------------


class StopIn(StopAt):
    """Stops at a step of a stage, whose steps are counted anew."""

    def __init__(self, stage, step):
        super().__init__(step)
        self.stage, self.here = stage, None

    def begin(self, title, total, done=0):
        self.here = title

    def step(self, step, metrics=None):
        if self.here == self.stage:
            super().step(step, metrics)


@pytest.mark.parametrize(("task", "stop", "total"), [("task 1", 1, 1), ("task 1", 3, 3), ("task 2", 2, 5)])
def test_stopped_and_resumed_equals_straight_bit_by_bit(tmp_path, task, stop, total):
    """Within the first task, at its end, and within the second."""
    settings = {"tasks": 2, "max_steps": 6, "weight_decay": 0.1}
    keys = {"dropout": 0.1, "norm_weight": 0.1, "target_modules": ["q_proj", "v_proj"]}
    straight, _ = train(work(tmp_path / "straight", method(**keys), **settings))
    with pytest.raises(Interrupted):
        train(work(tmp_path / "stopped", method(**keys), reporter=StopIn(task, stop), **settings))
    resumed = work(tmp_path / "stopped", method(**keys), **settings)
    assert resumed.run.latest_checkpoint().name == f"checkpoint-{total}"
    again, totals = train(resumed, resumed.run.latest_checkpoint())
    assert totals.steps == 6
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    for (_, one), (_, other) in zip(layers(straight), layers(again), strict=True):
        assert torch.equal(one.fixed_factors.E, other.fixed_factors.E) and len(one.fixed_factors.E) == 2
        assert torch.equal(one.fixed_factors.F, other.fixed_factors.F)


# -- the result ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_t5])
def test_the_result_is_one_lora_of_all_tasks_and_merges(base, tmp_path):
    chosen = method()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    model = randomise(next_task(chosen, randomise(second_task(chosen, base), seed=2)), seed=3).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    updates = [(layer.get_delta_weight("default").double(), layer.fixed_factors) for _, layer in layers(model)]
    chosen.export(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 6, 12)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert not any(type(m).__module__.startswith("peftctl") for m in again.modules())
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-5)
    loras = [m for m in again.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")]
    for layer, (own, fixed) in zip(loras, updates, strict=True):
        expected = own + 2.0 * fixed.F.double() @ fixed.E.double()
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(expected, tol=1e-6) == 6
    with torch.no_grad():
        together = again.double()(**inputs).logits
        merged, _ = fold(again, torch.float32)
        torch.testing.assert_close(merged(**inputs).logits, together, rtol=1e-9, atol=1e-9)


def test_switched_off_it_is_the_base_also_in_later_tasks():
    model = second_task(method()).eval()
    reference = tiny_llama()(input_ids=IDS).logits
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)


@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_tasks_on_a_quantised_base(bits, tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    chosen = method()
    model = next_task(chosen, applied(chosen, base))
    run_steps(model, 3)
    model.eval()
    with torch.no_grad():
        reference = model(IDS).logits
        torch.testing.assert_close(next_task(chosen, model)(IDS).logits, reference, rtol=0, atol=1e-5)
    losses = run_steps(model, 3)
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        reference = model(IDS).logits
        torch.testing.assert_close(chosen.export(model)(IDS).logits, reference, rtol=0, atol=1e-5)


def test_two_tasks_over_a_bfloat16_base_with_recomputed_activations(tmp_path):
    run = work(tmp_path, method(), max_steps=6, dtype="bfloat16", gradient_checkpointing=True)
    model, _ = train(run, model=tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for _, layer in layers(model):
        assert layer.fixed_factors.E.dtype is torch.float32 and layer.fixed_factors.F.any()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_classifiers_head_goes_on_through_all_tasks():
    from transformers import BertForSequenceClassification

    section = ModelSection(name_or_path="tiny", dtype="float32", task="seq_cls")
    config = tiny_bert().config
    config.num_labels = 3
    torch.manual_seed(0)
    chosen = method()
    context = Context(recipe().model_copy(update={"model": section}))
    model = randomise(next_task(chosen, chosen.apply(BertForSequenceClassification(config).eval(), context)))
    heads = {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name
    }
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(next_task(chosen, model)(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    assert heads and all(torch.equal(p, heads[name]) for name, p in model.named_parameters() if name in heads)


def test_parts_of_a_fused_projection_take_part():
    chosen = method(target_modules=["query_key_value"], parts=["q", "v"], norm_weight=0.1)
    model = second_task(chosen, tiny_bloom)
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B" in n)
    (overlap(model) + factor_norm(model)).backward()
    run_steps(model, 2)
    model.eval()
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(chosen.export(model)(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)


def test_the_count_is_that_of_one_task_and_the_stack_holds_the_others():
    chosen = method()
    expected = chosen.count(tiny_llama())
    model = applied(chosen, tiny_llama())
    for task in range(3):
        next_task(chosen, model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        stored = sum(
            f.numel() for _, m in layers(model) if m.fixed_factors for f in (m.fixed_factors.E, m.fixed_factors.F)
        )
        assert stored == task * expected
    assert expected == sum(2 * (layer.in_features + layer.out_features) for _, layer in layers(model))


def test_a_state_restores_the_tasks_in_a_model_that_has_gone_further():
    chosen = method()
    model = second_task(chosen).eval()
    state = copy.deepcopy(chosen.state_dict(model))
    weights = pairs(model)
    reference = model(input_ids=IDS).logits
    next_task(chosen, randomise(model))
    chosen.load_state_dict(model, state)
    for (a, b), (_, layer) in zip(weights, layers(model), strict=True):
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    assert torch.equal(model(input_ids=IDS).logits, reference)
    assert chosen.state_dict(model)["tasks"] == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_from": "runs/a"}, r"this one begins with r; name it in model\.adapters"),
        ({"orth_weight": -1.0}, "greater than or equal to 0"),
        ({"norm_weight": -0.1}, "greater than or equal to 0"),
        ({"init": "gaussian"}, "kaiming"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        method(**keys)


def test_embeddings_are_refused():
    with pytest.raises(UsageError, match=r"is an embedding; orthogonal_lora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


def test_rows_of_different_tasks_never_mix(tmp_path):
    """Every step of a task reads rows of its own source."""
    run = work(tmp_path, method(), max_steps=6)
    seen = []
    collate = run.collate

    class Watching:
        def __call__(self, rows):
            seen.append({row.source for row in rows})
            return collate(rows)

    order = random.Random(0).sample(run.train_rows, len(run.train_rows))
    train(replace(run, collate=Watching(), train_rows=order, eval_rows=[]))
    assert seen[:3] == [{0}] * 3 and seen[-3:] == [{1}] * 3 and all(len(sources) == 1 for sources in seen)

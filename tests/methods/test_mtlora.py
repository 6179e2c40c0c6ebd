"""MTLoRA: its equations in float64, which row reads which pair, what moves, and an adapter for every task."""

import json

import pytest
import torch
from pydantic import ValidationError

import peftctl
from peftctl.artifacts.fold import fold
from peftctl.artifacts.locate import locate
from peftctl.commands.evaluate import evaluate
from peftctl.errors import ArtifactError, RunError, UsageError
from peftctl.methods.base import Context
from peftctl.methods.mtlora import Config, Method
from peftctl.models.load import load_model
from peftctl.models.supervised import count_supervised, supervised_forward
from peftctl.recipe.schema import DataSection, ModelSection, QuantizationSection, Source
from peftctl.tuners.fixed_factors import layers
from peftctl.tuners.task_lora import task_layers
from peftctl.tuners.task_tensors import become, tasks_of
from tests.commands.helpers import write_recipe, write_rows
from tests.methods.helpers import recipe
from tests.methods.test_krona import smollm2
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_opt, tiny_t5

IDS = torch.arange(1, 37).reshape(3, 12)
MIXED = torch.tensor([2, 0, 2])
TASKS = ["a", "b", "c"]


def method(**keys):
    return Method(Config(**{"tasks": TASKS, "r": 4, "task_r": 2, "target_modules": "all-linear"} | keys))


def context(sources=3, task="causal_lm"):
    made = recipe()
    data = DataSection(sources=[Source(path=f"{i}.jsonl") for i in range(sources)])
    return Context(
        made.model_copy(update={"data": data, "model": made.model.model_copy(update={"task": task})}),
    )


def attached(chosen=None, model=None, task="causal_lm"):
    chosen = chosen or method()
    torch.manual_seed(0)
    return chosen.apply(tiny_llama() if model is None else model, context(len(chosen.config.tasks), task))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomise(model, seed=0):
    """Give everything that trains values of its own; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 8
        parameter.data = drawn.to(parameter.dtype)
    return model


def batch_of(task_ids):
    labels = IDS.clone()
    labels[0, :5] = -100  # so that tasks have unlike numbers of supervised tokens
    return {
        "input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels, "task_ids": torch.tensor(task_ids)
    }  # fmt: skip


def gradients(chosen, model, batch):
    """Return the gradients of the trainer's loss before its division; None where a tensor took no part."""
    model.zero_grad()
    chosen.loss(model, batch, lambda inputs: supervised_forward(model, inputs))["loss"].backward()
    return {name: p.grad for name, p in trainable(model).items()}


def is_of_task(name, task):
    return name.endswith((f"task_factors.A_{task}", f"task_factors.B_{task}"))


# -- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["matrixv2", "matrix"])
@pytest.mark.parametrize("scale", [4.0, 0.5])
def test_each_row_is_the_papers_equation_with_its_tasks_pair(mode, scale, training):
    """y_i = W x_i + s B A x_i + s B_t A_t x_i, and without B A in mode matrix; every row by itself, in float64."""
    model = randomise(attached(method(mode=mode, scale=scale), tiny_llama().double()).double()).train(training)
    model(input_ids=IDS, task_ids=MIXED)
    seen = dict(task_layers(model))
    assert len(seen) == 4 * 7  # each of four blocks ends a segment
    for name in ("mlp.down_proj", "self_attn.k_proj"):
        layer = seen[f"base_model.model.model.layers.1.{name}"]
        x = torch.randn(3, 5, layer.base_layer.in_features, dtype=torch.float64)
        expected = x @ layer.base_layer.weight.T
        for i, task in enumerate(MIXED.tolist()):
            if mode == "matrixv2":
                shared = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                expected[i] += scale * x[i] @ shared.T
            a, b = layer.task_factors.pair(task)
            own = b @ a
            expected[i] += scale * x[i] @ own.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)
    assert ("lora_A.default.weight" in {n for n, _ in layer.named_parameters()}) == (mode == "matrixv2")


def test_where_nothing_branches_there_is_the_shared_pair_alone():
    model = randomise(attached(method(branch_points=1), tiny_llama().double()).double())
    model(input_ids=IDS, task_ids=MIXED)
    layer = model.get_submodule("base_model.model.model.layers.2.mlp.up_proj")
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    shared = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + 4 * shared).T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("base", "task"),
    [(tiny_llama, "causal_lm"), (tiny_opt, "causal_lm"), (tiny_t5, "seq2seq_lm"), (tiny_bert, "seq_cls")],
)
def test_a_mixed_batch_answers_each_row_as_a_batch_of_its_task(base, task):
    """On every architecture, also where rows are flattened before the feed-forward part."""
    made = base(kind="BertForSequenceClassification", num_labels=3) if base is tiny_bert else base()
    model = randomise(attached(model=made, task=task).eval())
    more = {"decoder_input_ids": IDS[:, :4]} if base is tiny_t5 else {}
    logits = model(input_ids=IDS, task_ids=MIXED, **more).logits
    alone = [model(input_ids=IDS, task_ids=torch.full((3,), t), **more).logits for t in range(3)]
    for i, t in enumerate(MIXED.tolist()):
        torch.testing.assert_close(logits[i], alone[t][i], rtol=1e-5, atol=1e-5)
        assert (logits[i] - alone[1][i]).abs().max() > 1e-2


def test_rows_without_a_task_are_of_the_first_and_no_call_keeps_the_tasks_of_another():
    model = randomise(attached().eval())
    first = model(input_ids=IDS, task_ids=torch.tensor([0, 0, 0])).logits
    model(input_ids=IDS, task_ids=MIXED)
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert torch.equal(model(input_ids=IDS, task_ids=torch.tensor([-1, -1, -1])).logits, first)
    assert not torch.equal(model(input_ids=IDS, task_ids=torch.tensor([1, 1, 1])).logits, first)


def test_a_layer_that_sees_other_rows_than_the_batch_is_refused():
    model = attached()
    model(input_ids=IDS, task_ids=MIXED)
    _, layer = next(task_layers(model))
    with pytest.raises(RunError, match=r"7 states of 3 rows.*method\.branch_points"):
        layer(torch.randn(7, 32))


@pytest.mark.parametrize("mode", ["matrixv2", "matrix"])
def test_every_task_starts_as_the_base_exactly(mode):
    reference = tiny_llama()(input_ids=IDS).logits
    model = attached(method(mode=mode))
    for training in (False, True):
        for task_ids in (None, MIXED, *(torch.full((3,), t) for t in range(3))):
            assert torch.equal(model.train(training)(input_ids=IDS, task_ids=task_ids).logits, reference)
    for _, layer in task_layers(model):
        for a, b in (layer.task_factors.pair(task) for task in range(3)):
            bound = a.shape[1] ** -0.5
            assert not b.any() and bound / 2 < a.abs().max() <= bound


def test_without_pairs_of_their_own_all_tasks_answer_as_the_shared_lora():
    model = randomise(attached().eval())
    for _, layer in task_layers(model):
        for _, b in (layer.task_factors.pair(task) for task in range(3)):
            b.data.zero_()
    answers = [model(input_ids=IDS, task_ids=torch.full((3,), t)).logits for t in range(3)]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for name, layer in task_layers(model):
        shared = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        base = model.get_submodule(f"{name}.base_layer")
        base.weight.data += 4 * shared
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, answers[0], rtol=1e-4, atol=1e-4)


def test_switched_off_it_is_the_base():
    reference = tiny_llama()(input_ids=IDS).logits
    for mode in ("matrixv2", "matrix"):
        model = randomise(attached(method(mode=mode)).eval())
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS, task_ids=MIXED).logits, reference)
        assert trainable(model).keys() == trainable(attached(method(mode=mode))).keys()


# -- what moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["matrixv2", "matrix"])
def test_a_batch_of_one_task_leaves_the_others_without_gradient_and_unmoved_by_weight_decay(mode):
    chosen = method(mode=mode)
    model = randomise(attached(chosen).train())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        found = gradients(chosen, model, batch_of([1, 1, 1]))
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    others = {name for name in found if is_of_task(name, 0) or is_of_task(name, 2)}
    assert others and {name for name, gradient in found.items() if gradient is None} == others
    # All of the base, and of the others; in mode matrix no shared pair is left where every layer branches.
    assert still == others | {name for name in before if name not in found}


def test_the_shared_gradient_of_a_mixed_batch_is_the_weighted_sum_of_those_of_its_tasks():
    weights = [1.0, 3.0, 0.25]
    chosen = method(task_weights=weights, branch_points=2)
    model = randomise(attached(chosen, tiny_llama().double()).double().train())
    mixed = gradients(chosen, model, batch_of([2, 0, 2]))
    expected = dict.fromkeys(mixed, 0.0)
    plain = method(branch_points=2)
    for task, rows in ((2, [0, 2]), (0, [1])):
        batch = {name: value[rows] for name, value in batch_of([2, 0, 2]).items()}
        for name, gradient in gradients(plain, model, batch).items():
            if gradient is not None:
                expected[name] = expected[name] + weights[task] * gradient
    for name, gradient in mixed.items():
        if is_of_task(name, 1):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_weights_multiply_the_loss_of_each_task_and_nothing_else():
    batch = batch_of([2, 0, 2])
    plain, model = method(), randomise(attached())

    def value(chosen, batch):
        return chosen.loss(model, batch, lambda inputs: supervised_forward(model, inputs))["loss"]

    per_task = {t: value(plain, {n: v[rows] for n, v in batch.items()}) for t, rows in ((2, [0, 2]), (0, [1]))}
    assert count_supervised(model, batch["labels"]) == 3 * 11 - 4
    torch.testing.assert_close(value(plain, batch), per_task[0] + per_task[2])
    weighted = value(method(task_weights=[2.0, 1.0, 5.0]), batch)
    torch.testing.assert_close(weighted, 2 * per_task[0] + 5 * per_task[2])
    torch.testing.assert_close(value(method(task_weights=[2.0] * 3), batch), 2 * (per_task[0] + per_task[2]))
    nothing = batch | {"labels": torch.full_like(batch["labels"], -100)}
    empty = value(method(task_weights=[2.0, 1.0, 5.0]), nothing)
    assert empty == 0 and empty.requires_grad


def test_recomputed_activations_know_the_tasks():
    found = []
    for checkpointing in (False, True):
        chosen = method()
        model = randomise(attached(chosen).train())
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        found.append(gradients(chosen, model, batch_of([2, 0, 2])))
    for name, gradient in found[0].items():
        assert (gradient is None and found[1][name] is None) or torch.equal(gradient, found[1][name]), name


# -- where tasks branch --------------------------------------------------------------------------------------------


def branch_blocks(model):
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name, _ in task_layers(model)})


@pytest.mark.parametrize(("points", "blocks"), [(1, [29]), (2, [14, 29]), (4, [7, 14, 22, 29]), (99, list(range(30)))])
def test_tasks_branch_in_the_last_block_of_equal_segments(points, blocks):
    chosen, base = method(branch_points=points), smollm2()
    expected = chosen.count(base)
    model = chosen.apply(base, context())
    assert branch_blocks(model) == blocks
    sides = 305_280 // 30  # of a block's seven layers, d_in + d_out
    assert expected == 4 * 305_280 + 3 * 2 * sides * len(blocks) == sum(p.numel() for p in trainable(model).values())
    names = {name.rsplit(".", 1)[0] for name in trainable(model) if "task_factors" in name}
    assert names == {f"{name}.task_factors" for name, _ in task_layers(model)}


def test_the_papers_sizes_on_the_demo_model():
    base, sides = smollm2(), 305_280 // 30
    chosen = Method(Config(tasks=["a", "b"], target_modules="all-linear"))
    assert chosen.count(base) == 16 * 305_280 + 2 * 4 * sides * 4
    matrix = Method(Config(tasks=["a", "b"], target_modules="all-linear", mode="matrix"))
    assert matrix.count(base) == 16 * (305_280 - 4 * sides) + 2 * 4 * sides * 4


def test_an_encoder_decoder_branches_in_both_parts():
    model = attached(method(branch_points=1), tiny_t5(), "seq2seq_lm")
    found = {name.split(".layer.")[0] for name, _ in task_layers(model)}
    assert found == {"base_model.model.encoder.block.1", "base_model.model.decoder.block.1"}


def test_branch_points_can_be_named():
    model = attached(method(branch_points=["layers.1.mlp.up_proj", "v_proj"]))
    prefix = "base_model.model.model.layers"
    expected = {f"{prefix}.1.mlp.up_proj", *(f"{prefix}.{i}.self_attn.v_proj" for i in range(4))}
    assert {name for name, _ in task_layers(model)} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"branch_points": ["up_proj"], "target_modules": ["q_proj"]}, r"branch_points: .*up_proj is not among"),
        ({"branch_points": ["nowhere"]}, "'nowhere' matches no linear layer"),
        ({"target_modules": ["layers.0.self_attn.q_proj"], "branch_points": 1}, "no target lies in the last block"),
        ({"target_modules": ["embed_tokens"]}, "embedding; mtlora takes linear layers only"),
    ],
)
def test_places_that_can_not_be_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        method(**keys).count(tiny_llama())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": []}, "at least 1"),
        ({"tasks": ["a", "A"]}, "same name"),
        ({"tasks": ["a/b"]}, "in a task's name"),
        ({"task_weights": [1.0]}, "expected 3, one for each"),
        ({"task_weights": [1.0, 0.0, 1.0]}, "greater than 0"),
        ({"init_from": "runs/mtlora"}, r"method\.name: lora"),
        ({"alpha": 8}, "Extra inputs"),
        ({"mode": "addition"}, "matrixv2"),
        ({"branch_points": 0}, "greater than 0"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        method(**keys)


@pytest.mark.parametrize(("sources", "message"), [(2, "expected 2, one for each of data.sources, got 3"), (0, "got 3")])
def test_there_is_one_task_a_source(sources, message):
    where = context(sources) if sources else Context(recipe())
    with pytest.raises(UsageError, match=rf"^method\.tasks: .*{message}"):
        method().apply(tiny_llama(), where)


def test_the_notices_say_where_tasks_branch_and_where_they_go():
    lines = method().notices(tiny_llama())
    assert lines[0] == "3 tasks (a, b, c) branch at: down_proj, gate_proj, k_proj, o_proj and 3 more"
    assert "adapter/ will hold task a" in lines[1] and "adapter/b and so on" in lines[1]
    assert len(method(tasks=["a"]).notices(tiny_llama())) == 1


# -- the result ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["matrixv2", "matrix"])
@pytest.mark.parametrize("points", [4, 1])
def test_each_tasks_export_is_a_plain_lora_that_answers_and_merges_as_the_task(mode, points, tmp_path):
    from peft import PeftModel

    chosen = method(mode=mode, branch_points=points)
    model = randomise(attached(chosen).eval())
    expected = [model(input_ids=IDS, task_ids=torch.full((3,), t)).logits for t in range(3)]
    exported = chosen.export(model)
    found = tasks_of(exported)
    assert list(found.tensors) == TASKS and found.default == "a"
    for task, logits in [*zip(TASKS, expected, strict=True), ("a", expected[0])]:
        become(exported, task)
        torch.testing.assert_close(exported(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
        exported.save_pretrained(tmp_path / task)
        settings = json.loads((tmp_path / task / "adapter_config.json").read_text())
        assert settings["peft_type"] == "LORA"
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / task).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, exported(input_ids=IDS).logits, rtol=0, atol=1e-6)
        ranks = {layer.r["default"] for _, layer in layers(exported)}
        assert ranks == {2 if mode == "matrix" else 6} | ({4} if points == 1 else set())
        merged, _ = fold(again, torch.float32)
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
        for other in expected:
            if other is not logits:
                assert (merged(input_ids=IDS).logits - other).abs().max() > 1e-2


@pytest.mark.parametrize(("r", "task_r"), [(4, 2), (8, 2), (4, 16)])
def test_the_scale_does_not_follow_the_ranks(r, task_r):
    chosen = method(r=r, task_r=task_r, scale=3.0, branch_points=2)
    model = attached(chosen)
    assert {layer.scaling["default"] for _, layer in layers(model)} == {3.0}
    config = chosen.export(model).peft_config["default"]
    assert config.lora_alpha / config.r == 3.0
    assert {config.alpha_pattern[name] / rank for name, rank in config.rank_pattern.items()} == {3.0}


def test_whole_modules_and_a_classifiers_head_are_shared_and_saved(tmp_path):
    from peft import PeftModel

    def base():
        return tiny_bert(kind="BertForSequenceClassification", num_labels=3)

    chosen = method()
    model = randomise(attached(chosen, base(), "seq_cls").eval())
    expected = [model(input_ids=IDS, task_ids=torch.full((3,), t)).logits for t in range(3)]
    exported = chosen.export(model)
    for task, logits in zip(TASKS, expected, strict=True):
        become(exported, task)
        exported.save_pretrained(tmp_path / task)
        again = PeftModel.from_pretrained(base(), tmp_path / task).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base_each_row_reads_its_tasks_pair(bits, tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    chosen = method()
    model = randomise(attached(chosen, base).train())
    found = gradients(chosen, model, batch_of([2, 0, 2]))
    assert all((gradient is None) == is_of_task(name, 1) for name, gradient in found.items())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values() if gradient is not None)
    logits = model.eval()(input_ids=IDS, task_ids=MIXED).logits
    alone = model(input_ids=IDS, task_ids=torch.full((3,), 2)).logits
    assert (logits[1] - alone[1]).abs().max() > 1e-2
    exported = chosen.export(model)
    become(exported, "c")
    torch.testing.assert_close(exported(input_ids=IDS).logits, alone, rtol=1e-3, atol=1e-3)


def test_rows_of_new_tokens_are_shared_and_saved(tmp_path):
    from peft import PeftModel

    chosen = method()
    chosen.new_token_ids = [390, 391]
    expected = chosen.count(tiny_llama())
    model = randomise(attached(chosen).eval())
    assert sum(p.numel() for p in trainable(model).values()) == expected
    ids = torch.cat([IDS, torch.tensor([[390], [391], [390]])], dim=1)
    answers = [model(input_ids=ids, task_ids=torch.full((3,), t)).logits for t in range(3)]
    exported = chosen.export(model)
    for task, logits in zip(TASKS, answers, strict=True):
        become(exported, task)
        exported.save_pretrained(tmp_path / task, save_embedding_layers=False)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / task).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)


# -- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over two sources."""
    folder = tmp_path_factory.mktemp("mtlora")
    section = {"name": "mtlora", "tasks": ["one", "two"], "r": 4, "task_r": 2, "target_modules": "all-linear"}
    path = write_recipe(folder, save_tiny(folder / "base"), section)
    other = write_rows(folder / "other.jsonl", 12, first=200)
    path.write_text(
        path.read_text().replace("train: train.jsonl", f"sources: [{{path: train.jsonl}}, {{path: {other}}}]")
    )
    overrides = ["train.eval_steps=6", "train.max_steps=12", "train.learning_rate=0.01", "train.weight_decay=0.1"]
    return peftctl.train(peftctl.load_recipe(path, overrides))


def test_a_task_that_was_saved_wrong_is_noticed(run, monkeypatch, tmp_path):
    monkeypatch.setattr("peftctl.artifacts.save.become", lambda model, task: None)
    again = peftctl.load_recipe(run.run / "recipe.yaml", [f"train.output_dir={tmp_path / 'run'}", "train.max_steps=3"])
    with pytest.raises(ArtifactError, match="what was saved is not what was trained"):
        peftctl.train(again)


def logits_of(target, **keys):
    model, _ = peftctl.load(target, **keys)
    assert model.peft_config["default"].peft_type.value == "LORA"
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_one_run_trains_two_tasks_and_load_gives_each(run):
    default, one, two = logits_of(run.run), logits_of(run.run, task="one"), logits_of(run.run, task="two")
    assert torch.equal(default, one) and (one - two).abs().max() > 1e-2
    assert torch.equal(logits_of(run.run, task="1"), two) and torch.equal(logits_of(run.artefact, task="0"), one)
    assert torch.equal(logits_of(run.artefact / "two"), two)
    manifest = json.loads((run.artefact / "peftctl.json").read_text())
    assert manifest["tasks"] == ["one", "two"] and manifest["own_task"] == {"name": "one", "source": 0}
    inner = json.loads((run.artefact / "two" / "peftctl.json").read_text())
    assert inner["tasks"] == [] and inner["own_task"] == {"name": "two", "source": 1}
    assert "| task | one; others: `two/` |" in (run.artefact / "README.md").read_text()
    assert "| task | two |" in (run.artefact / "two" / "README.md").read_text()


def test_held_out_rows_without_a_source_are_measured_with_the_first_task(run):
    lines = [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluated[-1] == pytest.approx(run.summary["eval"]["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize("task", ["three", "2", "-1", ""])
def test_a_task_that_is_not_there_is_refused(run, task):
    with pytest.raises(UsageError, match=rf"has no task '{task}'"):
        peftctl.load(run.run, task=task)
    with pytest.raises(UsageError, match="has no task 'one'"):
        peftctl.load(run.artefact / "two", task="one")


def test_a_tasks_folder_is_an_adapter_of_the_run_that_every_command_takes(run, tmp_path):
    assert locate(run.artefact / "two").recipe == run.run / "recipe.yaml"
    one, two = evaluate(str(run.run)), evaluate(str(run.artefact / "two"))
    assert one.metrics["loss"] == pytest.approx(run.summary["eval"]["after"]["loss"], rel=1e-5)
    assert two.metrics["loss"] != pytest.approx(one.metrics["loss"], rel=1e-3)
    from peftctl.artifacts.merge import merge

    merge(run.artefact / "two", tmp_path / "merged", dtype="float32")
    model, _ = peftctl.load(tmp_path / "merged")
    torch.testing.assert_close(model(input_ids=IDS).logits, logits_of(run.run, task="two"), rtol=1e-4, atol=1e-4)


def test_a_source_of_one_task_moves_that_task_alone(run):
    """The pairs of both have moved in a run over both, and B_t of neither is that of the other."""
    from safetensors.torch import load_file

    one, two = (load_file(place / "adapter_model.safetensors") for place in (run.artefact, run.artefact / "two"))
    assert one.keys() == two.keys()
    for name in one:
        shared, own = (one[name][:4], one[name][4:]) if "lora_A" in name else (one[name][:, :4], one[name][:, 4:])
        others = two[name][:4] if "lora_A" in name else two[name][:, :4]
        assert torch.equal(shared, others) and own.any()
        assert not torch.equal(one[name], two[name])

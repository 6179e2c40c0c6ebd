"""P-tuning v2 on several tasks: one table, a head each, then the target alone; kills in either stage."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import LlamaForSequenceClassification

import peftctl
from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.p_tuning_v2 import Config, Method
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import DataSection, Source
from peftctl.training.optimizers import check_partition
from peftctl.tuners.task_heads import heads_of, rows_of_tasks
from tests.methods.helpers import recipe
from tests.methods.prefixes import IDS, inputs
from tests.methods.test_intrinsic_prompt_tuning import StopAfter
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_tokenizer
from tests.training.helpers import train, workload

TABLE = "prompt_encoder.default.embedding.weight"
KINDS = {"seq_cls": "BertForSequenceClassification", "token_cls": "BertForTokenClassification"}


def method(tasks=2, target: int | str | None = 1, **keys):
    return Method(Config(num_virtual_tokens=5, tasks=tasks, target=target, **keys))


def bert(task="seq_cls"):
    return tiny_bert(kind=KINDS[task], num_labels=3)


def with_sources(made, task="seq_cls", count=2):
    data = DataSection(sources=[Source(path=f"task_{'ab'[i]}.jsonl") for i in range(count)])
    return made.model_copy(update={"data": data, "model": made.model.model_copy(update={"task": task})})


def attached(chosen, model=None, task="seq_cls", count=2):
    torch.manual_seed(0)
    context = Context(with_sources(recipe(chosen.config), task, count), tiny_tokenizer())
    return chosen.apply(bert(task) if model is None else model, context).eval()


def apart(model):
    """Give every head values of its own; return the model."""
    for i, head in enumerate(heads_of(model)[0].heads):
        for j, p in enumerate(head.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
    return model


def rows(task, tasks):
    labels = torch.tensor([[1] + [-100] * 11, [2] + [-100] * 11]) if task == "seq_cls" else IDS % 3
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels, "task_ids": torch.tensor(tasks)}


def loss(chosen, model, batch):
    return chosen.loss(model, batch, lambda part: supervised_forward(model, part))["loss"]


@pytest.mark.parametrize("task", KINDS)
def test_every_row_is_read_by_the_head_of_its_task_behind_the_same_table(task):
    chosen = method()
    model = apart(attached(chosen, task=task))
    heads, seen = heads_of(model)[0], []
    handle = heads.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain = model(**inputs(model)).logits  # of no known task: the target's
        assert torch.equal(plain, heads.heads[1](seen[0]))
        with rows_of_tasks(model, torch.tensor([1, 0])):
            logits = model(**inputs(model)).logits
        expected = torch.stack([heads.heads[1](seen[1][0]), heads.heads[0](seen[1][1])])
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(seen[0], seen[1])  # one table: what heads read has no task
        assert not torch.allclose(logits[1], plain[1])
        with rows_of_tasks(model, torch.tensor([-1, -1])):
            assert torch.equal(model(**inputs(model)).logits, plain)
    handle.remove()


def test_the_head_of_a_decoder_is_divided_too():
    config = tiny_llama().config
    config.num_labels = 3
    chosen = method()
    model = apart(attached(chosen, LlamaForSequenceClassification(config).eval()))
    with torch.no_grad(), rows_of_tasks(model, torch.tensor([0, 1])):
        mixed = model(**inputs(model)).logits
    with torch.no_grad(), rows_of_tasks(model, torch.tensor([1, 1])):
        assert torch.equal(model(**inputs(model)).logits[1], mixed[1])


@pytest.mark.parametrize("task", KINDS)
def test_a_step_on_one_task_leaves_the_other_head_as_it_is(task):
    chosen = method()
    model = attached(chosen, task=task).train()
    heads = heads_of(model)[0].heads
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    loss(chosen, model, rows(task, [0, 1])).backward()  # momentum that must not carry on
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    loss(chosen, model, rows(task, [0, 0])).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    first = {f"base_model.classifier.modules_to_save.default.heads.0.{name}" for name in ("weight", "bias")}
    assert moved == {TABLE, *first}
    assert not torch.equal(heads[0].weight, heads[1].weight)
    assert heads_of(model)[0].task_ids is None


def test_all_heads_train_first_and_then_the_targets_alone():
    chosen = method(target="task_a")
    model = attached(chosen)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    own = "base_model.classifier.modules_to_save.default."
    assert names == {TABLE} | {f"{own}heads.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == chosen.count(bert())
    assert chosen.count(bert()) == 5 * 2 * 2 * 32 + 2 * (32 * 3 + 3)
    check_partition(model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    stages = chosen.stages(with_sources(recipe(chosen.config)))
    assert [stage.name for stage in stages] == ["mixture", "main"]
    apart(model)
    table, head = model.get_parameter(TABLE), heads_of(model)[0].heads[0]
    chosen.enter(model, stages[0], None)
    assert heads_of(model)
    chosen.enter(model, stages[1], None)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {TABLE, f"{own}weight", f"{own}bias"}
    assert model.get_parameter(TABLE) is table and model.get_parameter(f"{own}weight") is head.weight
    of_tasks = [EncodedRow([5, 6], [0], f"rows:{i}", classes=True, source=i % 2) for i in range(5)]
    assert len(stages[0].choose(of_tasks)) == 5
    assert [row.source for row in stages[1].choose(of_tasks)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_base_all_heads_train_in_float32(dtype):
    chosen = method()
    model = attached(chosen, bert().to(dtype)).train()
    for entered in (False, True):
        if entered:
            chosen.enter(model, chosen.stages(with_sources(recipe(chosen.config)))[1], None)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        found = loss(chosen, model, rows("seq_cls", [0, 1]))
        found.backward()
        assert found.isfinite()
    assert model(**inputs(model)).logits.dtype == dtype


# -- runs ------------------------------------------------------------------------------------------------------------


def staged(folder, reporter=None):
    chosen = method()
    work = workload(folder, chosen, reporter=reporter, max_steps=6, save_steps=1, save_total_limit=99, weight_decay=0.1)
    classed = [
        EncodedRow(row.input_ids, [i % 3], row.where, classes=True, source=i % 2)
        for i, row in enumerate(work.train_rows)
    ]
    collate = Collator(tiny_tokenizer(), None, chosen.fields())
    return replace(work, recipe=with_sources(work.recipe), train_rows=classed, eval_rows=classed[:4], collate=collate)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_is_killed_in_either_stage_ends_as_one_that_was_not(tmp_path, stop):
    straight, _ = train(staged(tmp_path / "straight"), model=bert())
    with pytest.raises(Interrupted):
        train(staged(tmp_path / "stopped", StopAfter(stop)), model=bert())
    work = staged(tmp_path / "stopped")
    again, totals = train(work, work.run.latest_checkpoint(), model=bert())
    assert totals.steps == 6
    found, expected = dict(again.named_parameters()), dict(straight.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_on_two_data_sets_is_saved_as_one_classifier_that_plain_peft_reads(tmp_path):
    folder = save_tiny(tmp_path / "bert", tiny_bert())
    for name, labels in (("a", ("book", "tell")), ("b", ("good", "bad")), ("eval", ("good", "bad"))):
        made = [{"text": f"{name} answer {i}", "label": labels[i % 2]} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"name_or_path": str(folder), "task": "seq_cls", "dtype": "float32"},
        "method": {"name": "p_tuning_v2", "num_virtual_tokens": 5, "dropout": 0.1, "tasks": 2, "target": "b"},
        "data": {
            "sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "eval": "eval.jsonl", "format": "labelled_text",
            "max_length": 64,
        },
        "train": {
            "output_dir": str(tmp_path / "run"), "max_steps": 6, "batch_size": 4, "learning_rate": 0.01,
            "logging_steps": 1, "eval_steps": 2,
        },
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    result = peftctl.train(peftctl.load_recipe(path))  # compares the logits read back with those trained
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    trained = [line["stage"] for line in lines if "learning_rate" in line]
    assert trained == [*["mixture"] * 3, *["main"] * 3]
    again = PeftModel.from_pretrained(tiny_bert(kind=KINDS["seq_cls"], num_labels=4), str(result.artefact))
    assert again.base_model.classifier.modules_to_save["default"].weight.shape == (4, 32)
    model, _ = peftctl.load(result.run)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs(again)).logits, model.eval()(**inputs(model)).logits)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused():
    for keys in ({"tasks": 2}, {"target": 0}, {"tasks": 1, "target": "a"}):
        with pytest.raises(ValidationError, match="tasks and target go together"):
            Config(**keys)
    with pytest.raises(UsageError, match=r"^method\.tasks: expected 2, one for each of data\.sources, got 3"):
        attached(method(tasks=3))
    for target in (2, "task_c", -1):
        with pytest.raises(UsageError, match=r"^method\.target: expected one of task_a, task_b, or a place from 0"):
            attached(method(target=target))

"""Multitask prompt tuning: its equation in float64, which row reads which prompt, and what training moves."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import peftctl
from peftctl.artifacts.load import load
from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all
from peftctl.data.encode import EncodedRow
from peftctl.data.examples import load_examples
from peftctl.errors import UsageError
from peftctl.methods._tasks import names_of_sources
from peftctl.methods.multitask_prompt_tuning import Config, Method, task_prompts
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import DataSection, Source
from peftctl.training.optimizers import check_partition
from peftctl.tuners.task_tensors import become, tasks_of
from tests.commands.helpers import write_recipe, write_rows
from tests.methods.prompts import IDS, attached, behind, context, method, randomise, smollm2, table
from tests.tiny import save_tiny, tiny_llama, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, workload

MASK = torch.ones_like(IDS)
DECODER = torch.tensor([[3, 7, 8], [3, 9, 9]])


def multi(tasks=3, model=None, task="causal_lm", **keys):
    chosen = method("multitask_prompt_tuning", tasks=tasks, **keys)
    return attached(chosen, model, task, sources=tasks)


def factors(model):
    encoder = model.prompt_encoder["default"]
    return encoder.prefix_task_cols, encoder.prefix_task_rows


def naive_prompts(model):
    """P_k[i, j] = P[i, j] * sum over ranks of u_k[i] v_k[j]."""
    shared, (u, v) = table(model).detach(), (f.detach() for f in factors(model))
    made = torch.zeros(len(u), *shared.shape, dtype=shared.dtype)
    for k, i, j in torch.cartesian_prod(*(torch.arange(size) for size in made.shape)).tolist():
        made[k, i, j] = shared[i, j] * sum(u[k, i, rank] * v[k, rank, j] for rank in range(u.shape[2]))
    return made


# -- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_row_reads_the_prompt_of_its_task(ranks):
    model = randomise(multi(model=tiny_llama().double(), ranks=ranks).double())
    prompts = naive_prompts(model)
    torch.testing.assert_close(task_prompts(model), prompts, rtol=1e-12, atol=1e-12)
    logits = model(input_ids=IDS, attention_mask=MASK, task_ids=torch.tensor([2, 0])).logits
    torch.testing.assert_close(logits, behind(tiny_llama().double(), prompts[[2, 0]]), rtol=1e-9, atol=1e-9)


def test_an_encoder_reads_the_prompt_of_its_rows_task():
    """peft's own forward pass of encoder-decoders drops what the decoder reads."""
    model = randomise(multi(model=tiny_t5().double(), task="seq2seq_lm").double())
    base = tiny_t5().double()
    embedded = torch.cat([naive_prompts(model)[[2, 0]], base.shared(IDS)], dim=1)
    mask = MASK.clone()
    mask[1, 8:] = 0
    wide = torch.cat([torch.ones(2, 5, dtype=torch.long), mask], dim=1)
    expected = base(inputs_embeds=embedded, attention_mask=wide, decoder_input_ids=DECODER).logits
    logits = model(input_ids=IDS, attention_mask=mask, decoder_input_ids=DECODER, task_ids=torch.tensor([2, 0])).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_a_row_without_a_task_reads_the_last_prompt():
    for base, task, more in (
        (tiny_llama(), "causal_lm", {}),
        (tiny_t5(), "seq2seq_lm", {"decoder_input_ids": DECODER}),
    ):
        model = randomise(multi(model=base, task=task)).eval()
        last = model(input_ids=IDS, task_ids=torch.tensor([2, 2]), **more).logits
        assert torch.equal(model(input_ids=IDS, **more).logits, last)
        assert torch.equal(model(input_ids=IDS, task_ids=torch.tensor([-1, -1]), **more).logits, last)
        assert not torch.equal(model(input_ids=IDS, task_ids=torch.tensor([0, 0]), **more).logits, last)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_task_starts_with_the_shared_prompt(ranks):
    model = multi(ranks=ranks)
    assert all(torch.equal(prompt, table(model)) for prompt in task_prompts(model))
    assert table(model).abs().max() > 0.1  # which is not the nearly-zero product that peft starts with


def test_a_tasks_prompt_is_the_shared_one_times_a_matrix_of_rank_r():
    model = randomise(multi(ranks=2).double())
    quotient = task_prompts(model)[1] / table(model).detach()
    assert torch.linalg.matrix_rank(quotient, rtol=1e-9) == 2


def test_further_ranks_move_although_their_product_starts_at_zero():
    model = multi(ranks=3)
    u, v = factors(model)
    optimizer = torch.optim.SGD([u, v], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, task_ids=torch.tensor([0, 0])).loss.backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(u[0].detach() @ v[0].detach(), rtol=1e-6) == 3


# -- what trains ---------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_formula():
    assert Method(Config(num_virtual_tokens=20, tasks=6)).count(smollm2()) == 15_096
    chosen = method("multitask_prompt_tuning", tasks=3, ranks=2)
    model = attached(chosen, sources=3)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == chosen.count(tiny_llama()) == 5 * 32 + 3 * 2 * (5 + 32)


def test_rows_of_one_task_give_no_gradient_to_another():
    model = randomise(multi())
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "task_ids": torch.tensor([0, 0])}
    supervised_forward(model, batch).cross_entropy().backward()
    for factor in factors(model):
        assert (factor.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, False]
    assert (table(model).grad.abs().sum(1) > 0).all()


def test_the_factors_have_a_learning_rate_of_their_own():
    chosen = method("multitask_prompt_tuning", task_lr_ratio=2.0)
    model = attached(chosen)
    groups = chosen.param_groups(model, context(chosen, learning_rate=0.3, weight_decay=0.1).recipe.train)
    check_partition(model, groups)
    u, v = factors(model)
    rates = {id(p): group.get("lr", 0.3) for group in groups for p in group["params"]}
    assert rates == {id(table(model)): 0.3, id(u): 0.6, id(v): 0.6}
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert Config().task_lr_ratio == pytest.approx(0.4 / 0.3)


def test_the_result_is_the_last_tasks_prompt_multiplied_out(tmp_path):
    chosen = method("multitask_prompt_tuning", tasks=3, ranks=2)
    model = randomise(attached(chosen, sources=3)).eval()
    logits = [model(input_ids=IDS, task_ids=torch.tensor([k, k])).logits for k in range(3)]
    exported = chosen.export(model)
    assert exported.peft_config["default"].peft_type.value == "PROMPT_TUNING"
    assert torch.equal(exported(input_ids=IDS).logits, logits[2])
    assert not torch.equal(logits[1], logits[2])


# -- tasks are sources ---------------------------------------------------------------------------------------------


def test_rows_know_their_source_and_batches_their_tasks(tmp_path):
    paths = [str(write_rows(tmp_path / f"{i}.jsonl", 4, first=10 * i)) for i in range(2)]
    sources = [Source(path=paths[0]), Source(path=paths[1], weight=2)]
    data = DataSection(sources=sources, eval=paths[0])
    examples = load_examples(data, 0)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        rows, _ = encode_all(examples.train, tiny_tokenizer(), data, cache)
        assert [row.source for row in rows] == [0] * 4 + [1] * 8
    held_out, _ = encode_all(examples.eval, tiny_tokenizer(), data)
    assert {row.source for row in held_out} == {None}
    collate = Collator(tiny_tokenizer(), None, ("task_ids",))
    assert collate([rows[5], rows[0], held_out[0]])["task_ids"].tolist() == [1, 0, -1]
    assert collate([])["task_ids"].tolist() == [-1]
    assert collate(rows)["task_ids"].dtype is torch.int64
    assert "task_ids" not in Collator(tiny_tokenizer())(rows)


@pytest.mark.parametrize(
    ("tasks", "sources", "message"),
    [
        (1, 3, r"^method\.tasks: expected 3, one for each of data\.sources, got 1"),
        (2, None, r"^method\.tasks: expected 1, as data\.train is one task, got 2"),
    ],
)
def test_another_number_of_tasks_than_sources_is_refused(tasks, sources, message):
    with pytest.raises(UsageError, match=message):
        attached(method("multitask_prompt_tuning", tasks=tasks), sources=sources)


def test_a_finished_prompt_can_not_be_factored_again():
    with pytest.raises(ValidationError, match=r"is multiplied out; go on from it with method\.name: prompt_tuning"):
        Config(init_from="runs/mpt")


def test_one_task_comes_with_a_notice_and_several_with_what_becomes_of_them():
    one, several = (method("multitask_prompt_tuning", tasks=n).notices(tiny_llama()) for n in (1, 3))
    assert "one task" in one[0] and "3 tasks" in several[0] and "last" in several[0]


def test_a_run_over_two_sources_trains_both_and_saves_the_last(tmp_path):
    base = save_tiny(tmp_path / "base")
    path = write_recipe(tmp_path, base, {"name": "multitask_prompt_tuning", "num_virtual_tokens": 4, "tasks": 2})
    other = write_rows(tmp_path / "other.jsonl", 12, first=200)
    content = path.read_text().replace("train: train.jsonl", f"sources: [{{path: train.jsonl}}, {{path: {other}}}]")
    path.write_text(content)
    result = peftctl.train(
        peftctl.load_recipe(path, ["train.eval_steps=6", "train.max_steps=12", "train.learning_rate=0.1"])
    )
    assert result.summary["trainable_parameters"] == 4 * 32 + 2 * (4 + 32)
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    # Held-out rows belong to no source: in training, too, they are measured with the prompt that is saved.
    assert lines[-1]["eval_loss"] == pytest.approx(result.summary["eval"]["after"]["loss"], rel=1e-5)
    assert result.summary["eval"]["after"]["loss"] < result.summary["eval"]["before"]["loss"]
    model, _ = load(result.run)
    assert model.peft_config["default"].peft_type.value == "PROMPT_TUNING"
    prompts = {task: table(load(result.run, task=task)[0]) for task in ("train", "other", "0", "1")}
    assert torch.equal(table(model), prompts["other"]) and not torch.equal(prompts["train"], prompts["other"])
    assert torch.equal(prompts["0"], prompts["train"]) and torch.equal(prompts["1"], prompts["other"])
    assert json.loads((result.artefact / "peftctl.json").read_text())["tasks"] == ["train", "other"]
    with pytest.raises(UsageError, match="has no task 'others'; did you mean 'other'"):
        load(result.run, task="others")


def test_every_tasks_prompt_is_exported_as_the_model_reads_it():
    chosen = method("multitask_prompt_tuning", tasks=3)
    model = randomise(attached(chosen, tiny_llama().double(), sources=3).double()).eval()
    expected = [model(input_ids=IDS, task_ids=torch.full((2,), k)).logits for k in range(3)]
    exported = chosen.export(model).double()
    assert list(tasks_of(exported).tensors) == ["task-0", "task-1", "task-2"]
    torch.testing.assert_close(exported(input_ids=IDS).logits, expected[2], rtol=1e-5, atol=1e-5)
    for name, logits in zip(tasks_of(exported).tensors, expected, strict=True):
        become(exported, name)
        torch.testing.assert_close(exported(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/a.jsonl", "b.csv"], ["a", "b"]),
        (["x/a.jsonl", "y/a.jsonl"], ["0", "1"]),
        (["a.jsonl", ["b.jsonl", "c.jsonl"]], ["0", "1"]),
        (["a b.jsonl", "b.jsonl"], ["0", "1"]),
    ],
)
def test_tasks_are_called_as_their_files_where_these_tell_them_apart(paths, names):
    assert list(names_of_sources(DataSection(sources=[Source(path=path) for path in paths]))) == names


def test_training_moves_the_factors_of_every_task_that_has_rows(tmp_path):
    work = workload(tmp_path, method("multitask_prompt_tuning", tasks=1))
    collate = Collator(tiny_tokenizer(), None, work.method.fields())
    rows = [replace(row, source=0) for row in work.train_rows]
    model, _ = train(replace(work, collate=collate, train_rows=rows))
    before = attached(work.method)
    for new, old in zip((table(model), *factors(model)), (table(before), *factors(before)), strict=True):
        assert (new != old).float().mean() > 0.9


def test_pairs_train_an_encoder_decoder(tmp_path):
    work = workload(tmp_path, method("multitask_prompt_tuning"), batch_size=8, max_steps=12)
    model_section = work.recipe.model.model_copy(update={"task": "seq2seq_lm"})
    collate = Collator(tiny_tokenizer(), None, work.method.fields())
    pairs = [EncodedRow([i, i + 1, i + 2], [7, 8, 2], "rows", paired=True) for i in range(5, 29)]
    recipe = work.recipe.model_copy(update={"model": model_section})
    work = replace(work, recipe=recipe, collate=collate, train_rows=pairs, eval_rows=pairs[:4])
    train(work, model=tiny_t5())
    losses = [json.loads(line)["loss"] for line in work.run.metrics.read_text().splitlines()]
    assert losses[-1] < losses[0]

"""Multitask prompt tuning with teachers, and its second run: what is distilled, when, and where a target starts."""

import json

import pytest
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.artifacts.load import load
from peftctl.errors import UsageError
from peftctl.methods.multitask_prompt_tuning import task_prompts
from peftctl.models.supervised import supervised_forward
from tests.commands.helpers import write_recipe, write_rows
from tests.methods.earlier import write_prompt
from tests.methods.prompts import IDS, attached, method, randomise, table
from tests.methods.test_multitask_prompt_tuning import MASK, factors
from tests.tiny import save_tiny, tiny_llama, tiny_t5


def taught(tmp_path, tasks=2, model=None, task="causal_lm", **keys):
    """Return a method with a teacher a task, its model in float64 with factors of their own, and the teachers."""
    base = {"causal_lm": tiny_llama, "seq2seq_lm": tiny_t5}[task]
    found = [write_prompt(tmp_path / f"teacher-{i}", base(), 5, 50 + i, task) for i in range(tasks)]
    chosen = method("multitask_prompt_tuning", tasks=tasks, teachers=[str(folder) for folder, _ in found], **keys)
    model = randomise(attached(chosen, (model or base()).double(), task, sources=tasks).double())
    return chosen, model, torch.stack([values for _, values in found]).double()


def distilled(chosen, model, batch):
    return chosen.loss(model, batch, lambda rows: supervised_forward(model, rows))


LABELS = IDS.clone()
LABELS[0, :8] = -100
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "task_ids": torch.tensor([1, 0])}


def test_the_loss_is_cross_entropy_divergence_and_distance_of_states(tmp_path):
    chosen, model, teachers = taught(tmp_path, distill_weight=0.7)
    parts, base = distilled(chosen, model.train(), BATCH), tiny_llama().double()

    def read(prompts):
        embedded = torch.cat([prompts, base.get_input_embeddings()(IDS)], dim=1)
        out = base(inputs_embeds=embedded, output_hidden_states=True)
        return out.logits[:, 5:-1].log_softmax(-1), out.hidden_states[-1][:, 5:-1]

    with torch.no_grad():
        (log_p, h_teacher), (log_q, h_student) = read(teachers[[1, 0]]), read(task_prompts(model)[[1, 0]])
    kl, square, ce = [], [], 0.0
    for row, targets in enumerate(LABELS[:, 1:]):
        own = targets != -100
        ce -= log_q[row, own].gather(1, targets[own][:, None]).sum()
        kl.append((log_p[row, own].exp() * (log_p[row, own] - log_q[row, own])).sum(-1).mean())
        square.append(((h_teacher - h_student)[row, own] ** 2).mean())
    torch.testing.assert_close(parts["loss"], ce, rtol=1e-8, atol=0)
    torch.testing.assert_close(parts["distill_logits"], 0.7 * sum(kl) / 2, rtol=1e-8, atol=0)
    torch.testing.assert_close(parts["distill_hidden"], 0.7 * sum(square) / 2, rtol=1e-8, atol=0)
    assert set(parts) == {"loss", "distill_logits", "distill_hidden"}


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path, task):
    chosen, model, _ = taught(tmp_path, task=task)
    apart = distilled(chosen, model, BATCH)
    assert apart["distill_logits"] > 1e-3 and apart["distill_hidden"] > 1e-3
    model.prompt_encoder["default"].teachers = task_prompts(model)
    parts = distilled(chosen, model, BATCH)
    assert parts["distill_logits"] == parts["distill_hidden"] == 0
    (parts["distill_logits"] + parts["distill_hidden"]).backward()
    assert table(model).grad.abs().max() < 1e-12


def test_the_teacher_reads_without_dropout_and_gets_no_gradient(tmp_path):
    chosen, model, teachers = taught(tmp_path)
    model.train()
    modes = []
    model.get_base_model().register_forward_hook(
        lambda module, *_: modes.append((module.training, torch.is_grad_enabled()))
    )
    sum(distilled(chosen, model, BATCH).values()).backward()
    assert modes == [(False, False), (True, True)] and model.training
    held = model.prompt_encoder["default"].teachers
    assert torch.equal(held, teachers) and not held.requires_grad
    assert "teachers" not in "".join(chosen.export(model).state_dict())


def test_distillation_of_two_batches_of_two_is_that_of_one_of_four(tmp_path):
    chosen, model, _ = taught(tmp_path)
    four = {name: torch.cat([value, value.flip(0)]) for name, value in BATCH.items()}
    four["task_ids"] = torch.tensor([0, 1, 1, 1])
    whole = distilled(chosen, model, four)
    halves = [distilled(chosen, model, {k: v[i : i + 2] for k, v in four.items()}) for i in (0, 2)]
    for name in ("distill_logits", "distill_hidden"):
        torch.testing.assert_close(sum(half[name] for half in halves) / 2, whole[name], rtol=1e-9, atol=0)


def test_a_batch_without_a_supervised_token_has_parts_of_zero(tmp_path):
    chosen, model, _ = taught(tmp_path)
    parts = distilled(chosen, model, BATCH | {"labels": torch.full_like(IDS, -100)})
    assert all(part == 0 for part in parts.values())
    sum(parts.values()).backward()


def test_without_a_weight_there_is_no_teacher(tmp_path):
    chosen, model, _ = taught(tmp_path, distill_weight=0.0)
    assert set(distilled(chosen, model, BATCH)) == {"loss"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run over two sources, distilled from a prompt each; with its recipe."""
    folder = tmp_path_factory.mktemp("mpt")
    base = save_tiny(folder / "base")
    for i in range(2):
        write_prompt(folder / "teachers" / str(i), tiny_llama(), 4, i)
    keys = {"name": "multitask_prompt_tuning", "num_virtual_tokens": 4, "tasks": 2, "ranks": 2, "teachers": "teachers"}
    path = write_recipe(folder, base, keys)
    other = write_rows(folder / "other.jsonl", 12, first=200)
    path.write_text(
        path.read_text().replace("train: train.jsonl", f"sources: [{{path: train.jsonl}}, {{path: {other}}}]")
    )
    overrides = ["train.eval_steps=6", "train.max_steps=6", "train.learning_rate=0.1"]
    return peftctl.train(peftctl.load_recipe(path, overrides)), path


def test_a_distilled_run_logs_its_parts_in_training_only(sources):
    result, path = sources
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line and "eval_loss" not in line and line["stage"] != "before"]
    for line in trained:
        parts = [line[name] for name in ("loss_loss", "distill_logits", "distill_hidden")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(line["loss"], rel=1e-4)
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert held_out[-1] == pytest.approx(result.summary["eval"]["after"]["loss"], rel=1e-5)
    assert peftctl.load_recipe(path).method.teachers == [str(path.parent / "teachers" / str(i)) for i in range(2)]


def test_a_target_starts_from_the_mean_of_the_sources_factors(sources, tmp_path):
    result, path = sources
    kept = load_file(result.run / "parts" / "factors.safetensors")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {"shared": (4, 32), "u": (2, 4, 2), "v": (2, 2, 32)}
    last, other = (table(load(result.run, task=task)[0]) for task in ("1", "0"))
    made = kept["shared"] * (kept["u"] @ kept["v"])
    torch.testing.assert_close(torch.stack([other, last]), made, rtol=1e-6, atol=1e-6)
    for tasks in (1, 3):
        chosen = method(
            "multitask_prompt_tuning", num_virtual_tokens=4, ranks=2, tasks=tasks, source_run=str(result.run)
        )
        model = attached(chosen, sources=tasks if tasks > 1 else None)
        u, v = factors(model)
        assert torch.equal(table(model), kept["shared"])
        for k in range(tasks):
            assert torch.equal(u[k], (kept["u"][0] + kept["u"][1]) / 2)
            assert torch.equal(v[k], (kept["v"][0] + kept["v"][1]) / 2)
    keys = {"name": "multitask_prompt_tuning", "num_virtual_tokens": 4, "ranks": 2, "source_run": str(result.run)}
    target = write_recipe(tmp_path, path.parent / "base", keys)
    assert peftctl.train(peftctl.load_recipe(target, ["train.max_steps=2"])).summary["steps"] == 2


def test_earlier_runs_that_do_not_fit_are_refused(sources, tmp_path):
    result, path = sources
    with pytest.raises(UsageError, match=r"^method\.teachers: expected 3, one for each of data\.sources, got 1"):
        attached(method("multitask_prompt_tuning", tasks=3, teachers="x"), sources=3)
    with pytest.raises(UsageError, match=r"^method\.source_run: expected factors of shapes .*, got .*; give its num"):
        attached(method("multitask_prompt_tuning", source_run=str(result.run)))
    with pytest.raises(UsageError, match=r"^method\.source_run: .*: expected a finished run that has"):
        attached(method("multitask_prompt_tuning", source_run=str(tmp_path)))
    with pytest.raises(UsageError, match=r"^method\.teachers: .*no such directory"):
        recipe = peftctl.load_recipe(path, ["method.teachers=[a/b/c, d/e/f]", f"train.output_dir={tmp_path / 'run'}"])
        peftctl.train(recipe)

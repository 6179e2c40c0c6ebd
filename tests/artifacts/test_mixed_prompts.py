"""Prompts of several runs in one batch: every row answers as under its own prompt alone."""

import pytest
import torch

import peftctl
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.save import save_artifact
from peftctl.errors import UsageError
from peftctl.methods._prompts import prompt_tuning_model
from peftctl.models.load import load_model, load_tokenizer
from tests.artifacts.helpers import make_info, make_recipe
from tests.tiny import save_tiny, tiny_llama, tiny_t5

IDS = torch.tensor([[9, 20, 31, 7], [41, 300, 2, 17], [60, 61, 62, 63], [9, 20, 31, 7]])
TASKS = torch.tensor([2, 0, 1, 1])


def write(folder, base, seed, task="causal_lm", tokens=5):
    """Write a finished run whose prompt is random."""
    recipe = make_recipe(base, folder)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"task": task})})
    plain = load_model(recipe.model)
    info = make_info(recipe, plain)
    model = prompt_tuning_model(plain, tokens, task)
    torch.nn.init.normal_(
        model.prompt_encoder["default"].embedding.weight, generator=torch.Generator().manual_seed(seed)
    )
    run = RunDir(folder)
    save_artifact(model.eval(), load_tokenizer(recipe.model), run, info)
    run.write_text(run.recipe, f"model:\n  name_or_path: {base}\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    made = {}
    for task, model in (("causal_lm", tiny_llama()), ("seq2seq_lm", tiny_t5())):
        base = save_tiny(folder / task / "base", model)
        made[task] = [write(folder / task / name, base, seed, task) for seed, name in enumerate("abc")]
    return made


def inputs(task, rows):
    more = {"decoder_input_ids": torch.tensor([[3, 7, 8]] * len(rows))} if task == "seq2seq_lm" else {}
    return {"input_ids": IDS[rows], "attention_mask": torch.ones_like(IDS[rows]), **more}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft, of what the library passes it
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_rows_of_a_mixed_batch_equal_each_task_alone(runs, task):
    mixed, _ = peftctl.load(runs[task])
    alone = [peftctl.load(run)[0] for run in runs[task]]
    every = list(range(len(IDS)))
    with torch.no_grad():
        together = mixed(**inputs(task, every), task_ids=TASKS).logits
        written = mixed.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=TASKS, max_new_tokens=6, do_sample=False
        )
        for row, own in enumerate(TASKS.tolist()):
            expected = alone[own](**inputs(task, [row])).logits[0]
            torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)
            ids = IDS[[row]]
            answer = alone[own].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )[0]
            assert written[row, : len(answer)].tolist() == answer.tolist()
    assert (together[2] - together[3]).abs().max() > 0.01
    # The same row under two prompts answers differently, and without a task as under the last.
    with torch.no_grad():
        assert (together[3] - together[0]).abs().max() > 0.01
        last = mixed(**inputs(task, every)).logits
        assert torch.equal(last, mixed(**inputs(task, every), task_ids=torch.full((4,), 2)).logits)


def test_the_prompts_are_the_files_bit_for_bit_and_nothing_trains(runs):
    mixed, _ = peftctl.load(runs["causal_lm"])
    alone = [peftctl.load(run)[0].prompt_encoder["default"].embedding.weight for run in runs["causal_lm"]]
    assert torch.equal(mixed.get_prompt(3, torch.tensor([0, 1, 2])), torch.stack(list(alone)))
    assert not mixed.training and not any(p.requires_grad for p in mixed.prompt_encoder.parameters())


def test_prompts_of_other_lengths_and_bases_are_refused(runs, tmp_path):
    a, *_ = runs["causal_lm"]
    longer = write(tmp_path / "longer", a.parent / "base", 0, tokens=7)
    with pytest.raises(UsageError, match=r"longer: is a prompt of 7 vectors, .*a has 5; only prompts of one length"):
        peftctl.load([a, longer])
    other = write(tmp_path / "other", save_tiny(tmp_path / "base", tiny_llama(seed=1)), 0)
    with pytest.raises(UsageError, match="is an adapter of another base"):
        peftctl.load([a, other])
    with pytest.raises(UsageError, match="its task"):
        peftctl.load([a, runs["seq2seq_lm"][0]])

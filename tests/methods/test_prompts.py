"""What every prompt method must hold: names and counts, a base that stays as it is, plain peft, resume, generation."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import peftctl
from peftctl.artifacts.load import load
from peftctl.artifacts.merge import merge
from peftctl.commands.check import check
from peftctl.commands.model import inspect
from peftctl.errors import UsageError
from peftctl.evaluation.generation import generate
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from tests.commands.helpers import write_recipe
from tests.methods.helpers import run_steps
from tests.methods.prompts import IDS, KINDS, attached, method, randomise
from tests.tiny import save_tiny, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, workload

BASES = {"llama": (tiny_llama, "causal_lm"), "opt": (tiny_opt, "causal_lm"), "t5": (tiny_t5, "seq2seq_lm")}
NAMES = [name for name in KINDS if "-" not in name]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run of each method, by name; the run itself compares what it reads back with what was trained."""
    runs = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        overrides = ["train.save_steps=3", "train.save_total_limit=5", "train.eval_steps=2", "eval.max_new_tokens=4"]
        overrides += ["eval.metrics=[loss, exact_match]", f"train.learning_rate={0.01 if name == 'p_tuning' else 0.1}"]
        recipe = write_recipe(folder, base, {"name": name, "num_virtual_tokens": 4})
        runs[name] = peftctl.train(peftctl.load_recipe(recipe, overrides))
    return runs


@pytest.mark.parametrize("on", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_alone_trains_and_its_size_is_the_closed_form(kind, on):
    make, task = BASES[on]
    chosen = method(kind)
    expected = chosen.count(make())
    model = attached(chosen, make(), task)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == expected
    assert all(name.startswith("prompt_encoder.default.") for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with torch.device("meta"):
        bare = make()
    assert sum(p.numel() for p in attached(chosen, bare, task).parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_leaves_no_position_for_a_row_is_refused(kind):
    with pytest.raises(UsageError, match=r"^method\.num_virtual_tokens: the model has 512 positions, got 512"):
        attached(method(kind, num_virtual_tokens=512))


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_bit_for_bit_and_switching_off_gives_it_back(tmp_path, kind):
    reference = tiny_llama()(input_ids=IDS).logits
    before = dict(tiny_llama().named_parameters())
    model, _ = train(workload(tmp_path, method(kind), max_steps=3, weight_decay=0.1))
    assert all(torch.equal(p, before[name]) for name, p in model.get_base_model().named_parameters())
    with model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)
    assert (model(input_ids=IDS).logits[:, -12:] - reference).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_checkpointing_are_those_without(kind):
    model = randomise(attached(method(kind), tiny_llama().double()).double()).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_trains_prompts_and_keeps_every_byte(base, kind, bits):
    section = ModelSection(name_or_path=str(base), dtype="float32")
    quantised = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    model = attached(method(kind), quantised)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(model, 4, weight_decay=0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("prompt_encoder.")}
    assert losses[-1] < losses[0]


def test_a_run_on_nf4_is_read_back_on_nf4(tmp_path, base):
    recipe = write_recipe(tmp_path, base, {"name": "p_tuning", "num_virtual_tokens": 4}, quantization={"bits": 4})
    result = peftctl.train(peftctl.load_recipe(recipe, ["train.max_steps=3", "train.gradient_checkpointing=true"]))
    assert result.summary["steps"] == 3


LOADED_BY_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, out, *adapters = sys.argv[1:]
logits = []
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        logits.append(model(input_ids=torch.arange(5, 29).reshape(2, 12)).logits)
assert not any(name.startswith("peftctl") for name in sys.modules)
torch.save(logits, out)
"""


def test_plain_peft_loads_every_result_in_a_process_of_its_own(tmp_path, base, finished):
    adapters = [finished[name].artefact for name in NAMES]
    for adapter in adapters:
        assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    arguments = [sys.executable, "-W", "ignore", "-c", LOADED_BY_PEFT, str(base), str(tmp_path / "logits.pt")]
    done = subprocess.run([*arguments, *map(str, adapters)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for adapter, logits in zip(adapters, torch.load(tmp_path / "logits.pt"), strict=True):
        model, _ = load(adapter)
        assert (logits[:, -12:] - tiny_llama()(input_ids=IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(logits, model(input_ids=IDS).logits.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_resumed_ends_byte_for_byte_as_one_that_was_not(tmp_path, finished, name):
    straight = finished[name]
    run = tmp_path / "run"
    shutil.copytree(straight.run, run)
    for leftover in ("summary.json", "adapter", "checkpoints/checkpoint-6"):
        path = run / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    overrides = [f"train.output_dir={run}"]
    result = peftctl.train(peftctl.load_recipe(straight.run / "recipe.yaml", overrides), resume=True)
    weights = "adapter_model.safetensors"
    assert (result.artefact / weights).read_bytes() == (straight.artefact / weights).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_measures_before_and_after_and_its_loss_falls(finished, name):
    before, after = (finished[name].summary["eval"][when] for when in ("before", "after"))
    assert before.keys() == after.keys() == {"loss", "exact_match"}
    lines = [json.loads(line) for line in (finished[name].run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert after["loss"] == pytest.approx(measured[-1], rel=1e-5)
    assert measured[-1] < measured[0]


def test_a_prompt_is_not_merged(tmp_path, finished):
    with pytest.raises(UsageError, match=r"P-tuning can't be merged: a prompt is input, not weights"):
        merge(finished["p_tuning"].run, tmp_path / "merged")


def test_the_report_of_a_prompt_names_the_nearest_tokens(finished):
    report = inspect(str(finished["prompt_tuning"].run))
    assert len(report.content["virtual_tokens"]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_step_by_step_greedy_and_the_same_alone_as_in_a_batch(kind):
    model = randomise(attached(method(kind))).eval()
    model = method(kind).export(model)
    prompts = [[5, 6, 7], [30, 31, 32, 33, 34], [9, 8, 7]]
    answers = generate(model, tiny_tokenizer(), prompts, max_new_tokens=5, batch_size=3)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(5):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == 2:  # eos
                break
            ids.append(token)
        assert ids[len(prompt) :] == answer


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_planned_by_running_the_step(tmp_path, base, name):
    small = check(peftctl.load_recipe(write_recipe(tmp_path, base, {"name": name})), device="cuda")
    assert small.plan.traced
    longer = {"name": name, "num_virtual_tokens": 200}
    large = check(peftctl.load_recipe(write_recipe(tmp_path, base, longer)), device="cuda")
    assert large.plan.activations > 1.5 * small.plan.activations

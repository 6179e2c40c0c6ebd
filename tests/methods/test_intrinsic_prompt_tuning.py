"""Intrinsic prompt tuning: its equations in float64, what each stage trains and sees, kills, and what is kept."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import peftctl
from peftctl.artifacts.load import load
from peftctl.data.collate import Collator
from peftctl.errors import Interrupted, RecipeError, UsageError
from peftctl.methods.base import Context
from peftctl.methods.intrinsic_prompt_tuning import Config, Method
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import DataSection, Source
from tests.commands.helpers import write_recipe, write_rows
from tests.methods.earlier import write_decoder, write_prompt
from tests.methods.helpers import recipe as plain_recipe
from tests.methods.prompts import IDS, behind, smollm2
from tests.tiny import save_tiny, tiny_llama, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, workload
from tests.training.test_resume import StopAt

N, D, DIM, HIDDEN, TASKS = 5, 32, 3, 8, 2
SMALL = {"num_virtual_tokens": N, "intrinsic_dim": DIM, "hidden": HIDDEN}
MASK = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished prompts of the tiny Llama."""
    folder = tmp_path_factory.mktemp("prompts")
    return [str(write_prompt(folder / f"task-{i}", tiny_llama(), N, i)[0]) for i in range(TASKS)]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A finished run's folder, as far as its decoder."""
    return str(write_decoder(tmp_path_factory.mktemp("run") / "ipt", DIM, HIDDEN, N * D))


def with_sources(recipe, count, task="causal_lm"):
    data = DataSection(sources=[Source(path=f"task-{i}.jsonl") for i in range(count)])
    model = recipe.model.model_copy(update={"task": task})
    return recipe.model_copy(update={"data": data, "model": model})


def attached(method, model=None, task="causal_lm", sources=TASKS + 1, **settings):
    torch.manual_seed(0)
    context = Context(with_sources(plain_recipe(method.config, **settings), sources, task), tiny_tokenizer())
    return method.apply(tiny_llama() if model is None else model, context)


def over(runs, **keys):
    return Method(Config(prompts=runs, **SMALL | keys))


def on(decoder, **keys):
    return Method(Config(decoder=decoder, **SMALL | keys))


def encoder(model):
    return model.prompt_encoder["default"]


def batch(*tasks):
    return {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "task_ids": torch.tensor(tasks)}


def trainable(model):
    return {name.split("default.")[1]: p for name, p in model.named_parameters() if p.requires_grad}


def decode(made, z):
    """W3 tanh(W2 z + b2) + b3, entry by entry."""
    first, last = made.decoder[0], made.decoder[2]
    middle = torch.tanh(torch.stack([(row * z).sum() for row in first.weight]) + first.bias)
    return torch.stack([(row * middle).sum() for row in last.weight]) + last.bias


def double(method, runs):
    """Return the method on a base in float64, with the source prompts."""
    model = attached(method, tiny_llama().double()).double()
    prompts = torch.stack([load_file(f"{run}/adapter_model.safetensors")["prompt_embeddings"] for run in runs])
    return model, prompts.double()


# -- the equations ---------------------------------------------------------------------------------------------------


def test_a_row_of_a_source_task_reads_its_prompt_through_the_autoencoder(runs):
    model, prompts = double(over(runs), runs)
    made = encoder(model)
    expected = [decode(made, made.encoder.weight @ p.flatten() + made.encoder.bias).view(N, D) for p in prompts]
    torch.testing.assert_close(made.reconstructed(), torch.stack(expected), rtol=1e-10, atol=1e-12)
    own = decode(made, made.z).view(N, D)
    for tasks, read in (((1, 0), [expected[1], expected[0]]), ((2, 0), [own, expected[0]]), ((-1, -1), [own, own])):
        logits = model(input_ids=IDS, attention_mask=MASK, task_ids=torch.tensor(tasks)).logits
        torch.testing.assert_close(logits, behind(tiny_llama().double(), torch.stack(read)), rtol=1e-9, atol=1e-9)
    logits = model(input_ids=IDS, attention_mask=MASK).logits  # held-out rows belong to the target
    torch.testing.assert_close(logits, behind(tiny_llama().double(), own), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weight", [200.0, 7.0])
def test_the_first_stages_loss_is_cross_entropy_and_alpha_times_the_mean_square(runs, weight):
    method = over(runs, reconstruction_weight=weight)
    model, prompts = double(method, runs)
    parts = method.loss(model, batch(0, 0), lambda rows: supervised_forward(model, rows))
    expected = ((encoder(model).reconstructed() - prompts) ** 2).mean()
    torch.testing.assert_close(parts["reconstruction"], weight * expected, rtol=1e-10, atol=0)
    ce = torch.nn.functional.cross_entropy(
        behind(tiny_llama().double(), encoder(model).reconstructed()[[0, 0]])[:, N:-1].flatten(0, 1),
        IDS[:, 1:].flatten(), reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(parts["loss"], ce, rtol=1e-8, atol=0)
    assert set(parts) == {"loss", "reconstruction"}


def test_alpha_changes_the_gradient_of_the_decoder_and_none_of_the_cross_entropy_is_lost(runs):
    gradients = []
    for weight in (0.0, 200.0):
        method = over(runs, reconstruction_weight=weight)
        model, _ = double(method, runs)
        parts = method.loss(model, batch(0, 1), lambda rows, model=model: supervised_forward(model, rows))
        assert ("reconstruction" in parts) == (weight > 0)
        sum(parts.values()).backward()
        assert all(p.grad.abs().max() > 0 for p in trainable(model).values())
        gradients.append(encoder(model).decoder[2].weight.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[0].abs().max()


def test_what_z_decodes_to_varies_in_no_more_directions_than_z_has(decoder):
    made = encoder(attached(on(decoder)).double())
    jacobian = torch.autograd.functional.jacobian(lambda z: made.decoder(z), made.z.detach())
    assert jacobian.shape == (N * D, DIM)
    samples = made.decoder(torch.randn(40, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert torch.linalg.matrix_rank(jacobian) == DIM
    assert torch.linalg.matrix_rank(samples - samples.mean(0), rtol=1e-9) <= HIDDEN
    for z in (made.z.detach(), torch.ones(DIM, dtype=torch.float64)):
        torch.testing.assert_close(made.decoder(z), decode(made, z), rtol=1e-10, atol=1e-12)


# -- what trains -----------------------------------------------------------------------------------------------------


def test_the_autoencoder_trains_first_then_z_alone_then_on_request_the_prompt(runs):
    method = over(runs, prompt_steps=1)
    model = attached(method)
    names = {"encoder.weight", "encoder.bias"} | {f"decoder.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(trainable(model)) == names
    size = N * D
    count = size * DIM + DIM + DIM * HIDDEN + HIDDEN + HIDDEN * size + size
    assert sum(p.numel() for p in trainable(model).values()) == count == method.count(tiny_llama())
    stages = method.stages(with_sources(plain_recipe(method.config), TASKS + 1))
    assert [stage.name for stage in stages] == ["subspace", "intrinsic", "prompt"]
    method.enter(model, stages[1], None)
    assert {name: p.numel() for name, p in trainable(model).items()} == {"z": DIM}
    expected = encoder(model).prompt()
    method.enter(model, stages[2], None)
    assert {name: tuple(p.shape) for name, p in trainable(model).items()} == {"table": (N, D)}
    assert torch.equal(trainable(model)["table"], expected)


def test_counts_on_smollm2(decoder):
    assert on(decoder, intrinsic_dim=250).count(smollm2()) == 250
    size = 100 * 576
    chosen = Method(Config(prompts=["a"], num_virtual_tokens=100, intrinsic_dim=250))
    assert chosen.count(smollm2()) == size * 250 + 250 + 250 * 768 + 768 + 768 * size + size
    assert "250 numbers" in chosen.notices(smollm2())[0]


def test_z_starts_small_and_only_z_has_the_recipes_learning_rate(decoder, runs):
    z = encoder(attached(on(decoder, intrinsic_dim=DIM))).z
    assert z.requires_grad and 0 < z.abs().max() < 0.1
    method = over(runs, prompt_steps=1, prompt_learning_rate=0.7)
    model = attached(method)
    section = plain_recipe(method.config, learning_rate=0.3, weight_decay=0.1).train
    rates = []
    for stage in ("subspace", "intrinsic", "prompt"):
        encoder(model).go_on(stage)
        groups = method.param_groups(model, section)
        assert sum(len(group["params"]) for group in groups) == len(trainable(model))
        rates.append({group["lr"] for group in groups})
    assert rates == [{1e-4}, {0.3}, {0.7}]


def test_no_stage_sees_rows_of_the_others_tasks(runs, tmp_path):
    method = over(runs)
    rows = [replace(row, source=i % 3) for i, row in enumerate(workload(tmp_path, method).train_rows)]
    subspace, intrinsic = method.stages(with_sources(plain_recipe(method.config), TASKS + 1))
    assert {row.source for row in subspace.choose(rows)} == {0, 1}
    assert {row.source for row in intrinsic.choose(rows)} == {2}
    assert len(subspace.choose(rows)) + len(intrinsic.choose(rows)) == len(rows)


@pytest.mark.parametrize(
    ("keys", "whole", "steps"),
    [
        ({}, None, {"subspace": None, "intrinsic": None}),
        ({}, 7, {"subspace": 4, "intrinsic": 3}),
        ({"subspace_steps": 5}, 7, {"subspace": 5, "intrinsic": 2}),
        ({"subspace_steps": 0.5, "prompt_steps": 0.25}, 8, {"subspace": 4, "intrinsic": 2, "prompt": 2}),
        ({"subspace_steps": 0.5, "prompt_steps": 3}, None, {"subspace": 0.5, "intrinsic": None, "prompt": 3}),
    ],
)
def test_max_steps_is_dealt_to_the_stages(keys, whole, steps):
    method = over(["a", "b"], **keys)
    recipe = plain_recipe(method.config, max_steps=whole)
    assert {stage.name: stage.steps for stage in method.stages(recipe)} == steps


# -- runs ------------------------------------------------------------------------------------------------------------


class StopAfter(StopAt):
    """Sends the signal after so many steps of the run, whatever their stage."""

    def step(self, step, metrics=None):
        self.at -= metrics is None
        if metrics is None and self.at == 0:
            super().step(0)


def staged(folder, runs, reporter=None, **keys):
    """Return a workload over two source tasks and a target, of three stages."""
    method = over(runs, **{"subspace_steps": 3, "prompt_steps": 2, "subspace_learning_rate": 0.01} | keys)
    work = workload(folder, method, reporter=reporter, max_steps=8, save_steps=1, save_total_limit=99)
    rows = [replace(row, source=i % 3) for i, row in enumerate(work.train_rows)]
    collate = Collator(tiny_tokenizer(), None, method.fields())
    return replace(work, recipe=with_sources(work.recipe, TASKS + 1), train_rows=rows, collate=collate)


def numbers(model):
    return {name: p.detach().clone() for name, p in encoder(model).named_parameters()}


@pytest.mark.parametrize("stop", [2, 3, 5, 6, 7])
def test_a_run_that_is_killed_in_any_stage_ends_as_one_that_was_not(tmp_path, runs, stop):
    straight, _ = train(staged(tmp_path / "straight", runs))
    with pytest.raises(Interrupted):
        train(staged(tmp_path / "stopped", runs, StopAfter(stop)))
    work = staged(tmp_path / "stopped", runs)
    torch.manual_seed(1)
    again, totals = train(work, work.run.latest_checkpoint())
    assert totals.steps == 8
    found, expected = numbers(again), numbers(straight)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_decoder_stands_still_while_z_trains(tmp_path, runs):
    method = over(runs)
    model = attached(method)
    method.enter(model, method.stages(with_sources(plain_recipe(method.config), 3))[1], None)
    before = numbers(model)
    optimizer = torch.optim.AdamW(
        method.param_groups(model, plain_recipe(method.config, learning_rate=0.1, weight_decay=0.5).train)
    )
    for _ in range(3):
        optimizer.zero_grad()
        sum(method.loss(model, batch(2, 2), lambda rows: supervised_forward(model, rows)).values()).backward()
        optimizer.step()
    assert {name for name, p in numbers(model).items() if not torch.equal(p, before[name])} == {"z"}


def test_the_reconstruction_gets_better_and_is_the_same_however_a_step_is_cut(tmp_path, runs):
    def lines(name, **train_keys):
        work = staged(tmp_path / name, runs, subspace_steps=20, prompt_steps=0)
        section = work.recipe.train.model_copy(update={"max_steps": 21, **train_keys})
        train(replace(work, recipe=work.recipe.model_copy(update={"train": section})))
        found = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
        return [line["reconstruction"] for line in found if "reconstruction" in line]

    whole = lines("whole")
    assert len(whole) == 20 and whole[-1] < 0.5 * whole[0]
    cut = lines("cut", batch_size=2, gradient_accumulation=2)
    assert cut == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(("base", "task"), [(tiny_llama, "causal_lm"), (tiny_t5, "seq2seq_lm")])
def test_the_result_is_a_plain_prompt_of_equal_logits(decoder, base, task):
    method = on(decoder)
    model = attached(method, base(), task).eval()
    more = {} if task == "causal_lm" else {"decoder_input_ids": IDS[:, :3]}
    logits = model(input_ids=IDS, attention_mask=MASK, **more).logits
    exported = method.export(model)
    assert exported.peft_config["default"].peft_type.value == "PROMPT_TUNING"
    assert torch.equal(exported(input_ids=IDS, attention_mask=MASK, **more).logits, logits)
    assert torch.equal(exported.prompt_encoder["default"].embedding.weight, encoder(model).prompt())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two real prompt runs in one folder, and a run over that folder; returns the latter and its folder."""
    folder = tmp_path_factory.mktemp("ipt")
    base = save_tiny(folder / "base")
    for i, name in enumerate(("a", "b")):
        work = folder / f"work-{name}"
        work.mkdir()
        path = write_recipe(work, base, {"name": "prompt_tuning", "num_virtual_tokens": N})
        write_rows(folder / f"{name}.jsonl", 12, first=20 * i)
        keys = [f"data.train={folder / name}.jsonl", f"train.output_dir={folder / 'prompts' / name}"]
        peftctl.train(peftctl.load_recipe(path, [*keys, "train.max_steps=2"]))
    section = {"name": "intrinsic_prompt_tuning", "prompts": "prompts", **SMALL}
    path = write_recipe(folder, base, section, train={"max_steps": 6, "learning_rate": 0.1})
    text = "sources: [{path: a.jsonl}, {path: b.jsonl}, {path: train.jsonl}]"
    path.write_text(path.read_text().replace("train: train.jsonl", text))
    return peftctl.train(peftctl.load_recipe(path)), folder


def test_a_run_over_a_folder_of_prompts_is_read_back_and_says_its_stages(finished):
    result, folder = finished
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"before", "subspace", "intrinsic"}
    recipe = peftctl.load_recipe(result.run / "recipe.yaml")
    assert recipe.method.prompts == [str(folder / "prompts" / name) for name in ("a", "b")]
    model, _ = load(result.run)
    assert model.peft_config["default"].peft_type.value == "PROMPT_TUNING"
    kept = load_file(result.run / "parts" / "decoder.safetensors")
    assert {name: tuple(t.shape) for name, t in kept.items()} == {
        "0.weight": (HIDDEN, DIM), "0.bias": (HIDDEN,), "2.weight": (N * D, HIDDEN), "2.bias": (N * D,),
    }  # fmt: skip
    made = encoder(attached(on(str(result.run))))
    made.decoder.load_state_dict(kept)
    prompt = model.prompt_encoder["default"].embedding.weight.flatten() - made.decoder[2].bias
    middle = torch.linalg.lstsq(made.decoder[2].weight.detach(), prompt[:, None]).solution
    torch.testing.assert_close((made.decoder[2].weight @ middle)[:, 0], prompt, rtol=1e-4, atol=1e-5)
    assert middle.abs().max() < 1  # as a tanh is


def test_another_run_takes_the_decoder_and_trains_z_alone(finished, tmp_path):
    result, folder = finished
    section = {"name": "intrinsic_prompt_tuning", "decoder": str(result.run), **SMALL}
    path = write_recipe(tmp_path, folder / "base", section, train={"max_steps": 2})
    again = peftctl.train(peftctl.load_recipe(path))
    assert again.summary["trainable_parameters"] == DIM and again.summary["steps"] == 2
    assert not (again.run / "parts").exists()
    peftctl.train(peftctl.load_recipe(folder / "recipe.yaml"), resume=True)  # finished: nothing to do


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "got neither"),
        ({"prompts": ["a"], "decoder": "b"}, "got both"),
        ({"prompts": ["a"], "init_from": "b"}, r"go on from it with method\.name: prompt_tuning"),
    ],
)
def test_a_section_names_prompts_or_a_decoder(keys, message):
    with pytest.raises(ValidationError, match=message):
        Config(**keys)


def test_what_does_not_fit_is_refused_in_one_line(runs, decoder, tmp_path):
    with pytest.raises(UsageError, match=r"^data\.sources: expected 3, one for each of method\.prompts and the target"):
        attached(over(runs), sources=2)
    with pytest.raises(
        UsageError, match=r"^method\.num_virtual_tokens: expected 5, as .*task-0 of method\.prompts has"
    ):
        attached(over(runs, num_virtual_tokens=4))
    with pytest.raises(
        UsageError, match=r"^method\.prompts: .* is a prompt of another base: .* 32 wide, the model's 16"
    ):
        attached(over(runs), tiny_llama_of(16))
    with pytest.raises(UsageError, match=r"^method\.decoder: expected a decoder of shapes"):
        attached(on(decoder, intrinsic_dim=4))
    with pytest.raises(UsageError, match=r"^method\.decoder: .*: expected a finished run that has"):
        attached(on(str(tmp_path)))
    with pytest.raises(UsageError, match=r"^method\.prompts: .*: expected a prompt, got none that can be read"):
        attached(over([str(tmp_path), *runs[:1]]))
    with pytest.raises(UsageError, match=r"^train\.max_steps: expected at least 6, a step for every stage, got 5"):
        attached(over(runs, subspace_steps=5), max_steps=5)


def tiny_llama_of(width):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_prompt_of_another_base_and_a_run_that_is_not_finished_are_refused(finished, tmp_path):
    _, folder = finished
    other = save_tiny(tmp_path / "other", tiny_llama(seed=1))
    recipe = folder / "recipe.yaml"
    out = f"train.output_dir={tmp_path / 'run'}"
    with pytest.raises(UsageError, match=r"^method\.prompts: .* is an adapter of another base"):
        peftctl.train(peftctl.load_recipe(recipe, [f"model.name_or_path={other}", out]))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "recipe.yaml").write_text("a run\n")
    with pytest.raises(UsageError, match=r"^method\.prompts: .*half: this run is not finished"):
        peftctl.train(peftctl.load_recipe(recipe, [f"method.prompts=[{folder}/prompts/a, {tmp_path}/half]", out]))
    with pytest.raises(UsageError, match=r"^method\.prompts: .*nowhere: no such directory"):
        peftctl.train(peftctl.load_recipe(recipe, [f"method.prompts=[{folder}/prompts/a, {folder}/nowhere]", out]))


def test_paths_of_runs_start_at_the_working_directory_or_the_recipes_folder(finished, tmp_path, monkeypatch):
    _, folder = finished
    monkeypatch.chdir(tmp_path)
    assert peftctl.load_recipe(folder / "recipe.yaml").method.prompts == [str(folder / "prompts" / n) for n in "ab"]
    (tmp_path / "prompts" / "c").mkdir(parents=True)
    (tmp_path / "prompts" / "c" / "adapter_config.json").write_text("{}")
    assert peftctl.load_recipe(folder / "recipe.yaml").method.prompts == [str(tmp_path / "prompts" / "c")]
    both = peftctl.load_recipe(folder / "recipe.yaml", [f"method.prompts=[prompts/c, {folder}/prompts, runs/none]"])
    expected = [str(tmp_path / "prompts" / "c"), *(str(folder / "prompts" / n) for n in "ab"), "runs/none"]
    assert both.method.prompts == expected
    with pytest.raises(RecipeError, match="prompts"):
        peftctl.load_recipe(folder / "recipe.yaml", ["method.prompts=[3, {}]"])

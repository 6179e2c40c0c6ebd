"""AdaLoRA: its equations written naively in float64, the schedule of its budget, and what is saved."""

import json
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer, RankAllocator

from peftctl.errors import Interrupted, UsageError
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods.adalora import Config, Method, orthogonality, phases
from peftctl.methods.base import StepInfo
from peftctl.models.supervised import supervised_forward
from peftctl.training.checkpoints import read_state
from tests.methods.conformance import Recorder
from tests.methods.helpers import applied, context
from tests.tiny import save_tiny, tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

QV = {"target_modules": ["q_proj", "v_proj"]}
IDS = torch.arange(1, 25).reshape(2, 12)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaLoraLayer)}


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        for factor in (layer.lora_A, layer.lora_B, layer.lora_E):
            old = factor["default"]
            old.data = torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype)


def live(model):
    """Number of lambdas that are not 0, by layer."""
    return {name: int((layer.lora_E["default"] != 0).sum()) for name, layer in layers(model).items()}


def method(**keys):
    return Method(Config(**{"init_r": 6, "target_r": 2, "delta_t": 2, **QV, **keys}))


# -- the equations -------------------------------------------------------------------------------------------------


def test_layer_is_the_papers_equation_in_float64():
    """y = W x + alpha / (init_r + 1e-5) P diag(lambda) Q x; peft adds the 1e-5."""
    model = applied(method(init_r=3, alpha=12), tiny_llama().double()).double()
    randomise(model)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    w, q, p = layer.base_layer.weight, layer.lora_A["default"], layer.lora_B["default"]
    lambdas = layer.lora_E["default"][:, 0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    scale = 12 / (3 + 1e-5)
    naive = torch.stack([torch.stack([w @ v + scale * (p @ (lambdas * (q @ v))) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_starts_as_the_base_exactly(base):
    reference = base()(input_ids=IDS).logits
    model = applied(Method(Config(target_modules="all-linear")), base())
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(input_ids=IDS).logits, reference)


def test_orthogonality_is_the_mean_of_the_norms_over_all_p_and_q():
    model = applied(method(), tiny_llama().double()).double()
    randomise(model)
    norms = []
    for layer in layers(model).values():
        q, p = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        for gram in (q @ q.T, p.T @ p):
            off = gram - torch.eye(6, dtype=torch.float64)
            norms.append(sum(float(v) ** 2 for v in off.flatten()) ** 0.5)
    assert orthogonality(model).item() == pytest.approx(sum(norms) / len(norms), rel=1e-12)


def test_orthonormal_factors_are_not_punished():
    model = applied(method(), tiny_llama().double()).double()
    for layer in layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            tall = torch.linalg.qr(torch.randn(max(factor["default"].shape), 6, dtype=torch.float64))[0]
            factor["default"].data = tall.T if factor is layer.lora_A else tall
    value = orthogonality(model)
    value.backward()
    assert value.item() < 1e-12
    assert all(torch.isfinite(p.grad).all() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)


@pytest.mark.parametrize("weight", [0.3, 0.0])
def test_the_loss_has_the_regulariser_as_a_part_of_its_own(weight):
    chosen = method(orth_reg_weight=weight)
    model = applied(chosen, tiny_llama().double()).double().train()
    randomise(model)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    parts = chosen.loss(model, batch, lambda b: supervised_forward(model, b))
    whole = model(input_ids=IDS, labels=IDS).loss  # peft's own sum, of means
    regulariser = weight * orthogonality(model)
    # The library computes its cross-entropy in float32.
    torch.testing.assert_close(parts["loss"] / 22 + regulariser, whole.double(), rtol=1e-6, atol=0)
    assert parts.keys() == ({"loss", "orthogonality"} if weight else {"loss"})
    if weight:
        torch.testing.assert_close(parts["orthogonality"], regulariser, rtol=1e-12, atol=0)


def test_scores_and_pruning_by_hand():
    """Two targets of rank 2; three steps of given gradients; then the two best of four triplets stay."""
    chosen = Method(Config(init_r=2, target_r=1, tinit=0, tfinal=1, delta_t=1, beta1=0.6, beta2=0.7,
                           target_modules=["layers.0.self_attn.q_proj", "layers.3.self_attn.v_proj"]))  # fmt: skip
    model = applied(chosen, tiny_llama().double()).double()
    randomise(model)
    (schedule,) = chosen.callbacks(model)
    schedule.stage_begins(StepInfo(0, 5, model, None))
    settings = model.peft_config["default"]
    settings.deltaT = 100  # score only, until the last phase prunes
    weights = {n: p for n, p in model.named_parameters() if "lora_" in n}
    smooth = {n: torch.zeros_like(p) for n, p in weights.items()}
    doubt = {n: torch.zeros_like(p) for n, p in weights.items()}
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        for name, p in weights.items():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            sensitivity = (p * p.grad).abs().detach()
            smooth[name] = 0.6 * smooth[name] + 0.4 * sensitivity
            doubt[name] = 0.7 * doubt[name] + 0.3 * (sensitivity - smooth[name]).abs()
        schedule.after_optimizer(StepInfo(step, 5, model, None))
    scores = {}
    for name in layers(model):
        s = {f: smooth[f"{name}.lora_{f}.default"] * doubt[f"{name}.lora_{f}.default"] for f in "AEB"}
        for i in range(2):
            scores[name, i] = float(s["E"][i, 0] + s["B"][:, i].mean() + s["A"][i].mean())
    best = sorted(scores, key=scores.__getitem__)[-2:]
    schedule.after_optimizer(StepInfo(3, 5, model, None))  # step 4 of 5: the last phase begins
    for (name, i), _ in scores.items():
        assert bool(layers(model)[name].lora_E["default"][i] != 0) == ((name, i) in best)
    assert len({name for name, _ in best}) in (1, 2)


def test_the_budget_follows_the_cubic_schedule(tmp_path):
    work = workload(tmp_path, method(tinit=3, tfinal=4, delta_t=1), max_steps=14)
    model, _ = train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    budgets = {line["step"]: line["rank_budget"] for line in lines if "rank_budget" in line}
    targets = 8
    for step in range(1, 15):
        progress = min(max((step - 3) / (14 - 4 - 3), 0), 1)
        assert budgets[step] == int(targets * (2 + (6 - 2) * (1 - progress) ** 3)), step
    assert budgets[1] == 48 and budgets[14] == 16
    assert sum(live(model).values()) == 16


# -- counts, names, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "targets"), [(tiny_llama, "all-linear"), (tiny_llama, None), (tiny_opt, ["q_proj", "fc1"])]
)
def test_trainable_count_is_the_closed_form(base, targets):
    chosen = method(init_r=5, target_modules=targets)
    expected = chosen.count(base())
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert expected == sum(5 * (m.in_features + m.out_features + 1) for m in layers(model).values())


def test_count_on_smollm2_is_the_formulas():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert Method(Config(init_r=12, target_modules="all-linear")).count(model) == 3_665_880


def test_only_the_three_factors_of_the_targets_train():
    model = applied(method(), tiny_llama())
    names = {n.split("base_model.model.")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        f"model.layers.{i}.self_attn.{m}.lora_{f}.default"
        for i in range(4)
        for m in ("q_proj", "v_proj")
        for f in "ABE"
    }


@pytest.mark.parametrize(
    ("keys", "total", "expected"),
    [
        ({}, 100, (10, 30, 10)),
        ({"delta_t": 0.02}, 200, (20, 60, 4)),
        ({"tinit": 5, "tfinal": 0, "delta_t": 1}, 20, (5, 0, 1)),
        ({"tinit": 0.5, "tfinal": 0.5}, 10, (4, 5, 10)),
        ({}, 3, (0, 1, 10)),
        ({}, 2, (0, 0, 10)),
        ({}, 1, (0, 0, 10)),
        ({"delta_t": 0.001}, 10, (1, 3, 1)),
    ],
)
def test_phases_in_steps(keys, total, expected):
    assert phases(Config(**keys), total) == expected


def test_phases_that_leave_no_room_are_refused_before_weights_load():
    message = r"method.tinit: 5 steps before and method.tfinal: 5 after the pruning leave none of 10"
    with pytest.raises(UsageError, match=message):
        phases(Config(tinit=5, tfinal=5), 10)
    short = context().recipe.model_copy(update={"train": context().recipe.train.model_copy(update={"max_steps": 10})})
    with pytest.raises(UsageError, match=message):
        method(tinit=5, tfinal=5).apply(tiny_llama(), type(context())(short))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_r": 4}, "expected less than init_r, which is 4, got 8"),
        ({"init_r": 8, "target_r": 8}, "expected less than init_r, which is 8, got 8"),
        (
            {"init_from": "runs/a"},
            "a finished adalora is pruned and can't be pruned anew; merge it with model.adapters",
        ),
        ({"tfinal": 1.0}, "less than 1"),
        ({"beta1": 1.0}, "less than 1"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Config(**keys)


def test_a_target_that_is_no_linear_layer_is_refused():
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding; adalora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{"tfinal": 4}, {"tfinal": 0}, {"tfinal": 4, "delta_t": 5}])
def test_after_the_last_pruning_the_budget_is_met_exactly(tmp_path, schedule):
    model, _ = train(workload(tmp_path, method(tinit=1, **schedule), max_steps=12))
    ranks = live(model)
    assert sum(ranks.values()) == 2 * 8
    assert len(set(ranks.values())) > 1  # not the same rank everywhere


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_prune_too(tmp_path, steps):
    model, _ = train(workload(tmp_path, method(), max_steps=steps, warmup_steps=0))
    assert sum(live(model).values()) == 16


def test_accumulation_equals_one_large_batch(tmp_path):
    """Budgets and scores see the gradients of the whole step; the regulariser counts once."""
    keys = {"orth_reg_weight": 0.5, "tinit": 0, "tfinal": 1, "delta_t": 1}
    large, _ = train(workload(tmp_path / "a", method(**keys), max_steps=5, batch_size=4))
    small, _ = train(workload(tmp_path / "b", method(**keys), max_steps=5, batch_size=2, gradient_accumulation=2))
    for name, tensor in trained_tensors(large).items():
        torch.testing.assert_close(trained_tensors(small)[name], tensor, rtol=1e-3, atol=2e-5)


def test_evaluation_changes_no_score_and_has_no_regulariser(tmp_path):
    keys = {"orth_reg_weight": 50.0, "dropout": 0.1}
    plain, _ = train(workload(tmp_path / "a", method(**keys), max_steps=6))
    work = workload(tmp_path / "b", method(**keys), max_steps=6, eval_steps=1)
    watched, _ = train(work)
    for name, tensor in trained_tensors(plain).items():
        assert torch.equal(trained_tensors(watched)[name], tensor), name
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    assert all(line["eval_loss"] < 10 for line in lines if "eval_loss" in line)
    assert all(line["loss"] > 10 for line in lines if "loss" in line)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_regulariser_counts_once_however_many_micro_batches_a_step_has(tmp_path, accumulation):
    """lambda is 0 at first, so the gradient of P and Q in the first step is the regulariser's alone."""
    chosen = method(orth_reg_weight=0.5)
    model = applied(chosen, tiny_llama())
    factors = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    expected = torch.autograd.grad(0.5 * orthogonality(model), list(factors.values()))
    recorder = Recorder()
    with recorder.watching():
        settings = {"batch_size": 4 // accumulation, "gradient_accumulation": accumulation, "max_grad_norm": 0.0}
        train(workload(tmp_path, chosen, max_steps=2, **settings), model=tiny_llama())
    for name, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(recorder.gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_the_budget_moves_once_an_optimizer_step(tmp_path):
    """Not once a micro-batch: steps are counted from 1, and each is scored with the gradient of all its rows."""
    seen = []
    chosen = method(tinit=1, tfinal=2, delta_t=1, beta1=0.5)

    def spy(allocator, model):
        gradients = recorder.gradients[len(seen) + 1]
        lambdas = {n: p for n, p in model.named_parameters() if "lora_E" in n}
        before = {n: allocator.exp_avg_ipt.get(n, torch.zeros_like(p)).clone() for n, p in lambdas.items()}
        original(allocator, model)
        for name, p in lambdas.items():
            sensitivity = (p * gradients[f"base_model.model.{name}"]).abs()
            torch.testing.assert_close(allocator.exp_avg_ipt[name], (before[name] + sensitivity) / 2)
        seen.append(allocator)

    original, recorder = RankAllocator.update_ipt, Recorder()
    work = workload(tmp_path, chosen, max_steps=6, batch_size=1, gradient_accumulation=4, max_grad_norm=0.0)
    with recorder.watching(), patch.object(RankAllocator, "update_ipt", spy):
        train(work)
    assert len(seen) == 6 - 2 - 1  # nothing is scored where ranks are settled
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    budgets = {line["step"]: line["rank_budget"] for line in lines if "rank_budget" in line}
    assert budgets == {1: 48, 2: 25, 3: 17, 4: 16, 5: 16, 6: 16}


def test_held_out_losses_are_cross_entropies(tmp_path):
    """To the last digit: peft's own forward would add its regulariser in evaluation too."""
    work = workload(tmp_path, method(orth_reg_weight=50.0), max_steps=4, eval_steps=4)
    model, _ = train(work)
    plain = held_out_loss(model.merge_and_unload(), work.eval_rows, work.collate, 4)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    (measured,) = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert measured == pytest.approx(plain["loss"], rel=1e-5)


def test_no_lambda_is_masked_before_tinit_and_after_the_settling_none_comes_back():
    """Lambdas are made anew before every step; what a step masks is its own."""
    chosen = method(tinit=4, tfinal=3, delta_t=2)
    model = applied(chosen, tiny_llama())
    (schedule,) = chosen.callbacks(model)
    schedule.stage_begins(StepInfo(0, 13, model, None))
    generator, standing = torch.Generator().manual_seed(0), []
    for step in range(13):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.grad = torch.randn(p.shape, generator=generator)
        for layer in layers(model).values():
            layer.lora_E["default"].data = torch.rand(6, 1, generator=generator) + 0.5
        schedule.after_optimizer(StepInfo(step, 13, model, None))
        standing.append(sum(live(model).values()))
    cubic = {t: int(8 * (2 + 4 * (1 - (t - 4) / 6) ** 3)) for t in (6, 8)}
    assert standing == [48] * 5 + [cubic[6], 48, cubic[8], 48] + [16] * 4  # step 10 settles, 11 to 13 mask alike
    assert 48 > cubic[6] > cubic[8] > 16


@pytest.mark.parametrize("stop", [2, 5, 7, 9], ids=["before pruning", "while pruning", "settled", "later"])
def test_stopped_and_resumed_equals_straight(tmp_path, stop):
    """Steps 1 to 2 of 10 do not prune, 3 to 7 do, 8 to 10 are settled."""
    keys = {"tinit": 2, "tfinal": 3, "delta_t": 1, "dropout": 0.1}
    straight, _ = train(workload(tmp_path / "straight", method(**keys), max_steps=10))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(**keys), max_steps=10, reporter=StopAt(stop)))
    resumed = workload(tmp_path / "stopped", method(**keys), max_steps=10)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    pattern = straight.peft_config["default"].rank_pattern
    assert again.peft_config["default"].rank_pattern == pattern and pattern


# -- the artefact --------------------------------------------------------------------------------------------------


def saved(folder, chosen, **settings):
    """Train on a base on disk, export and save; return (base, adapter, logits)."""
    base = save_tiny(folder / "base")
    model, _ = train(workload(folder / "run", chosen, **settings))
    exported = chosen.export(model).eval()
    with torch.no_grad():
        logits = exported(input_ids=IDS).logits
    exported.save_pretrained(folder / "adapter")
    return base, folder / "adapter", logits


def live_of(adapter):
    """Number of lambdas that are not 0 of each target in a saved adapter."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return [int((tensor != 0).sum()) for name, tensor in tensors.items() if name.endswith("lora_E")]


LOADED_BY_PEFT = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
assert not any(name.startswith("peftctl") for name in sys.modules)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits, out)
"""


def test_plain_peft_loads_the_pruned_adapter_in_a_process_of_its_own(tmp_path):
    base, adapter, logits = saved(tmp_path, method(tinit=1, tfinal=3), max_steps=10)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["init_r"], config["total_step"]) == ("ADALORA", 6, 10)
    lost = sum(rank == 0 for rank in live_of(adapter))
    assert sum(map(sum, config["rank_pattern"].values())) == 16 + lost
    arguments = [sys.executable, "-c", LOADED_BY_PEFT, str(base), str(adapter), str(tmp_path / "logits.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=0, atol=1e-5)


def test_a_target_that_lost_every_rank_is_saved_without_empty_tensors(tmp_path):
    from safetensors.torch import load_file

    chosen = method(tinit=1, tfinal=3, target_modules="all-linear", target_r=1, init_r=4)
    _, adapter, _ = saved(tmp_path, chosen, max_steps=10)
    pattern = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    lost = sum(rank == 0 for rank in live_of(adapter))
    assert lost, "the case to test did not come about"
    assert all(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert sum(map(sum, pattern.values())) == 28 + lost


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # peft, of its own adapters
def test_a_run_that_ends_while_it_prunes_is_saved_as_it_answers(tmp_path):
    """Between two prunings lambdas grow back; what is saved is what was last chosen."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen = method(tinit=0, tfinal=1, delta_t=4)
    base = save_tiny(tmp_path / "base")
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "run", chosen, max_steps=12, reporter=StopAt(6)))
    work = workload(tmp_path / "run", chosen, max_steps=12)
    torch.manual_seed(0)
    model = chosen.apply(tiny_llama(), context())
    read_state(work.run.latest_checkpoint(), model, chosen)
    grown = sum(live(model).values())
    exported = chosen.export(model).eval()
    assert grown == 48 > sum(live(model).values())
    model.peft_config["default"].total_step = 12
    exported.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, exported(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # peft, of its own adapters
def test_on_a_half_type_base_the_scale_does_not_train_and_what_is_saved_reloads_exactly(tmp_path):
    from peft import PeftModel

    chosen = method(tinit=1, tfinal=2, alpha=32, dropout=0.1)
    expected = chosen.count(tiny_llama())
    model, _ = train(
        workload(tmp_path / "run", chosen, max_steps=6, learning_rate=0.05, dtype="bfloat16"),
        model=tiny_llama(dtype="bfloat16"),
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert {layer.ranknum["default"].item() for layer in layers(model).values()} == {6.0}
    exported = chosen.export(model.eval())
    exported.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(dtype="bfloat16"), tmp_path / "adapter").eval()
    logits = exported(input_ids=IDS).logits.detach()
    assert (logits - tiny_llama(dtype="bfloat16")(input_ids=IDS).logits).abs().max() > 0.05
    # Less than a rounding here is chaos in a large model: the check of what was saved would fail.
    assert torch.equal(again(input_ids=IDS).logits, logits)
    read = {name: tensor for name, tensor in again.named_parameters() if "default" in name}
    assert all(torch.equal(tensor, read[name]) for name, tensor in exported.named_parameters() if name in read)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}


def test_merged_equals_unmerged(tmp_path):
    chosen = method(tinit=1, tfinal=3)
    model, _ = train(workload(tmp_path, chosen, max_steps=8, learning_rate=0.05))
    model = chosen.export(model).double().eval()
    logits = model(input_ids=IDS).logits
    assert (logits - tiny_llama().double()(input_ids=IDS).logits).abs().max() > 1e-3
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-9, atol=1e-9)


def test_disabled_adapter_is_the_base_and_frozen_weights_stay(tmp_path):
    reference = tiny_llama()(input_ids=IDS).logits
    before = {n: p.detach().clone() for n, p in tiny_llama().named_parameters()}
    model, _ = train(workload(tmp_path, method(), max_steps=4, weight_decay=0.1))
    model.eval()
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)
    plain = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())


def test_the_method_keeps_no_model_alive(tmp_path):
    """Its state outlives the run's model, which must make room for the one that is read back."""
    import gc
    import weakref

    chosen = method()
    model, _ = train(workload(tmp_path, chosen, max_steps=3))
    watch = weakref.ref(model.get_base_model())
    pattern = chosen.state_dict(model)["rank_pattern"]
    del model
    gc.collect()
    assert watch() is None and pattern

"""AdapterFusion: attention over finished adapters, which stay as they are."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import peftctl
from peftctl.commands.check import check
from peftctl.errors import ArtifactError, Interrupted, RunError, UsageError
from peftctl.methods import houlsby, lora, pfeiffer
from peftctl.methods.adapter_fusion import Config, Method
from peftctl.recipe.schema import ModelSection
from peftctl.tuners.bottleneck import BottleneckLayer
from peftctl.tuners.fused_perceptrons import FusedPerceptrons, identity_distance
from tests.methods.architectures import tiny_of
from tests.methods.earlier import write_adapter
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.methods.lora_family import KINDS, quantized, smollm2
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_llama, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PLACES = {
    "around": lambda: pfeiffer.Method(pfeiffer.Config(bottleneck=6)),
    "behind": lambda: houlsby.Method(houlsby.Config(bottleneck=6, activation="silu", train_norms=False)),
    "simple": lambda: pfeiffer.Method(pfeiffer.Config(bottleneck=6, variant="simple", activation="gelu")),
}


def fusion(*adapters, **keys):
    return Method(Config(adapters=[str(adapter) for adapter in adapters], **keys))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three adapters of other widths and values on the tiny Llama."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_adapter(folder / f"task-{i}", tiny_llama(), i) for i in range(3)]


def layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, BottleneckLayer)}


def fused(model):
    return {name: layer.bottleneck_adapter["default"] for name, layer in layers(model).items()}


def double(method, base=tiny_llama, seed=None):
    """Apply a method in float64; with a seed, what trains takes values of the order of 1."""
    model = applied(method, base().double()).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def only(folder, base=tiny_llama):
    """Return the base with one finished adapter, as its own run left it, in float64."""
    return PeftModel.from_pretrained(base().double(), folder, autocast_adapter_dtype=False).double().eval()


# -- the equation ---------------------------------------------------------------------------------------------------


def test_what_is_added_is_the_papers_equation_in_float64_whatever_its_bk_is(runs):
    module = fused(double(fusion(*runs), seed=0))["model.layers.1"]
    h, bias = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    for row, got in zip(h.flatten(0, 1), module(h).flatten(0, 1), strict=True):
        a = [u.up.weight @ torch.relu(u.down.weight @ row + u.down.bias) + u.up.bias for u in module.adapters]
        q = module.query @ row + module.query_bias
        keys = [module.key @ one + bias for one in a]
        scores = torch.stack([q @ key for key in keys])
        p = scores.exp() / scores.exp().sum()
        expected = sum(weight * (module.value @ one) for weight, one in zip(p, a, strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_attention_sums_to_one_over_the_adapters_of_every_token(runs):
    module = fused(double(fusion(*runs), seed=1))["model.layers.0"]
    h = 0.3 * torch.randn(2, 7, 32, dtype=torch.float64)
    p = module.attention(h, torch.stack([adapter(h) for adapter in module.adapters], -2))
    assert p.shape == (2, 7, 3) and p.min() >= 0
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 7, dtype=torch.float64), **EXACT)
    assert p.std(dim=(0, 1)).min() > 1e-3  # each token has its own


@pytest.mark.parametrize("place", PLACES)
def test_of_one_adapter_it_is_that_adapter_whatever_wq_and_wk_are(tmp_path, place):
    run = write_adapter(tmp_path / "one", tiny_llama(), chosen=PLACES[place]())
    model = double(fusion(run), seed=2)
    for module in fused(model).values():
        module.value.data.copy_(torch.eye(32))
    torch.testing.assert_close(logits(model), logits(only(run)), **EXACT)
    assert (logits(model) - logits(tiny_llama().double())).abs().max() > 0.1


def test_of_equal_adapters_wq_and_wk_are_without_effect(tmp_path, runs):
    for seed in (0, 1):
        model = double(fusion(runs[1], runs[1], runs[1]), seed=seed)
        for module in fused(model).values():
            module.value.data.copy_(torch.eye(32))
        torch.testing.assert_close(logits(model), logits(only(runs[1])), rtol=1e-10, atol=1e-10)


def test_without_queries_it_is_the_mean_of_the_changes(runs):
    module = fused(double(fusion(*runs), seed=3))["model.layers.2"]
    module.query.data.zero_()
    module.query_bias.data.zero_()
    h = torch.randn(4, 32, dtype=torch.float64)
    mean = torch.stack([adapter(h) for adapter in module.adapters]).mean(0)
    torch.testing.assert_close(module(h), mean @ module.value.T, **EXACT)


# -- how it starts --------------------------------------------------------------------------------------------------


def test_factors_start_as_the_authors(runs):
    module = next(iter(fused(applied(fusion(*runs), tiny_llama())).values()))
    identity = torch.eye(32)
    assert torch.equal(module.value.diagonal(), torch.ones(32))
    assert torch.equal(module.value[identity == 0], torch.full((32 * 31,), 1e-6))
    for weight in (module.query, module.key):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not module.query_bias.any()


def test_the_start_is_about_the_mean_of_the_adapters(tmp_path):
    quiet = [write_adapter(tmp_path / str(i), tiny_llama(), i, spread=0.05) for i in range(2)]
    module = fused(double(fusion(*quiet)))["model.layers.0"]
    h = torch.randn(6, 32, dtype=torch.float64)
    mean = torch.stack([adapter(h) for adapter in module.adapters]).mean(0)
    assert (module(h) - mean).abs().max() < 0.01 * mean.abs().max()


def test_the_penalty_is_the_distance_of_wv_from_the_identity_and_next_to_nothing_at_first(runs):
    model = double(fusion(*runs))
    at_first = identity_distance(model).item()
    assert at_first == pytest.approx(4 * 32 * 31 * 1e-12, rel=1e-6)
    model = double(fusion(*runs), seed=5)
    expected = sum(((torch.eye(32) - module.value) ** 2).sum() for module in fused(model).values())
    torch.testing.assert_close(identity_distance(model), expected, **EXACT)


def parts_logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_the_penalty_is_a_part_of_the_loss_in_training_and_holds_wv(tmp_path, runs):
    distances = []
    for penalty in (0.0, 0.01, 100.0):
        folder = tmp_path / str(penalty)
        model, _ = train(workload(folder, fusion(*runs, value_penalty=penalty), max_steps=4, scheduler="constant"))
        distances.append(identity_distance(model).item())
        lines = parts_logged(folder)
        assert len(lines) == 4 and all(("value_identity" in line) == bool(penalty) for line in lines)
        if penalty:
            assert lines[0]["value_identity"] == pytest.approx(penalty * 4 * 32 * 31 * 1e-12, rel=1e-3)
            assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss_loss"] + lines[-1]["value_identity"], rel=1e-5)
    assert distances[2] < 0.5 * distances[1] < distances[0]


# -- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("base", [tiny_llama, tiny_t5, tiny_bart])
def test_trainable_count_is_the_closed_form(tmp_path, base, place):
    run = write_adapter(tmp_path / "one", base(), chosen=PLACES[place]())
    chosen = fusion(run, run)
    assert chosen.count(base()) == len(layers(only(run, base))) * (3 * 32**2 + 32)
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == chosen.count(base())
    assert model(**inputs(base)).logits.isfinite().all()


def inputs(base):
    ids = {"input_ids": IDS}
    return ids if base is tiny_llama else ids | {"decoder_input_ids": IDS}


def test_count_on_smollm2_is_the_papers_formula(tmp_path):
    base = tiny_of("llama", "cpu", hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                   intermediate_size=64, head_dim=64)  # fmt: skip
    run = write_adapter(tmp_path / "one", base, spread=0.0)
    chosen = fusion(run, run)
    assert chosen.count(smollm2()) == 30 * (3 * 576**2 + 576) == 29_877_120
    model = chosen.apply(smollm2(), context())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 29_877_120
    assert all(p.device.type == "meta" for p in model.parameters())


def test_training_moves_the_fusion_and_no_adapter(runs):
    model = applied(fusion(*runs), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    own = {"query", "query_bias", "key", "value"}
    for name, p in model.named_parameters():
        assert p.requires_grad == ("bottleneck_adapter" in name and name.rsplit(".", 1)[-1] in own), name
        assert torch.equal(p, before[name]) != p.requires_grad, name
    for i, run in enumerate(runs):
        saved = load_file(run / "adapter_model.safetensors")
        for name, module in fused(model).items():
            for part, p in module.adapters[i].named_parameters():
                assert torch.equal(p, saved[f"base_model.model.{name}.bottleneck_adapter.{part}"])


def test_gradients_reach_through_the_adapters_to_the_blocks_below(runs):
    model = double(fusion(*runs), seed=6)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for module in fused(model).values():
        assert all(getattr(module, part).grad.abs().max() > 0 for part in ("query", "query_bias", "key", "value"))
        assert all(p.grad is None for p in module.adapters.parameters())


def test_adapters_stay_frozen_when_peft_switches(runs):
    model = applied(fusion(*runs), tiny_llama())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.base_model.set_requires_grad("default", True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_disabled_it_is_the_base(runs):
    reference = logits(tiny_llama())
    model = applied(fusion(*runs), tiny_llama())
    run_steps(model, 3)
    model.eval()
    assert not torch.equal(logits(model), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)


def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_not(runs):
    model = applied(fusion(*runs), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    module = fused(model)["model.layers.0"]
    assert module(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_over_a_quantised_base(tmp_path, runs, kind):
    save_tiny(tmp_path)
    base = quantized(tmp_path, kind)
    reference, chosen = logits(base), fusion(*runs)
    expected = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


def test_a_classifier_leaves_the_earlier_heads_behind(tmp_path):
    bert = {"kind": "BertForSequenceClassification", "num_labels": 3}
    runs = [write_adapter(tmp_path / str(i), tiny_bert(), i, "seq_cls") for i in range(2)]
    assert any("classifier" in name for name in load_file(runs[0] / "adapter_model.safetensors"))
    chosen = fusion(*runs)
    section = ModelSection(name_or_path="tiny", dtype="float32", task="seq_cls")
    there = replace(context(), recipe=recipe().model_copy(update={"model": section}))
    model = chosen.apply(tiny_bert(**bert), there)
    head = {n for n, p in model.named_parameters() if p.requires_grad and "bottleneck" not in n}
    assert {n.split(".modules_to_save")[0].rsplit(".", 1)[-1] for n in head} == {"classifier"}
    assert chosen.count(tiny_bert(**bert)) == 2 * (3 * 32**2 + 32) + 3 * 33


# -- runs -----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight(tmp_path, runs):
    straight, _ = train(workload(tmp_path / "a", fusion(*runs), max_steps=8))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", fusion(*runs), max_steps=8, reporter=StopAt(5)))
    work = workload(tmp_path / "b", fusion(*runs), max_steps=8)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_a_run_does_not_go_on_over_adapters_that_were_trained_anew(tmp_path, runs):
    own = write_adapter(tmp_path / "task-a", tiny_llama(), 1)
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "run", fusion(runs[0], own), max_steps=8, reporter=StopAt(5)))
    write_adapter(tmp_path / "task-a", tiny_llama(), 1, spread=0.1)
    work = workload(tmp_path / "run", fusion(runs[0], own), max_steps=8)
    with pytest.raises(RunError, match=r"method\.adapters: task-a has been trained anew since this run began"):
        train(work, work.run.latest_checkpoint())


RECIPE = {
    "model": {"dtype": "float32"},
    "data": {"train": "rows.jsonl", "format": "prompt_completion", "template": "chat", "max_length": 64},
    "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "scheduler": "constant"},
}


def written(folder, base, name, method, rows=8):
    """Write a recipe over a few rows."""
    lines = [{"prompt": f"{name} {i}", "completion": str(i)} for i in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "model": RECIPE["model"] | {"name_or_path": str(base)},
        "method": method,
        "data": RECIPE["data"],
        "train": RECIPE["train"] | {"output_dir": str(folder / "runs" / name)},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of Pfeiffer adapters and one that fuses them; the folder of all."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny(folder / "base")
    for name, m in (("a", 4), ("b", 6)):
        peftctl.train(peftctl.load_recipe(written(folder, base, name, {"name": "pfeiffer", "bottleneck": m})))
    method = {"name": "adapter_fusion", "adapters": ["runs/a", "runs/b"]}
    peftctl.train(peftctl.load_recipe(written(folder, base, "both", method)))
    return folder


PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
import peftctl.tuners
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits, out)
"""


def test_the_artefact_needs_none_of_the_runs(trained, tmp_path):
    model, _ = peftctl.load(trained / "runs" / "both")
    for i, name in enumerate("ab"):
        saved = load_file(trained / "runs" / name / "adapter" / "adapter_model.safetensors")
        for place, module in fused(model).items():
            for part, p in module.adapters[i].named_parameters():
                assert torch.equal(p, saved[f"base_model.model.{place}.bottleneck_adapter.{part}"])
    options = model.peft_config["default"].options
    assert options["bottlenecks"] == [4, 6] and [entry["name"] for entry in options["fused"]] == ["a", "b"]
    moved = tmp_path / "adapter"
    (trained / "runs" / "both" / "adapter").rename(moved)
    arguments = [str(trained / "base"), str(moved), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    moved.rename(trained / "runs" / "both" / "adapter")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    assert str(trained) not in json.dumps(options)


def test_runs_are_looked_for_beside_the_recipe(trained):
    loaded = peftctl.load_recipe(trained / "both.yaml")
    assert loaded.method.adapters == [str(trained / "runs" / name) for name in "ab"]
    assert list(Method(loaded.method).inputs().values()) == [loaded.method.adapters]


# -- refusals -------------------------------------------------------------------------------------------------------


def refused(folder, adapters, message):
    method = {"name": "adapter_fusion", "adapters": adapters}
    loaded = peftctl.load_recipe(written(folder, folder / "base", "refused", method))
    with pytest.raises(UsageError, match=message) as caught:
        check(loaded)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_not_there_or_not_finished_is_refused(trained):
    refused(trained, ["runs/a", "runs/c"], r"method\.adapters: runs/c: no such directory|method\.adapters: .*runs/c")
    half = trained / "runs" / "half"
    half.mkdir()
    (half / "recipe.yaml").write_text("model: {}\n")
    refused(trained, ["runs/a", "runs/half"], r"method\.adapters: .*half: this run is not finished")


def test_adapters_of_another_base_are_refused_by_their_fingerprint(trained, tmp_path):
    save_tiny(tmp_path / "base", tiny_llama(seed=1))
    refused(tmp_path, [str(trained / "runs" / "a")], r"method\.adapters: .*adapter of another base")


def test_other_kinds_of_adapters_are_refused(trained, tmp_path):
    lora_run = tmp_path / "lora"
    applied(lora.Method(lora.Config(r=4)), tiny_llama()).save_pretrained(lora_run)
    refused(trained, ["runs/a", str(lora_run)], "holds an adapter of the type LORA; .* as houlsby and pfeiffer make")
    refused(trained, ["runs/both"], "of the type fusion")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_trained_norms_are_refused_by_name(tmp_path, device):
    run = write_adapter(
        tmp_path / "normed", tiny_of("llama", "cpu"), chosen=houlsby.Method(houlsby.Config(bottleneck=4))
    )
    message = r"normed has trained model\.layers\.0\.input_layernorm too, .*train_norms: false"
    with pytest.raises(UsageError, match=message):
        fusion(run).count(tiny_of("llama", device))


def test_adapters_at_other_places_are_refused(tmp_path):
    folders = [write_adapter(tmp_path / place, tiny_llama(), chosen=make()) for place, make in PLACES.items()]
    with pytest.raises(UsageError, match=r"around has placement around, .*behind behind; they must be equal"):
        fusion(*folders[:2]).count(tiny_llama())
    with pytest.raises(UsageError, match=r"stand at different places, e\.g\. model\.layers\.0\.self_attn\.o_proj; "):
        fusion(*folders[1:]).count(tiny_llama())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters_without_a_record_that_do_not_fit_are_refused(tmp_path, device):
    deeper = write_adapter(tmp_path / "deep", tiny_of("llama", "cpu", num_hidden_layers=3))
    with pytest.raises(UsageError, match=r"it stands at model\.layers\.2, which this model does not have"):
        fusion(deeper).count(tiny_of("llama", device))
    wider = write_adapter(tmp_path / "wide", tiny_of("llama", "cpu", hidden_size=64))
    base = tiny_of("llama", device)
    with pytest.raises(
        UsageError, match=r"wide is an adapter of another base: it is 64 wide at model\.layers\.0, .* is 32"
    ):
        fusion(wider).apply(base, context())


def test_damaged_files_are_told(tmp_path):
    run = write_adapter(tmp_path / "cut", tiny_llama())
    file = run / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: is damaged or cut off"):
        fusion(run).count(tiny_llama())
    (run / "adapter_config.json").write_text('{"peft_type": "NO_SUCH_TYPE"}')
    with pytest.raises(ArtifactError, match="is not one that peft reads"):
        fusion(run).count(tiny_llama())


def test_tensors_of_other_shapes_than_the_settings_say_are_told(tmp_path):
    run = write_adapter(tmp_path / "odd", tiny_llama())
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"bottleneck": 9}))
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: is damaged"):
        applied(fusion(run), tiny_llama())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapters": []}, "at least 1 item"),
        ({"adapters": ["a"] * 17}, "at most 16 items"),
        ({"adapters": ["a"], "value_penalty": -1.0}, "greater than or equal to 0"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))


def test_merging_is_refused_with_a_reason(runs):
    with pytest.raises(NotImplementedError, match="not linear"):
        applied(fusion(*runs), tiny_llama()).merge_and_unload()
    assert not Method.card.mergeable and "linear" in Method.card.merge_note


def test_places_without_a_fusion_have_none(runs):
    model = applied(fusion(*runs), tiny_llama())
    assert set(layers(model)) == {f"model.layers.{i}" for i in range(4)}
    assert all(isinstance(module, FusedPerceptrons) for module in fused(model).values())

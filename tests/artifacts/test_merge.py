import errno
import gc
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftctl.artifacts import fold as folding
from peftctl.artifacts import merge as merging
from peftctl.artifacts import parity
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.load import load, locate
from peftctl.artifacts.merge import merge
from peftctl.errors import ArtifactError, RunError, UsageError
from tests.artifacts.helpers import ROWS, lora_run
from tests.tiny import save_tiny, tiny_llama


def stored(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def naive(run, scale=2.0):
    """W + s B A of every adapted layer, in float64."""
    base, adapter = stored(run.path.parent / "base"), stored(run.adapter)
    merged = {}
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            b = adapter[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            merged[weight] = base[weight].double() + scale * (b.double() @ a.double())
    return base, merged


def no_trace(folder):
    return [p.name for p in folder.iterdir() if "merged" in p.name] == []


def test_every_layer_is_w_plus_s_b_a(finished, tmp_path):
    run, reference = finished
    result = merge(run.path, tmp_path / "merged", rows=ROWS)
    base, expected = naive(run)
    found = stored(tmp_path / "merged")
    assert found.keys() == base.keys()  # tied: no lm_head.weight in either
    assert (result.layers, len(expected)) == (28, 28)
    for name, tensor in found.items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(tensor, base[name]), name
    model, _ = load(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=5e-5, rtol=0)
    assert result.dtype == "float32"
    assert result.max_delta < 5e-5
    assert result.top1_agreement == 1.0
    assert result.positions == sum(map(len, ROWS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_rounded_once(tmp_path, dtype):
    run, _ = lora_run(tmp_path, dtype=dtype, std=0.01)
    result = merge(run.path, tmp_path / "merged")
    kind = getattr(torch, dtype)
    base, expected = naive(run)
    found = stored(tmp_path / "merged")
    twice = same = total = 0
    error = exact = 0.0
    for name, target in expected.items():
        assert found[name].dtype is kind
        same += (found[name] == target.to(kind)).sum().item()
        update = target - base[name].double()
        twice += (base[name] + update.to(kind) == target.to(kind)).sum().item()
        total += target.numel()
        error += (found[name].double() - target).square().sum().item()
        exact += update.square().sum().item()
    assert same >= total - 5  # float32 and float64 sums may fall on two sides of a rounding boundary
    assert twice < total - 100  # what rounding BA first, then the sum, would give
    assert result.lost == pytest.approx((error / exact) ** 0.5, rel=1e-3)
    assert 0.0 < result.lost < 0.2
    assert 0.98 < result.cosine < 1.0


def test_the_base_s_stored_type_is_the_default_and_can_be_changed(tmp_path):
    run, _ = lora_run(tmp_path, dtype="bfloat16")
    assert merge(run.path, tmp_path / "a").dtype == "bfloat16"
    result = merge(run.path, tmp_path / "b", dtype="float32")
    assert (result.dtype, result.lost) == ("float32", pytest.approx(0.0, abs=1e-6))
    assert {t.dtype for t in stored(tmp_path / "b").values()} == {torch.float32}
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "float32"


def test_the_merged_directory_is_whole(finished, tmp_path):
    run, _ = finished
    merge(run.adapter, tmp_path / "merged", rows=ROWS)
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "peftctl.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    record = locate(tmp_path / "merged")
    assert (record.kind, record.is_adapter, record.base) == ("model", False, str(run.path.parent / "base"))
    assert record.manifest["merged"]["top1_agreement"] == 1.0
    model, _ = load(tmp_path / "merged")
    assert not hasattr(model, "peft_config")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards(finished, tmp_path):
    run, reference = finished
    merge(run.path, tmp_path / "merged", rows=ROWS, max_shard_size="64KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "merged/model.safetensors.index.json").is_file()
    model, _ = load(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=5e-5, rtol=0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_tied_embeddings_unties_them(tmp_path, target):
    run, reference = lora_run(tmp_path, target_modules=["q_proj", target])
    merge(run.path, tmp_path / "merged", rows=ROWS)
    model, _ = load(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=5e-5, rtol=0)
    assert not model.config.tie_word_embeddings
    changed, kept = model.lm_head.weight, model.model.embed_tokens.weight
    if target == "embed_tokens":
        changed, kept = kept, changed
    before = stored(tmp_path / "base")["model.embed_tokens.weight"]
    assert torch.equal(kept, before)
    assert not torch.equal(changed, before)


def test_both_ends_changed_alike_stay_tied(tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    run, reference = lora_run(tmp_path, **config)
    merge(run.path, tmp_path / "merged", rows=ROWS)
    model, _ = load(tmp_path / "merged")
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in stored(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=5e-5, rtol=0)


def test_trained_copies_replace_modules(tmp_path):
    names = ["model.layers.3", "model.norm", "lm_head"]
    run, reference = lora_run(tmp_path, target_modules=["layers.0.mlp.up_proj"], modules_to_save=names)
    result = merge(run.path, tmp_path / "merged", rows=ROWS)
    assert result.layers == 1
    adapter, merged = stored(run.adapter), stored(tmp_path / "merged")
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], adapter[f"base_model.model.{name}"])
    model, _ = load(tmp_path / "merged")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=5e-5, rtol=0)


def plain_peft(folder, config, base_dir):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["ia3", "dora", "rank_pattern", "vera"])
def test_other_types_of_plain_peft(tiny_dir, tmp_path, kind):
    from peft import IA3Config, LoraConfig, VeraConfig

    config = {
        "ia3": IA3Config(task_type="CAUSAL_LM"),
        "dora": LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj", "down_proj"]),
        "rank_pattern": LoraConfig(
            task_type="CAUSAL_LM", r=2, use_rslora=True, rank_pattern={"q_proj": 5}, target_modules="all-linear"
        ),
        "vera": VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]),
    }[kind]
    adapter = plain_peft(tmp_path / kind, config, tiny_dir)
    assert merge(adapter, tmp_path / "merged", rows=ROWS).folding_error < 5e-6


def test_only_one_model_is_in_memory_at_a_time(finished, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def alive():
        gc.collect()
        return {id(o) for o in gc.get_objects() if type(o) is LlamaForCausalLM}

    real, before, seen = merging.load_model, alive(), []

    def watched(*args, **kwargs):
        seen.append(alive() - before)
        return real(*args, **kwargs)

    monkeypatch.setattr(merging, "load_model", watched)
    merge(finished[0].path, tmp_path / "merged", rows=ROWS)
    assert seen == [set()]


# -- the gate -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[("float32", 0.05), ("bfloat16", 0.05), ("bfloat16", 1e-3)], ids=str)
def victim(request, tmp_path):
    """Runs whose adapters are strong, and so weak that bfloat16 rounds most of them away."""
    return lora_run(tmp_path, dtype=request.param[0], std=request.param[1])[0]


def test_a_wrong_scale_is_refused(victim, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    real = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: real(self, name) * 1.05)
    with pytest.raises(ArtifactError, match=r"folding the adapter into the weights changed the answers.*nothing was"):
        merge(victim.path, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_one_missing_layer_is_refused(victim, tmp_path, monkeypatch):
    real, calls = folding._merge_layer, []

    def skipping(layer, *rest):
        calls.append(layer)
        if len(calls) != 16:
            real(layer, *rest)

    monkeypatch.setattr(folding, "_merge_layer", skipping)
    with pytest.raises(ArtifactError, match="folding the adapter into the weights changed the answers"):
        merge(victim.path, tmp_path / "merged", rows=ROWS)
    assert len(calls) == 28
    assert no_trace(tmp_path)


def test_a_file_that_was_changed_on_its_way_is_refused(victim, tmp_path, monkeypatch):
    def tamper(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0] *= 2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "check_weights", tamper)
    with pytest.raises(ArtifactError, match="reading it back from disk changed the answers"):
        merge(victim.path, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_an_update_of_the_head_that_also_changes_the_input_is_refused(tmp_path, monkeypatch):
    run, _ = lora_run(tmp_path, target_modules=["lm_head"])
    monkeypatch.setattr(folding, "_untie", lambda model: False)
    with pytest.raises(ArtifactError, match="folding the adapter into the weights changed the answers"):
        merge(run.path, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_a_type_that_rounds_too_much_is_refused(tmp_path, monkeypatch):
    run, _ = lora_run(tmp_path, dtype="bfloat16")
    monkeypatch.setitem(parity.ROUNDED, "bfloat16", 1e-7)
    with pytest.raises(ArtifactError, match=r"stored as bfloat16.*mean KL.*top-1 agreement.*take a wider --dtype"):
        merge(run.path, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_an_adapter_with_nan_is_refused(finished, tmp_path):
    adapter = shutil.copytree(finished[0].adapter, tmp_path / "copy")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="merge refused: NaNs detected"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_a_full_disk_leaves_nothing(finished, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    real = LlamaForCausalLM.save_pretrained

    def full(self, folder, **options):
        real(self, folder, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(RunError, match=r"disk full while writing .*merged"):
        merge(finished[0].path, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_figures_of_the_comparison():
    reference = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[2.0, 0.0], [1.5, 1.0]])
    found = parity.compare(reference, other)
    p = torch.tensor([1.0, torch.e]) / (1 + torch.e)
    q = torch.tensor([1.5, 1.0]).softmax(0)
    assert found.max_delta == 1.5
    assert found.relative == pytest.approx(1.5 / 5**0.5)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 2)
    assert (found.top1_agreement, found.positions) == (0.5, 2)


def test_nan_passes_no_gate():
    reference = torch.ones(2, 3)
    broken = parity.compare(reference, reference * float("nan"))
    with pytest.raises(ArtifactError):
        parity.require_exact(broken, "x")
    with pytest.raises(ArtifactError):
        parity.require_close(broken, "bfloat16")
    with pytest.raises(ArtifactError, match=r"logits are \(1, 3\), expected \(2, 3\)"):
        parity.compare(reference, reference[:1])


def test_the_fixed_sentences_are_there_when_no_rows_are(finished, tmp_path):
    result = merge(finished[0].path, tmp_path / "merged")
    assert result.positions > 50


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_whole_model_is_nothing_to_merge(tiny_dir, tmp_path):
    with pytest.raises(UsageError, match=f"already a whole model at {tiny_dir}"):
        merge(tiny_dir, tmp_path / "merged")
    with pytest.raises(UsageError, match="already a whole model at smollm2-135m"):
        merge("smollm2-135m", tmp_path / "merged")


def test_output_must_be_free(finished, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken" / "x"):
        with pytest.raises(UsageError, match=r"--output: .* exists already"):
            merge(finished[0].path, place)
    (tmp_path / "empty").mkdir()
    merge(finished[0].path, tmp_path / "empty", rows=ROWS)
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_unknown_type(finished, tmp_path):
    with pytest.raises(UsageError, match="--dtype: expected float32, bfloat16, float16, got 'int8'"):
        merge(finished[0].path, tmp_path / "merged", dtype="int8")


def test_another_base_is_refused_by_fingerprint(finished, tmp_path):
    other = save_tiny(tmp_path / "other", tiny_llama(seed=4))
    with pytest.raises(ArtifactError, match="adapter of another base"):
        merge(finished[0].path, tmp_path / "merged", base=str(other))
    same = shutil.copytree(finished[0].path.parent / "base", tmp_path / "same")
    merge(finished[0].path, tmp_path / "merged", base=str(same), rows=ROWS)


def test_methods_that_cannot_be_merged(finished, tmp_path):
    adapter = shutil.copytree(finished[0].adapter, tmp_path / "copy")
    content = json.loads((adapter / "peftctl.json").read_text())
    (adapter / "peftctl.json").write_text(json.dumps(content | {"method": "hard_prompt"}))
    with pytest.raises(UsageError, match="Hard prompt can't be merged: there are no weights to merge"):
        merge(adapter, tmp_path / "merged")


def test_a_prompt_of_plain_peft_cannot_be_merged(tiny_dir, tmp_path):
    from peft import PromptTuningConfig

    adapter = plain_peft(tmp_path / "p", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), tiny_dir)
    with pytest.raises(UsageError, match="a prompt can't be merged"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    assert no_trace(tmp_path)


def test_the_adapters_here_change_the_answers(finished):
    """The fixtures above would prove nothing with an adapter that does nothing."""
    assert (finished[1] - probe_logits(tiny_llama(), ROWS)).abs().max() > 0.5

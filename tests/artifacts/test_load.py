import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftctl.artifacts import load as loading
from peftctl.artifacts import locate as locating
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.dtypes import stored_dtype
from peftctl.artifacts.load import load, locate
from peftctl.errors import ArtifactError, UsageError
from peftctl.recipe.schema import ModelSection
from tests.artifacts.helpers import ROWS, random_lora
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the adapter that may be damaged."""
    return shutil.copytree(finished[0].adapter, tmp_path / "copy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_kind_is_recognised(finished, tiny_dir, tmp_path):
    run, _ = finished
    base = str(run.path.parent / "base")
    found = locate(run.path)
    assert (found.kind, found.path, found.folder, found.recipe) == ("run", run.path, run.adapter, run.recipe)
    assert (found.base, found.is_adapter, found.manifest["method"]) == (base, True, "lora")
    found = locate(str(run.adapter))
    assert (found.kind, found.path, found.recipe, found.base) == ("adapter", run.adapter, run.recipe, base)
    found = locate(tiny_dir)
    assert (found.kind, found.path, found.is_adapter, found.base, found.recipe) == (
        "model",
        tiny_dir,
        False,
        None,
        None,
    )
    for name in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "gpt2", str(tmp_path / "model.gguf")):
        found = locate(name)
        assert (found.kind, found.path, found.is_adapter) == ("hub", None, False)


def test_a_misspelt_directory_suggests_its_sibling(finished):
    run, _ = finished
    with pytest.raises(UsageError, match=r"no such directory; did you mean '.*/run'\?"):
        locate(run.path.parent / "runn")
    with pytest.raises(UsageError, match=r"/nowhere does not exist either"):
        locate(run.path / "nowhere" / "adapter")
    with pytest.raises(UsageError, match=r"no such directory$"):
        locate(run.path.parent / "zzz")


def test_what_is_not_an_artefact(finished, tmp_path):
    run, _ = finished
    with pytest.raises(UsageError, match="is a file"):
        locate(run.recipe)
    with pytest.raises(UsageError, match=r"neither a run, an adapter nor a model; expected recipe\.yaml"):
        locate(tmp_path)
    with pytest.raises(UsageError, match="is given twice"):
        load([run.path, run.path])
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UsageError, match="is a checkpoint"):
        locate(tmp_path)


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match=rf"not finished; go on with: peftctl train {tmp_path}/recipe.yaml --resume"):
        locate(tmp_path)


def test_run_and_adapter_directories_load_alike(finished):
    run, reference = finished
    for target in (run.path, run.adapter, str(run.path)):
        model, _ = load(target)
        torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0, rtol=0)


def test_dtype_and_device_can_be_chosen(finished):
    run, reference = finished
    model, _ = load(run.path, dtype="bfloat16", device=torch.device("cpu"))
    assert model.get_base_model().lm_head.weight.dtype is torch.bfloat16
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0.3, rtol=0)


def test_an_unknown_task(finished):
    with pytest.raises(UsageError, match="has no task 'summaries'"):
        load(finished[0].path, task="summaries")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_loads_in_the_type_it_is_stored_in(tmp_path, dtype):
    base = save_tiny(tmp_path / "m", tiny_llama(dtype=dtype))
    assert stored_dtype(ModelSection(name_or_path=str(base))) == dtype
    model, tokenizer = load(base)
    assert model.dtype is getattr(torch, dtype)
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"


def test_an_adapter_of_plain_peft_without_tokenizer(tiny_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    model = random_lora(AutoModelForCausalLM.from_pretrained(tiny_dir), target_modules=["q_proj", "lm_head"])
    reference = probe_logits(model, ROWS)
    model.save_pretrained(tmp_path / "plain")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "plain/adapter_model.safetensors")
    found = locate(tmp_path / "plain")
    assert (found.kind, found.base, dict(found.manifest)) == ("adapter", str(tiny_dir), {})
    loaded, tokenizer = load(tmp_path / "plain")
    torch.testing.assert_close(probe_logits(loaded, ROWS), reference, atol=0, rtol=0)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_the_base_is_checked_by_its_weights(adapter, tmp_path):
    other = save_tiny(tmp_path / "other", tiny_llama(seed=9))
    content = json.loads((adapter / "peftctl.json").read_text())
    edit(adapter / "peftctl.json", base=content["base"] | {"name": str(other)})
    with pytest.raises(ArtifactError, match=r"adapter of another base: .*fingerprint \w{12}, .*other has \w{12}"):
        load(adapter)


def test_a_moved_base_is_found_by_adapter_config(adapter, finished, tmp_path):
    moved = shutil.copytree(finished[0].path.parent / "base", tmp_path / "moved")
    content = json.loads((adapter / "peftctl.json").read_text())
    edit(adapter / "peftctl.json", base=content["base"] | {"name": "/gone/base"})
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(moved))
    model, _ = load(adapter)
    torch.testing.assert_close(probe_logits(model, ROWS), finished[1], atol=0, rtol=0)


def test_a_missing_base_is_named(adapter):
    content = json.loads((adapter / "peftctl.json").read_text())
    edit(adapter / "peftctl.json", base=content["base"] | {"name": "/gone/a"})
    edit(adapter / "adapter_config.json", base_model_name_or_path="/gone/b")
    with pytest.raises(UsageError, match=r"its base model: /gone/b: no such directory"):
        load(adapter)


def test_an_adapter_without_a_base(adapter):
    (adapter / "peftctl.json").unlink()
    edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ArtifactError, match="names no base model"):
        load(adapter)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("peftctl.json", "{", r"peftctl.json: can't be read"),
        ("peftctl.json", "[]", r"expected a JSON object, found a list"),
        ("peftctl.json", '{"format": 2}', r"expected format 1, found 2; a newer peftctl may read it"),
        ("peftctl.json", '{"format": 1, "base": {}}', r"is damaged: no method, task in it"),
        ("peftctl.json", '{"format": 1, "base": 3, "method": "x", "task": "causal_lm"}', r"is damaged: no base"),
        ("adapter_config.json", "{", r"adapter_config.json: can't be read"),
    ],
)
def test_damaged_descriptions(adapter, name, content, message):
    (adapter / name).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        locate(adapter)


def test_damaged_weights(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: is damaged or cut off"):
        load(adapter)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"a pickle can run code")
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: is missing"):
        load(adapter)


def test_a_tensor_too_few_or_too_many(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(iter(tensors))
    save_file({name: t for name, t in tensors.items() if name != gone}, file)
    with pytest.raises(ArtifactError, match=f"1 differ, e.g. {gone}"):
        load(adapter)
    save_file(tensors | {"base_model.model.stray": torch.ones(2)}, file)
    with pytest.raises(ArtifactError, match=r"1 differ, e.g. base_model.model.stray"):
        load(adapter)


def test_an_adapter_that_does_not_fit(adapter):
    edit(adapter / "adapter_config.json", r=16)
    with pytest.raises(ArtifactError, match=r"does not fit .*base: ") as caught:
        load(adapter)
    assert "\n" not in str(caught.value)
    edit(adapter / "adapter_config.json", peft_type="UNHEARD_OF")
    with pytest.raises(ArtifactError, match="does not fit"):
        load(adapter)


def test_only_the_user_s_own_run_can_trust_code_and_choose_a_kernel(finished, tmp_path):
    run, _ = finished
    plain = {"trust_remote_code": False, "attn_implementation": None}
    assert loading._own_settings(locate(run.path)) == plain
    copy = shutil.copytree(run.path, tmp_path / "run")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe + "  trust_remote_code: true\n  attn_implementation: eager\n")
    chosen = {"trust_remote_code": True, "attn_implementation": "eager"}
    assert loading._own_settings(locate(copy)) == loading._own_settings(locate(copy / "adapter")) == chosen
    model, _ = load(copy)
    assert model.config._attn_implementation == "eager"
    alone = shutil.copytree(run.adapter, tmp_path / "elsewhere" / "adapter")
    edit(alone / "peftctl.json", trust_remote_code=True)
    assert loading._own_settings(locate(alone)) == {}
    (copy / "recipe.yaml").write_text("model: {attn_implementation: flash_attention_2}\n")
    assert loading._own_settings(locate(copy)) == plain  # not installed here
    (copy / "recipe.yaml").write_text("[")
    assert loading._own_settings(locate(copy)) == {}


def test_a_hub_adapter_from_the_cache(finished, tmp_path, monkeypatch):
    """The hub's cache layout, offline: the repository's adapter loads onto its base."""
    run, reference = finished
    cache = tmp_path / "models--someone--adapter"
    shutil.copytree(run.adapter, cache / "snapshots" / "c0ffee")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert locate("someone/adapter").path is None
    model, _ = load("someone/adapter")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0, rtol=0)


def test_a_hub_id_that_is_not_here(monkeypatch):
    monkeypatch.setattr(locating, "hub_answers", lambda: False)
    with pytest.raises(UsageError, match="someone/nothing"):
        load("someone/nothing")

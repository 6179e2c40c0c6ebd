"""Loading models and tokenizers: what is loaded is what was saved, and every failure is one line."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftctl.errors import ArtifactError, PeftctlError, UsageError
from peftctl.models import source
from peftctl.models.load import load_model, load_tokenizer, meta_model
from peftctl.recipe.schema import ModelSection
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 6, 7, 300, 2]])


def section(name, **fields):
    return ModelSection(name_or_path=str(name), **({"dtype": "float32"} | fields))


@pytest.fixture
def folder(tiny_dir, tmp_path):
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def test_weights_dtype_and_ties(tiny_dir):
    model = load_model(section(tiny_dir))
    torch.testing.assert_close(model(IDS).logits, tiny_llama()(IDS).logits)
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in load_model(section(tiny_dir, dtype="bfloat16")).parameters()} == {torch.bfloat16}
    assert load_model(section(tiny_dir, dtype="bfloat16"), dtype="float16", device="cpu").dtype == torch.float16
    assert load_model(section(tiny_dir), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_attention_kernel(tiny_dir):
    assert load_model(section(tiny_dir, attn_implementation="eager")).config._attn_implementation == "eager"
    chosen = load_model(section(tiny_dir, attn_implementation="eager"), attn_implementation="sdpa")
    assert chosen.config._attn_implementation == "sdpa"
    with pytest.raises(UsageError, match=r"^model\.attn_implementation: .*leave it out"):
        load_model(section(tiny_dir, attn_implementation="flash_attention_2"))


def test_meta_model_has_shapes_and_no_weights(folder):
    (folder / "model.safetensors").unlink()
    model = meta_model(section(folder, dtype="bfloat16"))
    expected = {name: tuple(p.shape) for name, p in tiny_llama().named_parameters()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_a_new_head_may_be_missing_but_nothing_else(folder, task):
    assert load_model(section(folder, task=task)).num_labels == 2
    _edit(lambda state: state.pop("model.norm.weight"))(folder)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        load_model(section(folder, task=task))


def test_task_that_the_architecture_does_not_have(tiny_dir):
    for call in (meta_model, load_model):
        with pytest.raises(UsageError, match=r"seq2seq|can't be loaded") as caught:
            call(section(tiny_dir, task="seq2seq_lm"))
        assert "\n" not in str(caught.value)


def test_tokenizer_pads_with_its_end_where_it_has_no_padding(folder):
    assert load_tokenizer(section(folder)).pad_token == "<|pad|>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(section(folder))
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == ("<|im_end|>", "right", 396)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="neither a padding nor an end-of-text token"):
        load_tokenizer(section(folder))


def _edit(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def _cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")


def _remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))


def _unknown_type(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "unheard_of"}
    (folder / "config.json").write_text(json.dumps(config))


def _lost_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def _run(folder):
    (folder / "config.json").unlink()
    (folder / "adapter").mkdir()


FAILURES = {
    "cut": (_cut, ArtifactError, r"model\.safetensors: damaged or cut short"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), ArtifactError, "damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), UsageError, r"holds no \*\.safetensors file"),
    "pickle": (_pickled, UsageError, "pickle files can run code"),
    "lost shard": (_lost_shard, ArtifactError, r"lacks model-00002-of-00002\.safetensors"),
    "bad index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"), ArtifactError, r"index\.json can't be read",
    ),
    "missing": (
        _edit(lambda s: s.pop("model.layers.1.mlp.up_proj.weight")), ArtifactError,
        r"lack 1 of the tensors .*: model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "no embeddings": (_edit(lambda s: s.pop("model.embed_tokens.weight")), ArtifactError, "lack 2 of the tensors"),
    "shape": (
        _edit(lambda s: s.update({"model.norm.weight": torch.ones(7)})), ArtifactError,
        r"model\.norm\.weight is \(7,\), expected \(32,\)",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), UsageError, r"holds no config\.json"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), ArtifactError, "not a valid JSON file"),
    "adapter": (_adapter, UsageError, "is an adapter; give its base model"),
    "run": (_run, UsageError, "is a run directory"),
    "remote code": (_remote_code, UsageError, r"set model\.trust_remote_code=true"),
    "unknown type": (_unknown_type, UsageError, r"`unheard_of`.*update transformers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(name, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    damage, error, message = FAILURES[name]
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(section(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["no config", "bad config", "adapter", "run", "remote code", "unknown type"])
def test_failures_of_the_shapes_alone(name, folder):
    damage, error, message = FAILURES[name]
    damage(folder)
    with pytest.raises(error, match=message):
        meta_model(section(folder))


def test_failures_of_the_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="its tokenizer can't be read"):
        load_tokenizer(section(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="holds no tokenizer files"):
        load_tokenizer(section(folder))


def test_unused_tensors_are_told(folder):
    _edit(lambda state: state.update({"model.layers.9.extra": torch.ones(2)}))(folder)
    with pytest.warns(UserWarning, match=r"1 tensors .* not used: model\.layers\.9\.extra"):
        load_model(section(folder))


@pytest.mark.parametrize("call", [load_model, load_tokenizer, meta_model])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "not on this machine, and the model hub can't be reached; give a local directory"),
        ("smollm2-135m", r"python scripts/fetch_demo_models\.py"),
        ("bad name/with:marks", "not on this machine"),
        ("./none", "no such directory"),
        ("runs/x/model", "no such directory"),
        ("none.gguf", "no such file"),
        (__file__, "is a file; expected"),
    ],
)
def test_names_that_lead_nowhere(call, name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path))
    monkeypatch.setattr(source, "hub_answers", lambda: False)
    with pytest.raises(UsageError, match=message) as caught:
        call(section(name))
    assert str(caught.value).startswith(name)


def test_the_hub_counts_as_unreachable_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source.hub_answers.cache_clear()
    assert source.hub_answers() is False
    source.hub_answers.cache_clear()


def test_an_earlier_download_serves_while_the_hub_is_away(tiny_dir, monkeypatch):
    monkeypatch.setattr(source, "hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_dir))
    model = load_model(section("some/model"))
    torch.testing.assert_close(model(IDS).logits, tiny_llama()(IDS).logits)


def test_what_the_hub_refuses_is_one_line(monkeypatch):
    import transformers

    def refuse(*_, **__):
        raise OSError("some/model is not a local folder and is not a valid model identifier\nlisted on the hub")

    monkeypatch.setattr(source, "hub_answers", lambda: True)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UsageError, match=r"^some/model: .*valid model identifier; check the name") as caught:
        meta_model(section("some/model"))
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_an_alias_loads_from_the_cache(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path))
    shutil.copytree(tiny_dir, tmp_path / "models" / "smollm2-135m")
    model = load_model(section("smollm2-135m"))
    torch.testing.assert_close(model(IDS).logits, tiny_llama()(IDS).logits)


def test_loading_is_quiet(tiny_dir, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(section(tiny_dir))
        load_tokenizer(section(tiny_dir))
    assert capfd.readouterr() == ("", "")


# -- .gguf -------------------------------------------------------------------------------------------------------


def _write_gguf(path, model, tokenizer):
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in raw["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # the format interleaves the halves of each head
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(_gguf_name(name), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name):
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
        "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    }  # fmt: skip
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


def test_gguf(tmp_path, capfd):
    file = tmp_path / "tiny.gguf"
    _write_gguf(file, tiny_llama(), tiny_tokenizer())
    model = load_model(section(file))
    torch.testing.assert_close(model(IDS).logits, tiny_llama()(IDS).logits, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shapes = {name: tuple(p.shape) for name, p in meta_model(section(file)).named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    text = "Book a table, please"
    assert load_tokenizer(section(file))(text).input_ids == tiny_tokenizer()(text).input_ids
    assert capfd.readouterr().err == ""
    # It is a plain model now: saved and read back like any other.
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.testing.assert_close(load_model(section(tmp_path / "plain"))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("content", [b"", b"x" * 5000, b"GGUF\x03\x00\x00\x00" + b"\x01" * 16])
def test_damaged_gguf(content, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(content)
    for call in (load_model, load_tokenizer, meta_model):
        with pytest.raises(PeftctlError, match=r"bad\.gguf: .* damaged"):
            call(section(tmp_path / "bad.gguf"))


def test_save_tiny_untied_round_trip(tmp_path):
    model = load_model(section(save_tiny(tmp_path / "untied", tiny_llama(tie=False))))
    assert model.lm_head.weight is not model.model.embed_tokens.weight

"""Weights read one by one: the same as loaded ones, and never the whole model where files hold the model's names."""

import json

import pytest
import torch

from peftctl.errors import ArtifactError
from peftctl.models.fingerprint import weights_fingerprint
from peftctl.models.stored import StoredWeights
from peftctl.recipe.schema import ModelSection
from tests.tiny import save_tiny, tiny_llama


def stored(path):
    return StoredWeights(ModelSection(name_or_path=str(path)))


def test_single_weights_are_the_models_own_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr("peftctl.models.stored.load_model", None)
    model = tiny_llama(dtype="bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = stored(tmp_path)
    assert weights.streams
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = weights.get(name)
        assert found.dtype is torch.float32 and torch.equal(found, parameter.float())
        assert weights.shapes[name] == tuple(parameter.shape)
    assert weights.owner["lm_head.weight"] == "model.embed_tokens.weight"
    assert weights.fingerprint() == weights_fingerprint(model)


def test_files_with_other_names_are_loaded_as_the_library_does(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.transformer.save_pretrained(tmp_path)  # names without `transformer.`, as GPT-2's own on the hub
    weights = stored(tmp_path)
    assert not weights.streams
    for name, parameter in model.named_parameters():
        assert torch.equal(weights.get(name), parameter)
    assert weights.fingerprint() == weights_fingerprint(model)


def test_files_that_do_not_fit_are_named(tmp_path):
    save_tiny(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(ArtifactError, match=r"gate_proj.weight is \(64, 32\), expected \(48, 32\) by config.json"):
        stored(tmp_path).get("model.layers.0.mlp.gate_proj.weight")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    with pytest.raises(ArtifactError, match=r"model.safetensors: damaged or cut short"):
        stored(tmp_path)

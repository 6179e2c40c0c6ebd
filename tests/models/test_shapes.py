"""Shipped shapes: the published sizes, the real names, and only where the model itself is not to be had."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from peftctl.errors import UsageError
from peftctl.models import shapes, source
from peftctl.models.anatomy import block_list
from peftctl.models.load import STAND_IN_TOKENIZER, load_model, load_tokenizer, meta_model, stand_in
from peftctl.recipe.schema import ModelSection
from tests.tiny import tiny_llama

FILES = sorted(Path(shapes.__file__).with_name("shapes").glob("*.json"))


def section(name, **fields):
    return ModelSection(name_or_path=str(name), **fields)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(source, "hub_answers", lambda: False)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(source, "hub_answers", lambda: True)


# As the model cards and papers count them; T5's head is its embedding in transformers, whatever its config.json says.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("huggyllama/llama-7b", 6_738_415_616),
        ("huggyllama/llama-13b", 13_015_864_320),
        ("huggyllama/llama-30b", 32_528_943_616),
        ("huggyllama/llama-65b", 65_285_660_672),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("bigscience/bloomz-7b1-mt", 7_069_016_064),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("THUDM/chatglm3-6b", 6_243_584_000),
        ("gpt3-175b", 174_604_283_904),
        ("google-t5/t5-base", 222_903_552),
        ("google/flan-t5-large", 783_150_080 - 32128 * 1024),
    ],
)
def test_models_have_their_published_sizes(name, parameters, no_hub):
    task = "seq2seq_lm" if "t5" in name else "causal_lm"
    model = meta_model(section(name, task=task, dtype="float16"), allow_stand_in=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


def test_every_file_is_plain_and_no_name_occurs_twice():
    names = []
    for file in FILES:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert content["config"]["model_type"]
        names += [name.lower() for name in content["names"]]
    assert len(set(names)) == len(names) >= len(FILES) == 11


def test_names_are_found_in_any_case():
    assert shapes.find("HuggyLlama/LLaMA-7b") is shapes.find("yahma/llama-7b-hf") is not None
    assert shapes.find("nobody/nothing") is None


def test_a_listed_model_has_the_names_that_its_own_code_gives_it(no_hub):
    model = meta_model(section("THUDM/chatglm3-6b"), allow_stand_in=True)
    linear = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    block = "transformer.encoder.layers.27."
    assert linear[block + "self_attention.query_key_value"] == (4608, 4096)
    assert linear[block + "self_attention.dense"] == (4096, 4096)
    assert linear[block + "mlp.dense_h_to_4h"] == (2 * 13696, 4096)
    assert linear[block + "mlp.dense_4h_to_h"] == (4096, 13696)
    assert len(linear) == 28 * 4 + 1
    assert model.get_submodule(block + "self_attention.query_key_value").bias is not None
    assert block_list(model)[0] == "transformer.encoder.layers"
    assert model.get_input_embeddings().weight.shape == (65024, 4096)
    assert model.get_output_embeddings() is model.transformer.output_layer
    config = model.config
    assert (config.model_type, config.hidden_size, config.intermediate_size) == ("chatglm", 4096, 13696)


def test_a_task_that_the_shapes_do_not_have_is_one_line(no_hub):
    with pytest.raises(UsageError, match=r"^huggyllama/llama-7b: can't be built as seq2seq_lm") as caught:
        meta_model(section("huggyllama/llama-7b", task="seq2seq_lm"), allow_stand_in=True)
    assert "\n" not in str(caught.value)


def test_shapes_never_replace_a_model_that_can_be_had(hub, monkeypatch):
    assert stand_in(section("huggyllama/llama-7b")) is None
    monkeypatch.setattr(source, "hub_answers", lambda: False)
    assert stand_in(section("huggyllama/llama-7b")) is not None
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "an/earlier/download")
    assert stand_in(section("huggyllama/llama-7b")) is None


def test_a_folder_of_the_same_name_wins(no_hub, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_dir, tmp_path / "t5-base")
    model = meta_model(section("t5-base"), allow_stand_in=True)
    assert model.num_parameters() == tiny_llama().num_parameters()


def test_code_that_is_not_to_be_run_is_stood_in_for_with_a_hub_too(hub):
    assert stand_in(section("THUDM/chatglm3-6b")).remote_code
    assert stand_in(section("THUDM/chatglm3-6b", trust_remote_code=True)) is None
    assert stand_in(section("gpt3-175b")) is not None  # never published


def test_nothing_stands_in_unless_it_is_allowed(no_hub):
    for call in (load_model, load_tokenizer, meta_model):
        with pytest.raises(
            UsageError, match=r"not on this machine.*`check` and `train --dry-run` plan with its shapes"
        ):
            call(section("huggyllama/llama-7b"))
    with pytest.raises(UsageError, match=r"directory with its weights and model\.trust_remote_code=true$"):
        load_model(section("THUDM/chatglm3-6b"))


def test_the_tokenizer_that_stands_in_is_the_demo_models(no_hub, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"^smollm2-135m: .*fetch_demo_models\.py"):
        load_tokenizer(section("huggyllama/llama-7b"), allow_stand_in=True)
    shutil.copytree(tiny_dir, tmp_path / "models" / STAND_IN_TOKENIZER)
    base = load_tokenizer(section("huggyllama/llama-7b"), allow_stand_in=True)
    assert (len(base), base.chat_template) == (396, None)  # Llama 7B has no chat template either
    assert load_tokenizer(section("THUDM/chatglm3-6b"), allow_stand_in=True).chat_template
    with pytest.raises(UsageError, match=r"^nobody/nothing: not on this machine"):
        load_tokenizer(section("nobody/nothing"), allow_stand_in=True)

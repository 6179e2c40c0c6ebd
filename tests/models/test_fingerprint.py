"""The fingerprint of base weights: blind to dtype, wrappers and files; sensitive to any fine-tune."""

import peft
import pytest
import torch

from peftctl.models.fingerprint import _positions, directory_fingerprint, weights_fingerprint
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection
from tests.tiny import save_tiny, tiny_llama, tiny_opt


def load(path, dtype):
    return load_model(ModelSection(name_or_path=str(path), dtype=dtype))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_load_does_not_matter(stored, tmp_path):
    path = save_tiny(tmp_path / "model", tiny_llama(dtype=stored))
    loads = ["float32", "bfloat16"] + ([] if stored == "float32" else ["float16"])
    prints = {weights_fingerprint(load(path, dtype)) for dtype in loads}
    assert prints == {directory_fingerprint(path)}
    assert len(next(iter(prints))) == 64


def test_small_and_tiny_values_survive_float16():
    model = tiny_llama(dtype="bfloat16")
    with torch.no_grad():
        model.model.norm.weight.mul_(3e-6)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    assert weights_fingerprint(model) == weights_fingerprint(model.to(torch.float16))


@pytest.mark.parametrize("build", [tiny_llama, lambda: tiny_llama(tie=False), tiny_opt])
def test_files_give_what_the_model_gives(build, tmp_path):
    model = build()
    expected = weights_fingerprint(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert directory_fingerprint(tmp_path / "whole") == expected
    assert directory_fingerprint(tmp_path / "shards") == expected


def test_a_file_that_repeats_the_tied_head(tmp_path):
    from safetensors.torch import load_file, save_file

    path = save_tiny(tmp_path / "model")
    before = directory_fingerprint(path)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert directory_fingerprint(path) == before


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_do_not_count(name):
    expected = weights_fingerprint(tiny_llama())
    model = peft.get_peft_model(tiny_llama(), ADAPTERS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert weights_fingerprint(model) == expected


def test_the_base_inside_an_adapter_counts():
    model = peft.get_peft_model(tiny_llama(), ADAPTERS["lora"]())
    expected = weights_fingerprint(model)
    with torch.no_grad():
        model.base_model.model.model.layers[2].mlp.up_proj.base_layer.weight.mul_(1.01)
    assert weights_fingerprint(model) != expected


def test_any_changed_tensor_counts():
    model = tiny_llama()
    seen = {weights_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.02)
        seen.add(weights_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_shapes_count():
    first = torch.nn.Linear(4, 6, bias=False)
    second = torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        second.weight.copy_(first.weight.reshape(4, 6))
    assert weights_fingerprint(first) != weights_fingerprint(second)


def test_a_sparse_change_of_a_large_tensor_counts():
    torch.manual_seed(0)
    layer = torch.nn.Linear(1536, 576, bias=False)
    expected = weights_fingerprint(layer)
    with torch.no_grad():
        layer.weight += (torch.rand_like(layer.weight) < 0.005) * 0.1
    assert weights_fingerprint(layer) != expected


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (49152, 576), (3000, 3000), (4097, 1)])
def test_samples_meet_nearly_every_row_and_column(shape):
    places = _positions(shape[0] * shape[1])
    assert int(places.min()) >= 0 and int(places.max()) < shape[0] * shape[1] and len(places) == 4096
    rows, columns = len(set((places // shape[1]).tolist())), len(set((places % shape[1]).tolist()))
    # 4096 places thrown at random would meet 93 % of 1536, 75 % of 3000 and 63 % of 4097.
    assert rows > 0.75 * min(shape[0], 4096) and columns > 0.75 * shape[1]


def test_positions_of_huge_tensors_are_distinct():
    places = _positions(10**12)
    assert len(set(places.tolist())) == 4096 and int(places.max()) < 10**12

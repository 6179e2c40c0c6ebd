"""Merging what the keys of LoRA make: embeddings, parts of a fused projection, patterns, whole and tied modules."""

import pytest
import torch

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.merge import merge
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.save import save_artifact
from peftctl.methods.base import Context
from peftctl.methods.lora import Config, Method
from peftctl.models.load import load_model, load_tokenizer
from peftctl.recipe.schema import ModelSection
from tests.artifacts.helpers import ROWS, make_info, make_recipe
from tests.methods.architectures import tiny_of
from tests.tiny import save_tiny, tiny_llama


def tiny_gpt2():
    return tiny_of("gpt2", "cpu", vocab_size=400, bos_token_id=0)


CASES = {
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "mlp"]}, False),
    "embedding, untied": (lambda: tiny_llama(tie=False), {"target_modules": ["embed_tokens"]}, False),
    "tied embedding": (tiny_llama, {"modules_to_save": ["embed_tokens", "norm"]}, True),
    "tied embedding of gpt2": (tiny_gpt2, {"target_modules": "mlp", "modules_to_save": ["wte"]}, True),
    "parts and patterns": (
        tiny_gpt2, {"target_modules": "attention", "parts": ["q", "v"], "rank_pattern": {"c_attn": 2}}, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_answers_as_base_and_adapter_and_keeps_its_tie_where_it_can(case, tmp_path):
    make, keys, tied = CASES[case]
    method = Method(Config(r=4, **keys))
    recipe = make_recipe(save_tiny(tmp_path / "base", make()), tmp_path / "run", method=method.config)
    base = load_model(recipe.model)
    info = make_info(recipe, base)
    torch.manual_seed(0)
    model = method.apply(base, Context(recipe))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    exported = method.export(model.eval())
    expected = probe_logits(exported, ROWS)
    save_artifact(exported, load_tokenizer(recipe.model), RunDir(tmp_path / "run"), info)
    merge(tmp_path / "run" / "adapter", tmp_path / "merged")
    merged = load_model(ModelSection(name_or_path=str(tmp_path / "merged"), dtype="float32"))
    torch.testing.assert_close(probe_logits(merged, ROWS), expected, rtol=1e-4, atol=1e-4)
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (head.weight is embedding.weight) == merged.config.tie_word_embeddings == tied

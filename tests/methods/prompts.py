"""What the tests of prompt methods share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftctl.methods import multitask_prompt_tuning, p_tuning, prompt_tuning
from peftctl.methods.base import Context
from peftctl.recipe.schema import DataSection, Source
from tests.methods.helpers import recipe
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.arange(5, 29).reshape(2, 12)
KINDS = {
    "prompt_tuning": (prompt_tuning, {}),
    "p_tuning": (p_tuning, {}),
    "p_tuning-mlp": (p_tuning, {"encoder": "mlp", "hidden": 8}),
    "multitask_prompt_tuning": (multitask_prompt_tuning, {}),
}


def method(kind, **keys):
    module, own = KINDS[kind]
    return module.Method(module.Config(**({"num_virtual_tokens": 5} | own | keys)))


def context(chosen, task="causal_lm", sources=None, **train):
    made = recipe(chosen.config, **train)
    data = (
        made.data if sources is None else DataSection(sources=[Source(path=f"task-{i}.jsonl") for i in range(sources)])
    )
    model = made.model.model_copy(update={"task": task})
    return Context(made.model_copy(update={"model": model, "data": data}), tiny_tokenizer())


def attached(chosen, model=None, task="causal_lm", sources=None, **train):
    torch.manual_seed(0)
    return chosen.apply(model if model is not None else tiny_llama(), context(chosen, task, sources, **train))


def table(model):
    return model.prompt_encoder["default"].embedding.weight


def randomise(model, seed=0):
    """Give everything that trains values of its own; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return model


def behind(base, prompt, ids=IDS):
    """Return the logits of a base that reads vectors and then tokens: what every prompt method must equal."""
    embedded = base.get_input_embeddings()(ids)
    prompts = prompt if prompt.dim() == 3 else prompt.expand(len(ids), *prompt.shape)
    with torch.no_grad():
        return base(inputs_embeds=torch.cat([prompts.to(embedded.dtype), embedded], dim=1)).logits


def smollm2():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)

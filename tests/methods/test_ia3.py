"""(IA)^3: the paper's equations in float64, which layers are scaled where, and what weight decay must not do."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from peftctl.artifacts.fold import fold
from peftctl.artifacts.parity import compare, require_exact
from peftctl.errors import UsageError
from peftctl.methods.base import Context
from peftctl.methods.ia3 import Config, Method
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.training.optimizers import check_partition
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5

IDS = torch.arange(1, 25).reshape(2, 12)


def vectors(model):
    """Return the trainable vector of every layer that has one, by the layer's name in the base."""
    prefix = "base_model.model."
    layers = {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, IA3Layer)}
    return {name: layer.ia3_l["default"] for name, layer in layers.items()}


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for vector in vectors(model).values():
        vector.data = 1 + 0.3 * torch.randn(vector.shape, generator=generator, dtype=torch.float64).to(vector.dtype)


def tiny_qwen3():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def tiny_tagger():
    return tiny_bert(kind="BertForTokenClassification", num_labels=3)


def for_task(task, **train):
    wanted = recipe(**train)
    return Context(wanted.model_copy(update={"model": wanted.model.model_copy(update={"task": task})}))


# -- the equations -------------------------------------------------------------------------------------------------


def test_keys_values_and_feed_forward_are_the_papers_equations_in_float64():
    model = applied(Method(Config()), tiny_opt().double()).double().eval()
    randomise(model)
    block, found = model.base_model.model.model.decoder.layers[1], vectors(model)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name in ("k_proj", "v_proj"):
        layer = getattr(block.self_attn, name)
        scale = found[f"model.decoder.layers.1.self_attn.{name}"].flatten()
        w, b = layer.base_layer.weight, layer.base_layer.bias
        naive = torch.stack([torch.stack([scale * (w @ v + b) for v in row]) for row in x])
        torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)
    inner, scale = torch.randn(2, 5, 64, dtype=torch.float64), found["model.decoder.layers.1.fc2"].flatten()
    w, b = block.fc2.base_layer.weight, block.fc2.base_layer.bias
    naive = torch.stack([torch.stack([w @ (scale * v) + b for v in row]) for row in inner])
    torch.testing.assert_close(block.fc2(inner), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_starts_as_the_base_exactly(base, training):
    model = applied(Method(Config()), base()).train(training)
    assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)
    assert all((vector == 1).all() for vector in vectors(model).values())


def test_scaling_keys_and_unscaling_queries_changes_nothing():
    reference = tiny_llama().double()(input_ids=IDS).logits
    model = applied(Method(Config()), tiny_llama().double()).double()
    for name, vector in vectors(model).items():
        if name.endswith("k_proj"):
            vector.data.mul_(4.0)
    moved = model(input_ids=IDS).logits
    for name, weight in model.named_parameters():
        if ".q_proj." in name:
            weight.data.div_(4.0)
    assert (moved - reference).abs().max() > 0.1
    torch.testing.assert_close(model(input_ids=IDS).logits, reference, rtol=1e-9, atol=1e-9)


def test_on_qwen3_only_scales_that_differ_show_because_it_norms_keys():
    reference = tiny_qwen3()(input_ids=IDS).logits
    model = applied(Method(Config()), tiny_qwen3())
    keys = [vector for name, vector in vectors(model).items() if name.endswith("k_proj")]
    for vector in keys:
        vector.data.fill_(3.0)
    assert (model(input_ids=IDS).logits - reference).abs().max() < 1e-3
    for vector in keys:
        vector.data[:4] = 1.0
    assert (model(input_ids=IDS).logits - reference).abs().max() > 0.05


# -- what is scaled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "scaled", "read"),
    [
        (tiny_llama, {"k_proj", "v_proj"}, {"down_proj"}),
        (tiny_opt, {"k_proj", "v_proj"}, {"fc2"}),
        (tiny_qwen3, {"k_proj", "v_proj"}, {"down_proj"}),
        (lambda: tiny_of("qwen2"), {"k_proj", "v_proj"}, {"down_proj"}),
        (lambda: tiny_of("gemma2"), {"k_proj", "v_proj"}, {"down_proj"}),
        (tiny_bart, {"k_proj", "v_proj"}, {"fc2"}),
        (tiny_t5, {"k", "v"}, {"wo"}),
        (tiny_tagger, {"key", "value"}, {"dense"}),
    ],
)
def test_keys_values_and_feed_forward_ends_are_found_by_structure(base, scaled, read):
    model = Method(Config()).apply(base(), for_task("token_cls" if base is tiny_tagger else "causal_lm"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, IA3Layer)}
    assert {n.rsplit(".", 1)[-1] for n, m in layers.items() if not m.is_feedforward} == scaled
    assert {n.rsplit(".", 1)[-1] for n, m in layers.items() if m.is_feedforward} == read
    attentions = sum(n.rsplit(".", 1)[-1] in {"q_proj", "q", "query"} for n, _ in model.named_modules())
    assert sum(not m.is_feedforward for m in layers.values()) == 2 * attentions
    assert Method(Config()).count(base()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_bert_has_no_vector_at_the_end_of_attention():
    model = Method(Config()).apply(tiny_tagger(), for_task("token_cls"))
    ends = {name for name in vectors(model) if name.endswith("output.dense")}
    assert ends == {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}


def test_cross_attention_has_vectors_of_its_own():
    names = set(vectors(applied(Method(Config()), tiny_t5())))
    assert {f"decoder.block.{i}.layer.{j}.{a}.{r}" for i in range(2) for j, a in enumerate(("SelfAttention",
            "EncDecAttention")) for r in "kv"} < names  # fmt: skip


def test_the_count_on_smollm2_is_the_specifications():
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert Method(Config()).count(model) == 30 * (2 * 192 + 1536) == 57_600


def test_a_vector_has_one_entry_a_row_of_the_shared_key_heads():
    found = vectors(applied(Method(Config()), tiny_llama()))
    shapes = {name.rsplit(".", 1)[-1]: vector.numel() for name, vector in found.items()}
    assert shapes == {"k_proj": 16, "v_proj": 16, "down_proj": 64}


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "bloom", "falcon", "phi3", "mpt"])
def test_fused_projections_are_refused(architecture):
    for call in (lambda m: Method(Config()).count(m), lambda m: Method(Config()).apply(m, context())):
        with pytest.raises(UsageError, match=rf"the {architecture} architecture has no linear layers of their own"):
            call(tiny_of(architecture))


def test_experts_are_refused():
    with pytest.raises(UsageError, match="the feed-forward parts of the mixtral architecture end is not known here"):
        Method(Config()).count(tiny_of("mixtral"))


def test_the_notice_names_the_layers():
    assert Method(Config()).notices(tiny_llama()) == ["scaled: outputs of k_proj, v_proj; inputs of down_proj"]


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
def test_vectors_never_decay(head):
    """Under weight decay and without gradients nothing but the weight of a head moves."""
    base, task = (tiny_tagger(), "token_cls") if head else (tiny_llama(), "causal_lm")
    wanted = for_task(task, weight_decay=0.5)
    model = Method(Config()).apply(base, wanted)
    groups = Method(Config()).param_groups(model, wanted.recipe.train)
    check_partition(model, groups)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(3):
        optimizer.step()
    decayed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert all((vector == 1).all() for vector in vectors(model).values())
    assert {name.rsplit(".", 3)[-3] for name in decayed} == ({"modules_to_save"} if head else set())


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_bart])
def test_merged_equals_unmerged_also_with_biases(base):
    model = applied(Method(Config()), base().double()).double().eval()
    randomise(model)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_bart else {})
    logits = model(**inputs).logits
    assert (logits - base().double()(**inputs).logits).abs().max() > 0.05
    merged, loss = fold(model, torch.float64)
    torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-10, atol=1e-10)
    assert loss.layers == len([n for n, _ in base().named_modules() if n.rsplit(".", 1)[-1] in
                               {"k_proj", "v_proj", "down_proj", "fc2"}])  # fmt: skip


def test_trained_over_nf4_it_folds_into_the_original_weights(tmp_path):
    """peft refuses to merge into quantised weights; the adapter itself is the same file."""
    section = ModelSection(name_or_path=str(save_tiny(tmp_path / "base")), dtype="float32")
    quantised = load_model(section, device="cpu", quantization=QuantizationSection(bits=4))
    plain = quantised(input_ids=IDS).logits
    model = applied(Method(Config()), quantised)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == Method(Config()).count(tiny_llama())
    torch.testing.assert_close(model(input_ids=IDS).logits, plain, rtol=0, atol=0)
    losses = run_steps(model, 4, lr=3e-2)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="4-bit"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    logits = again(input_ids=IDS).logits.detach()
    merged, _ = fold(again, torch.float32)
    require_exact(compare(logits.flatten(0, 1), merged(input_ids=IDS).logits.detach().flatten(0, 1)), "merging")


def test_on_a_bfloat16_base_vectors_are_float32_and_small_steps_count():
    model = applied(Method(Config()), tiny_llama(dtype="bfloat16"))
    run_steps(model, 1, lr=1e-4)
    assert {vector.dtype for vector in vectors(model).values()} == {torch.float32}
    assert all((vector != 1).any() for vector in vectors(model).values())

"""Which modules a `target_modules` value selects, over architectures, and what it says where it selects nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from peftctl.errors import UsageError
from peftctl.methods._targets import adaptable_modules, in_out_features, matched_modules, suffixes
from peftctl.models.anatomy import fused_parts
from tests.methods.architectures import tiny_of
from tests.tiny import tiny_llama

ATTENTION_AND_MLP = {
    "llama": (["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]),
    "qwen2": (["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]),
    "mistral": (["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]),
    "gemma2": (["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]),
    "phi3": (["o_proj", "qkv_proj"], ["down_proj", "gate_up_proj"]),
    "gpt2": (["attn.c_proj", "c_attn"], ["c_fc", "mlp.c_proj"]),
    "opt": (["k_proj", "out_proj", "q_proj", "v_proj"], ["fc1", "fc2"]),
    "bloom": (["dense", "query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"]),
    "bert": (
        ["attention.output.dense", "key", "query", "value"],
        ["0.output.dense", "1.output.dense", "intermediate.dense"],
    ),
    "t5": (["k", "o", "q", "v"], ["wi", "wo"]),
}


@pytest.mark.parametrize("architecture", ATTENTION_AND_MLP)
def test_attention_and_mlp_are_the_two_halves_of_every_block(architecture):
    model = tiny_of(architecture)
    attention, mlp = (matched_modules(model, word) for word in ("attention", "mlp"))
    assert (suffixes(model, attention), suffixes(model, mlp)) == ATTENTION_AND_MLP[architecture]
    assert not attention.keys() & mlp.keys()
    outside = matched_modules(model, "all-linear").keys() - attention.keys() - mlp.keys()
    assert outside == ({"cls.predictions.transform.dense"} if architecture == "bert" else set())


def test_cross_attention_is_attention():
    names = matched_modules(tiny_of("t5"), "attention")
    assert "decoder.block.1.layer.1.EncDecAttention.q" in names
    assert len(names) == 2 * 4 + 2 * 8  # the encoder's blocks have one attention, the decoder's two


def test_words_names_and_embeddings_mix_in_a_list():
    model = tiny_llama()
    names = list(matched_modules(model, ["embed_tokens", "attention", "layers.1.mlp.up_proj"]))
    assert names[0] == "model.embed_tokens"
    assert sum(".self_attn." in name for name in names) == 16
    assert [name for name in names if ".mlp." in name] == ["model.layers.1.mlp.up_proj"]


def test_all_linear_leaves_the_head_and_embeddings_out():
    model = tiny_llama(tie=False)
    names = matched_modules(model, "all-linear")
    assert len(names) == 4 * 7 and "lm_head" not in names
    assert "lm_head" in matched_modules(model, ["all-linear", "lm_head"])


def test_a_regular_expression_matches_whole_names_and_passes_containers_over():
    model = tiny_llama()
    assert list(matched_modules(model, r".*layers\.0\.mlp.*")) == [
        f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
    ]


def test_positions_that_look_up_something_else_are_no_embedding_target():
    assert "model.decoder.embed_positions" not in adaptable_modules(tiny_of("opt"))
    assert "transformer.wpe" in adaptable_modules(tiny_of("gpt2"))


def test_in_and_out_are_right_for_every_kind():
    gpt2 = dict(tiny_of("gpt2").named_modules())
    assert in_out_features(gpt2["transformer.h.0.attn.c_attn"]) == (32, 96)
    assert in_out_features(gpt2["transformer.wte"]) == (64, 32)
    assert in_out_features(gpt2["lm_head"]) == (32, 64)


def test_suffixes_select_exactly_what_they_were_made_from():
    model = tiny_of("bert")
    chosen = {"bert.encoder.layer.1.output.dense", "bert.encoder.layer.0.attention.self.query"}
    ends = suffixes(model, chosen)
    hits = {n for n, _ in model.named_modules() for e in ends if n == e or n.endswith("." + e)}
    assert hits == chosen
    assert ends == ["0.attention.self.query", "1.output.dense"]


@pytest.mark.parametrize(
    ("architecture", "targets", "message"),
    [
        ("llama", ["q_porj"], r"'q_porj' matches no linear layer .*did you mean 'q_proj'\?"),
        ("llama", ["atention"], r"did you mean 'attention'\?"),
        ("llama", ["input_layernorm"], "is model.layers.0.input_layernorm, a LlamaRMSNorm, not a linear layer"),
        ("llama", ["self_attn"], "a LlamaAttention, not a linear layer; there are: .*q_proj"),
        ("opt", ["embed_positions"], "a OPTLearnedPositionalEmbedding, not a linear layer"),
        ("mixtral", ["gate_up_proj"], r"a tensor of \(2, 128, 32\) inside the fused kernel of MixtralExperts"),
        ("mixtral", "mlp", "'mlp' matches no linear layer .*experts lie fused in MixtralExperts"),
        ("mamba", "attention", "'attention' matches no linear layer of the mamba"),
        ("mamba", ["out_proj"], "a Linear, inside the fused kernel of MambaMixer, which never calls it"),
        ("llama", r"(", "is not a regular expression"),
        ("llama", r"q_proj", "'q_proj' matches no linear layer"),
    ],
)
def test_a_target_that_can_not_be_adapted_is_named_with_its_type(architecture, targets, message):
    with pytest.raises(UsageError, match=message) as caught:
        matched_modules(tiny_of(architecture), targets)
    assert "\n" not in str(caught.value)


def test_the_projection_inside_torchs_own_attention_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.up = nn.Linear(8, 8)

    model = tiny_llama()
    model.model.extra = Block()
    assert "model.extra.attention.out_proj" not in matched_modules(model, "all-linear")
    with pytest.raises(UsageError, match="inside the fused kernel of MultiheadAttention"):
        matched_modules(model, ["attention.out_proj"])


# -- fused projections: the rows that the table calls q, k and v are those that the forward pass takes for them --------

FUSED = [
    ("gpt2", {}, "c_attn"),
    ("bloom", {}, "query_key_value"),
    ("gpt_neox", {}, "query_key_value"),
    ("gpt_bigcode", {"multi_query": True}, "c_attn"),
    ("gpt_bigcode", {"multi_query": False}, "c_attn"),
    ("mpt", {}, "Wqkv"),
    ("phi3", {}, "qkv_proj"),
    ("falcon", {"new_decoder_architecture": True}, "query_key_value"),
    ("falcon", {"multi_query": True}, "query_key_value"),
    ("falcon", {"multi_query": False, "num_kv_heads": 4}, "query_key_value"),
]


def seen_by_attention(model, monkeypatch):
    """Return the q, k, v of the first block for one token at position 0, where a rotation is the identity."""
    seen = []

    def spy(module, query, key, value, *_, **__):
        seen.append((query, key, value))
        return torch.zeros_like(query).transpose(1, 2), None

    if model.config.model_type == "falcon":
        original = type(model.transformer.h[0].self_attention)._split_heads
        monkeypatch.setattr(
            type(model.transformer.h[0].self_attention),
            "_split_heads",
            lambda self, fused: seen.append(original(self, fused)) or original(self, fused),
        )
    elif model.config.model_type == "bloom":
        original = type(model.transformer.h[0].self_attention)._reshape
        monkeypatch.setattr(
            type(model.transformer.h[0].self_attention),
            "_reshape",
            lambda self, fused: seen.append(original(self, fused)) or original(self, fused),
        )
    elif model.config.model_type == "mpt":
        original = torch.matmul
        monkeypatch.setattr(torch, "matmul", lambda a, b: seen.append((a, b)) or original(a, b))
    else:
        from transformers import AttentionInterface

        AttentionInterface.register("spy", spy)
        model.set_attn_implementation("spy")
    model(input_ids=torch.tensor([[5]]))
    if model.config.model_type == "mpt":
        return seen[0][0], seen[0][1], seen[1][1]
    return seen[0]


@pytest.mark.parametrize(("architecture", "changes", "leaf"), FUSED)
def test_fused_rows_are_what_the_forward_pass_takes_for_q_k_and_v(architecture, changes, leaf, monkeypatch):
    model = tiny_of(architecture, "cpu", **changes).double()
    name, fused = next((n, m) for n, m in model.named_modules() if n.endswith(leaf))
    output = []
    fused.register_forward_hook(lambda _, __, y: output.append(y.flatten()))
    q, k, v = seen_by_attention(model, monkeypatch)
    rows = fused_parts(model.config, name, in_out_features(fused)[1])
    assert sorted(row for part in rows.values() for row in part) == list(range(in_out_features(fused)[1]))
    for part, tensor in zip("qkv", (q, k, v), strict=True):
        wanted, got = output[0][rows[part]], tensor.flatten()
        if len(got) > len(wanted):  # heads that share k and v were repeated for their queries
            got = got.reshape(len(wanted) // 8, -1, 8)[:, 0].flatten()
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_gate_and_up_are_told_apart():
    model = tiny_of("phi3", "cpu").double()
    mlp = model.model.layers[0].mlp
    rows = fused_parts(model.config, "mlp.gate_up_proj", 128)
    x = torch.randn(3, 32, dtype=torch.float64)
    gate, up = (x @ mlp.gate_up_proj.weight[rows[part]].T for part in ("gate", "up"))
    torch.testing.assert_close(mlp(x), (functional.silu(gate) * up) @ mlp.down_proj.weight.T)


def test_chatglms_grouped_and_plain_projections():
    """Its modelling code is not ours to import: (32 + 2 * 2) heads of 128, q then k then v."""
    from types import SimpleNamespace

    config = SimpleNamespace(
        model_type="chatglm", num_attention_heads=32, multi_query_attention=True, multi_query_group_num=2
    )
    rows = fused_parts(config, "encoder.layers.0.self_attention.query_key_value", 4608)
    assert (rows["q"], rows["k"], rows["v"]) == (
        list(range(4096)), list(range(4096, 4352)), list(range(4352, 4608)),
    )  # fmt: skip

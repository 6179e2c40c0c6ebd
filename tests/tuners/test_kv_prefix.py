"""The prefix of an attention layer: its equation in float64, every kind of attention, and an untouched base."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from peftctl.errors import UsageError
from peftctl.models.attentions import attentions
from peftctl.tuners.kv_prefix import KvPrefix, Prefix, PrefixSettings, PrefixTable, prefix_attention
from peftctl.tuners.prefix import keys_and_values
from peftctl.tuners.union import UnionConfig, flatten_prefixes
from tests.methods.architectures import tiny_of
from tests.tiny import tiny_bart, tiny_bert, tiny_bloom, tiny_llama, tiny_opt, tiny_t5

IDS = torch.arange(1, 25).reshape(2, 12)
B, H, HK, T, D, DV, N = 2, 4, 2, 7, 8, 6, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(query, key, value, allowed, prefix, gate, bias=None, scaling=D**-0.5, cap=None):
    """Attend position by position; allowed (batch, queries, keys), gate (batch, queries)."""
    out = torch.zeros(len(query), query.shape[2], query.shape[1], value.shape[3], dtype=torch.float64)
    for b in range(len(query)):
        for h in range(H):
            k, v = key[b, h * HK // H], value[b, h * HK // H]
            pk, pv = prefix.keys[h * HK // H], prefix.values[h * HK // H]
            for t in range(query.shape[2]):
                q, g = query[b, h, t], gate[b, t]
                seen = [i for i in range(k.shape[0]) if allowed[b, t, i]]
                scores = [scaling * g * q @ p for p in pk]
                scores += [scaling * q @ k[i] + (0 if bias is None else bias[0, h, t, i]) for i in seen]
                scores = torch.stack(scores)
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                out[b, t, h] = scores.softmax(0) @ torch.cat([g * pv, v[seen]])
    return out


@pytest.fixture
def inputs():
    return draw(B, H, T, D, seed=1), draw(B, HK, T, D, seed=2), draw(B, HK, T, DV, seed=3)


def module(causal=True):
    made = torch.nn.Identity()
    made.num_key_value_groups, made.is_causal = H // HK, causal
    return made


def masks(kind):
    """Return what the library hands over, and which keys it lets each query see."""
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T).clone()
    if kind == "causal":
        return None, seen
    if kind == "all":
        return None, torch.ones_like(seen)
    seen[1, :, :2] = False  # padded on the left: some queries see nothing but the prefix
    mask = seen[:, None]
    return (mask if kind == "bool" else torch.zeros(mask.shape).double().masked_fill(~mask, -1e30)), seen


@pytest.mark.parametrize("kind", ["causal", "all", "bool", "float"])
@pytest.mark.parametrize("gated", ["none", "row", "token"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_it_is_the_naive_equation_in_float64(inputs, kind, gated, biased):
    mask, allowed = masks(kind)
    gate = {
        "none": None,
        "row": torch.sigmoid(draw(B, 1, 1, seed=5)),
        "token": torch.sigmoid(draw(B, T, 1, seed=6)),
    }[gated]
    prefix = Prefix(draw(HK, N, D, seed=7), draw(HK, N, DV, seed=8), gate)
    bias = draw(1, H, T, T, seed=9) if biased else None
    got, _ = prefix_attention(module(kind != "all"), *inputs, mask, scaling=0.3, kv_prefix=prefix, position_bias=bias)
    each = torch.ones(B, T).double() if gate is None else gate[..., 0].expand(B, T)
    expected = naive(*inputs, allowed, prefix, each, bias, scaling=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
def test_capped_scores_as_gemma_2_has_them(inputs, kind):
    mask, allowed = masks(kind)
    gate = torch.sigmoid(draw(B, T, 1, seed=6))
    prefix = Prefix(draw(HK, N, D, seed=7), draw(HK, N, DV, seed=8), gate)
    got, _ = prefix_attention(module(), *inputs, mask, kv_prefix=prefix, softcap=0.7)
    torch.testing.assert_close(got, naive(*inputs, allowed, prefix, gate[..., 0], cap=0.7), rtol=1e-10, atol=1e-10)


def test_one_query_behind_a_cache_sees_everything(inputs):
    query, key, value = inputs
    prefix = Prefix(draw(HK, N, D, seed=7), draw(HK, N, DV, seed=8), torch.sigmoid(draw(B, T, 1, seed=6)))
    whole, _ = prefix_attention(module(), query, key, value, None, kv_prefix=prefix)
    last = Prefix(prefix.keys, prefix.values, prefix.gate[:, -1:])
    one, _ = prefix_attention(module(), query[:, :, -1:], key, value, None, kv_prefix=last)
    torch.testing.assert_close(one, whole[:, -1:], rtol=1e-10, atol=1e-10)


def test_a_prefix_takes_a_share_of_the_attention(inputs):
    """head' = (1 - λ) Attn(q, K, V) + λ softmax(q P_k) P_v, λ the share of the prefix."""
    query, key, value = inputs
    prefix = Prefix(draw(HK, N, D, seed=7), draw(HK, N, DV, seed=8), None)
    got, _ = prefix_attention(module(False), query, key, value, None, kv_prefix=prefix)
    k, v = (part.repeat_interleave(H // HK, dim=1) for part in (key, value))
    pk, pv = (part.repeat_interleave(H // HK, dim=0) for part in (prefix.keys, prefix.values))
    text, first = query @ k.transpose(2, 3) * D**-0.5, query @ pk.transpose(1, 2) * D**-0.5
    share = first.exp().sum(-1) / (first.exp().sum(-1) + text.exp().sum(-1))
    expected = (1 - share)[..., None] * (text.softmax(-1) @ v) + share[..., None] * (first.softmax(-1) @ pv)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-10, atol=1e-10)


# -- in models ------------------------------------------------------------------------------------------------------


def prefixed(base, tokens=3, only=lambda layer: True, hidden=None):
    """Return a base with a random prefix at its attention layers."""
    parts = []
    for layer in filter(only, attentions(base)):
        settings = {
            "tokens": tokens, "heads": layer.heads, "key_dim": layer.key_dim, "value_dim": layer.value_dim,
            "width": base.config.hidden_size, "hidden": hidden, "std": 1.0,
        }  # fmt: skip
        parts.append({"part": "prefix", "targets": [layer.name], "settings": settings})
    torch.manual_seed(1)
    return get_peft_model(base, UnionConfig(parts=parts)).eval()


def logits(model, ids=IDS, **options):
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids[:, :9]
    with torch.no_grad():
        out = model(input_ids=ids, **options)
    return out.logits if "logits" in out else out.last_hidden_state


def layers(model):
    return [m for m in model.modules() if isinstance(m, KvPrefix)]


def gpt2():
    return tiny_of("gpt2", "cpu")


def gemma2():
    return tiny_of("gemma2", "cpu")


BASES = [tiny_llama, tiny_opt, tiny_t5, tiny_bart, tiny_bert, gpt2, gemma2]


@pytest.mark.parametrize("base", BASES)
def test_every_layer_has_a_gradient_and_the_base_none(base):
    model = prefixed(base())
    options = {"decoder_input_ids": IDS[:, :9]} if model.config.is_encoder_decoder else {}
    out = model(input_ids=IDS, **options)
    (out.logits if "logits" in out else out.last_hidden_state).square().mean().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == {name for name, _ in model.named_parameters() if ".added_prefix." in name}
    assert len(found) == len(layers(model)) == len(attentions(base()))


@pytest.mark.parametrize("base", BASES)
def test_switched_off_unloaded_or_broken_the_base_is_as_it_was(base):
    reference = logits(base())
    plain = base()
    keys, config = list(plain.state_dict()), plain.config
    model = prefixed(plain)
    assert logits(model).shape == reference.shape
    assert not torch.allclose(logits(model), reference)
    assert plain.config is config and config._attn_implementation in ("sdpa", "eager")
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    for twin in (again, model):
        bare = twin.unload()
        assert torch.equal(logits(bare), reference)
        assert list(bare.state_dict()) == keys
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())


def test_a_copy_has_a_prefix_of_its_own():
    model = prefixed(tiny_llama())
    before, again = logits(model), copy.deepcopy(model)
    for layer in layers(again):
        layer.union_parts["default"].table.data.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(again), before)


def test_an_error_under_way_leaves_the_configuration_as_it_was():
    model = prefixed(tiny_llama())
    before, attention = logits(model), model.get_base_model().model.layers[1].self_attn
    handle = attention.o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model)
    handle.remove()
    assert attention.config is model.get_base_model().model.layers[0].self_attn.config
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_any_subset_of_layers(base, kind):
    model = prefixed(base(), only=lambda layer: layer.kind == kind and re.search(r"(block|layers)\.0\.", layer.name))
    assert len(layers(model)) == 1
    with torch.no_grad():
        encoder, reference = (m.get_encoder()(input_ids=IDS)[0] for m in (model.get_base_model(), base()))
    assert torch.equal(encoder, reference) == (kind != "encoder")
    assert not torch.allclose(logits(model), logits(base()))


def test_the_keys_and_values_of_a_text_stand_for_the_text():
    base = tiny_llama().double()
    text, rest = IDS[:1, :5], IDS[:1, 5:]
    expected = logits(base, IDS[:1])[:, 5:]
    pairs = keys_and_values(base, text[0].tolist())
    model = prefixed(base, tokens=5)
    model.double()
    for layer, pair in zip(layers(model), pairs, strict=True):
        rows = torch.cat([part[0] for part in pair], dim=2)  # (h_kv, n, 2 d_h)
        layer.union_parts["default"].table.data = rows.transpose(0, 1).flatten(1)
    got = logits(model, rest, position_ids=torch.arange(5, 12)[None])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, gemma2])
def test_a_prefix_leaks_nothing_from_later_tokens(base):
    model = prefixed(base())
    changed = IDS.clone()
    changed[:, 7:] += 9
    torch.testing.assert_close(logits(model, changed)[:, :7], logits(model)[:, :7])
    assert not torch.allclose(logits(model, changed)[:, 7], logits(model)[:, 7])


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, tiny_bert])
def test_padding_changes_nothing_at_real_tokens(base):
    model = prefixed(base())
    short, alone = IDS[1:, :8], logits(model, IDS[1:, :8])
    left = base is not tiny_bert
    padded = torch.cat([torch.full((1, 4), 3), short] if left else [short, torch.full((1, 4), 3)], dim=1)
    mask = (torch.arange(12) >= 4) if left else (torch.arange(12) < 8)
    both = torch.cat([IDS[:1], padded])
    seen = torch.stack([torch.ones(12), mask]).long()
    options = {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)} if base in (tiny_llama, gpt2) else {}
    got = logits(model, both, attention_mask=seen, **options)[1:][:, mask]
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, tiny_t5, tiny_bart])
def test_generation_with_a_cache_equals_that_without(base):
    model = prefixed(base())
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    options |= {"min_new_tokens": 8, "pad_token_id": 3, "suppress_tokens": [3]}
    assert torch.equal(model.generate(**options, use_cache=True), model.generate(**options, use_cache=False))


def test_the_cache_is_the_bases_size():
    cache = DynamicCache()
    logits(prefixed(tiny_llama()), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 12


def test_a_network_makes_the_table_that_is_kept():
    model = prefixed(tiny_llama(), hidden=5)
    sizes = {
        n.split("union_parts.default.")[1]: p.shape
        for n, p in model.named_parameters()
        if "layers.0" in n and "added" in n
    }
    assert sizes == {
        "table": (3, 16), "network.0.weight": (5, 16), "network.0.bias": (5,),
        "network.2.weight": (32, 5), "network.2.bias": (32,),
    }  # fmt: skip
    table = layers(model)[0].union_parts["default"]
    w1, b1, w2, b2 = (p for name, p in table.named_parameters() if "network" in name)
    torch.testing.assert_close(table.rows(), torch.tanh(table.table @ w1.T + b1) @ w2.T + b2)
    before = logits(model)
    flatten_prefixes(model)
    torch.testing.assert_close(logits(model), before)
    assert all(layer.union_parts["default"].table.shape == (3, 32) for layer in layers(model))
    assert {part["settings"]["hidden"] for part in model.peft_config["default"].parts} == {None}


def test_a_table_starts_with_the_deviation_that_is_asked_for():
    torch.manual_seed(0)
    table = PrefixTable(PrefixSettings(tokens=500, heads=2, key_dim=8, value_dim=8, width=32, std=0.1)).table
    assert table.std().item() == pytest.approx(0.1, rel=0.03)


def test_a_kernel_without_room_in_its_mask_is_refused():
    base = tiny_llama()
    base.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UsageError, match=r"^model\.attn_implementation: expected sdpa or eager"):
        attentions(base)
    target = SimpleNamespace(config=base.config)
    with pytest.raises(ValueError, match="needs attn_implementation sdpa or eager, got flash"):
        KvPrefix().attach(target, base, None, "")


@pytest.mark.parametrize("base", [tiny_bloom, lambda: tiny_of("mamba"), lambda: tiny_of("falcon")])
def test_an_architecture_with_an_attention_of_its_own_is_refused(base):
    with pytest.raises(UsageError, match="architecture takes no keys and values of a method's own"):
        attentions(base())

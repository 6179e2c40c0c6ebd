"""Prefix tuning of an encoder-decoder with three prefixes: in both self-attentions and in cross-attention."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.modeling_outputs import BaseModelOutput

from peftctl.errors import UsageError
from peftctl.methods.prefix_tuning import Config, Method
from peftctl.models.attentions import attentions
from peftctl.tuners.kv_prefix import KvPrefix
from tests.methods.prefixes import IDS, attached, inputs
from tests.tiny import tiny_bart, tiny_llama, tiny_t5

BASES = [tiny_t5, tiny_bart]


def method(**keys):
    keys = {"num_virtual_tokens": 5, "hidden": 8, "projection": False, "everywhere": True, **keys}
    return Method(Config(**keys))


def made(base=tiny_t5, **keys):
    return attached(method(**keys), base(), "seq2seq_lm")


def prefixes(model, ends=""):
    """Return what stands in attention layers whose names end so."""
    return [m for name, m in model.named_modules() if isinstance(m, KvPrefix) and name.endswith(f"{ends}.added_prefix")]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_each_of_the_three_has_a_table_of_its_own_in_every_layer(base, projection):
    model = made(base, projection=projection)
    kinds = [layer.kind for layer in attentions(base())]
    blocks = len(kinds) // 3
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(["encoder", "decoder", "cross"], blocks)
    tables = [part.union_parts["default"].table for part in prefixes(model)]
    assert len({table.data_ptr() for table in tables}) == len(kinds)
    assert all(not torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])
    layer = attentions(base())[0]
    read, row = layer.heads * layer.key_dim, layer.row
    each = 5 * read + (read + 1) * 8 + (8 + 1) * row if projection else 5 * row
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == len(kinds) * each == method(projection=projection).count(base())


@pytest.mark.parametrize("base", BASES)
def test_every_prefix_has_a_gradient_and_the_base_none(base):
    model = made(base)
    model(**inputs(model), labels=IDS).loss.backward()
    tables = {part.union_parts["default"].table for part in prefixes(model)}
    assert all(table.grad.abs().sum() > 0 for table in tables)
    assert {p for p in model.parameters() if p.grad is not None} == tables


def test_a_cross_prefix_made_of_encoded_tokens_is_as_if_they_stood_before_the_text():
    model = made().double()
    first, then = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 7))
    first = first[:1].expand(2, -1, -1)  # a prefix is the same in every row
    with torch.no_grad():
        for part, block in zip(prefixes(model, "EncDecAttention"), model.get_base_model().decoder.block, strict=True):
            attention = block.layer[1].EncDecAttention
            keys, values = (
                linear(first[0]).unflatten(1, (attention.n_heads, -1)) for linear in (attention.k, attention.v)
            )
            part.union_parts["default"].table.copy_(torch.cat([keys, values], dim=2).flatten(1))
        behind = model(encoder_outputs=BaseModelOutput(then), decoder_input_ids=IDS).logits
        for part in prefixes(model, "EncDecAttention"):
            part.detach()
        whole = BaseModelOutput(torch.cat([first, then], dim=1))
        without = model(encoder_outputs=BaseModelOutput(then), decoder_input_ids=IDS).logits
        torch.testing.assert_close(behind, model(encoder_outputs=whole, decoder_input_ids=IDS).logits)
    assert (behind - without).abs().max() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_generation_with_a_cache_equals_that_without(base):
    model = made(base)
    batch = inputs(model)
    inputs_only = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def scores(**options):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
        made = model.generate(**inputs_only, **options, output_logits=True, return_dict_in_generate=True)
        return torch.stack(made.logits)

    torch.testing.assert_close(scores(use_cache=True), scores(use_cache=False))
    with model.disable_adapter():
        base_scores = scores()
    assert (base_scores - scores()).abs().max() > 1e-3


@pytest.mark.parametrize("projection", [False, True])
def test_the_export_holds_tables_alone_and_reads_back_equal(tmp_path, projection):
    model = made(projection=projection)
    with torch.no_grad():
        reference = model(**inputs(model)).logits
        method().export(model).save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_t5(), str(tmp_path)).eval()
        assert torch.equal(again(**inputs(model)).logits, reference)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFTCTL_UNION"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == method().count(tiny_t5())
    assert all(name.endswith("table") for name in tensors)


def test_what_it_can_not_do_is_refused():
    with pytest.raises(UsageError, match=r"^method\.everywhere: only for an encoder-decoder; the llama architecture"):
        attached(method(), tiny_llama())
    for keys, key in (({"init_text": "words"}, "init_text"), ({"dropout": 0.1}, "dropout")):
        with pytest.raises(ValueError, match=f"{key}: not with everywhere: true; remove one of them"):
            method(**keys)

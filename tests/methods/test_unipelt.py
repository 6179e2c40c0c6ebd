"""UniPELT: gates that see what they may, each part behind its own, no leak from later tokens, and what is saved."""

import copy
import json

import pytest
import torch

from peftctl.artifacts.load import load
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.unipelt import Config, Method
from peftctl.tuners._parts import Part
from peftctl.tuners.added import BottleneckPart, LowRankPart
from peftctl.tuners.gates import Gate
from peftctl.tuners.kv_prefix import KvPrefix
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import SMOLLM2
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**{"num_virtual_tokens": 3, "hidden": 7, "r": 2, "bottleneck": 5, **keys}))


def bert(**config):
    return tiny_bert(kind="BertForSequenceClassification", num_labels=3, **config)


def gpt2():
    return tiny_of("gpt2", "cpu")


def attached(chosen, base):
    """Apply a method to a language model or a classifier."""
    if not hasattr(base, "classifier"):
        return applied(chosen, base)
    torch.manual_seed(0)
    plain = recipe()
    return chosen.apply(
        base, Context(plain.model_copy(update={"model": plain.model.model_copy(update={"task": "seq_cls"})}))
    )


def randomised(base, seed=0, std=0.3, **keys):
    """Return a model whose every part does something, and whose gates differ from token to token."""
    model = attached(method(**keys), base)
    generator = torch.Generator().manual_seed(seed)
    for part in parts(model, Part):
        for p in part.parameters():
            p.data = (std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return model.eval()


def parts(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def logits(model, ids=IDS, **options):
    if model.config.is_encoder_decoder:
        options.setdefault("decoder_input_ids", ids[:, :9])
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def force(model, value):
    """Make every gate a number, whatever it reads."""
    for gate in parts(model, Gate):
        gate.linear.weight.data.zero_()
        gate.linear.bias.data.fill_(value)


OPEN, SHUT = 1e4, -1e4


# -- gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, tiny_t5, bert])
def test_gates_lie_in_0_1_one_a_row_in_encoders_and_one_a_token_in_decoders(base):
    model = randomised(base())
    seen = {}
    for name, gate in model.named_modules():
        if isinstance(gate, Gate):
            gate.register_forward_hook(lambda g, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    logits(model)
    assert len(seen) == len(parts(model, Gate))
    for name, (x, out) in seen.items():
        pooled = ".encoder." in name
        assert out.shape == (2, 1 if pooled else x.shape[1], 1), name
        assert (out > 0).all() and (out < 1).all()
        gate = model.get_submodule(name)
        each = torch.stack(
            [torch.stack([torch.sigmoid(gate.linear.weight[0] @ t + gate.linear.bias) for t in row]) for row in x]
        )
        torch.testing.assert_close(out, each.mean(1, keepdim=True) if pooled else each)


@pytest.mark.parametrize(("base", "gates"), [(tiny_llama, 4 * 4), (tiny_opt, 2 * 4), (bert, 2 * 4), (gpt2, 2 * 3)])
def test_every_part_has_a_gate_of_its_own(base, gates):
    model = attached(method(), base())
    assert len(parts(model, Gate)) == len({id(p) for g in parts(model, Gate) for p in g.parameters()}) / 2 == gates


def test_gates_start_as_the_authors_do():
    torch.manual_seed(0)
    model = applied(method(), tiny_of("llama", "cpu", hidden_size=512, num_attention_heads=4, head_dim=128))
    bottleneck = [p.union_parts["default"].gate.linear for p in parts(model, BottleneckPart)]
    others = [g.linear for p in parts(model, (KvPrefix, LowRankPart)) for g in p.modules() if isinstance(g, Gate)]
    drawn = torch.cat([g.weight.flatten() for g in bottleneck])
    assert drawn.std().item() == pytest.approx(0.02 * 0.88, rel=0.1) and not any(g.bias.any() for g in bottleneck)
    limit = 512**-0.5
    drawn = torch.cat([g.weight.flatten() for g in others])
    assert 0.98 * limit < drawn.abs().max() <= limit and all(g.bias.any() for g in others)


def test_permuting_the_batch_permutes_the_gates():
    model = randomised(bert())
    a, b = logits(model), logits(model, IDS.flip(0))
    torch.testing.assert_close(a, b.flip(0))
    assert not torch.allclose(a[0], a[1])


@pytest.mark.parametrize("base", [bert, tiny_t5, tiny_bart])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [True, False])
def test_an_encoders_mean_leaves_padding_out_or_as_the_authors_do_takes_it_in(base, attention, masked):
    plain = base()
    plain.set_attn_implementation(attention)
    model = randomised(plain, gate_mask=masked)
    padded = torch.cat([IDS[:1, :8], torch.full((1, 4), 3)], dim=1)
    mask = torch.stack([torch.arange(12) < 8, torch.arange(12) < 12]).long()
    options = {"decoder_input_ids": IDS[:, :9]} if model.config.is_encoder_decoder else {}
    both = logits(model, torch.cat([padded, IDS[1:]]), attention_mask=mask, **options)
    alone = logits(model, IDS[:1, :8], **{name: ids[:1] for name, ids in options.items()})
    assert torch.allclose(both[:1], alone, rtol=1e-4, atol=1e-4) == masked
    row = logits(model, IDS[1:], **{name: ids[1:] for name, ids in options.items()})
    torch.testing.assert_close(both[1:], row, rtol=1e-4, atol=1e-4)


def test_a_later_batch_without_a_mask_forgets_the_mask_before():
    model = randomised(bert())
    expected = logits(model)
    logits(model, attention_mask=(torch.arange(12) < 5).long().expand(2, 12))
    assert torch.equal(logits(model), expected)


# -- the parts behind their gates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, bert, tiny_t5])
def test_shut_gates_leave_the_base_but_for_the_share_of_an_empty_prefix(base):
    reference = logits(base())
    model = randomised(base())
    assert not torch.allclose(logits(model), reference, atol=1e-3)
    force(model, SHUT)
    assert not torch.allclose(logits(model), reference, atol=1e-3)  # keys of zero take attention
    empty = logits(model)
    for part in parts(model, KvPrefix):
        part.union_parts["default"].table.data.mul_(7)
    torch.testing.assert_close(logits(model), empty)  # whatever the prefix is
    for part in parts(model, KvPrefix):
        part.enable_adapters(False)
    torch.testing.assert_close(logits(model), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, bert, tiny_t5])
def test_open_gates_and_zero_factors_leave_the_pure_prefix(base):
    model = randomised(base())
    force(model, OPEN)
    for part in parts(model, LowRankPart):
        part.union_parts["default"].change.b.data.zero_()
    for part in parts(model, BottleneckPart):
        for p in part.union_parts["default"].change.up.parameters():
            p.data.zero_()
    got = logits(model)
    for part in parts(model, (LowRankPart, BottleneckPart)):
        part.enable_adapters(False)
    for part in parts(model, KvPrefix):
        part.union_parts["default"].gate = None
    torch.testing.assert_close(got, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [tiny_llama, gpt2])
def test_the_gate_stands_in_the_place_of_alpha_over_r_in_float64(base):
    model = randomised(base().double()).double()
    part = parts(model, LowRankPart)[0]
    factors, gate = part.union_parts["default"].change, part.union_parts["default"].gate
    linear = next(m for m in model.modules() if getattr(m, "added_low_rank", None) is part)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    weight = linear.weight.T if base is gpt2 else linear.weight
    for row, out in zip(x.flatten(0, 1), linear(x).flatten(0, 1), strict=True):
        g = 1 / (1 + torch.exp(-(gate.linear.weight[0] @ row + gate.linear.bias)))
        expected = weight @ row + (0 if linear.bias is None else linear.bias) + g * (factors.b @ (factors.a @ row))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_there_is_no_alpha():
    with pytest.raises(ValueError, match="alpha"):
        Config(alpha=16)


@pytest.mark.parametrize("base", [bert, tiny_llama])
def test_the_adapter_stands_at_the_end_of_the_block_in_float64(base):
    model = randomised(base().double()).double()
    part = parts(model, BottleneckPart)[1]
    place = next(m for m in model.modules() if getattr(m, "added_bottleneck", None) is part)
    change, gate = part.union_parts["default"].change, part.union_parts["default"].gate
    seen = {}
    # Behind the part's own hook, and before it.
    part.register_forward_hook(lambda *_: None)
    place._forward_hooks.move_to_end(next(iter(place._forward_hooks)))
    place.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out), prepend=True)
    place.register_forward_hook(lambda m, args, out: seen.update(out=out))
    logits(model)
    y, out = (seen[k][0] if isinstance(seen[k], tuple) else seen[k] for k in ("y", "out"))
    g = torch.sigmoid(y @ gate.linear.weight[0] + gate.linear.bias)[..., None]
    g = g.mean(1, keepdim=True) if base is bert else g
    added = g * (torch.relu(y @ change.down.weight.T + change.down.bias) @ change.up.weight.T + change.up.bias)
    expected = place.forward(seen["x"] + added) if base is bert else y + added
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


# -- nothing from the future ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2])
def test_logits_do_not_depend_on_later_tokens(base, training):
    plain = base()
    for dropout in (m for m in plain.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    model = randomised(plain).train(training)
    first = logits(model)
    for t in (1, 6, 11):
        changed = IDS.clone()
        changed[:, t:] = (changed[:, t:] + 17) % 60
        second = logits(model, changed)
        torch.testing.assert_close(second[:, :t], first[:, :t], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(second[:, t], first[:, t], atol=1e-3)


@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_a_decoder_does_not_see_its_later_tokens(base):
    model = randomised(base())
    first, changed = logits(model), IDS[:, :9].clone()
    changed[:, 5:] += 30
    second = logits(model, decoder_input_ids=changed)
    torch.testing.assert_close(second[:, :5], first[:, :5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second[:, 5], first[:, 5], atol=1e-3)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2])
def test_no_gradient_comes_from_later_tokens(base):
    model = randomised(base())
    states = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=states, attention_mask=torch.ones_like(IDS)).logits[:, 5].sum().backward()
    assert states.grad[:, 5].abs().max() > 1e-4
    assert states.grad[:, 6:].abs().max() == 0


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2, tiny_t5, tiny_bart])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_that_without(base, beams):
    model = randomised(base(), std=0.2)
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    options |= {"min_new_tokens": 8, "pad_token_id": 3, "num_beams": beams, "suppress_tokens": [3]}
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    # The tiny T5 repeats one token, whatever is added to it.
    assert base is tiny_t5 or not torch.equal(cached, base().generate(**options))


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, gpt2])
def test_logits_token_by_token_through_the_cache_are_those_of_the_row(base):
    model, cache, steps = randomised(base()), None, []
    with torch.no_grad():
        for t in range(12):
            out = model(input_ids=IDS[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", [tiny_t5, tiny_bart])
def test_a_decoders_logits_through_the_cache_are_those_of_the_row(base):
    model, cache, steps = randomised(base()), None, []
    with torch.no_grad():
        encoded = model.get_base_model().get_encoder()(input_ids=IDS)
        for t in range(9):
            one = IDS[:, t : t + 1]
            out = model(encoder_outputs=encoded, decoder_input_ids=one, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model), rtol=1e-4, atol=1e-4)


# -- count, training, artefact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [True, False])
def test_count_is_the_closed_form(projection):
    d, f, n, e, r, m = 32, 64, 3, 7, 2, 5
    expected = {
        # kv, layers, LoRA targets a layer, blocks
        tiny_llama: (16, 4, r * (2 * d + d + 16), 2, 4),
        tiny_opt: (32, 2, r * 4 * d, 2, 2),
        tiny_t5: (32, 6, r * 4 * d, 2, 4),
        gpt2: (32, 2, r * 4 * d, 1, 2),
    }
    assert f == 2 * d
    for base, (kv, layers, factors, targets, blocks) in expected.items():
        table = n * kv + (kv + 1) * e + (e + 1) * 2 * kv if projection else n * 2 * kv
        total = layers * (table + d + 1 + factors + targets * (d + 1)) + blocks * (2 * d * m + m + d + d + 1)
        chosen = method(projection=projection)
        assert chosen.count(base()) == total, base
        model = applied(chosen, base())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total, base


def test_count_on_smollm2_with_the_papers_sizes():
    model = tiny_of("llama", **SMOLLM2)
    d, kv, n, e, r, m = 576, 192, 10, 512, 8, 36
    table = n * kv + (kv + 1) * e + (e + 1) * 2 * kv
    adapters = r * (d + d) + r * (d + kv) + 2 * d * m + m + d + 4 * (d + 1)
    assert Method(Config(bottleneck=36)).count(model) == 30 * (table + adapters)
    assert Method(Config(bottleneck=36, projection=False)).count(model) == 30 * (n * 2 * kv + adapters)


def test_named_targets_and_an_embedding():
    model = applied(method(target_modules=["o_proj"]), tiny_llama())
    names = {n for n, m in model.named_modules() if isinstance(m, LowRankPart)}
    assert names == {f"base_model.model.model.layers.{i}.self_attn.o_proj.added_low_rank" for i in range(4)}
    with pytest.raises(UsageError, match="is an embedding; unipelt takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())


def test_stopped_and_resumed_equals_straight(tmp_path):
    straight, _ = train(workload(tmp_path / "a", method(), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(), max_steps=6, reporter=StopAt(3)))
    work = workload(tmp_path / "b", method(), max_steps=6)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_not():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen = []
    for block in model.get_base_model().model.layers:
        block.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0] and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("base", [tiny_llama, bert])
def test_what_is_saved_is_the_flat_prefix_and_answers_alike(tmp_path, base):
    folder = save_tiny(tmp_path / "base", base())
    chosen = method()
    model = randomised(base())
    before = logits(model)
    exported = chosen.export(model)
    torch.testing.assert_close(logits(exported), before, rtol=1e-5, atol=1e-5)
    exported.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["peft_type"] == "PEFTCTL_UNION" and config["modules_to_save"] in (None, ["classifier", "score"])
    if base is bert:
        return
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    again, _ = load(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(exported))
    assert torch.equal(logits(copy.deepcopy(again)), logits(exported))
    again.load_adapter(str(tmp_path / "adapter"), "other")
    again.set_adapter("other")
    assert torch.equal(logits(again), logits(exported))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_virtual_tokens": 0}, "greater than or equal to 1|greater than 0"),
        ({"activation": "tanh"}, "'gelu', 'relu' or 'silu'"),
        ({"prefix_std": 0}, "greater than 0"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Config(**keys)

"""Ladder side-tuning: what trains, that nothing enters the base, generation, and what is saved."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.artifacts.load import load
from peftctl.errors import Interrupted, RunError, UsageError
from peftctl.methods.ladder_side_tuning import Config, Method
from peftctl.models.load import load_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.training.step_bytes import StepSettings, step_bytes
from peftctl.tuners.ladder_pruning import the_end
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import save_tiny, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
BASES = pytest.mark.parametrize("base", ["llama", "opt", "gpt2"])
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def make(base):
    """Return a tiny base without dropout."""
    if base == "gpt2":
        return tiny_of("gpt2", "cpu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return {"llama": tiny_llama, "opt": tiny_opt}[base]()


def method(**keys):
    return Method(Config(**{"reduction": 4, "every": 1, "init": "random", **keys}))


def live(model, seed=0):
    """Give the side weights that count: Up too, and unequal gates."""
    side = the_end(model).ladder_side["default"]
    generator = torch.Generator().manual_seed(seed)
    for p in (side.up.weight, side.up.bias, *(rung.gate for rung in side.rungs)):
        p.data = (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return model


def blocks_of(model):
    end = the_end(model)
    return end.stack.block_list(model.get_base_model())


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def states(model, blocks, ids=IDS):
    """Return what blocks return in a forward pass with gradients."""
    found = []
    hooks = [block.register_forward_hook(lambda _, args, out: found.append(out)) for block in blocks]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


# -- no gradient enters the base ------------------------------------------------------------------------------------


def require_gradients(model):
    model.enable_input_require_grads()


def checkpoint(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


@BASES
@pytest.mark.parametrize("prepare", [lambda model: None, require_gradients, checkpoint], ids=["", "input", "both"])
def test_states_of_the_base_have_no_graph_and_are_the_bases(base, prepare):
    bare = make(base)
    model = live(applied(method(), make(base)))
    expected = states(bare, the_end(model).stack.block_list(bare))
    prepare(model)
    model.train()
    found = states(model, blocks_of(model))
    assert len(found) == len(expected) > 1
    for state, other in zip(found, expected, strict=True):
        assert not state.requires_grad and state.grad_fn is None
        assert torch.equal(state, other)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad == ("ladder_side" in name), name


def kept_bytes(width, inner, depth, every, **keys):
    """Return the bytes that a training step keeps for its backward pass, beside parameters, up to the head's input."""
    model = tiny_of(
        "llama", "cpu", hidden_size=width, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=width // 8, num_key_value_heads=width // 8,
    )  # fmt: skip
    model = applied(method(reduction=width // 8, every=every, **keys), model).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.get_base_model().model(input_ids=IDS).last_hidden_state
    assert states.requires_grad
    return sum(seen.values())


def test_kept_bytes_grow_with_what_the_down_projections_read_and_with_nothing_else_of_the_base():
    # f / r is 8, d / r is 8: the side stays the same. Each Down must have its input to make its gradient.
    small, wide = kept_bytes(16, 16, 4, 2), kept_bytes(64, 64, 4, 2)
    assert wide - small == (2 + 1) * IDS.numel() * (64 - 16) * 4
    # Depth costs nothing where the rungs are as many; the feed-forward part, eight times as wide here, neither.
    assert kept_bytes(64, 64, 8, 4) == wide
    widened = kept_bytes(64, 512, 4, 2) - wide  # of the side, whose feed-forward part is an eighth of it
    assert widened <= 2 * IDS.numel() * 56 * 4 * 4
    assert kept_bytes(64, 64, 4, 2, merge_last=False) == wide


def test_recomputed_side_blocks_have_the_same_gradients():
    found = {}
    for how in (False, True):
        model = live(applied(method(), tiny_llama())).train()
        if how:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found[how] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[True][n], g) for n, g in found[False].items())


# -- the start, and what the base answers ---------------------------------------------------------------------------


@BASES
def test_starts_as_the_base_exactly(base):
    reference = logits(make(base))
    model = applied(method(), make(base))
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode), reference)
    start = run_steps(applied(method(), make(base)), 1)[0]
    assert start == pytest.approx(run_loss(make(base)), rel=1e-6)


def run_loss(model):
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.item()


def test_the_papers_start_is_not_the_base():
    model = applied(method(merge_last=False), tiny_llama())
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1
    # The base's last state has no part in it, only what the rungs read.
    side = the_end(model).ladder_side["default"]
    torch.nn.init.zeros_(side.up.weight)
    torch.nn.init.zeros_(side.up.bias)
    assert not logits(model).any()


@BASES
@pytest.mark.parametrize("merge_last", [True, False])
def test_disabled_it_is_the_base(base, merge_last):
    reference = logits(make(base))
    model = applied(method(merge_last=merge_last), make(base))
    run_steps(model, 3)
    model.eval()
    assert not torch.equal(logits(model), reference)
    with model.disable_adapter():
        assert torch.equal(logits(model), reference)
    trained = logits(model)
    bare = model.unload()
    assert torch.equal(logits(bare), reference)
    assert not any(module._forward_pre_hooks for module in bare.modules())
    assert not any("leave" in repr(hook) for module in bare.modules() for hook in module._forward_hooks.values())
    assert not torch.equal(trained, reference)


def test_merging_is_refused_with_a_reason():
    with pytest.raises(NotImplementedError, match="a network of its own: no weight of the base can take it up"):
        applied(method(), tiny_llama()).merge_and_unload()
    assert not Method.card.mergeable and "a network of its own" in Method.card.merge_note


# -- what trains ----------------------------------------------------------------------------------------------------


def block_parameters(d, q, kv, f):
    """Of a Llama block."""
    return 2 * d * q + 2 * d * kv + 3 * d * f + 2 * d


def test_trainable_count_is_the_closed_form():
    # Llama: d 32, 4 heads of 8 over 2; r = 4: d_s = 8, one head over one, f / r = 16.
    for every, rungs in ((1, 4), (2, 2), (3, 2), (4, 1), (9, 1)):
        expected = (rungs + 1) * (32 * 8 + 8) + 8 * 32 + 32 + rungs + 8 + rungs * block_parameters(8, 8, 8, 16)
        assert method(every=every).count(tiny_llama()) == expected
        model = applied(method(every=every), tiny_llama())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert len(the_end(model).ladder_side["default"].rungs) == rungs


def test_count_on_smollm2_is_the_formula():
    block = block_parameters(72, 64, 64, 192)
    expected = 16 * (576 * 72 + 72) + 72 * 576 + 576 + 15 + 72 + 15 * block
    assert Method(Config()).count(tiny_of("llama", **SMOLLM2)) == expected == 1_607_559


def test_opt_and_gpt2_have_narrower_heads():
    for base in ("opt", "gpt2"):
        for reduction, heads, head in ((4, 1, 8), (8, 4, 1), (2, 2, 8)):
            model = applied(method(reduction=reduction), make(base))
            block = the_end(model).ladder_side["default"].rungs[0].block
            attention = block.self_attn if base == "opt" else block.attn
            assert (attention.num_heads, attention.head_dim) == (heads, head)


def test_rungs_are_counted_from_the_last_block():
    layers = {e: the_end(applied(method(every=e), tiny_llama())).ladder_side["default"].layers for e in (1, 2, 3, 5)}
    assert layers == {1: [0, 1, 2, 3], 2: [1, 3], 3: [0, 3], 5: [3]}


def test_gates_norms_and_biases_do_not_decay():
    model = applied(method(), tiny_opt())
    groups = method().param_groups(model, recipe(Config(), weight_decay=0.1).train)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    still = {id(p) for p in groups[1]["params"]}
    assert all(id(rung.gate) in still for rung in the_end(model).ladder_side["default"].rungs)


@BASES
def test_three_steps_move_the_side_and_nothing_else(base):
    model = applied(method(), make(base))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


# -- rows, caches ---------------------------------------------------------------------------------------------------


@BASES
def test_padding_changes_nothing(base):
    model = live(applied(method(), make(base))).eval()
    ids = IDS[:1] % 60 + 1
    padded = torch.cat([torch.full((1, 3), 3), ids], dim=1)
    mask = (torch.arange(15) >= 3).long()[None]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)
    right = torch.cat([ids, torch.full((1, 3), 3)], dim=1)
    found = logits(model, right, attention_mask=mask.flip(1))[:, :12]
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["llama", "opt", "gpt2", "gemma2"])
def test_token_by_token_from_the_cache_equals_whole_rows(base):
    model = tiny_of("gemma2", "cpu", sliding_window=4) if base == "gemma2" else make(base)
    model = live(applied(method(), model)).eval()
    ids = IDS % 60 + 1
    expected = logits(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids[:, :5], use_cache=True)
        pieces = [out.logits]
        for i in range(5, 12):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


@BASES
@pytest.mark.parametrize(
    "keys", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_generation_with_a_cache_equals_without(base, keys):
    model = live(applied(method(), make(base))).eval()
    ids = torch.cat([torch.tensor([[3, 3], [7, 8]]), IDS % 60 + 4], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    cached = model.generate(input_ids=ids, **options, **keys)
    plain = {k: v for k, v in keys.items() if k == "num_beams"}
    assert torch.equal(cached, model.generate(input_ids=ids, **options, **plain, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(input_ids=ids, **options, **plain))


def test_a_cache_of_the_base_alone_is_refused():
    model = live(applied(method(), tiny_llama())).eval()
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(RunError, match="filled without the side network"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    logits(model)  # nothing of the failed pass is left


def test_supervised_positions_have_the_logits_of_the_whole_row():
    model = live(applied(method(), tiny_llama())).eval()
    labels = IDS.clone()
    labels[:, :6] = -100
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    found = supervised_forward(model, batch).logits
    torch.testing.assert_close(found, logits(model)[:, 5:-1].flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_recorded_states_are_those_of_the_base():
    model = live(applied(method(), tiny_llama())).eval()
    with torch.no_grad():
        found = model(input_ids=IDS, output_hidden_states=True).hidden_states
        expected = tiny_llama()(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))


# -- other weights, copies, plans -----------------------------------------------------------------------------------


def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_kept_as_it_is():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.shape[-1:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    assert (torch.bfloat16, (32,)) in kept and (torch.float32, (32,)) not in kept
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8}], ids=["nf4", "int8"])
@pytest.mark.parametrize("init", ["magnitude", "random"])
def test_it_trains_over_a_quantised_base(tmp_path, kind, init):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(**kind))
    reference = logits(base)
    chosen = method(init=init)
    expected = chosen.count(base)
    model = applied(chosen, base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    chosen.calibrate(model, [])
    assert torch.equal(logits(model.eval()), reference)
    model.train()
    assert not any(state.requires_grad for state in states(model, blocks_of(model)))
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


def test_fisher_scores_of_quantised_weights_are_refused(tmp_path):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=4))
    with pytest.raises(UsageError, match=r"^method\.init: quantised weights have no gradient .* magnitude or random"):
        applied(method(init="fisher"), base)


def test_a_copy_has_a_ladder_of_its_own():
    model = live(applied(method(), tiny_llama())).eval()
    reference = logits(model)
    twin = copy.deepcopy(model)
    live(model, seed=1)
    assert torch.equal(logits(twin), reference)
    assert not torch.equal(logits(model), reference)
    first, second = the_end(model), the_end(twin)
    assert blocks_of(twin)[0]._forward_pre_hooks and second.entry is None
    owners = {id(hook.__self__) for hook in blocks_of(twin)[0]._forward_pre_hooks.values()}
    assert owners == {id(second)} != {id(first)}
    bare = twin.unload()
    assert not bare.model.layers[0]._forward_pre_hooks
    assert torch.equal(logits(bare), logits(tiny_llama()))
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_the_memory_of_a_step_can_be_planned_and_is_below_loras():
    from peftctl.methods.lora import Config as LoraConfig
    from peftctl.methods.lora import Method as Lora

    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
    batch = {"input_ids": torch.ones(4, 64, dtype=torch.long), "attention_mask": torch.ones(4, 64, dtype=torch.long)}
    batch["labels"] = batch["input_ids"]
    found = {}
    for name, chosen in {"lora": Lora(LoraConfig(target_modules="all-linear")), "ladder": method(every=2)}.items():
        model = applied(chosen, tiny_of("llama", **shape))
        found[name] = step_bytes(model, batch, StepSettings(chosen.loss)).activations
    assert found["ladder"] < 0.5 * found["lora"]


def test_stopped_and_resumed_equals_straight(tmp_path):
    for chosen in (method(init="fisher", rows=4), method(init="magnitude")):
        folder = tmp_path / chosen.config.init
        straight, _ = train(workload(folder / "a", chosen, max_steps=6))
        with pytest.raises(Interrupted):
            train(workload(folder / "b", chosen, max_steps=6, reporter=StopAt(3)))
        work = workload(folder / "b", chosen, max_steps=6)
        again, _ = train(work, work.run.latest_checkpoint())
        for name, tensor in trained_tensors(straight).items():
            assert torch.equal(trained_tensors(again)[name], tensor), name


# -- the artefact ---------------------------------------------------------------------------------------------------


def saved(folder):
    base = save_tiny(folder / "base")
    chosen = method(every=3, merge_last=False, gate_temperature=0.5)
    model = live(applied(chosen, tiny_llama()))
    run_steps(model, 2)
    exported = chosen.export(model).eval()
    exported.save_pretrained(folder / "adapter")
    return base, folder / "adapter", logits(exported)


def test_plain_peft_loads_it_and_the_file_holds_the_side_alone(tmp_path):
    _, adapter, reference = saved(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["reduction"], config["layers"]) == ("PEFTCTL_LADDER", 4, [0, 3])
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.norm.ladder_side.") for key in tensors)
    assert sum(t.numel() for t in tensors.values()) == method(every=3).count(tiny_llama())
    again = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    assert torch.equal(logits(again), reference)


def test_peftctl_loads_it_and_a_second_one_beside_it(tmp_path):
    base, adapter, reference = saved(tmp_path)
    path = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(path | {"base_model_name_or_path": str(base)}))
    other = live(applied(method(every=1, reduction=2), tiny_llama()), seed=5).eval()
    other.save_pretrained(tmp_path / "other")
    model, _ = load(str(adapter))
    assert torch.equal(logits(model), reference)
    model.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(logits(model), reference)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(ValueError, match="only one can be active"):
        model.base_model.set_adapter(["default", "other"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), reference)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (tiny_t5, "t5 architecture: it has an encoder"),
        (lambda: tiny_of("bloom"), "bloom architecture: its blocks take alibi, made for each head"),
        (lambda: tiny_of("falcon"), "falcon architecture"),
        (lambda: tiny_of("mpt"), "mpt architecture"),
        (lambda: tiny_of("mixtral"), "mixtral architecture: its blocks are not plain"),
        (lambda: tiny_of("mamba"), "mamba architecture"),
        (lambda: tiny_of("bert"), "bert architecture: no norm stands behind its last block"),
    ],
)
def test_other_architectures_are_refused(base, message):
    with pytest.raises(UsageError, match=f"ladder_side_tuning can't make a side network of the {message}"):
        method().count(base())
    with pytest.raises(UsageError, match=message):
        applied(method(), base())


def test_a_width_that_can_not_be_divided_is_refused():
    with pytest.raises(UsageError, match=r"^method\.reduction: got 5, which does not divide the base's width 32"):
        method(reduction=5).count(tiny_llama())
    with pytest.raises(UsageError, match=r"^method\.reduction: got 8: 4 dimensions can't be divided into heads of 8"):
        method(reduction=8).count(tiny_gptj())


def tiny_gptj():
    from transformers import GPTJConfig, GPTJForCausalLM

    with torch.device("meta"):
        return GPTJForCausalLM(GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))


@pytest.mark.parametrize("keys", [{"reduction": 0}, {"every": 0}, {"gate_temperature": 0}, {"init": "svd"}])
def test_sections_that_can_not_work_are_refused(keys):
    with pytest.raises(ValueError, match=r"greater than|'fisher', 'magnitude' or 'random'"):
        recipe(Config(**keys))

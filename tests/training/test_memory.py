"""The memory plan against real layers, real optimizers, real steps, and what the papers print."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import UsageError
from peftctl.methods import full, last_layers, lora
from peftctl.methods.base import Context
from peftctl.models import cross_entropy
from peftctl.models.lean_blocks import lean_blocks, lean_forwards
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import BackendSection, DataSection, ModelSection, QuantizationSection, Recipe, TrainSection
from peftctl.training import memory, step_bytes
from peftctl.training.memory import Machine, MemoryPlan, parse_bytes, plan_memory, quantised_bytes
from peftctl.training.sharing import read_sharing
from peftctl.training.step_bytes import StepSettings
from peftctl.training.widths import widest_rows, widths

CUDA, CPU = Machine("cuda"), Machine("cpu", process_bytes=10**9)
GB = 10**9
collate = Collator(SimpleNamespace(pad_token_id=0, eos_token_id=0))


def llama(hidden=64, layers=4, inner=128, heads=4, vocab=400, dtype=torch.float32, device="meta", **more):
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        vocab_size=vocab, **more,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def row(tokens, supervised=4):
    labels = [-100] * (tokens - supervised) + [1] * supervised
    return EncodedRow(input_ids=[5] * tokens, labels=labels, where="r", truncated=False, dropped_reason=None)


def recipe(method, *, dtype="float32", quantization=None, backend=None, **train):
    return Recipe(
        model=ModelSection(name_or_path="m", dtype=dtype),
        quantization=QuantizationSection(**(quantization or {})),
        method=method.config,
        data=DataSection(train="t.jsonl"),
        train=TrainSection(output_dir="o", **{"batch_size": 2, **train}),
        backend=BackendSection(**(backend or {})),
    )


def low_rank(**keys):
    return lora.Method(lora.Config(**{"r": 4, "target_modules": "all-linear", **keys}))


def planned(base, method, rows=None, machine=CUDA, **settings) -> MemoryPlan:
    made = recipe(method, **settings)
    return plan_memory(made, method, method.apply(base, Context(made)), rows or [row(32)] * 4, collate, machine)


def counted(base, method, rows=2, tokens=32, supervised=4, **settings):
    made = recipe(method)
    model = method.apply(base, Context(made))
    batch = collate([row(tokens, supervised)] * rows)
    return step_bytes.step_bytes(model, batch, StepSettings(loss=method.loss, **settings))


# -- what the papers print -------------------------------------------------------------------------------------------

LLAMAS = {"7B": (4096, 32, 11008, 32), "13B": (5120, 40, 13824, 40), "33B": (6656, 60, 17920, 52),
          "65B": (8192, 80, 22016, 64)}  # fmt: skip


def big(name):
    hidden, layers, inner, heads = LLAMAS[name]
    return llama(hidden, layers, inner, heads, 32000, torch.bfloat16)


def qlora(name, tokens=512):
    method = low_rank(r=64, alpha=16, dropout=0.1)
    return planned(
        big(name), method, [row(tokens)], dtype="bfloat16", batch_size=1, gradient_checkpointing=True,
        optimizer="paged_adamw_32bit", quantization={"bits": 4},
    )  # fmt: skip


@pytest.mark.parametrize(("name", "trained"), [("7B", 8_388_608), ("13B", 13_107_200), ("33B", 25_559_040)])
def test_rank_16_on_q_and_v_of_llamas(name, trained):
    base, method = big(name), low_rank(r=16, target_modules=["q_proj", "v_proj"])
    assert method.count(base) == trained
    model = method.apply(base, Context(recipe(method)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_qlora_of_65b_fits_48_gb_where_full_fine_tuning_takes_over_780():
    plan = qlora("65B")
    assert plan.traced
    assert 38 * GB < plan.total < 48 * GB
    assert plan.quantised == pytest.approx(64.76e9 * 4.127 / 8, rel=0.001)
    method = full.Method(full.Config())
    hidden, layers, inner, heads = LLAMAS["65B"]
    whole = planned(llama(hidden, layers, inner, heads, 32000), method, [row(512)], batch_size=1)
    assert whole.total > 780 * GB
    assert whole.weights == 4 * 65_285_660_672
    assert whole.optimizer == 2 * whole.weights


def test_qlora_of_7b_fits_24_gb_and_a_16_bit_base_does_not_fit_12():
    assert 5 * GB < qlora("7B").total < 8 * GB
    plain = planned(big("7B"), low_rank(r=64), [row(512)], dtype="bfloat16", batch_size=1)
    assert plain.weights == 2 * 6_738_415_616 + 4 * 159_907_840
    assert 16 * GB < plain.total < 24 * GB


def test_rank_4_on_q_and_v_of_gpt3_trains_ten_thousand_times_less():
    config = OPTConfig(
        vocab_size=50257, hidden_size=12288, word_embed_proj_dim=12288, ffn_dim=49152, num_hidden_layers=96,
        num_attention_heads=96, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    total = sum(p.numel() for p in base.parameters())
    method = low_rank(target_modules=["q_proj", "v_proj"])
    assert total == pytest.approx(175e9, rel=0.01)
    assert 9_000 < total / method.count(base) < 11_000


# -- what stays from step to step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_layers_take_what_bitsandbytes_stores(double, kind):
    bnb = pytest.importorskip("bitsandbytes")
    model, stored = llama(hidden=192, inner=320), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type=kind, compress_statistics=double
            )
            layer.weight = bnb.nn.Params4bit(
                torch.randn(module.weight.shape), requires_grad=False, quant_type=kind, compress_statistics=double
            )
            layer = layer.to("cpu")
            state = layer.weight.quant_state
            tensors = [layer.weight.data, *(v for v in state.as_dict().values() if isinstance(v, torch.Tensor))]
            # the offset is a number in the record, a tensor in memory
            stored += sum(t.nbytes for t in tensors) + (state.offset.nbytes if double else 0)
    section = QuantizationSection(bits=4, type=kind, double_quant=double)
    assert sum(quantised_bytes(model, section)) == stored
    assert quantised_bytes(model, QuantizationSection()) == (0, 0)


def test_8_bit_layers_take_what_bitsandbytes_stores():
    bnb = pytest.importorskip("bitsandbytes")
    model, stored = llama(hidden=192, inner=320), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = bnb.nn.Int8Params(torch.randn(module.weight.shape), requires_grad=False).to("cpu")
            stored += weight.data.nbytes + weight.SCB.nbytes
    assert sum(quantised_bytes(model, QuantizationSection(bits=8))) == stored


def test_quantised_layers_are_the_frozen_ones_of_the_base():
    method = low_rank()
    base = llama()
    before = sum(quantised_bytes(base, QuantizationSection(bits=4)))
    plan = planned(base, method, quantization={"bits": 4})
    assert plan.quantised == before
    linear = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert plan.weights == 4 * (sum(p.numel() for p in llama().parameters()) - linear + method.count(llama()))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor", "sgd"])
def test_optimizers_hold_what_is_planned(name):
    from transformers import Trainer, TrainingArguments

    from peftctl.training.optimizers import LIBRARY_NAMES

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 64))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=LIBRARY_NAMES[name], use_cpu=True))
    optimizer = kind(model.parameters(), **options)
    model(torch.randn(4, 96)).sum().backward()
    optimizer.step()
    held = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    tables = {id(t): t for t in held if t.numel() == 256 and t.dtype is torch.float32 and name.endswith("8bit")}
    stored = sum(t.nbytes for t in held if id(t) not in tables)
    made = recipe(low_rank(), optimizer=name)
    assert memory.optimizer_bytes(made, model.parameters()) == pytest.approx(stored, rel=0.01)


def test_paged_state_is_main_memory_on_a_gpu_alone():
    on_gpu = planned(llama(), low_rank(), optimizer="paged_adamw_32bit")
    on_cpu = planned(llama(), low_rank(), optimizer="paged_adamw_32bit", machine=CPU)
    assert (on_gpu.optimizer, on_cpu.host) == (0, 0)
    assert on_gpu.host == on_cpu.optimizer == 8 * low_rank().count(llama())
    assert on_cpu.process == 10**9 and on_cpu.measurable == on_cpu.total
    assert on_gpu.measurable == on_gpu.total - on_gpu.process


# -- several processes -----------------------------------------------------------------------------------------------


def zero(tmp_path, stage, **more):
    path = tmp_path / "zero.json"
    section = {"stage": stage, "reduce_bucket_size": 1000, "overlap_comm": False, **more}
    path.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": section}))
    return {"name": "deepspeed", "config": str(path)}


def test_zero_stages_share_one_thing_more_each(tmp_path):
    method = full.Method(full.Config())
    count = method.count(llama())
    four = Machine("cuda", processes=4)
    alone = planned(llama(), method, machine=four)
    assert alone.weights == alone.sharing == 4 * count  # the buckets
    assert alone.gradients <= 4 * count  # they come one by one, as in one process
    found = {}
    for stage in (1, 2, 3):
        backend = zero(tmp_path, stage)
        plan = planned(llama(), method, dtype="bfloat16", machine=four, backend=backend)
        found[stage] = (plan.weights / count, plan.gradients / count, plan.optimizer / count)
        gathered = 2 * count if stage == 3 else 0  # all are used again before DeepSpeed would divide them
        assert plan.sharing == 2 * 1000 + gathered
    assert found == {1: (2, 2, 3), 2: (2, 0.5, 3), 3: (0.5, 0.5, 3)}


def test_offloading_moves_the_optimizer_to_main_memory(tmp_path):
    method, machine = low_rank(), Machine("cuda", processes=2)
    backend = zero(tmp_path, 2, offload_optimizer={"device": "cpu"})
    count = method.count(llama())
    plan = planned(llama(dtype=torch.bfloat16), method, dtype="bfloat16", machine=machine, backend=backend)
    assert (plan.optimizer, plan.gradients) == (0, 0)
    assert plan.host == (8 + 4) * count // 2  # what trains is in float32, so the optimizer needs no copies
    kept = planned(llama(), method, machine=Machine("cpu", 2), backend=backend)  # float32; nowhere to move it to
    assert kept.host == 0
    assert kept.optimizer == 8 * count // 2


def test_zero_3_can_offload_weights(tmp_path):
    method = low_rank()
    section = {"reduce_bucket_size": "auto", "overlap_comm": True, "stage3_max_reuse_distance": 0}
    backend = zero(tmp_path, 3, offload_param={"device": "cpu"}, **section)
    plan = planned(llama(), method, machine=Machine("cuda", processes=2), backend=backend)
    weights = 4 * (sum(p.numel() for p in llama().parameters()) + method.count(llama()))
    assert (plan.weights, plan.host) == (0, weights // 2)
    gathered = 2 * 400 * 64  # the largest weight in use, and the next one
    assert plan.sharing == 4 * (2 * min(64 * 64, method.count(llama())) + gathered)


def test_fsdp_shares_everything_and_gathers_two_blocks():
    method, backend = full.Method(full.Config()), {"name": "fsdp"}
    base = llama()
    count, block = method.count(base), sum(p.numel() for p in base.model.layers[0].parameters())
    plan = planned(base, method, machine=Machine("cuda", processes=4), backend=backend)
    assert (plan.weights, plan.gradients, plan.optimizer) == (count, count, 2 * count)
    assert plan.sharing == 4 * (2 * block + count - 4 * block)  # embeddings, norm and head stay gathered
    alone = planned(llama(), method, backend=backend)
    assert (alone.weights, alone.sharing) == (4 * count, 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_3_shares_quantised_weights_but_not_their_scales(tmp_path, bits):
    weights, scales = quantised_bytes(llama(), QuantizationSection(bits=bits))
    backend = zero(tmp_path, 3)
    plan = planned(
        llama(), low_rank(), quantization={"bits": bits}, backend=backend, machine=Machine("cuda", processes=4)
    )
    assert plan.quantised == weights // 4 + scales
    small = zero(tmp_path, 3, stage3_max_reuse_distance=0)
    less = planned(llama(), low_rank(), quantization={"bits": bits}, backend=small, machine=Machine("cuda", 4))
    assert plan.sharing - less.sharing > weights  # stay gathered, as other weights do
    apart = zero(tmp_path, 3, offload_param={"device": "cpu"})
    moved = planned(llama(), low_rank(), quantization={"bits": bits}, backend=apart, machine=Machine("cuda", 4))
    assert moved.quantised == scales and moved.host == plan.weights + weights // 4


@pytest.mark.parametrize(
    ("content", "part"), [("{", "can't be read"), ("[]", "can't be read"),
                          ('{"zero_optimization": {"stage": 4}}', "expected 1, 2 or 3, got 4"),
                          ('{"bf16": {"enabled": true}}', "expected 1, 2 or 3, got 0"),
                          ('{"optimizer": {}, "zero_optimization": {"stage": 2}}', "optimizer: the recipe's `train:`"),
                          ('{"bf16": 1, "zero_optimization": {"stage": 2}}', "can't be read"),
                          ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
                           'bf16.enabled: got True, but the recipe comes to False; set it to "auto"'),
                          ('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}', "got 8, .* comes to 4")]
)  # fmt: skip
def test_deepspeed_configurations_that_are_none(tmp_path, content, part):
    path = tmp_path / "z.json"
    path.write_text(content)
    made = recipe(low_rank(), backend={"name": "deepspeed", "config": str(path)})
    with pytest.raises(UsageError, match=part):
        read_sharing(made, 2, offloads=True, autocast=None)


# -- what a step allocates -------------------------------------------------------------------------------------------


def kept_by_autograd(model, loss, batch):
    """Run the forward pass for real; return the bytes of all storages that the backward pass waits for."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), *batch.values()]}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), lean_blocks(lean_forwards(model)):
        loss(model, batch, lambda rows: supervised_forward(model, rows))
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("method", [low_rank(), low_rank(dropout=0.1), low_rank(target_modules=["q_proj", "v_proj"])])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_activations_are_what_autograd_keeps(method, attention, padded):
    torch.manual_seed(0)
    shape = dict(layers=6, num_key_value_heads=2, attn_implementation=attention)
    batch = collate([row(90), row(60 if padded else 90)])
    real = method.apply(llama(device="cpu", **shape), Context(recipe(method)))
    kept = kept_by_autograd(real, method.loss, batch)
    model = method.apply(llama(**shape), Context(recipe(method)))
    found = step_bytes.step_bytes(model, batch, StepSettings(loss=method.loss))
    # on top of it: the gradients of one block's tensors while it is left
    assert kept <= found.total <= 1.3 * kept


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (low_rank(), {}),
        (low_rank(), {"checkpointing": True}),
        (low_rank(dropout=0.1), {"on_gpu": True, "checkpointing": True}),
        (low_rank(), {"heap_limit": 2**25, "accumulates": True}),
        (last_layers.Method(last_layers.Config(layers=5)), {}),
        (full.Method(full.Config()), {}),
        (full.Method(full.Config()), {"accumulates": True, "autocast": torch.bfloat16}),
    ],
)
def test_a_few_blocks_stand_for_all(monkeypatch, method, settings):
    short = counted(llama(layers=6), method, tokens=100, **settings)
    monkeypatch.setattr(step_bytes, "_KEPT_BLOCKS", 100)
    assert short == counted(llama(layers=6), method, tokens=100, **settings)


def test_a_checkpointed_block_keeps_its_input():
    rows, tokens, hidden = 2, 200, 64
    deep = counted(llama(layers=20), low_rank(), tokens=tokens, checkpointing=True)
    flat = counted(llama(layers=10), low_rank(), tokens=tokens, checkpointing=True)
    assert deep.activations - flat.activations == 10 * rows * tokens * hidden * 4
    assert flat.activations < counted(llama(layers=10), low_rank(), tokens=tokens).activations / 4


def test_frozen_blocks_below_the_first_trained_one_keep_nothing():
    method = last_layers.Method(last_layers.Config(layers=2))
    assert counted(llama(layers=4), method) == counted(llama(layers=12), method)


def test_logits_are_made_at_supervised_positions_alone():
    vocab = 5000
    few, many = (counted(llama(vocab=vocab), low_rank(), tokens=200, supervised=n) for n in (10, 110))
    grown = many.logits - few.logits
    assert grown == pytest.approx(2 * 100 * vocab * 4 * 2, rel=0.05)  # logits, and what their gradient is made in
    assert many.activations == pytest.approx(few.activations, rel=0.05)


@pytest.mark.parametrize("divided", [True, False])
def test_a_frozen_head_makes_a_piece_of_the_logits_at_a_time(divided):
    vocab = 100_000
    few, many = (counted(llama(vocab=vocab), low_rank(), rows=1, tokens=900, supervised=n, divided=divided).logits
                 for n in (400, 800))  # fmt: skip
    piece = 4 * (cross_entropy.PIECE["cpu"] + cross_entropy.CHUNK["cpu"])
    if not divided:
        assert few < many < 1.3 * piece
    else:
        assert many - few == pytest.approx(2 * 400 * vocab * 4, rel=0.01)  # logits and their gradient
        assert many > 2 * 4 * 800 * vocab


def test_full_fine_tuning_peaks_where_activations_or_where_gradients_are():
    method = full.Method(full.Config())
    whole = 4 * method.count(llama(hidden=256))
    short = counted(llama(hidden=256), method, tokens=8)
    assert 0.9 * whole < short.gradients + short.logits + short.activations < 1.3 * whole
    long = counted(llama(hidden=256), method, rows=8, tokens=400)
    assert long.gradients < whole / 2 < long.activations


def test_accumulated_gradients_are_there_with_all_activations():
    method = full.Method(full.Config())
    one = planned(llama(hidden=256), method, [row(400)] * 4, machine=CPU)
    two = planned(llama(hidden=256), method, [row(400)] * 4, machine=CPU, gradient_accumulation=2)
    assert two.gradients == 4 * method.count(llama(hidden=256))
    assert two.total > one.total


def test_autocast_makes_activations_narrow():
    method = full.Method(full.Config())
    wide, narrow = (counted(llama(), method, tokens=400, autocast=t).activations for t in (None, torch.bfloat16))
    assert narrow < 0.85 * wide


def test_gpus_keep_dropout_masks_in_bytes():
    masks = {}
    for on_gpu in (False, True):
        kept = (counted(llama(), low_rank(dropout=p), tokens=200, on_gpu=on_gpu).activations for p in (0.1, 0.0))
        masks[on_gpu] = next(kept) - next(kept)
    inputs = 4 * (6 * 64 + 128) * 2 * 200  # of seven targets in four blocks
    assert masks[False] - masks[True] == pytest.approx(inputs * (4 - 1), rel=0.1)


def test_8_bit_layers_keep_their_inputs_and_4_bit_ones_do_not():
    method = low_rank(target_modules=["q_proj"])
    names = [f"base_model.model.model.layers.{i}.mlp.down_proj" for i in range(12)]
    base = partial(llama, layers=12)
    plain = counted(base(), method, tokens=400).activations
    kept = {bits: counted(base(), method, tokens=400, stored=dict.fromkeys(names, bits), compute=torch.float32)
            for bits in (4, 8)}  # fmt: skip
    assert kept[4].activations == pytest.approx(plain, rel=0.05)
    inputs = 12 * 2 * 400 * 128 * 4
    assert kept[8].activations - kept[4].activations == pytest.approx(inputs, rel=0.2)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=5, n_head=4, vocab_size=400, bos_token_id=0, eos_token_id=0),
        OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=5, num_attention_heads=4,
                  vocab_size=400),
        BloomConfig(hidden_size=64, n_layer=5, n_head=4, vocab_size=400),
    ],
    ids=["gpt2", "opt", "bloom"],
)  # fmt: skip
def test_other_architectures_are_run_and_keep_what_autograd_keeps(config):
    method = low_rank()
    batch = collate([row(90), row(60)])
    real = method.apply(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Context(recipe(method)))
    for module in real.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    kept = kept_by_autograd(real, method.loss, batch)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = method.apply(base, Context(recipe(method)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert kept <= step_bytes.step_bytes(model, batch, StepSettings(loss=method.loss)).total <= 1.35 * kept


def test_both_stacks_of_an_encoder_decoder_count():
    def keeps(encoder, decoder):
        config = T5Config(d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=encoder, num_decoder_layers=decoder,
                          vocab_size=400, decoder_start_token_id=0)  # fmt: skip
        with torch.device("meta"):
            model = T5ForConditionalGeneration(config).requires_grad_(True)
        batch = collate([row(40)] * 2)

        def loss(model, batch, forward):
            return {"loss": model(**batch).loss}

        return step_bytes.step_bytes(model, batch, StepSettings(loss=loss, accumulates=True)).activations

    base = keeps(6, 6)
    encoder, decoder = keeps(7, 6) - base, keeps(6, 7) - base
    assert decoder > encoder > 10_000
    assert keeps(8, 9) - base == 2 * encoder + 3 * decoder


def test_a_count_leaves_the_model_as_it_was():
    method = low_rank(dropout=0.1)
    model = method.apply(llama(layers=6), Context(recipe(method))).eval()
    before = [(n, id(p)) for n, p in [*model.named_parameters(), *model.named_buffers()]]
    blocks = list(model.get_base_model().model.layers)
    names = dict.fromkeys([n for n, m in model.named_modules() if n.endswith("base_layer")], 8)
    step_bytes.step_bytes(model, collate([row(30)]), StepSettings(loss=method.loss, checkpointing=True, stored=names))
    assert [(n, id(p)) for n, p in [*model.named_parameters(), *model.named_buffers()]] == before
    assert list(model.get_base_model().model.layers) == blocks
    assert not model.training and not model.is_activation_checkpointing
    assert all(p.grad is None and p.device.type == "meta" for p in model.parameters())
    assert not any(
        m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules() if m is not model
    )
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def test_a_model_that_can_not_be_run_is_estimated():
    method = low_rank()
    base = llama(layers=8)
    model = method.apply(base, Context(recipe(method)))
    made = recipe(method)
    run = plan_memory(made, method, model, [row(400)] * 4, collate, CUDA)
    base.model.forward = None
    estimated = plan_memory(made, method, model, [row(400)] * 4, collate, CUDA)
    assert run.traced and not estimated.traced
    assert estimated.activations == pytest.approx(run.activations, rel=0.35)
    checkpointed = recipe(method, gradient_checkpointing=True)
    assert (
        plan_memory(checkpointed, method, model, [row(400)] * 4, collate, CUDA).activations < estimated.activations / 3
    )


def test_nothing_trains_nothing_is_kept():
    base = llama()
    plan = plan_memory(recipe(low_rank()), low_rank(), base.requires_grad_(False), [row(9)], collate, CUDA)
    assert (plan.activations, plan.logits, plan.gradients, plan.optimizer) == (0, 0, 0, 0)
    assert plan.total == plan.weights + memory.CUDA_CONTEXT


# -- the allocator ---------------------------------------------------------------------------------------------------


def test_holes_follow_tensors_in_the_heap(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("peftctl.backends.heap._glibc", lambda: True)
    rows = [row(200)] * 2
    plan = planned(llama(), low_rank(), rows, machine=CPU)
    assert plan.allocator == pytest.approx(memory.HEAP_HOLES * (plan.activations + plan.logits), rel=0.02)
    assert planned(llama(), low_rank(), rows, machine=CUDA).allocator == 0
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "40000")
    assert planned(llama(), low_rank(), rows, machine=CPU).allocator < plan.allocator / 2
    monkeypatch.setattr("peftctl.backends.heap._glibc", lambda: False)
    assert planned(llama(), low_rank(), rows, machine=CPU).allocator == 0


# -- the batch, widths, sizes ----------------------------------------------------------------------------------------


def test_the_widest_batch_is_one_that_the_run_takes():
    rows = [row(n) for n in range(10, 50)]
    model = llama()
    made = recipe(low_rank(), batch_size=4)
    assert max(len(r.input_ids) for r in widest_rows(rows, made, model, 1)[0]) == 49
    assert sorted(len(r.input_ids) for r in widest_rows(rows, made, model, 1)[0]) == [46, 47, 48, 49]
    assert len(widest_rows(rows, recipe(low_rank(), batch_size=64), model, 1)[0]) == 40
    assert max(len(r.input_ids) for r in widest_rows(rows, made, model, 2)[0]) == 49
    first = recipe(low_rank(), batch_size=4, max_steps=1, seed=3)
    assert max(len(r.input_ids) for r in widest_rows(rows, first, model, 1)[0]) < 49


def test_many_supervised_tokens_can_weigh_more_than_length():
    rows = [row(60, 2), row(50, 10)]
    made = recipe(low_rank(), batch_size=1)
    assert len(widest_rows(rows, made, llama(layers=2), 1)[0][0].input_ids) == 60
    assert len(widest_rows(rows, made, llama(layers=2, vocab=100_000), 1)[0][0].input_ids) == 50


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(hidden_size=64, intermediate_size=20, num_hidden_layers=3, vocab_size=50), (64, 20, 3, 50)),
        (GPT2Config(n_embd=24, n_layer=3, vocab_size=50, bos_token_id=0, eos_token_id=0), (24, 96, 3, 50)),
        (OPTConfig(hidden_size=12, ffn_dim=20, num_hidden_layers=3, vocab_size=50), (12, 20, 3, 50)),
        (BloomConfig(hidden_size=8, n_layer=3, vocab_size=50), (8, 32, 3, 50)),
        (T5Config(d_model=8, d_ff=20, num_layers=3, num_decoder_layers=2, vocab_size=50), (8, 20, 5, 50)),
    ],
)
def test_widths_have_many_names(config, expected):
    size = widths(config)
    assert (size.hidden, size.feed_forward, size.layers, size.vocabulary) == expected


def test_widths_without_a_name():
    with pytest.raises(UsageError, match="the odd architecture can't be planned: its configuration has none of hidden"):
        widths(SimpleNamespace(model_type="odd"))


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("16 GiB", 2**34), ("1.5tb", 15 * 10**11), ("123", 123)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


def test_no_size():
    with pytest.raises(UsageError, match="expected a size such as 24GB, got 'much'"):
        parse_bytes("much")

"""Prefix tuning: the paper's equation, what peft leaves out or gets wrong, the start from real words, refusals."""

import math
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import linear, softmax
from transformers import DistilBertConfig, DistilBertForMaskedLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import peftctl
from peftctl.artifacts.merge import merge
from peftctl.commands.prepare import refuse_unsupported
from peftctl.errors import Interrupted, UsageError
from peftctl.evaluation.generation import generate, position_limit
from peftctl.methods.prefix_tuning import Config, Method
from peftctl.models.load import load_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners.prefix import cache_shape, keys_and_values
from tests.commands.helpers import write_recipe
from tests.methods.helpers import recipe, run_steps
from tests.methods.prefixes import IDS, attached, behind_prefix, encoder, gradient_of_rows, inputs
from tests.methods.prompts import smollm2
from tests.tiny import save_tiny, tiny_bart, tiny_bloom, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

MODELS = {
    "llama": (tiny_llama, "causal_lm"),
    "opt": (tiny_opt, "causal_lm"),
    "bloom": (tiny_bloom, "causal_lm"),
    "t5": (tiny_t5, "seq2seq_lm"),
    "bart": (tiny_bart, "seq2seq_lm"),
}


def method(**keys):
    return Method(Config(**{"num_virtual_tokens": 5, "hidden": 8, **keys}))


def made(key="llama", dtype=torch.float32, **keys):
    """Return a tiny model of a kind with its prefix."""
    make, task = MODELS[key]
    return attached(method(**keys), make().to(dtype), task)


# -- the equation ----------------------------------------------------------------------------------------------------


def test_attention_is_the_papers_equation_in_float64():
    """head = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V], the text rotated from position n, the prefix not at all."""
    model = made(dtype=torch.float64).double()
    attention = model.get_base_model().model.layers[2].self_attn
    seen = {}
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    attention.o_proj.register_forward_hook(lambda _, args, out: seen.update(heads=args[0]))
    with torch.no_grad():
        model(input_ids=IDS)
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    q, k, v = (
        linear(x, getattr(attention, f"{name}_proj").weight).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv"
    )
    angles = model.get_base_model().model.rotary_emb(x, torch.arange(5, 17)[None])
    assert torch.equal(cos, angles[0]) and torch.equal(sin, angles[1])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    split = encoder(model).rows().detach().double().view(5, 4, 2, 2, 8)
    expected = torch.empty(2, 12, 4, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            keys = torch.cat([split[:, 2, 0, h // 2], k[b, h // 2]])
            values = torch.cat([split[:, 2, 1, h // 2], v[b, h // 2]])
            for t in range(12):
                weights = softmax(keys[: 5 + t + 1] @ q[b, h, t] / math.sqrt(8), dim=0)
                expected[b, t, h] = weights @ values[: 5 + t + 1]
    torch.testing.assert_close(seen["heads"], expected.flatten(2), rtol=1e-9, atol=1e-9)


def test_the_network_is_the_papers_equation():
    e = encoder(made())
    w1, b1, w2, b2 = (getattr(e.transform[i], part) for i in (0, 2) for part in ("weight", "bias"))
    expected = torch.stack([w2 @ torch.tanh(w1 @ row + b1) + b2 for row in e.embedding.weight])
    torch.testing.assert_close(e.rows(), expected, rtol=1e-5, atol=1e-6)
    assert e.embedding.weight.std().item() == pytest.approx(1.0, abs=0.2)
    assert encoder(made(init_std=0.02)).embedding.weight.std().item() == pytest.approx(0.02, abs=0.005)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("key", MODELS)
def test_a_prefix_is_what_stands_in_the_cache_of_every_layer(key, projection):
    model = made(key, projection=projection)
    batch = inputs(model)
    with torch.no_grad():
        logits = model(**batch).logits
        expected = behind_prefix(MODELS[key][0](), encoder(model).rows(), encoder(model).shape, batch)
    assert logits.shape == (2, 12, 400)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", MODELS)
def test_the_keys_and_values_of_every_layer_have_a_gradient(key):
    model = made(key, projection=False)
    gradient = gradient_of_rows(model, inputs(model))
    largest = gradient.view(5, -1, encoder(model).shape.width).abs().amax(dim=(0, 2))
    assert len(largest) == 2 * encoder(model).shape.layers and (largest > 0).all()


def test_pefts_own_layout_of_an_encoder_decoder_gives_half_the_table_no_gradient():
    """Why the stored table has room for cross-attention; peft needs no such care once this fails."""
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    model = get_peft_model(tiny_t5(), config)
    model(**inputs(model)).logits.square().mean().backward()
    gradient = encoder(model).embedding.weight.grad.view(5, 4, -1).abs().amax(dim=(0, 2))
    assert (gradient > 0).tolist() == [True, True, False, False]


def test_the_network_runs_once_a_batch():
    model = made()
    widths = []
    encoder(model).transform[0].register_forward_hook(lambda _, args, out: widths.append(tuple(args[0].shape)))
    model(input_ids=IDS)
    assert widths == [(5, 16)]


def test_dropout_is_drawn_for_every_row_and_in_training_only():
    model = made(projection=False, dropout=0.5)
    same = IDS[:1].expand(2, -1)
    torch.testing.assert_close(model(input_ids=same).logits[0], model(input_ids=same).logits[1])
    stored = encoder(model).train()(torch.zeros(2, 5, dtype=torch.long))
    kept = stored != 0
    assert not torch.equal(kept[0], kept[1]) and 0.4 < kept.float().mean() < 0.6
    rows = encoder(model).rows().expand(2, -1, -1)
    torch.testing.assert_close(stored[kept], 2 * rows[kept])


def test_a_prefix_of_zeros_is_not_the_base():
    """Keys of zero take attention too; this also fails where a prefix is dropped on the way."""
    model = made(projection=False)
    with torch.no_grad():
        encoder(model).embedding.weight.zero_()
        delta = (model(input_ids=IDS).logits - tiny_llama()(input_ids=IDS).logits).abs().max()
    assert delta > 1e-3
    assert not Method.card.identity_at_init


@pytest.mark.parametrize("key", MODELS)
def test_without_the_prefix_it_is_the_base_exactly(key):
    model = made(key)
    batch = inputs(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, MODELS[key][0]()(**batch).logits)


# -- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("key", MODELS)
def test_trainable_count_is_the_closed_form(key, projection):
    base, chosen = MODELS[key][0](), method(projection=projection)
    expected = chosen.count(base)
    assert expected == (5 * 16 + (16 + 1) * 8 + (8 + 1) * 128 if projection else 5 * 128) or key != "llama"
    with torch.device("meta"):
        shapes = type(base)(base.config)
    assert chosen.count(shapes) == expected
    for model in (attached(chosen, base, MODELS[key][1]), attached(chosen, shapes, MODELS[key][1])):
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("keys", "count"), [({"projection": False}, 230_400), ({"hidden": 512}, 6_012_416)])
def test_count_on_smollm2(keys, count):
    assert Method(Config(num_virtual_tokens=20, **keys)).count(smollm2()) == count


@pytest.mark.parametrize("projection", [False, True])
def test_only_the_prefix_moves(projection):
    model = made(projection=projection)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    own = ["embedding.weight"] + [f"transform.{i}.{p}" for i in (0, 2) for p in ("weight", "bias") if projection]
    assert moved == {f"prompt_encoder.default.{name}" for name in own}
    assert losses[-1] < losses[0]


def test_loss_at_supervised_positions_is_that_of_all_logits():
    model = made()
    batch = inputs(model)
    labels = IDS.masked_fill(batch["attention_mask"] == 0, -100)
    part = supervised_forward(model, batch | {"labels": labels})
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(part.cross_entropy(), expected)


# -- start from real words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_a_start_from_words_answers_as_if_they_stood_before_the_text(make, projection):
    """The network's last layer is solved for, so nothing but rounding is left."""
    text = "answer the question with one word"
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    n = len(ids)
    model = attached(method(num_virtual_tokens=n, hidden=32, projection=projection, init_text=text), make())
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        expected = make()(input_ids=torch.cat([torch.tensor(ids).expand(2, -1), IDS], dim=1)).logits[:, n:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [2, 30])
def test_words_are_cut_or_repeated(n):
    ids = tiny_tokenizer()("answer the question", add_special_tokens=False)["input_ids"]
    assert 2 < len(ids) < 30
    model = attached(method(num_virtual_tokens=n, projection=False, init_text="answer the question"), tiny_llama())
    _, values = keys_and_values(tiny_llama(), (ids * 30)[:n])[0]
    stored = encoder(model).rows().detach().view(n, 4, 2, 2, 8)[:, 0, 1]
    torch.testing.assert_close(stored, values[0].transpose(0, 1))


def test_words_are_refused_where_there_is_nothing_to_start_from():
    with pytest.raises(UsageError, match=r"^method\.init_text: has no token"):
        attached(method(init_text=""), tiny_llama())
    with pytest.raises(UsageError, match=r"^method\.init_text: only for causal_lm"):
        attached(method(init_text="words"), tiny_t5(), "seq2seq_lm")


# -- save, resume, generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("key", ["llama", "t5"])
def test_the_export_is_a_flat_table_that_plain_peft_reads_with_equal_logits(tmp_path, key, projection):
    model = made(key, projection=projection, dropout=0.3)
    batch, shape = inputs(model), encoder(model).shape
    with torch.no_grad():
        reference = model(**batch).logits
        model.train()  # the export must not draw dropout
        method(projection=projection).export(model).save_pretrained(tmp_path)
        assert torch.equal(model.eval()(**batch).logits, reference)
        again = PeftModel.from_pretrained(MODELS[key][0](), str(tmp_path))
        assert torch.equal(again.eval()(**batch).logits, reference)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: t.shape for name, t in stored.items()} == {
        "prompt_embeddings": (5, shape.row * (2 if key == "t5" else 1))
    }
    assert not again.peft_config["default"].prefix_projection


@pytest.mark.parametrize("projection", [False, True])
def test_stopped_and_resumed_equals_straight(tmp_path, projection):
    """With dropout: the random state counts."""
    chosen = method(projection=projection, dropout=0.2)
    straight, _ = train(workload(tmp_path / "straight", chosen, max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", chosen, max_steps=6, reporter=StopAt(3)))
    resumed = workload(tmp_path / "stopped", chosen, max_steps=6)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    expected = trained_tensors(straight)
    assert len(expected) == (5 if projection else 1)
    for name, tensor in trained_tensors(again).items():
        assert torch.equal(tensor, expected[name]), name


def test_pefts_own_way_to_go_on_raises_for_a_network(tmp_path):
    """Why checkpoints hold the network itself."""
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
    )
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("key", ["llama", "opt", "t5"])
def test_generation_with_a_cache_is_greedy_without_one(key, exported):
    model = made(key)
    if exported:
        model = method().export(model)
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15]]
    answers = generate(model, tiny_tokenizer(), prompts, max_new_tokens=8, batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == greedy(model, prompt, 8)
    assert position_limit(model) == (None if key == "t5" else 507)


def greedy(model, prompt, most):
    written = [3] if model.config.is_encoder_decoder else list(prompt)
    first = len(written)
    for _ in range(most):
        batch = {"input_ids": torch.tensor([written])}
        if model.config.is_encoder_decoder:
            batch = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([written])}
        with torch.no_grad():
            token = int(model(**batch, use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        written.append(token)
    return written[first:]


# -- half and quantised bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_base_the_prefix_trains_in_float32(dtype):
    model = made(dtype=dtype)
    assert {p.dtype for p in encoder(model).parameters()} == {torch.float32}
    losses = run_steps(model, 3)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    model.eval()
    before = model(input_ids=IDS).logits
    assert before.dtype == dtype and before.isfinite().all()
    assert torch.equal(method().export(model)(input_ids=IDS).logits, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(folder, bits, dtype):
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    chosen = method()
    count, model = chosen.count(base), attached(chosen, base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = run_steps(model, 4)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "prompt_encoder" in name}
    assert losses[-1] < losses[0] and sum(before[name].numel() for name in moved) == count


@pytest.mark.parametrize("quantization", [{}, {"bits": 4}])
def test_a_run_evaluates_saves_and_reads_back(tmp_path, folder, quantization):
    keys = {"name": "prefix_tuning", "num_virtual_tokens": 5, "hidden": 8}
    extra = {"quantization": quantization} if quantization else {}
    path = write_recipe(tmp_path, folder, keys, eval={"max_new_tokens": 4, "metrics": ["loss", "exact_match"]}, **extra)
    result = peftctl.train(peftctl.load_recipe(path))  # compares the logits read back with those trained
    assert result.summary["steps"] == 6
    assert math.isfinite(result.summary["eval"]["after"]["loss"])
    with pytest.raises(UsageError, match="Prefix tuning can't be merged: the keys and values"):
        merge(str(result.artefact), tmp_path / "merged")


# -- refusals --------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_refused():
    """peft would drop the prefix with a log line."""
    with pytest.raises(UsageError, match=r"^train\.gradient_checkpointing: prefix_tuning does not support it"):
        refuse_unsupported(recipe(Config(), gradient_checkpointing=True), method())


def test_a_model_without_a_cache_is_refused():
    config = DistilBertConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    with pytest.raises(
        UsageError,
        match=r"^method\.name: the distilbert architecture takes no prefix: .* reads no cache of keys and values$",
    ):
        method().count(DistilBertForMaskedLM(config))


def test_layers_of_several_widths_are_refused():
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(32, 32, bias=False)
    attention.v_proj = torch.nn.Linear(32, 32, bias=False)
    attention.num_key_value_groups = 1
    with pytest.raises(UsageError, match=r"of one shape \(heads, width\) in all layers, found \(2, 8\), \(4, 8\)$"):
        cache_shape(model)


@pytest.mark.parametrize(("make", "positions"), [(tiny_opt, 512), (tiny_bart, 64), (tiny_llama, None)])
def test_a_fixed_table_of_positions_leaves_fewer_to_the_text(make, positions):
    lines = method().notices(make())
    expected = f"the prefix takes 5 of the model's {positions} positions: a row may have {(positions or 5) - 5} tokens"
    assert lines == ([] if positions is None else [expected])
    refused = pytest.raises(UsageError, match=rf"below the model's {positions} positions, got 600")
    with refused if positions else nullcontext():
        method(num_virtual_tokens=600).notices(make())

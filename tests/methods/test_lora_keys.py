"""LoRA beyond Linear layers and one rank: embeddings, Conv1D, parts of fused projections, patterns, whole modules."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM

from peftctl.errors import UsageError
from peftctl.methods.lora import Config, Method
from peftctl.models.vocabulary import fit_vocabulary, vocabulary_rows
from peftctl.tuners.chosen_rows import ChosenRows
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, run_steps
from tests.tiny import tiny_llama


def lora_layers(model):
    return {n.split("base_model.model.")[1]: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def trainable(model):
    return {n.split("base_model.model.")[1]: p for n, p in model.named_parameters() if p.requires_grad}


def randomise(model, std=0.1):
    """Move every trainable tensor away from where it starts, so that each has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std
    return model


def with_new_tokens(ids, **keys):
    method = Method(Config(**keys))
    method.new_token_ids = ids
    return method


# -- the equation beside an embedding and beside GPT-2's Conv1D --------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_beside_an_embedding_it_is_the_papers_equation_in_float64(training):
    """A row of the table and of A is looked up: y = E[t] + (alpha / r) B A[:, t]."""
    method = Method(Config(r=3, alpha=12, target_modules=["embed_tokens"]))
    model = randomise(applied(method, tiny_llama().double()).double()).train(training)
    layer = lora_layers(model)["model.embed_tokens"]
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    ids = torch.tensor([[5, 7, 5], [399, 0, 1]])
    naive = torch.stack(
        [torch.stack([layer.base_layer.weight[t] + (12 / 3) * (b @ a[:, t]) for t in row]) for row in ids]
    )
    torch.testing.assert_close(layer(ids), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_beside_conv1d_it_is_the_papers_equation_in_float64(training):
    """GPT-2 stores W as (d_in, d_out): y = x W + bias + (alpha / r) B A x."""
    model = applied(Method(Config(r=3, alpha=12, target_modules=["c_attn"])), tiny_of("gpt2", "cpu").double())
    model = randomise(model.double()).train(training)
    layer = lora_layers(model)["transformer.h.1.attn.c_attn"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    w, bias = layer.base_layer.weight, layer.base_layer.bias
    naive = torch.stack([torch.stack([v @ w + bias + (12 / 3) * (b @ (a @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)


def test_conv1d_and_linear_targets_merge_each_in_its_own_layout():
    base = tiny_of("gpt2", "cpu", tie_word_embeddings=False).double()
    model = randomise(applied(Method(Config(target_modules=["c_fc", "lm_head"])), base).double())
    ids = torch.arange(1, 11).reshape(1, 10)
    model.eval()
    before = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-10, atol=1e-10)


# -- counts: closed form, meta device and attached model agree ---------------------------------------------------------

D, TOKENS = 32, 400
CASES = {
    "embedding": (lambda: tiny_llama(tie=False), {"r": 5, "target_modules": ["embed_tokens"]}, 5 * (TOKENS + D)),
    "attention": (tiny_llama, {"r": 2, "target_modules": "attention"}, 4 * 2 * (64 + 48 + 48 + 64)),
    "rank pattern": (
        tiny_llama,
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 7, r"layers\.0\..*q_proj": 1}},
        4 * 7 * 48 + 3 * 2 * 64 + 64,
    ),
    "parts of gpt2": (
        lambda: tiny_of("gpt2", "cpu"), {"r": 4, "target_modules": ["c_attn"], "parts": ["q", "v"]}, 2 * 4 * (32 + 64),
    ),
    "parts of phi3": (
        lambda: tiny_of("phi3", "cpu"),
        {"r": 4, "target_modules": ["qkv_proj", "o_proj"], "parts": ["k"]},
        2 * 4 * (32 + 16 + 64),
    ),
    "norm": (tiny_llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}, 4 * 2 * 64 + D),
    "tied embedding": (
        tiny_llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 4 * 2 * 64 + TOKENS * D,
    ),
    "both ends": (
        lambda: tiny_llama(tie=False),
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        4 * 2 * 64 + 2 * TOKENS * D,
    ),
    "mlp saved": (
        tiny_llama, {"r": 2, "target_modules": "all-linear", "modules_to_save": ["mlp", "up_proj"]},
        4 * 2 * (64 + 48 + 48 + 64) + 4 * 3 * 32 * 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_count_is_the_closed_form_with_and_without_weights(case):
    make, keys, expected = CASES[case]
    method = Method(Config(**keys))
    assert method.count(make()) == expected
    model = applied(method, make())
    assert sum(p.numel() for p in trainable(model).values()) == expected
    bare = make().to("meta")
    bare.tie_weights()
    assert method.count(bare) == expected
    model = method.apply(bare, context())
    assert sum(p.numel() for p in trainable(model).values()) == expected
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_base_exactly(case):
    make, keys, _ = CASES[case]
    ids = torch.arange(1, 11).reshape(1, 10)
    reference = make()(input_ids=ids).logits
    model = applied(Method(Config(**keys)), make())
    assert torch.equal(model.eval()(input_ids=ids).logits, reference)


@pytest.mark.parametrize(("tie", "ends"), [(True, 1), (False, 2)])
def test_rows_of_new_tokens_count_once_where_the_head_is_tied(tie, ends):
    base = tiny_llama(tie=tie)
    fit_vocabulary(base, 403)
    method = with_new_tokens([400, 401, 402], r=2, target_modules=["q_proj"])
    expected = 4 * 2 * 64 + ends * 3 * D
    assert method.count(base) == expected
    model = applied(method, base)
    assert sum(p.numel() for p in trainable(model).values()) == expected


# -- init, rank and alpha ----------------------------------------------------------------------------------------------


def test_gaussian_a_has_standard_deviation_one_over_r_and_b_is_zero():
    model = applied(Method(Config(r=64, init="gaussian", target_modules=["down_proj"])), tiny_llama())
    layer = next(iter(lora_layers(model).values()))
    a = layer.lora_A["default"].weight
    assert a.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert a.abs().max() > 3 / 64  # kaiming-uniform would end at sqrt(3) standard deviations
    assert not layer.lora_B["default"].weight.any()
    assert model.peft_config["default"].init_lora_weights == "gaussian"


def test_patterns_set_rank_and_scale_layer_by_layer():
    keys = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.[qv]_proj": 32}}
    model = applied(Method(Config(r=4, alpha=8, target_modules=["q_proj", "v_proj"], **keys)), tiny_llama())
    layers = lora_layers(model)
    expected = {"0.q": (4, 8 / 4), "0.v": (2, 8 / 2), "1.q": (4, 32 / 4), "1.v": (2, 32 / 2)}
    for place, (rank, scale) in expected.items():
        block, letter = place.split(".")
        layer = layers[f"model.layers.{block}.self_attn.{letter}_proj"]
        assert (layer.r["default"], layer.scaling["default"]) == (rank, scale)
        assert layer.lora_A["default"].weight.shape[0] == rank


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank_pattern": {"q_porj": 4}}, r"method.rank_pattern: 'q_porj' matches no target; did you mean 'q_proj'\?"),
        ({"alpha_pattern": {"(": 4}}, r"method.alpha_pattern: '\(' is not a regular expression"),
        (
            {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2}},
            "'layers.0.self_attn.q_proj' is never reached, patterns above it match first; move it up",
        ),
        (
            {"modules_to_save": ["lm_haed"]},
            r"method.modules_to_save: 'lm_haed' matches no module; did you mean 'lm_head'",
        ),
        ({"modules_to_save": ["layers"]}, "model.layers is a ModuleList, a list of modules"),
        ({"modules_to_save": ["act_fn"]}, "is a SiLUActivation, which has no parameters"),
        ({"modules_to_save": ["self_attn"]}, "holds every target of method.target_modules"),
        ({"parts": ["q"]}, "method.parts: no target is a fused projection .* the llama architecture"),
    ],
)
def test_keys_that_select_nothing_are_refused_in_one_line(keys, message):
    for base in (tiny_llama(), tiny_llama().to("meta")):
        with pytest.raises(UsageError, match=message) as caught:
            Method(Config(target_modules=["q_proj", "v_proj"], **keys)).count(base)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "targets", "parts", "message"),
    [
        ("gpt2", ["c_attn"], ["q", "w"], "no fused target has a part 'w'; known: k, q, v"),
        ("phi3", "all-linear", ["q"], "gate_up_proj has the parts gate, up, and none of them is named"),
        ("gpt2", ["c_fc"], ["q"], "no target is a fused projection"),
    ],
)
def test_parts_that_do_not_fit_the_targets_are_refused(architecture, targets, parts, message):
    with pytest.raises(UsageError, match=message):
        Method(Config(target_modules=targets, parts=parts)).count(tiny_of(architecture))


# -- parts of a fused projection ---------------------------------------------------------------------------------------

OTHER_ROWS = {
    "gpt2": ("c_attn", list(range(32, 64))),  # k, in the middle third
    "bloom": ("query_key_value", [h * 24 + 8 + i for h in range(4) for i in range(8)]),  # heads of q 8, k 8, v 8
    "phi3": ("qkv_proj", list(range(32, 48))),
}


@pytest.mark.parametrize("architecture", OTHER_ROWS)
def test_parts_leave_the_other_rows_bit_equal_through_training_and_merging(architecture):
    leaf, others = OTHER_ROWS[architecture]
    method = Method(Config(r=4, target_modules=[leaf], parts=["q", "v"]))
    model = applied(method, tiny_of(architecture, "cpu"))
    run_steps(model, 3, weight_decay=0.3)
    for name, full in get_peft_model_state_dict(model).items():
        if "lora_B" not in name:
            continue
        chosen = [row for row in range(len(full)) if row not in others]
        assert not full[others].any() and full[chosen].any(dim=1).all()
    layer = next(iter(lora_layers(model).values()))
    before = layer.base_layer.weight.detach().clone()
    model.merge_adapter()
    change = layer.base_layer.weight.detach() - before
    change = change.T if architecture == "gpt2" else change
    assert not change[others].any() and change.any()


def test_chosen_rows_act_as_the_full_matrix_in_training_and_evaluation():
    model = applied(
        Method(Config(r=4, alpha=8, target_modules=["c_attn"], parts=["v"])), tiny_of("gpt2", "cpu").double()
    )
    randomise(model.double())
    layer = next(iter(lora_layers(model).values()))
    full = get_peft_model_state_dict(model)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    x = torch.randn(5, 32, dtype=torch.float64)
    naive = x @ layer.base_layer.weight + layer.base_layer.bias + 2 * (x @ layer.lora_A["default"].weight.T) @ full.T
    for mode in (model.train(), model.eval()):
        torch.testing.assert_close(mode.get_submodule("base_model.model.transformer.h.0.attn.c_attn")(x), naive)


def test_chosen_rows_read_their_own_state_and_refuse_that_of_other_parts():
    source, copy = (ChosenRows(nn.Linear(2, 6, bias=False), [1, 4]) for _ in range(2))
    copy.load_state_dict(source.state_dict())
    assert torch.equal(copy.rows, source.rows)
    assert list(source.state_dict()) == ["weight"] and source.state_dict()["weight"].shape == (6, 2)
    with pytest.raises(UsageError, match="changes rows of other parts"):
        ChosenRows(nn.Linear(2, 6, bias=False), [1, 5]).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="expected \\(8, 2\\)"):
        ChosenRows(nn.Linear(2, 8, bias=False), [1]).load_state_dict(source.state_dict())


# -- whole modules -----------------------------------------------------------------------------------------------------


def test_norm_is_the_final_norm_alone_and_the_notice_says_so():
    method = Method(Config(modules_to_save=["norm"]))
    assert method.notices(tiny_llama()) == [
        "target_modules: q_proj, v_proj (peft's choice)",
        "trained whole: model.norm",
    ]
    model = applied(method, tiny_llama())
    assert {n for n in trainable(model) if "lora" not in n} == {"model.norm.modules_to_save.default.weight"}


def test_a_tied_head_stays_tied_and_the_notice_says_so():
    method = Method(Config(modules_to_save=["lm_head"], target_modules=["q_proj"]))
    assert method.notices(tiny_llama()) == ["trained whole: model.embed_tokens, with lm_head tied to the embedding"]
    model = applied(method, tiny_llama())
    run_steps(model, 2)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    assert ends[0].weight is ends[1].weight
    assert not torch.equal(ends[0].weight, tiny_llama().get_input_embeddings().weight)


def test_an_adapter_on_a_tied_embedding_changes_the_input_only_and_the_notice_says_so():
    method = Method(Config(target_modules=["embed_tokens"]))
    assert method.notices(tiny_llama()) == [
        "model.embed_tokens and lm_head share one matrix; the adapter changes the input only"
    ]
    model = applied(method, tiny_llama())
    assert list(lora_layers(model)) == ["model.embed_tokens"]


@pytest.mark.parametrize("whole", ["norm", "mlp", "embed_tokens", "lm_head"])
def test_in_a_bfloat16_base_whole_modules_train_in_float32_and_are_stored_in_bfloat16(whole):
    method = Method(Config(r=2, target_modules=["q_proj"], modules_to_save=[whole]))
    model = applied(method, tiny_llama(dtype="bfloat16", tie=False))
    copies = {n: p for n, p in trainable(model).items() if "modules_to_save" in n}
    start = {n: p.detach().clone() for n, p in copies.items()}
    assert copies and {p.dtype for p in copies.values()} == {torch.float32}
    ids = torch.arange(1, 25).reshape(2, 12)
    reference = tiny_llama(dtype="bfloat16", tie=False)(input_ids=ids).logits
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, reference, rtol=2e-2, atol=2e-2)
    run_steps(model, 1, lr=1e-5)  # an AdamW step of 1e-5: bfloat16 would round it away on weights of size 0.2
    assert all((p != start[n]).any() for n, p in copies.items())
    method.export(model)
    assert {p.dtype for n, p in trainable(model).items() if "modules_to_save" in n} == {torch.bfloat16}
    assert {p.dtype for n, p in trainable(model).items() if "lora" in n} == {torch.float32}
    assert model.eval()(input_ids=ids).logits.dtype == torch.bfloat16
    assert not any("forward" in vars(module) for module in model.modules())


# -- gradient checkpointing --------------------------------------------------------------------------------------------

SETS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "attention": {"target_modules": "attention"},
    "mlp": {"target_modules": "mlp"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm", "lm_head"]},
    "new tokens": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", SETS)
def test_checkpointing_gives_equal_gradients_with_every_set_of_targets(name, dtype):
    ids, gradients = torch.arange(1, 25).reshape(2, 12), []
    for checkpointed in (False, True):
        method = with_new_tokens([3, 7] if name == "new tokens" else [], r=2, dropout=0.2, **SETS[name])
        model = applied(method, tiny_llama(dtype=dtype))
        if dtype == "float64":
            model = model.double()
        randomise(model).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in trainable(model).items()})
    assert all(g is not None and g.any() for g in gradients[0].values())
    for tensor, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][tensor]), tensor


# -- saved, and read by plain peft in a process of its own -------------------------------------------------------------

_PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    kept = torch.load(folder + "/logits.pt")
    base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=kept["dtype"])
    if kept["rows"] > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(kept["rows"], mean_resizing=False)
    with torch.no_grad():
        reference = base(input_ids=kept["ids"]).logits
        model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
        logits = model(input_ids=kept["ids"]).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=kept["ids"]).logits, reference), folder
    assert "peftctl" not in sys.modules
    print(float((logits - kept["logits"]).abs().max()))
"""
SAVED = {
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens"]}),
    "parts": (lambda: tiny_of("gpt2", "cpu"), {"target_modules": ["c_attn", "c_fc"], "parts": ["q", "v"]}),
    "parts of bloom": (
        lambda: tiny_of("bloom", "cpu"), {"target_modules": ["query_key_value"], "parts": ["k"], "r": 3},
    ),
    "patterns": (
        tiny_llama,
        {"target_modules": "mlp", "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.[01]\..*": 3}},
    ),
    "whole modules": (
        lambda: tiny_llama(dtype="bfloat16"), {"target_modules": "attention", "modules_to_save": ["norm", "mlp"]},
    ),
    "tied head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "tied head of gpt2": (lambda: tiny_of("gpt2", "cpu"), {"modules_to_save": ["wte", "ln_f"]}),
    "new tokens": (tiny_llama, {}),
    "new tokens, untied": (lambda: tiny_llama(tie=False), {}),
    "new tokens of gpt2": (lambda: tiny_of("gpt2", "cpu"), {}),
    "new tokens, head saved": (lambda: tiny_llama(tie=False), {"modules_to_save": ["lm_head"]}),
}  # fmt: skip


def test_plain_peft_reads_every_adapter_as_it_was_trained(tmp_path):
    for name, (make, keys) in SAVED.items():
        folder, ids = tmp_path / name, torch.tensor([[1, 5, 9, 33, 7, 2]])
        make().save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=make().dtype)
        method = with_new_tokens([], **keys)
        if "new tokens" in name:
            old = vocabulary_rows(base)
            fit_vocabulary(base, old + 4)
            method.new_token_ids = list(range(old, old + 4))
            ids = torch.tensor([[1, old + 1, 9, old + 3]])
        model = randomise(applied(method, base))
        model = method.export(model).eval()
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        kept = {"ids": ids, "logits": logits, "rows": vocabulary_rows(model), "dtype": logits.dtype}
        torch.save(kept, folder / "logits.pt")
    folders = [str(tmp_path / name) for name in SAVED]
    done = subprocess.run([sys.executable, "-c", _PLAIN, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == [0.0] * len(SAVED)


# -- rows of new tokens ------------------------------------------------------------------------------------------------


def test_only_the_new_rows_of_the_embedding_move():
    base = tiny_llama()
    fit_vocabulary(base, TOKENS + 3)
    before = base.get_input_embeddings().weight.detach().clone()
    model = applied(with_new_tokens([400, 402], target_modules=["q_proj"]), base).train()
    ids = torch.tensor([[1, 400, 5, 402, 9]])
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(*ends)
    moved = (ends[0] != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [400, 402]


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (
            tiny_llama,
            {"target_modules": ["embed_tokens"]},
            "model.embed_tokens can't get a low-rank update and rows of",
        ),
        (
            lambda: tiny_llama(tie=False),
            {"target_modules": ["lm_head"]},
            "lm_head can't get a low-rank update and rows",
        ),
        (lambda: tiny_of("t5"), {}, "model.add_tokens: .* encoder-decoders"),
    ],
)
def test_what_can_not_train_beside_new_rows_is_refused(make, keys, message):
    with pytest.raises(UsageError, match=message):
        with_new_tokens([5], **keys).count(make())


def test_a_head_with_a_bias_must_train_whole_beside_new_tokens():
    model = tiny_llama(tie=False)
    model.lm_head.bias = nn.Parameter(torch.ones(TOKENS))
    with pytest.raises(UsageError, match=r"the output head of this architecture has a bias, .* add lm_head"):
        with_new_tokens([5]).count(model)
    assert with_new_tokens([5], modules_to_save=["lm_head"]).count(model) == 4 * 8 * (64 + 48) + TOKENS * 33 + 32


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_the_adapter_names_its_task_as_peft_does(task):
    setting = context()
    model = setting.recipe.model.model_copy(update={"task": task})
    setting = replace(setting, recipe=setting.recipe.model_copy(update={"model": model}))
    base = tiny_llama() if task == "causal_lm" else tiny_of("t5", "cpu")
    adapted = Method(Config()).apply(base, setting)
    assert adapted.peft_config["default"].task_type == {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM"}[task]


def test_kaiming_is_the_default_and_bounded_as_pefts():
    assert Config().init == "kaiming"
    a = next(iter(lora_layers(applied(Method(Config(r=64)), tiny_llama())).values())).lora_A["default"].weight
    assert a.abs().max() <= 1 / math.sqrt(a.shape[1])

"""KronA: its product written out in float64, the shapes of its factors, and plain LoKr files."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftctl.artifacts.fold import fold
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.krona import Config, Method
from peftctl.tuners.kron_linear import KronLinear, layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.tiny import tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**{"factor": 4, "target_modules": "all-linear"} | keys))


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in layers(model):
        for factor in (layer.lokr_w1["default"], layer.lokr_w2["default"]):
            factor.data = torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor.dtype) / 4


def factors(layer):
    return layer.lokr_w1["default"].detach().double(), layer.lokr_w2["default"].detach().double()


def smollm2():
    """The demo model's shapes, without weights."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# -- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_layer_is_the_papers_equation_in_float64(training, scale):
    """y = W x + s (A kron B) x, in our training forward and in peft's own, entry by entry."""
    model = applied(method(scale=scale), tiny_llama().double()).double().train(training)
    randomise(model)
    for name in ("mlp.gate_proj", "mlp.down_proj", "self_attn.k_proj"):
        layer = model.get_submodule(f"base_model.model.model.layers.1.{name}")
        a, b = factors(layer)
        (d_out, d_in), (b1, b2) = layer.base_layer.weight.shape, b.shape
        product = torch.stack(
            [torch.stack([a[i // b1, j // b2] * b[i % b1, j % b2] for j in range(d_in)]) for i in range(d_out)]
        )
        x = torch.randn(2, 5, d_in, dtype=torch.float64)
        expected = x @ layer.base_layer.weight.T + scale * x @ product.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


def test_training_forward_has_pefts_gradients():
    results = []
    for lean in (True, False):
        model = applied(method(), tiny_llama().double()).double().train()
        randomise(model)
        if not lean:
            for _, layer in layers(model):
                layer.__class__ = KronLinear.__bases__[0]
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-10, atol=1e-12)


def test_training_keeps_neither_the_product_nor_a_float32_copy_of_the_input():
    model = applied(method(target_modules=["gate_proj"]), tiny_llama(dtype="bfloat16")).train()
    _, layer = next(layers(model))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 7, 32, dtype=torch.bfloat16, requires_grad=True))
    assert kept
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= 3 * 7 * 32]
    products = [t for t in kept if t.numel() == 64 * 32]
    assert all(t.data_ptr() == layer.base_layer.weight.data_ptr() for t in products)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_starts_as_the_base_exactly_and_a_is_the_factor_at_zero(dtype):
    reference = tiny_llama(dtype=dtype)(input_ids=IDS).logits
    model = applied(method(), tiny_llama(dtype=dtype))
    for mode in (model.eval(), model.train()):
        assert torch.equal(mode(input_ids=IDS).logits, reference)
    for _, layer in layers(model):
        a, b = factors(layer)
        assert not a.any() and b.all()
        assert b.abs().max() <= b.shape[1] ** -0.5
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_update_has_the_product_of_the_ranks():
    model = applied(method(), tiny_llama())
    for trained, rank in ((False, 0), (True, 32)):
        if trained:
            run_steps(model, 4)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        a, b = factors(layer)
        change = layer.get_delta_weight("default").detach().double()
        torch.testing.assert_close(change, torch.kron(a, b), rtol=0, atol=1e-6)
        ranks = [int(torch.linalg.matrix_rank(m, rtol=1e-5)) for m in (a, b, change)]
        assert ranks[0] * ranks[1] == ranks[2] == rank  # LoRA with as few parameters has rank 1


# -- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 7, 8, 16, 17, 32, 1000])
def test_factors_multiply_back_to_the_shapes_of_the_demo_model(factor):
    chosen = method(factor=factor)
    base = smollm2()
    expected = chosen.count(base)
    model = chosen.apply(base, context())
    found = 0
    for _, layer in layers(model):
        (a1, a2), (b1, b2) = layer.lokr_w1["default"].shape, layer.lokr_w2["default"].shape
        assert (a1 * b1, a2 * b2) == (layer.out_features, layer.in_features)
        found += a1 * a2 + b1 * b2
    assert expected == found == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"lokr_w1", "lokr_w2"}  # no factor is split in two


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 30 * (16 * 16 + 36 * 36)),  # 576 x 576
        (["v_proj"], 30 * (16 * 16 + 12 * 36)),  # 192 x 576
        (["up_proj"], 30 * (16 * 16 + 96 * 36)),  # 1536 x 576
        (["q_proj", "v_proj"], 30 * (2 * 16 * 16 + 36 * 36 + 12 * 36)),
    ],
)
def test_counts_on_the_demo_model(targets, count):
    assert Method(Config(factor=16, target_modules=targets)).count(smollm2()) == count


def test_the_scale_is_s_whatever_number_peft_divides_by():
    """LoKr's scale is alpha / r, and r must grow with the widest target: s does not follow it."""
    seen = set()
    for targets, scale in ((["k_proj"], 2.0), ("all-linear", 2.0), ("all-linear", 0.3)):
        model = applied(method(target_modules=targets, scale=scale), tiny_llama())
        settings = model.peft_config["default"]
        seen.add(settings.r)
        assert settings.alpha / settings.r == pytest.approx(scale, rel=1e-12)
        for _, layer in layers(model):
            assert layer.scaling["default"] == pytest.approx(scale, rel=1e-12)
    assert len(seen) == 2


def test_the_notice_says_the_shapes():
    assert method(target_modules=["q_proj", "o_proj", "v_proj"]).notices(tiny_llama()) == [
        "A (4, 4) kron B (8, 8): o_proj, q_proj",
        "A (4, 4) kron B (4, 8): v_proj",
    ]


@pytest.mark.parametrize(
    ("architecture", "targets", "kind"),
    [("gpt2", "all-linear", "Conv1D"), ("llama", ["embed_tokens"], "Embedding")],
)
def test_targets_that_are_no_linear_layer_are_refused(architecture, targets, kind):
    with pytest.raises(UsageError, match=rf"is a {kind}; krona takes nn\.Linear only"):
        method(target_modules=targets).count(tiny_of(architecture))


def test_a_classifiers_head_trains_whole_and_is_no_target(tmp_path):
    from peft import PeftModel

    def base():
        return tiny_bert(kind="BertForSequenceClassification", num_labels=3).to(torch.bfloat16)

    plain = recipe()
    task = Context(plain.model_copy(update={"model": plain.model.model_copy(update={"task": "seq_cls"})}))
    with pytest.raises(UsageError, match="holds only the head"):
        method(target_modules=["classifier"]).count(base())
    model = method().apply(base(), task)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == method().count(base())
    assert len(trainable) == 2 * len(list(layers(model))) + 2 and {p.dtype for p in trainable} == {torch.float32}
    assert torch.equal(model.eval()(input_ids=IDS).logits, base()(input_ids=IDS).logits)
    for parameter in trainable:
        parameter.data += 0.01
    exported = method().export(model)
    logits = exported(input_ids=IDS).logits
    exported.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("keys", [{"factor": 0}, {"scale": 0.0}, {"r": 4}])
def test_sections_that_can_not_work_are_refused(keys):
    with pytest.raises(ValueError, match=r"greater than 0|Extra inputs"):
        method(**keys)


# -- training and the result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_it_learns_saves_and_merges(base, tmp_path):
    from peft import PeftModel

    chosen = method(scale=2.0)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is tiny_t5 else {})
    reference = base()(**inputs).logits
    model = applied(chosen, base())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = run_steps(model, 4, weight_decay=0.1)
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    assert not any(torch.equal(parameters[n], p) for n, p in start.items())
    model.eval()
    logits = model(**inputs).logits
    assert (logits - reference).abs().max() > 1e-2
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, reference, rtol=0, atol=1e-5)
    chosen.export(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOKR"
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-6)
    merged, lost = fold(again, torch.float32)
    torch.testing.assert_close(merged(**inputs).logits, logits, rtol=0, atol=2e-5)
    assert lost.layers == sum(1 for _ in layers(model)) and lost.relative < 1e-6


def test_stopped_and_resumed_equals_straight_bit_by_bit(tmp_path):
    straight, _ = train(workload(tmp_path / "straight", method(), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(), max_steps=6, reporter=StopAt(3)))
    resumed = workload(tmp_path / "stopped", method(), max_steps=6)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_recomputed_activations_give_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = applied(method(), tiny_llama()).train()
        randomise(model)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

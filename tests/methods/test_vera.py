"""VeRA: the equation, one pair of projections for all layers in memory and in the file, and what moves."""

import json
import math

import pytest
import torch
from peft.tuners.vera.layer import VeraLayer
from safetensors.torch import load_file

import peftctl
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.vera import Config, Method
from peftctl.recipe.schema import ModelSection
from peftctl.training.optimizers import check_partition
from tests.commands.helpers import write_recipe
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.tiny import tiny_bert, tiny_llama, tiny_opt
from tests.training.helpers import train, workload
from tests.training.test_resume import StopAt

QV = {"r": 6, "target_modules": ["q_proj", "v_proj"]}
ALL = {"r": 6, "target_modules": "all-linear"}


def layers(model):
    return {n.split("base_model.model.")[1]: m for n, m in model.named_modules() if isinstance(m, VeraLayer)}


def projections(model):
    return model.base_model.vera_A["default"], model.base_model.vera_B["default"]


# -- the equation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_layer_is_the_papers_equation_in_float64(name, training):
    """y = W x + b * (B (d * (A x))), with the first columns of A and the first rows of B."""
    model = family.double(Method(Config(**ALL))).train(training)
    layer = layers(model)[f"model.layers.1.{name}"]
    shared_a, shared_b = projections(model)
    assert shared_a.shape == (6, 64) and shared_b.shape == (64, 6)
    a, b = shared_a[:, : layer.in_features], shared_b[: layer.out_features]
    vector_d, vector_b, w = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"], layer.base_layer.weight
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    naive = [torch.stack([w @ v + vector_b * (b @ (vector_d * (a @ v))) for v in row]) for row in x]
    torch.testing.assert_close(layer(x), torch.stack(naive), rtol=1e-12, atol=1e-12)


def test_beside_conv1d_it_is_the_papers_equation_in_float64():
    """GPT-2 stores W as (d_in, d_out), its head as (d_out, d_in)."""
    make = lambda: tiny_of("gpt2", "cpu", tie_word_embeddings=False)  # noqa: E731
    model = family.double(Method(Config(r=6, target_modules=["c_fc", "lm_head"])), make)
    a, b = projections(model)
    x = torch.randn(3, 32, dtype=torch.float64)
    for layer in layers(model).values():
        low = x @ a[:, :32].T * layer.vera_lambda_d["default"]
        update = low @ b[: layer.out_features].T * layer.vera_lambda_b["default"]
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update, rtol=1e-12, atol=1e-12)
    logits = model.eval()(input_ids=family.IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=family.IDS).logits, logits, rtol=1e-9, atol=1e-9)


def test_vectors_start_at_zero_and_at_d_initial():
    model = applied(Method(Config(d_initial=0.25, **QV)), tiny_llama())
    for layer in layers(model).values():
        assert not layer.vera_lambda_b["default"].any()
        assert (layer.vera_lambda_d["default"] == 0.25).all()


def test_projections_are_kaiming_uniform_and_follow_from_their_seed_alone():
    first = projections(applied(Method(Config(r=128, target_modules=["q_proj"])), tiny_llama(), seed=1))
    again = projections(applied(Method(Config(r=128, target_modules=["q_proj"])), tiny_llama(seed=5), seed=2))
    other = projections(applied(Method(Config(r=128, target_modules=["q_proj"], projection_seed=1)), tiny_llama()))
    for tensor, same, differs, fan in zip(first, again, other, (32, 128), strict=True):
        assert torch.equal(tensor, same) and not torch.equal(tensor, differs)
        assert 0.98 * math.sqrt(6 / fan) < tensor.abs().max() <= math.sqrt(6 / fan)


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, lambda: tiny_llama(dtype="bfloat16")])
def test_starts_as_the_base_exactly(base):
    family.check_identity(Method(Config(**ALL)), base)


def test_gradient_of_d_is_zero_at_first_and_that_of_b_is_not():
    model = applied(Method(Config(**QV)), tiny_llama()).train()
    model(input_ids=family.IDS, labels=family.IDS).loss.backward()
    for layer in layers(model).values():
        assert not layer.vera_lambda_d["default"].grad.any()
        assert layer.vera_lambda_b["default"].grad.any()


def test_the_update_lies_in_the_rows_of_a():
    model = family.double(Method(Config(**QV)))
    rows = torch.linalg.qr(projections(model)[0].T)[0]
    for layer in layers(model).values():
        delta = layer.get_delta_weight("default")
        assert torch.linalg.matrix_rank(delta) == 6
        torch.testing.assert_close(delta @ rows @ rows.T, delta, rtol=1e-9, atol=1e-10)


# -- what trains -------------------------------------------------------------------------------------------------------


def test_count_is_the_sum_of_d_out_and_r():
    assert Method(Config(target_modules=["q_proj", "v_proj"])).count(family.smollm2()) == 38_400
    method = Method(Config(**ALL))
    expected = 4 * (2 * 32 + 2 * 16 + 2 * 64 + 32 + 7 * 6)
    assert method.count(tiny_llama()) == family.trainable_count(applied(method, tiny_llama())) == expected
    bare = tiny_llama().to("meta")
    bare.tie_weights()
    model = method.apply(bare, context())
    assert family.trainable_count(model) == expected
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_vectors_move_and_all_layers_share_one_pair(dtype):
    family.check_frozen_base(Method(Config(**QV)), lambda: tiny_llama(dtype=dtype))
    model = applied(Method(Config(**ALL)), tiny_llama(dtype=dtype))
    assert run_steps(model, 12)[-1] < 6.6
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for kind, shared in zip(("vera_A", "vera_B"), projections(model), strict=True):
        held = {getattr(layer, kind)["default"].data_ptr() for layer in layers(model).values()}
        assert held == {shared.data_ptr()}


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=16)))


@pytest.mark.parametrize(
    ("task", "kind"), [("seq_cls", "BertForSequenceClassification"), ("token_cls", "BertForTokenClassification")]
)
def test_a_classifiers_head_trains_beside_the_vectors_at_its_own_rate(task, kind):
    """Biases and vectors don't decay; the head is no target."""
    method = Method(Config(head_learning_rate=1e-4, **ALL))
    settings = recipe().model_copy(update={"model": ModelSection(name_or_path="tiny", task=task)})
    model = method.apply(tiny_bert(kind=kind, num_labels=3), Context(settings))
    assert family.trainable_count(model) == method.count(tiny_bert(kind=kind, num_labels=3))
    assert not any("classifier" in name for name in layers(model))
    groups = method.param_groups(model, recipe(learning_rate=1e-2, weight_decay=0.1).train)
    check_partition(model, groups)
    vectors, matrix, bias = groups
    assert "lr" not in vectors and vectors["weight_decay"] == 0.0 and len(vectors["params"]) == 2 * len(layers(model))
    assert [tuple(p.shape) for p in matrix["params"] + bias["params"]] == [(3, 32), (3,)]
    assert (matrix["lr"], matrix["weight_decay"], bias["lr"], bias["weight_decay"]) == (1e-4, 0.1, 1e-4, 0.0)
    plain = Method(Config(**ALL)).param_groups(model, recipe(learning_rate=1e-2).train)
    assert [group["lr"] for group in plain[1:]] == [1e-2, 1e-2]


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    method = Method(Config(**QV))
    family.check_identity(method, lambda: family.quantized(tiny_dir, kind))
    model = applied(method, family.quantized(tiny_dir, kind))
    before = {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    losses = run_steps(model, 3)
    assert losses[-1] < losses[0]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) == ("vera_lambda_" not in name), name


def test_dropout_acts_in_training_only():
    model = family.randomise(applied(Method(Config(dropout=0.5, **QV)), tiny_llama()), std=1.0)
    assert torch.equal(model.eval()(input_ids=family.IDS).logits, model(input_ids=family.IDS).logits)
    model.train()
    assert not torch.equal(model(input_ids=family.IDS).logits, model(input_ids=family.IDS).logits)


def test_peft_chooses_targets_where_none_are_given():
    assert Method(Config()).notices(tiny_llama()) == ["target_modules: q_proj, v_proj (peft's choice)"]
    assert not Method(Config(**ALL)).notices(tiny_llama())


def test_an_embedding_is_refused():
    message = r"method.target_modules: model.embed_tokens is an embedding; vera takes linear layers only"
    with pytest.raises(UsageError, match=message):
        Method(Config(target_modules=["embed_tokens"])).count(tiny_llama())


# -- checkpoints and the artefact --------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: Method(Config(dropout=0.1, **QV)))


def test_accumulation_equals_one_large_batch(tmp_path):
    family.check_accumulation(tmp_path, lambda: Method(Config(**QV)))


def test_checkpoints_hold_the_projections_once(tmp_path):
    """Another version of torch may draw others from the seed."""
    method = Method(Config(**QV))
    with pytest.raises(Interrupted):
        train(workload(tmp_path, method, max_steps=6, reporter=StopAt(3)))
    state = torch.load(workload(tmp_path, method).run.latest_checkpoint() / "method.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in state.items()} == {"A": (6, 32), "B": (32, 6)}
    model = applied(method, tiny_llama())
    drawn = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    method.load_state_dict(model, drawn)
    for layer in layers(model).values():
        assert torch.equal(layer.vera_A["default"], drawn["A"]) and torch.equal(layer.vera_B["default"], drawn["B"])


def test_the_file_holds_the_projections_once(tmp_path):
    folder = family.check_saved(tmp_path, Method(Config(**ALL)))
    sizes = {name: tuple(t.shape) for name, t in load_file(folder / "adapter_model.safetensors").items()}
    vectors = [name for name in sizes if "vera_lambda_" in name]
    assert len(vectors) == 4 * 7 * 2
    assert {name: sizes[name] for name in sizes.keys() - set(vectors)} == {
        "base_model.vera_A": (6, 64),
        "base_model.vera_B": (64, 6),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["save_projection"], config["projection_prng_key"]) == ("VERA", True, 0)


def test_a_bfloat16_base_reads_it_back_exactly(tmp_path):
    from peft import PeftModel

    model = family.randomise(applied(Method(Config(**ALL)), tiny_llama(dtype="bfloat16"))).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(dtype="bfloat16"), tmp_path).eval()
    assert torch.equal(again(input_ids=family.IDS).logits, model(input_ids=family.IDS).logits)


def test_training_goes_on_from_a_finished_run_of_the_same_seed_only(tmp_path, tiny_dir):
    method = {"name": "vera", "r": 6, "target_modules": ["q_proj", "v_proj"], "projection_seed": 5}

    def section(folder, **changes):
        (tmp_path / folder).mkdir()
        return peftctl.load_recipe(write_recipe(tmp_path / folder, tiny_dir, method | changes))

    first = peftctl.train(section("first"))
    second = peftctl.train(section("second", init_from=str(first.run), dropout=0.1))
    before, after = (load_file(result.artefact / "adapter_model.safetensors") for result in (first, second))
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == ("vera_lambda_" not in name), name
    with pytest.raises(UsageError, match=r"has projection_prng_key 5, this recipe has 0; they must be equal"):
        peftctl.train(section("third", init_from=str(first.run), projection_seed=0))

"""LoRA-FA: A stays, the gradients of both versions, what is kept for the backward pass, and A in checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

import peftctl
from peftctl.errors import Interrupted, UsageError
from peftctl.methods import lora
from peftctl.methods.lora_fa import Config, Method
from tests.commands.helpers import write_recipe
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context, run_steps
from tests.tiny import tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

QV = {"target_modules": ["q_proj", "v_proj"]}


def frozen(model):
    return {name: layer.lora_A["default"].weight.clone() for name, layer in family.lora_layers(model).items()}


# -- the equation and its gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_papers_equation_in_float64(training):
    model = family.double(Method(Config(r=3, alpha=12, target_modules="all-linear"))).train(training)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    w, a, b = family.factors(layer)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    naive = torch.stack([torch.stack([w @ v + (12 / 3) * (b @ (a @ v)) for v in row]) for row in x])
    torch.testing.assert_close(layer(x), naive, rtol=1e-12, atol=1e-12)


def gradients(variant, r, target="gate_proj", **keys):
    """Return (gradient of B, G, A, s) of a layer in float64; G is that of the whole weight, by a dense layer."""
    method = Method(Config(variant=variant, r=r, alpha=5, target_modules=[target], **keys))
    layer = family.lora_layers(family.double(method).train())[f"model.layers.1.mlp.{target}"]
    w, a, b = family.factors(layer)
    x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
    scale = layer.scaling["default"]
    dense = (w + scale * b @ a).detach().requires_grad_()
    torch.nn.functional.linear(x, dense).sin().sum().backward()
    layer(x).sin().sum().backward()
    return b.grad, dense.grad, a, scale


def test_v1_takes_the_gradient_of_b_as_it_is():
    gradient, whole, a, scale = gradients("v1", 3)
    torch.testing.assert_close(gradient, scale * whole @ a.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("r", [1, 3, 32])
def test_v2_moves_the_update_by_the_gradient_projected_onto_the_rows_of_a(r):
    gradient, whole, a, scale = gradients("v2", r)
    expected = scale * whole @ a.T @ torch.linalg.inv(a @ a.T) / scale**2
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7)
    rows = torch.linalg.qr(a.T)[0]
    torch.testing.assert_close(scale * gradient @ a, whole @ rows @ rows.T, rtol=1e-7, atol=1e-7)


def test_v2_with_more_ranks_than_inputs_moves_the_update_by_the_whole_gradient():
    gradient, whole, a, scale = gradients("v2", 40)
    torch.testing.assert_close(scale * gradient @ a, whole, rtol=1e-8, atol=1e-10)


def test_v1_is_v2_where_a_is_orthonormal_and_the_scale_is_one():
    results = []
    for variant in ("v1", "v2"):
        model = family.double(Method(Config(variant=variant, r=4, alpha=4, **QV)))
        for layer in family.lora_layers(model).values():
            a = layer.lora_A["default"].weight
            a.copy_(torch.linalg.qr(a.T)[0].T)
        run_steps(model, 4)
        results.append([layer.lora_B["default"].weight for layer in family.lora_layers(model).values()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_v2_corrects_parts_of_fused_layers_too():
    keys = {"r": 3, "target_modules": ["c_attn"], "parts": ["q", "v"]}
    results = {}
    for variant in ("v1", "v2"):
        model = family.double(Method(Config(variant=variant, **keys)), lambda: tiny_of("gpt2", "cpu"))
        model.train()(input_ids=family.IDS, labels=family.IDS).loss.backward()
        layer = next(iter(family.lora_layers(model).values()))
        results[variant] = layer.lora_B["default"].rows.grad
    _, a, _ = family.factors(layer)
    expected = results["v1"] @ torch.linalg.inv(a @ a.T) / layer.scaling["default"] ** 2
    torch.testing.assert_close(results["v2"], expected, rtol=1e-8, atol=1e-12)


def test_v2_follows_an_a_that_is_replaced_after_the_first_gradient():
    method = Method(Config(variant="v2", r=3, **QV))
    model = family.double(method).train()
    layer = next(iter(family.lora_layers(model).values()))
    _, a, b = family.factors(layer)
    x = torch.randn(4, 32, dtype=torch.float64)
    layer(x).sum().backward()
    other = {name: torch.randn_like(tensor) for name, tensor in method.state_dict(model).items()}
    method.load_state_dict(model, other)
    b.grad = None
    layer(x).sum().backward()
    plain = layer.scaling["default"] * torch.ones(32, 4, dtype=torch.float64) @ x @ a.T
    expected = plain @ torch.linalg.inv(a @ a.T) / layer.scaling["default"] ** 2
    torch.testing.assert_close(b.grad, expected, rtol=1e-9, atol=1e-12)


def test_v2_corrects_in_the_forward_and_its_values_are_v1s():
    """A hook on B would be lost where an engine puts its own tensors in B's place."""
    outputs = []
    for variant in ("v1", "v2"):
        model = family.double(Method(Config(variant=variant, r=3, **QV))).train()
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
        outputs.append(model(input_ids=family.IDS).logits)
    assert torch.equal(*outputs)


def test_v2_corrects_a_b_that_was_replaced():
    model = family.double(Method(Config(variant="v2", r=3, **QV))).train()
    layer = next(iter(family.lora_layers(model).values()))
    w, a, b = family.factors(layer)
    layer.lora_B["default"].weight = torch.nn.Parameter(b.detach().clone())
    x = torch.randn(4, 32, dtype=torch.float64)
    layer(x).sum().backward()
    plain = layer.scaling["default"] * torch.ones(len(w), 4, dtype=torch.float64) @ x @ a.T
    expected = plain @ torch.linalg.inv(a @ a.T) / layer.scaling["default"] ** 2
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_recomputed_forwards_give_the_same_gradients(tmp_path, variant):
    plain, _ = train(workload(tmp_path / "a", Method(Config(variant=variant, r=4, **QV)), max_steps=3))
    settings = {"max_steps": 3, "gradient_checkpointing": True}
    again, _ = train(workload(tmp_path / "b", Method(Config(variant=variant, r=4, **QV)), **settings))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(again)[name], tensor, rtol=1e-6, atol=1e-8)


def test_accumulation_equals_one_large_batch(tmp_path):
    family.check_accumulation(tmp_path, lambda: Method(Config(variant="v2", r=4, **QV)))


# -- what trains, and what is kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_stays_bit_for_bit_and_only_b_moves(variant):
    family.check_identity(Method(Config(variant=variant, target_modules="all-linear")), tiny_opt)
    family.check_frozen_base(Method(Config(variant=variant, r=4, **QV)))


def test_switching_the_adapter_off_and_on_does_not_let_a_train():
    """peft then sets requires_grad of all that it counts to the adapter."""
    model = applied(Method(Config(r=4, **QV)), tiny_llama())
    with model.disable_adapter():
        pass
    names = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_B"}


def test_the_update_lies_in_the_rows_of_a():
    model = applied(Method(Config(r=3, **QV)), tiny_llama())
    run_steps(model, 4)
    for layer in family.lora_layers(model).values():
        rows = torch.linalg.qr(layer.lora_A["default"].weight.T)[0]
        delta = layer.get_delta_weight("default").detach()
        assert delta.norm() > 1e-3
        assert (delta - delta @ rows @ rows.T).norm() < 1e-5 * delta.norm()


@pytest.mark.parametrize("base", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_no_input_of_a_target_is_kept_for_the_backward_pass(base, variant, tiny_dir):
    make = (lambda: family.quantized(tiny_dir)) if base == "nf4" else (lambda: tiny_llama(dtype=base))
    dtype = torch.bfloat16 if base == "bfloat16" else torch.float32
    model = applied(Method(Config(variant=variant, r=4, target_modules="all-linear")), make())
    for layer in family.lora_layers(model).values():
        shapes = [shape for shape, _ in family.kept_for_backward(layer, dtype=dtype)]
        assert (3, 7, layer.in_features) not in shapes
        assert (3, 7, 4) in shapes or (21, 4) in shapes


def test_lora_and_dropout_keep_an_input_of_every_target():
    """The measure above sees it where it is kept."""
    plain = lora.Method(lora.Config(r=4, target_modules="all-linear"))
    dropped = Method(Config(r=4, target_modules="all-linear").model_copy(update={"dropout": 0.05}))
    for method in (plain, dropped):
        for layer in family.lora_layers(applied(method, tiny_llama())).values():
            shapes = [shape for shape, _ in family.kept_for_backward(layer)]
            assert (3, 7, layer.in_features) in shapes or (21, layer.in_features) in shapes


def test_count_is_r_times_d_out():
    assert Method(Config(r=8, target_modules="all-linear")).count(family.smollm2()) == 1_244_160
    keys = {"r": 5, "rank_pattern": {"v_proj": 3}, "modules_to_save": ["norm"], **QV}
    expected = 4 * (5 * 32 + 3 * 16) + 32
    method = Method(Config(**keys))
    assert method.count(tiny_llama()) == family.trainable_count(applied(method, tiny_llama())) == expected
    bare = tiny_llama().to("meta")
    bare.tie_weights()
    assert family.trainable_count(method.apply(bare, context())) == expected
    fused = Method(Config(r=4, target_modules=["c_attn"], parts=["q", "v"]))
    assert fused.count(tiny_of("gpt2")) == 2 * 4 * 64


# -- checkpoints and the artefact --------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: Method(Config(r=4, **QV)))


def test_checkpoints_hold_a(tmp_path):
    """A run that resumes from another A than the seed's takes the checkpoint's."""
    method = Method(Config(r=4, **QV))
    with pytest.raises(Interrupted):
        train(workload(tmp_path, method, max_steps=6, reporter=StopAt(3)))
    work = workload(tmp_path, method, max_steps=6)
    state = torch.load(work.run.latest_checkpoint() / "method.pt", weights_only=True)
    again = applied(method, tiny_llama(), seed=7)
    assert not any(torch.equal(a, state[f"base_model.model.{name}"]) for name, a in frozen(again).items())
    method.load_state_dict(again, state)
    assert all(torch.equal(a, state[f"base_model.model.{name}"]) for name, a in frozen(again).items())


def test_a_run_from_another_adapter_has_its_a_before_and_after_a_resume(tmp_path, tiny_dir):
    method = {"name": "lora_fa", "r": 4, "target_modules": ["q_proj", "v_proj"]}

    def run(folder, **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        sections = {"train": {"output_dir": str(tmp_path / folder / "run"), "seed": 3}}
        return peftctl.load_recipe(write_recipe(tmp_path / folder, tiny_dir, method | changes, **sections))

    def tensors(result):
        return load_file(result.artefact / "adapter_model.safetensors")

    (tmp_path / "first").mkdir()
    first = peftctl.train(peftctl.load_recipe(write_recipe(tmp_path / "first", tiny_dir, method)))
    straight = peftctl.train(run("straight", init_from=str(first.run)))
    with pytest.raises(Interrupted):
        peftctl.train(run("stopped", init_from=str(first.run)), reporter=StopAt(3))
    resumed = peftctl.train(run("stopped", init_from=str(first.run)), resume=True)
    for name, tensor in tensors(straight).items():
        assert torch.equal(tensors(resumed)[name], tensor), name
        assert torch.equal(tensors(first)[name], tensor) == (".lora_A." in name), name


def test_the_adapter_is_a_plain_lora_with_its_a(tmp_path):
    folder = family.check_saved(tmp_path, Method(Config(r=4, **QV)))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    names = load_file(folder / "adapter_model.safetensors")
    assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) == 8


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=4)))


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    method = Method(Config(r=4, **QV))
    family.check_identity(method, lambda: family.quantized(tiny_dir, kind))
    model = applied(method, family.quantized(tiny_dir, kind))
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name]) == (".lora_B." not in name), name


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_dropout_is_refused():
    with pytest.raises(ValueError, match=r"expected 0, got 0\.1: dropout keeps what lora_fa saves; remove it"):
        Config(dropout=0.1)


def test_an_embedding_is_refused():
    message = r"method.target_modules: model.embed_tokens is an embedding; lora_fa takes linear layers only"
    with pytest.raises(UsageError, match=message):
        Method(Config(target_modules=["embed_tokens"])).count(tiny_llama())

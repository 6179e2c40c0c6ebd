"""What a run says about its steps is what they do."""

import pytest

import peftctl
from peftctl.methods import dora, lora
from peftctl.methods.base import Context
from peftctl.models import short_attention
from peftctl.models.cross_entropy import HeadCrossEntropy
from peftctl.models.lean_blocks import Gated, RmsNorm
from peftctl.models.short_attention import Products
from peftctl.training.active import active
from peftctl.tuners.lora_products import LoraProducts
from tests import tiny
from tests.training.helpers import train, workload


def said(*overrides, dtype="float32", device="cpu", model=None):
    recipe = peftctl.load_recipe("lora", ["data.eval=null", f"model.dtype={dtype}", *overrides])
    model = tiny.tiny_llama(dtype=dtype) if model is None else model
    return list(active(recipe, lora.Method(recipe.method), model, device))


ATTENTION = f"rows of up to {short_attention.LONGEST:,} tokens attend by matrix products"


def test_it_names_what_the_recipe_leaves_on():
    plain = ["logits at supervised positions", "rows of similar length together", "passes of 1,024 tokens"]
    lean = "13 norms and gated parts keep less"
    assert said() == [*plain, lean, "fused AdamW"]
    assert said("train.tokens_per_pass=300", "train.optimizer=sgd") == [*plain[:2], "passes of 300 tokens", lean]
    assert said("train.gradient_checkpointing=true")[-1] == "gradient checkpointing"
    assert "passes" not in str(said(device="cuda")) and lean not in said(device="cuda")
    assert "norms" not in str(said(model=tiny.tiny_opt()))


def test_attention_by_products_is_named_where_it_serves():
    assert ATTENTION in said(dtype="bfloat16")
    assert ATTENTION not in said(dtype="bfloat16", device="cuda")
    eager = tiny.tiny_llama(dtype="bfloat16")
    eager.set_attn_implementation("eager")
    assert ATTENTION not in said(dtype="bfloat16", model=eager)


def attached(keys, method=lora, dtype="float32"):
    return method.Method(method.Config(target_modules="all-linear", r=4, **keys)).apply(
        tiny.tiny_llama(dtype=dtype), Context(peftctl.load_recipe("lora"))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_are_one_operation_with_their_lora_are_named(dtype):
    fused = "28 layers and their LoRA as one operation each"
    assert fused in said(dtype=dtype, model=attached({}, dtype=dtype))
    assert fused not in said(dtype="float16", model=attached({}))
    assert fused not in said(model=attached({"dropout": 0.1}))
    assert fused not in said(model=attached({}, dora))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_trainer_runs_one_operation_where_it_is_named(dropout, tmp_path, monkeypatch):
    calls = []
    apply = LoraProducts.apply
    monkeypatch.setattr(LoraProducts, "apply", lambda *args: calls.append(1) or apply(*args))
    train(workload(tmp_path, lora.Method(lora.Config(target_modules="all-linear", r=4, dropout=dropout))))
    assert bool(calls) == (not dropout)


def test_the_trainer_runs_lean_parts_and_a_waiting_head(tmp_path, monkeypatch):
    calls = []
    for operation in (RmsNorm, Gated, HeadCrossEntropy):
        apply = operation.apply
        monkeypatch.setattr(operation, "apply", lambda *args, f=apply, o=operation: calls.append(o) or f(*args))
    model = tiny.tiny_llama()
    train(workload(tmp_path), model=model)
    assert set(calls) == {RmsNorm, Gated, HeadCrossEntropy}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("dtype", "serves"), [("bfloat16", True), ("float32", False)])
def test_the_trainer_attends_by_products_where_it_is_named(dtype, serves, tmp_path, monkeypatch):
    calls = []
    apply = Products.apply
    monkeypatch.setattr(Products, "apply", lambda *args: calls.append(1) or apply(*args))
    train(workload(tmp_path, dtype=dtype), model=tiny.tiny_llama(dtype=dtype))
    assert bool(calls) == serves

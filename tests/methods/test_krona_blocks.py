"""KronA beside feed-forward blocks (variants B and Bres): its equation in float64, what moves, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import peftctl
from peftctl.artifacts.merge import merge
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.krona import Config, Method
from peftctl.tuners.kron_block import KronBlockLayer
from tests.commands.helpers import write_recipe
from tests.methods.helpers import applied, context, recipe, run_steps
from tests.methods.test_krona import smollm2
from tests.tiny import save_tiny, tiny_bert, tiny_bloom, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)
ROOT = Path(__file__).parents[2]
both = pytest.mark.parametrize("variant", ["B", "Bres"])


def method(variant, **keys):
    return Method(Config(**{"variant": variant, "factor": 4} | keys))


def classifier():
    return tiny_bert(kind="BertForSequenceClassification", num_labels=3)


def gpt2():
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def attached(chosen, base, task):
    made = recipe()
    torch.manual_seed(0)
    return chosen.apply(base, Context(made.model_copy(update={"model": made.model.model_copy(update={"task": task})})))


def blocks(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, KronBlockLayer)]


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype) / 4
    return model


# -- the equation --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_block_is_the_papers_equation_in_float64(variant, training, scale):
    """y = FFN(x) + s (A kron B) x, with l x on top in Bres, against torch.kron."""
    model = randomise(applied(method(variant, scale=scale), tiny_llama().double()).double()).train(training)
    plain = tiny_llama().double().model.layers[2].mlp
    block = model.base_model.model.model.layers[2].mlp
    layer = block.down_proj
    a, b = layer.kron_block_a["default"], layer.kron_block_b["default"]
    assert (a.shape, b.shape) == ((4, 4), (8, 8))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = plain(x) + scale * x @ torch.kron(a, b).T
    if variant == "Bres":
        expected = expected + layer.kron_block_l["default"] * x
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11)
    assert len(layer.kron_block_l) == (variant == "Bres")


@both
def test_gradients_are_those_of_the_explicit_product(variant):
    model = randomise(applied(method(variant, scale=2.0), tiny_llama().double()).double()).train()
    block = model.base_model.model.model.layers[0].mlp
    layer = block.down_proj
    tensors = [*layer.kron_block_a.values(), *layer.kron_block_b.values(), *layer.kron_block_l.values()]
    x = torch.randn(3, 4, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 32, dtype=torch.float64)
    found = torch.autograd.grad((block(x) * weights).sum(), [x, *tensors])
    plain = tiny_llama().double().model.layers[0].mlp
    explicit = plain(x) + 2.0 * x @ torch.kron(tensors[0], tensors[1]).T
    if variant == "Bres":
        explicit = explicit + tensors[2] * x
    expected = torch.autograd.grad((explicit * weights).sum(), [x, *tensors])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_the_product_is_never_built():
    model = applied(method("Bres"), tiny_llama()).train()
    layer = blocks(model)[0][1]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.append(result.numel())
            return result

    with Watch():
        layer.change("default", torch.randn(3, 32))
    assert seen and max(seen) < 32 * 32


@both
@pytest.mark.parametrize(
    ("base", "task"),
    [
        (tiny_llama, "causal_lm"), (tiny_opt, "causal_lm"), (tiny_bloom, "causal_lm"),
        (gpt2, "causal_lm"), (tiny_t5, "seq2seq_lm"), (classifier, "seq_cls"),
    ],
)  # fmt: skip
def test_it_starts_as_the_base_trains_and_reloads_on_every_kind_of_block(variant, base, task, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    plain = base()
    torch.manual_seed(0)
    chosen, more = method(variant), {"decoder_input_ids": IDS} if task == "seq2seq_lm" else {}
    expected_count = chosen.count(plain)
    reference = plain.eval()(input_ids=IDS, **more).logits
    model = attached(chosen, base(), task).eval()
    assert sum(p.numel() for p in trainable(model).values()) == expected_count
    # The wrapper of an encoder-decoder hands over a mask, and another kernel sums in another order.
    torch.testing.assert_close(model(input_ids=IDS, **more).logits, reference, rtol=0, atol=1e-5 if more else 0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.1)
    alive = set()
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(input_ids=IDS, **more).logits
        torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1])[:2], torch.tensor([1, 2])).backward()
        alive |= {name for name, p in trainable(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == alive == set(trainable(model))
    logits = model.eval()(input_ids=IDS, **more).logits
    with model.disable_adapter():
        if task != "seq_cls":  # its head has trained too
            torch.testing.assert_close(model(input_ids=IDS, **more).logits, reference, rtol=0, atol=1e-5 if more else 0)
    chosen.export(model).save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS, **more).logits, logits, rtol=0, atol=1e-5)


@both
def test_the_start_is_exact_in_training_and_in_bfloat16(variant):
    for dtype in ("float32", "bfloat16"):
        reference = tiny_llama(dtype=dtype)(input_ids=IDS).logits
        model = applied(method(variant), tiny_llama(dtype=dtype)).train()
        assert torch.equal(model(input_ids=IDS).logits, reference)
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}
        losses = run_steps(model, 4)
        assert losses[-1] < losses[0] and model(input_ids=IDS).logits.isfinite().all()


@both
def test_the_update_can_have_full_rank(variant):
    model = applied(method(variant), tiny_llama())
    run_steps(model, 4)
    layer = blocks(model)[0][1]
    change = layer.change("default", torch.eye(32)).detach().double()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) == 32


# -- places --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"), [("B", 30 * (16 * 16 + 36 * 36)), ("Bres", 30 * (16 * 16 + 36 * 36 + 1))]
)
def test_counts_on_the_demo_model(variant, count):
    chosen, base = method(variant, factor=16), smollm2()
    assert chosen.count(base) == count
    model = chosen.apply(base, context())
    assert sum(p.numel() for p in trainable(model).values()) == count
    assert all(p.device.type == "meta" for p in model.parameters())


def test_blocks_can_be_chosen_by_their_last_layers():
    model = applied(method("B", target_modules=["layers.3.mlp.down_proj", "layers.1.mlp.down_proj"]), tiny_llama())
    assert [name.split("layers.")[1] for name, _ in blocks(model)] == ["1.mlp.down_proj", "3.mlp.down_proj"]
    with pytest.raises(UsageError, match=r"q_proj does not end a feed-forward block.*down_proj"):
        method("B", target_modules=["q_proj", "v_proj"]).count(tiny_llama())
    with pytest.raises(ValueError, match="Input should be 'kron', 'B' or 'Bres'"):
        method("C")


def test_the_notice_says_the_shapes():
    assert method("B").notices(tiny_llama()) == ["A (4, 4) kron B (8, 8): down_proj"]


# -- runs ----------------------------------------------------------------------------------------------------------


@both
def test_stopped_and_resumed_equals_straight_bit_by_bit(variant, tmp_path):
    straight, _ = train(workload(tmp_path / "straight", method(variant), max_steps=4))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(variant), max_steps=4, reporter=StopAt(2)))
    resumed = workload(tmp_path / "stopped", method(variant), max_steps=4)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


@both
def test_two_batches_of_two_equal_one_of_four(variant, tmp_path):
    one, _ = train(workload(tmp_path / "one", method(variant), max_steps=1))
    two, _ = train(workload(tmp_path / "two", method(variant), max_steps=1, batch_size=2, gradient_accumulation=2))
    tensors = trained_tensors(two)
    for name, tensor in trained_tensors(one).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-5)


@both
def test_recomputed_activations_give_equal_gradients(variant):
    gradients = []
    for checkpointing in (False, True):
        model = randomise(applied(method(variant), tiny_llama()).train())
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_reloads_in_a_new_process_and_its_merge_is_refused_in_a_line(tmp_path):
    section = {"name": "krona", "variant": "Bres", "factor": 4}
    path = write_recipe(tmp_path, save_tiny(tmp_path / "base"), section)
    result = peftctl.train(peftctl.load_recipe(path, ["train.max_steps=3", "train.learning_rate=0.05"]))
    model, _ = peftctl.load(result.run)
    expected = model(input_ids=IDS).logits.detach()
    assert json.loads((result.artefact / "adapter_config.json").read_text())["peft_type"] == "PEFTCTL_KRON_BLOCK"
    code = (
        "import torch, peftctl, sys\nmodel, _ = peftctl.load(sys.argv[1])\n"
        "torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits.detach(), sys.argv[2])"
    )
    out, environment = tmp_path / "logits.pt", os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, result.run, out], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(out), expected, rtol=0, atol=1e-6)
    with pytest.raises(UsageError) as refused:
        merge(result.run, tmp_path / "merged")
    assert str(refused.value) == "PEFTCTL_KRON_BLOCK: adapters of this type can't be merged"
    assert "variant kron only" in Method.card.merge_note and not (tmp_path / "merged").exists()

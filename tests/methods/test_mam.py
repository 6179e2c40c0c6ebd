"""MAM adapter: a prefix in attention, an adapter beside the feed-forward part, each where the paper has it."""

import json
import subprocess
import sys

import pytest
import torch

from peftctl.errors import Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.mam import Config, Method
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners._parts import Part
from peftctl.tuners.added import BottleneckPart
from peftctl.tuners.kv_prefix import KvPrefix
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import SMOLLM2
from tests.tiny import save_tiny, tiny_bart, tiny_bert, tiny_bloom, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**{"num_virtual_tokens": 3, "bottleneck": 6, **keys}))


def gpt2():
    return tiny_of("gpt2", "cpu")


def parts(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def randomised(base, seed=0, std=0.3, **keys):
    model = applied(method(**keys), base)
    generator = torch.Generator().manual_seed(seed)
    for part in parts(model, Part):
        for p in part.parameters():
            p.data = (std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    return model.eval()


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


BASES = [tiny_llama, tiny_opt, tiny_t5, tiny_bart, gpt2]


# -- the equation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_it_starts_as_the_pure_prefix_exactly(base):
    model = applied(method(), base()).eval()
    start = logits(model)
    assert not torch.allclose(start, logits(base()), atol=1e-4)
    for part in parts(model, BottleneckPart):
        part.enable_adapters(False)
    assert torch.equal(logits(model), start)


@pytest.mark.parametrize(
    ("base", "place", "first"),
    [
        (tiny_llama, "model.layers.1.mlp", "model.layers.1.mlp"),
        (tiny_opt, "model.decoder.layers.1.fc2", "model.decoder.layers.1.fc1"),
        (gpt2, "transformer.h.1.mlp", "transformer.h.1.mlp"),
        (tiny_t5, "decoder.block.1.layer.2.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"),
        (tiny_bart, "model.encoder.layers.1.fc2", "model.encoder.layers.1.fc1"),
    ],
)
def test_the_adapter_reads_what_the_feed_forward_part_reads_in_float64(base, place, first):
    model = randomised(base().double(), scaling=3.0).double()
    plain = model.get_base_model()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    seen = {}
    plain.get_submodule(first).register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    plain.get_submodule(place).register_forward_hook(lambda _, args, out: seen.update(out=out))
    logits(model)
    adapter = next(p for n, p in plain.get_submodule(place.rpartition(".")[0]).named_modules()
                   if isinstance(p, BottleneckPart) and place.rsplit(".", 1)[-1] in n)  # fmt: skip
    change, x, out = adapter.union_parts["default"].change, seen["x"], seen["out"]
    adapter.enable_adapters(False)
    with torch.no_grad():
        if first == place:
            alone = plain.get_submodule(place)(x)
        else:
            ends = plain.get_submodule(place), plain.get_submodule(place.rpartition(".")[0]).activation_fn
            alone = ends[0](ends[1](plain.get_submodule(first)(x)))
    hidden = torch.relu(x @ change.down.weight.T + change.down.bias)
    expected = alone + 3 * (hidden @ change.up.weight.T + change.up.bias)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_the_change_of_a_sublayer_is_linear_in_s_and_0_is_no_adapter():
    x, outputs = torch.randn(2, 5, 32), []
    for s in (0.0, 1.0, 2.5):
        model = randomised(tiny_llama(), scaling=s)
        outputs.append(model.get_base_model().model.layers[2].mlp(x))
    assert torch.equal(outputs[0], tiny_llama().model.layers[2].mlp(x))
    torch.testing.assert_close(outputs[2] - outputs[0], 2.5 * (outputs[1] - outputs[0]), rtol=1e-4, atol=1e-5)
    assert (outputs[1] - outputs[0]).abs().max() > 0.1


@pytest.mark.parametrize(("task", "s"), [("causal_lm", 4.0), ("seq_cls", 2.0), ("token_cls", 2.0)])
def test_s_is_the_papers_for_the_task(task, s):
    plain = recipe()
    base = tiny_llama() if task == "causal_lm" else tiny_bert(kind="BertForSequenceClassification", num_labels=3)
    section = plain.model.model_copy(update={"task": task})
    model = method().apply(base, Context(plain.model_copy(update={"model": section})))
    assert {p.union_parts["default"].scaling for p in parts(model, BottleneckPart)} == {s}


def test_tensors_start_as_in_the_authors_code():
    model = applied(method(bottleneck=50, prefix_std=0.1, num_virtual_tokens=40), tiny_llama())
    for part in parts(model, BottleneckPart):
        change = part.union_parts["default"].change
        assert not any(p.any() for p in (change.up.weight, change.up.bias, change.down.bias))
        limit = 32**-0.5  # Kaiming-uniform with a = sqrt(5)
        assert 0.98 * limit < change.down.weight.abs().max() <= limit
    tables = torch.cat([p.union_parts["default"].table.flatten() for p in parts(model, KvPrefix)])
    assert tables.std().item() == pytest.approx(0.1, rel=0.05)


# -- where it stands, and what trains -------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "prefixes", "adapters"), [(tiny_llama, 4, 4), (tiny_t5, 6, 4), (tiny_bart, 6, 4)])
def test_every_attention_layer_has_a_prefix_and_every_block_an_adapter(base, prefixes, adapters):
    model = applied(method(), base())
    assert (len(parts(model, KvPrefix)), len(parts(model, BottleneckPart))) == (prefixes, adapters)
    n, d, m = 3, model.config.hidden_size, 6
    kv = 16 if base is tiny_llama else 32
    expected = prefixes * n * 2 * kv + adapters * (2 * d * m + m + d)
    assert method().count(base()) == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".union_parts.default." in n
    }


def test_count_on_smollm2_is_the_papers_formula():
    model = tiny_of("llama", **SMOLLM2)
    assert Method(Config()).count(model) == 30 * 2 * 30 * 192 + 30 * (2 * 576 * 512 + 512 + 576) == 18_072_960
    network = 30 * 192 + (192 * 800 + 800) + (800 * 384 + 384)
    assert Method(Config(projection=True)).count(model) == 18_072_960 - 30 * 2 * 30 * 192 + 30 * network


@pytest.mark.parametrize("base", BASES)
def test_the_first_step_has_a_gradient_in_both_parts_and_d_from_the_second_on(base):
    model = applied(method(), base())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    options = {"labels": IDS}
    for step in (1, 2):
        optimizer.zero_grad()
        model(input_ids=IDS, **options).loss.backward()
        zero = {n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()}
        down = {n for n, _ in model.named_parameters() if ".change.down." in n}
        assert zero == (down if step == 1 else set())
        optimizer.step()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_three_steps_move_what_trains_and_nothing_else_and_off_it_is_the_base(base, projection):
    reference = logits(base())
    model = applied(method(projection=projection, hidden=7), base())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, 3, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)
    assert torch.equal(logits(model.unload()), reference)


def test_merging_is_refused_with_a_reason():
    model = applied(method(), tiny_llama())
    with pytest.raises(NotImplementedError, match="a union of parts can't be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize("base", [tiny_bloom, lambda: tiny_of("mamba", "cpu"), lambda: tiny_of("mixtral", "cpu")])
def test_an_unknown_structure_is_refused(base):
    with pytest.raises(UsageError, match=r"method\."):
        method().count(base())


@pytest.mark.parametrize("projection", [False, True])
def test_stopped_and_resumed_equals_straight(tmp_path, projection):
    keys = {"projection": projection, "hidden": 7}
    straight, _ = train(workload(tmp_path / "a", method(**keys), max_steps=4))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(**keys), max_steps=4, reporter=StopAt(2)))
    work = workload(tmp_path / "b", method(**keys), max_steps=4)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


@pytest.mark.parametrize("kind", [{"bits": 4}, {"bits": 8}], ids=["nf4", "int8"])
def test_it_trains_over_a_quantised_base(tmp_path, kind):
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(**kind))
    reference, expected = logits(base), method().count(base)
    model = applied(method(), base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


def test_in_a_half_type_what_trains_is_float32_and_the_stream_is_not():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    seen = []
    for block in model.get_base_model().model.layers:
        block.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0] and set(seen) == {torch.bfloat16}


# -- the artefact ---------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch
import peftctl.tuners
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits, out)
"""


@pytest.mark.parametrize("projection", [False, True])
def test_in_another_process_one_import_makes_plain_peft_load_it(tmp_path, projection):
    from safetensors.torch import load_file

    base = save_tiny(tmp_path / "base")
    chosen = method(projection=projection, hidden=7)
    exported = chosen.export(randomised(tiny_llama(), projection=projection, hidden=7)).eval()
    exported.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], len(config["parts"])) == ("PEFTCTL_UNION", 2)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == method().count(tiny_llama())
    assert "base_model.model.model.layers.0.self_attn.added_prefix.union_parts.table" in tensors
    arguments = [str(base), str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(exported))


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"bottleneck": 0}, "greater than"), ({"scaling": -1}, "greater than"), ({"activation": "tanh"}, "'gelu'")],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Config(**keys)

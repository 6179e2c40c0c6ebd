"""P-tuning: its encoders written naively in float64, what resume restores, and what is left when they are dropped."""

import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import Interrupted
from peftctl.methods.base import Context
from peftctl.methods.p_tuning import Config, Method
from peftctl.training.checkpoints import read_state
from tests.methods.prompts import IDS, attached, behind, method, randomise, smollm2, table
from tests.tiny import tiny_llama
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

KINDS = ["p_tuning", "p_tuning-mlp"]


def weights(model):
    prefix = "prompt_encoder.default."
    return {n.removeprefix(prefix): p.detach() for n, p in model.named_parameters() if n.startswith(prefix)}


def prompt_of(model):
    return model.get_prompt(1)[0]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def one_direction(rows, w, suffix):
    """A long short-term memory over rows, as in Hochreiter and Schmidhuber with forget gates; (n, hidden)."""
    w_x, w_h, b_x, b_h = (w[f"lstm_head.{part}_{suffix}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = torch.zeros(w_h.shape[1], dtype=torch.float64)
    states = []
    for x in rows:
        i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        states.append(h)
    return states


def naive_lstm(w):
    rows = list(w["embedding.weight"])
    for layer in ("l0", "l1"):
        forward = one_direction(rows, w, layer)
        backward = one_direction(rows[::-1], w, f"{layer}_reverse")[::-1]
        rows = [torch.cat(pair) for pair in zip(forward, backward, strict=True)]
    inner = [torch.relu(w["mlp_head.0.weight"] @ x + w["mlp_head.0.bias"]) for x in rows]
    return torch.stack([w["mlp_head.2.weight"] @ x + w["mlp_head.2.bias"] for x in inner])


def naive_mlp(w):
    rows = list(w["embedding.weight"])
    for i in (0, 2):
        rows = [torch.relu(w[f"mlp_head.{i}.weight"] @ x + w[f"mlp_head.{i}.bias"]) for x in rows]
    return torch.stack([w["mlp_head.4.weight"] @ x + w["mlp_head.4.bias"] for x in rows])


@pytest.mark.parametrize(("kind", "naive"), [("p_tuning", naive_lstm), ("p_tuning-mlp", naive_mlp)])
def test_the_prompt_is_the_encoders_equation_and_stands_before_the_row(kind, naive):
    model = randomise(attached(method(kind)).double())
    prompt = naive(weights(model))
    assert prompt.shape == (5, 32)
    torch.testing.assert_close(prompt_of(model), prompt, rtol=1e-10, atol=1e-10)
    expected = behind(tiny_llama().double(), prompt)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-8, atol=1e-8)


def test_an_lstm_has_half_the_width_in_either_direction():
    assert attached(method("p_tuning")).prompt_encoder["default"].lstm_head.hidden_size == 16
    assert attached(method("p_tuning", hidden=6)).prompt_encoder["default"].lstm_head.hidden_size == 6


@pytest.mark.parametrize(("kind", "mixes"), [("p_tuning", True), ("p_tuning-mlp", False)])
def test_a_vector_depends_on_all_rows_of_an_lstms_table_and_on_its_own_of_an_mlps(kind, mixes):
    model = randomise(attached(method(kind)))
    for i in range(5):
        model.zero_grad()
        prompt_of(model)[i].square().sum().backward()
        reached = table(model).grad.abs().sum(dim=1) > 0
        assert reached.tolist() == [mixes or j == i for j in range(5)]


@pytest.mark.parametrize(
    ("keys", "count"), [({"encoder": "mlp", "hidden": 128}, 176_192), ({"hidden": 288}, 4_666_752), ({}, 4_666_752)]
)
def test_counts_on_smollm2_are_those_of_the_formulas(keys, count):
    assert Method(Config(num_virtual_tokens=20, **keys)).count(smollm2()) == count


# -- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_brings_back_the_encoder_and_its_input_table(tmp_path, kind):
    """peft's own resume puts the encoder's outputs into its input table and keeps a fresh encoder."""
    with pytest.raises(Interrupted):
        train(workload(tmp_path, method(kind), max_steps=8, reporter=StopAt(4)))
    stopped = workload(tmp_path, method(kind), max_steps=8)
    torch.manual_seed(7)
    model = stopped.method.apply(tiny_llama(), Context(stopped.recipe))
    fresh = trained_tensors(model)
    read_state(stopped.run.latest_checkpoint(), model, stopped.method)
    restored = trained_tensors(model)
    straight, _ = train(workload(tmp_path / "straight", method(kind), max_steps=8, save_steps=4))
    assert restored.keys() == trained_tensors(straight).keys()
    assert not any(torch.equal(fresh[name], restored[name]) for name in fresh)
    resumed, _ = train(stopped, stopped.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(resumed)[name], tensor), name


# -- what is saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_encoders_output_alone(kind):
    chosen = method(kind)
    model = randomise(attached(chosen)).eval()
    prompt, logits = prompt_of(model).detach(), model(input_ids=IDS).logits
    exported = chosen.export(model)
    names = [n for n, _ in exported.named_parameters() if n.startswith("prompt_encoder")]
    assert names == ["prompt_encoder.default.embedding.weight"]
    assert torch.equal(table(exported), prompt)
    assert torch.equal(exported(input_ids=IDS).logits, logits)
    assert exported.peft_config["default"].peft_type.value == "PROMPT_TUNING"


def test_a_finished_prompt_can_not_be_taken_up_by_a_new_encoder():
    with pytest.raises(ValidationError, match=r"has no encoder; go on from it with method\.name: prompt_tuning"):
        Config(init_from="runs/p_tuning")

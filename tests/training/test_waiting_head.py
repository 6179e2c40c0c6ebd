"""A head that waits for the loss: the same numbers, on demand the logits, and never where code follows it."""

from dataclasses import replace

import pytest
import torch

from peftctl.models import cross_entropy
from peftctl.models.supervised import Supervised, supervised_forward
from peftctl.training.waiting_head import head_can_wait
from tests.models.test_supervised import gemma2, gradients, make_batch, peft_lora
from tests.tiny import tiny_llama


def waiting(model, batch, **more):
    waits = head_can_wait(model, batch)
    found = supervised_forward(model, batch, lean=waits, **more)
    assert ("logits" not in vars(found)) == waits
    return waits, found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("piece", [1 << 24, 900, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_waits_for_the_loss(monkeypatch, smoothing, piece, bias):
    monkeypatch.setitem(cross_entropy.PIECE, "cpu", piece)
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", 2 * 400)
    model = peft_lora(["q_proj", "down_proj"]).double()
    if bias:
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.randn(400, dtype=torch.float64), requires_grad=False)
    batch = make_batch()
    waits, found = waiting(model, batch, smoothing=smoothing)
    assert waits
    ours = found.cross_entropy()
    plain = supervised_forward(model, batch)
    expected = torch.nn.functional.cross_entropy(plain.logits, plain.labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    wanted, got = gradients(model, 0.3 * expected), gradients(model, 0.3 * ours)
    assert wanted.keys() == got.keys() and wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_loss_that_asks_for_logits_gets_them_with_a_graph():
    model, batch = peft_lora(["q_proj"]).double(), make_batch()
    waits, found = waiting(model, batch)
    assert waits
    plain = supervised_forward(model, batch)
    assert torch.equal(found.logits, plain.logits) and found.logits is found.logits and found.logits.requires_grad
    torch.testing.assert_close(found.cross_entropy(), plain.cross_entropy())
    some = replace(found, logits=found.logits[:2], labels=found.labels[:2])
    torch.testing.assert_close(some.cross_entropy(), Supervised(plain.logits[:2], plain.labels[:2]).cross_entropy())
    assert int(waiting(model, batch)[1].correct()) == int(plain.correct())


def test_a_row_without_a_label_has_a_loss_of_zero_with_a_graph():
    model, batch = peft_lora(["q_proj"]), make_batch()
    batch["labels"][:] = -100
    waits, found = waiting(model, batch)
    assert waits
    loss = found.cross_entropy()
    loss.backward()
    assert loss == 0 and not model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.any()


def frozen_gemma():
    model = gemma2().double()
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    return model


def test_code_after_the_head_is_noticed_and_nothing_is_drawn_for_it():
    model, batch = frozen_gemma(), make_batch()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.5))
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    waits, found = waiting(model, batch)
    assert not waits and found.logits.abs().max() <= 0.5  # the cap
    torch.manual_seed(3)
    assert not head_can_wait(model, batch) and torch.equal(torch.rand(1), drawn)


class InPlace(torch.nn.Module):
    """Scales logits after the head, in place or not at all."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.scale, self.config = tiny_llama(), scale, tiny_llama().config
        self.inner.requires_grad_(False)
        self.inner.model.norm.weight.requires_grad_()

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, **inputs):
        out = self.inner(**inputs)
        if self.scale != 1:
            out.logits.mul_(self.scale)
        return out


@pytest.mark.parametrize("scale", [1, 2])
def test_a_change_in_place_is_noticed_too(scale):
    waits, found = waiting(InPlace(scale), make_batch())
    assert waits == (scale == 1)
    torch.testing.assert_close(found.logits, scale * supervised_forward(InPlace(1), make_batch()).logits)


@pytest.mark.parametrize("change", ["trains", "lora", "hook", "autocast", "float16"])
def test_a_head_that_does_not_wait(change):
    model, batch = peft_lora(["q_proj", "lm_head"] if change == "lora" else ["q_proj"]), make_batch()
    head = model.get_output_embeddings()
    if change == "trains":
        head.weight.requires_grad_()
    if change == "float16":
        model.half()
    if change == "hook":
        head.register_forward_hook(lambda _, __, out: 2 * out)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert not waiting(model, batch)[0]
    assert waiting(peft_lora(["q_proj"]), batch)[0]


def test_an_error_in_the_model_is_raised_and_the_head_is_whole_again():
    model, batch = peft_lora(["q_proj"]), make_batch()
    batch["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        supervised_forward(model, batch, lean=True)
    assert "forward" not in vars(model.get_output_embeddings())

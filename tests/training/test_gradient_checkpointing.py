"""Recomputing activations changes no gradient, also where nothing below the first trained layer trains."""

import pytest
import torch

from peftctl.methods import adalora, full, last_layers, lora
from peftctl.training.trainer import MethodTrainer
from tests.tiny import tiny_llama
from tests.training.helpers import train, workload


def lora_on(targets, **keys):
    return lambda: lora.Method(lora.Config(r=4, dropout=0.1, target_modules=targets, **keys))


METHODS = {
    "all-linear": lora_on("all-linear"),
    "attention": lora_on(["q_proj", "v_proj"]),
    "mlp": lora_on(["gate_proj", "down_proj"]),
    "one-layer": lora_on(r".*layers\.3\.self_attn\.q_proj"),
    "embedding": lora_on(["embed_tokens"]),
    "saved-norms": lora_on(["v_proj"], modules_to_save=["norm"]),
    "adalora": lambda: adalora.Method(
        adalora.Config(init_r=4, target_r=2, tinit=1, target_modules=["q_proj", "v_proj"])
    ),
    "full": lambda: full.Method(full.Config(name="full")),
    "last_layers": lambda: last_layers.Method(last_layers.Config(name="last_layers", layers=2)),
}


def gradients(folder, method, monkeypatch, checkpointing):
    """Return the gradients of the second step, in which B is no longer zero, and how often the blocks ran in it."""
    found, runs = {}, []

    def keep(trainer, model, grad_norm=None):
        found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        if trainer.state.global_step == 0:
            runs.clear()
        return torch.tensor(1.0)

    monkeypatch.setattr(MethodTrainer, "_get_grad_norm", keep)
    model = tiny_llama(tie=False)
    model.model.layers[3].mlp.act_fn.register_forward_hook(lambda *_: runs.append(1))
    train(workload(folder, method, max_steps=2, gradient_checkpointing=checkpointing), model=model)
    return found, len(runs)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_without_it(tmp_path, monkeypatch, name):
    plain, runs = gradients(tmp_path / "a", METHODS[name](), monkeypatch, False)
    again, recomputed = gradients(tmp_path / "b", METHODS[name](), monkeypatch, True)
    assert (runs, recomputed) == (1, 2)
    assert plain.keys() == again.keys() and plain
    for parameter, gradient in plain.items():
        assert gradient.abs().sum() > 0, parameter
        torch.testing.assert_close(again[parameter], gradient, rtol=1e-4, atol=1e-7, msg=parameter)

"""What the tests of methods with mixtures of experts share."""

from functools import partial

import pytest
import torch

from peftctl.errors import Interrupted
from peftctl.methods._routed import _of_tokens
from peftctl.models.load import load_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.tuners.routing import layers, recording
from tests.methods.helpers import applied, run_steps
from tests.tiny import save_tiny
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def experts(model):
    """Return the module of experts of every layer, by the layer's name."""
    return {name: layer.experts["default"] for name, layer in layers(model).items()}


def randomise(model, seed=0, std=0.3):
    """Give routers and experts other values, of which B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in experts(model).values():
        for p in module.parameters():
            p.data = (std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p)
    return model


def batch(ids=IDS, pad=0, task_ids=None, **more):
    """Return a batch whose second half is supervised, with padding on the right."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    padded = torch.nn.functional.pad
    made = {
        "input_ids": padded(ids, (0, pad), value=3),
        "attention_mask": padded(torch.ones_like(ids), (0, pad)),
        "labels": padded(labels, (0, pad), value=-100),
        **more,
    }
    return made if task_ids is None else {**made, "task_ids": torch.tensor(task_ids)}


def parts(method, model, inputs):
    """Return the parts of the loss of a micro-batch."""
    return method.loss(model, inputs, partial(supervised_forward, model))


def observed(model, inputs):
    """Return the routing of a micro-batch by layer, as losses see it."""
    with recording(model) as found, torch.no_grad():
        supervised_forward(model, inputs)
    return {layer.name: layer for layer in _of_tokens(model, found, inputs)}


def check_resume(tmp_path, make):
    """Assert that a stopped and resumed run ends with the tensors of a straight one."""
    straight, _ = train(workload(tmp_path / "a", make(), max_steps=6))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", make(), max_steps=6, reporter=StopAt(4)))
    work = workload(tmp_path / "b", make(), max_steps=6)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def check_quantised(tmp_path, make, bits):
    """Assert that a method trains over a quantised base, which it starts as and goes back to."""
    section = ModelSection(name_or_path=str(save_tiny(tmp_path)), dtype="float32")
    base = load_model(section, device="cpu", quantization=QuantizationSection(bits=bits))
    with torch.no_grad():
        reference = base(input_ids=IDS).logits
        chosen = make()
        expected = chosen.count(base)
        model = applied(chosen, base)
        assert torch.equal(model.eval()(input_ids=IDS).logits, reference)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, reference)


def check_moves(model, steps=3):
    """Assert that a few steps with weight decay move experts and routers and nothing else, and lower the loss."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = run_steps(model, steps, weight_decay=0.1)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name

"""O-LoRA: earlier pairs frozen in the forward, the rows of the new A pushed away from theirs."""

from __future__ import annotations

import torch

from peftctl.methods.base import Stage
from scripts.parity._core import Fixture, Given, Values, differentiate, normal, total
from scripts.parity._naive import lora_gradients
from scripts.parity._product import Supervised, attach, lora_layer

SCALE, L1, L2, EARLIER = 6 / 3, 0.5, 0.2, 2

FIXTURE = Fixture(
    seed=2310,
    source="Wang et al. 2023, arXiv 2310.14152, O as in cmnfriend/O-LoRA, uie_trainer_lora.py: "
    "sum of |A_i A_t^T|, lambda_2 times the 2-norms of the new factors",
    shapes="two modules W (64, 32), two earlier pairs each, x (2, 5, 32), r 3",
    config={
        "r": 3,
        "alpha": 6,
        "orth_weight": L1,
        "norm_weight": L2,
        "target_modules": r".*layers\.[12]\.mlp\.gate_proj",
    },
)


def given() -> Given:
    """Draw two modules with three pairs each."""
    draw = FIXTURE.generator()
    numbers = {}
    for module in range(2):
        numbers[f"W.{module}"] = normal(draw, 64, 32, scale=0.2)
        numbers[f"x.{module}"], numbers[f"g.{module}"] = normal(draw, 2, 5, 32), normal(draw, 2, 5, 64)
        for task in range(EARLIER + 1):
            numbers[f"A{task}.{module}"], numbers[f"B{task}.{module}"] = normal(draw, 3, 32), normal(draw, 64, 3)
    return numbers


def naive(given: Given) -> Values:
    """Entry by entry of A_i A_t^T; its gradient is sign(A_i A_t^T)^T A_i, and p / ||p|| for the 2-norms."""
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    orthogonal = torch.zeros((), dtype=torch.float64)
    size = torch.zeros((), dtype=torch.float64)
    for module in range(2):
        A, B = given[f"A{EARLIER}.{module}"], given[f"B{EARLIER}.{module}"]
        x, g = given[f"x.{module}"], given[f"g.{module}"]
        whole, pull = given[f"W.{module}"].clone(), torch.zeros_like(A)
        for task in range(EARLIER + 1):
            whole += SCALE * given[f"B{task}.{module}"] @ given[f"A{task}.{module}"]
        for task in range(EARLIER):
            for earlier in given[f"A{task}.{module}"]:
                for k in range(3):
                    overlap = torch.dot(earlier, A[k])
                    orthogonal += overlap.abs()
                    pull[k] += torch.sign(overlap) * earlier
        size += A.norm() + B.norm()
        outputs[f"y.{module}"] = x @ whole.T
        found = lora_gradients(A, B, SCALE, x, g)
        gradients[f"A.{module}"] = found["A"] + L1 * pull + L2 * A / A.norm()
        gradients[f"B.{module}"] = found["B"] + L2 * B / B.norm()
    outputs["penalty"] = L1 * orthogonal + L2 * size
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Three tasks begin one after another; what each has learned is the fixture's pairs."""
    method, model = attach("orthogonal_lora", FIXTURE)
    layers = [f"model.layers.{layer}.mlp.gate_proj" for layer in (1, 2)]
    for task in range(EARLIER + 1):
        method.enter(model, Stage(f"task {task + 1}"), lambda stage: ())
        made = []
        for module, name in enumerate(layers):
            numbers = {"W": given[f"W.{module}"], "A": given[f"A{task}.{module}"], "B": given[f"B{task}.{module}"]}
            made.append(lora_layer(model, numbers, name))
    outputs = {f"y.{module}": layer(given[f"x.{module}"]) for module, (layer, _) in enumerate(made)}
    loss = total((outputs[f"y.{module}"] * given[f"g.{module}"]).sum() for module in range(2))
    parts = method.loss(model, {}, lambda batch: Supervised(loss))
    wanted = {f"{name}.{module}": factors[name] for module, (_, factors) in enumerate(made) for name in ("A", "B")}
    penalty = parts["orthogonality"] + parts["factor_norm"]
    return Values({**outputs, "penalty": penalty}, differentiate(parts["loss"] + penalty, None, wanted))

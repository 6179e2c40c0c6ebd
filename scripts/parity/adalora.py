"""AdaLoRA: the scores of three steps, which triplets the budget leaves, the layer, the orthogonality loss."""

from __future__ import annotations

import torch

from peftctl.methods.base import StepInfo
from scripts.parity._core import Fixture, Given, Values, differentiate, normal
from scripts.parity._product import Supervised, attach, forget_nothing, linear_layer, passed, put

MODULES, RANK, TARGET, ALPHA, BETA, WEIGHT = 4, 4, 2, 8, 0.85, 0.3
TOTAL, INITIAL, FINAL, EVERY = 10, 2, 3, 1
FIRST, LAST = 3, 5
SCALE = ALPHA / (RANK + 1e-5)

FIXTURE = Fixture(
    seed=2303,
    source="Zhang et al. 2023, arXiv 2303.10512, W + s P Lambda Q, scores, cubic budget; "
    "the loss as in QingruZhang/AdaLoRA: mean of the Frobenius norms over all P and Q, scale alpha / (r_0 + 1e-5)",
    shapes="4 modules W (16, 32), r 4 -> 2, x (2, 5, 32); steps 3 to 5 of 10, t_i 2, t_f 3",
    config={
        "init_r": RANK,
        "target_r": TARGET,
        "tinit": INITIAL,
        "tfinal": FINAL,
        "delta_t": EVERY,
        "alpha": ALPHA,
        "beta1": BETA,
        "beta2": BETA,
        "orth_reg_weight": WEIGHT,
        "target_modules": ["v_proj"],
    },
)


def given() -> Given:
    """Draw W, x and g of the first module; P, lambda, Q of every module and step with gradients."""
    draw = FIXTURE.generator()
    numbers = {
        "W": normal(draw, 16, 32, scale=0.2),
        "x": normal(draw, 2, 5, 32),
        "g": normal(draw, 2, 5, 16),
    }
    for step in range(1, LAST + 1):
        for module in range(MODULES):
            for name, shape in (("P", (16, RANK)), ("l", (RANK,)), ("Q", (RANK, 32))):
                numbers[f"{name}{step}.{module}"] = normal(draw, *shape)
                numbers[f"d{name}{step}.{module}"] = normal(draw, *shape)
    return numbers


def budget(step: int) -> int:
    """Equation 12: all, then a cubic, then the target for the last steps."""
    if step <= INITIAL:
        return RANK * MODULES
    if step > TOTAL - FINAL:
        return TARGET * MODULES
    rest = 1 - (step - INITIAL) / (TOTAL - FINAL - INITIAL)
    return int(TARGET * MODULES + (RANK - TARGET) * MODULES * rest**3)


def naive(given: Given) -> Values:
    """Moving averages entry by entry; the lowest triplets of the whole net lose their lambda."""
    outputs: dict[str, torch.Tensor] = {"budget": torch.tensor([budget(step) for step in range(1, TOTAL + 1)])}
    mean: dict[str, torch.Tensor] = {}
    unsure: dict[str, torch.Tensor] = {}
    for step in range(1, LAST + 1):
        scores = {}
        for module in range(MODULES):
            for name in ("P", "l", "Q"):
                key = f"{name}.{module}"
                sensitivity = (given[f"{name}{step}.{module}"] * given[f"d{name}{step}.{module}"]).abs()
                mean[key] = BETA * mean.get(key, 0.0) + (1 - BETA) * sensitivity
                unsure[key] = BETA * unsure.get(key, 0.0) + (1 - BETA) * (sensitivity - mean[key]).abs()
            for i in range(RANK):
                whole = {name: mean[f"{name}.{module}"] * unsure[f"{name}.{module}"] for name in ("P", "l", "Q")}
                score = whole["l"][i] + whole["P"][:, i].mean() + whole["Q"][i].mean()
                scores[module, i] = score.item()
        alive = sorted(scores, key=lambda triplet: -scores[triplet])[: budget(step)]
        if step >= FIRST:
            for module in range(MODULES):
                kept = torch.tensor([float((module, i) in alive) for i in range(RANK)], dtype=torch.float64)
                outputs[f"lambda{step}.{module}"] = given[f"l{step}.{module}"] * kept
    layer, found = _layer(given, outputs[f"lambda{LAST}.0"])
    penalty, pulls = _penalty(given)
    return Values({**outputs, **layer, "penalty": penalty}, {**found, **pulls})


def _layer(given: Given, values: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pass y = W x + s P diag(lambda) Q x of the first module after the last step; gradients by the chain rule."""
    P, Q, x, g = given[f"P{LAST}.0"], given[f"Q{LAST}.0"], given["x"], given["g"]
    full = torch.einsum("bto,bti->oi", g, x)
    inner = torch.diag(values)
    gradients = {
        "P": SCALE * full @ Q.T @ inner,
        "l": torch.stack([SCALE * P[:, i] @ full @ Q[i] for i in range(RANK)]),
        "Q": SCALE * inner @ P.T @ full,
        "x": g @ (given["W"] + SCALE * P @ inner @ Q),
    }
    return {"y": x @ (given["W"] + SCALE * P @ inner @ Q).T}, gradients


def _penalty(given: Given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The derivative of ||M^T M - I||_F is 2 M (M^T M - I) / ||M^T M - I||_F."""
    total, gradients = torch.zeros((), dtype=torch.float64), {}
    for module in range(MODULES):
        for name in ("P", "Q"):
            M = given[f"{name}{LAST}.{module}"]
            M = M if name == "P" else M.T
            rest = M.T @ M - torch.eye(RANK, dtype=torch.float64)
            size = (rest**2).sum() ** 0.5
            total += size
            pull = WEIGHT / (2 * MODULES) * 2 * M @ rest / size
            gradients[f"{name}.{module} of the penalty"] = pull if name == "P" else pull.T
    return WEIGHT * total / (2 * MODULES), gradients


def ours(given: Given) -> Values:
    """Values and gradients go where an optimizer's step would leave them; then the method's hook runs."""
    method, model = attach("adalora", FIXTURE)
    layers = [linear_layer(model, f"model.layers.{i}.self_attn.v_proj") for i in range(MODULES)]
    places = [
        {"P": layer.lora_B["default"], "l": layer.lora_E["default"], "Q": layer.lora_A["default"]} for layer in layers
    ]
    (callback,) = method.callbacks(model)
    outputs: dict[str, torch.Tensor] = {}
    logged = []
    callback.stage_begins(StepInfo(0, TOTAL, model, forget_nothing))
    for step in range(1, LAST + 1):
        for module, place in enumerate(places):
            for name, parameter in place.items():
                put({name: given[f"{name}{step}.{module}"].reshape(parameter.shape)}, {name: parameter})
                parameter.grad = given[f"d{name}{step}.{module}"].reshape(parameter.shape).clone()
        info = StepInfo(step - 1, TOTAL, model, forget_nothing)
        callback.after_optimizer(info)
        logged.append(info.log["rank_budget"])
        if step >= FIRST:
            outputs |= {f"lambda{step}.{i}": place["l"].detach().clone().flatten() for i, place in enumerate(places)}
    allocator = model.base_model.rankallocator
    logged += [allocator.budget_schedule(step)[0] for step in range(LAST + 1, TOTAL + 1)]
    put(given, {"W": layers[0].get_base_layer().weight})
    layer = passed(layers[0], given, places[0])
    penalty = method.loss(model, {}, lambda batch: Supervised(torch.zeros(())))["orthogonality"]
    wanted = {f"{n}.{i} of the penalty": place[n] for i, place in enumerate(places) for n in ("P", "Q")}
    gradients = {**layer.gradients, "l": layer.gradients["l"].flatten(), **differentiate(penalty, None, wanted)}
    return Values({**outputs, **layer.outputs, "budget": torch.tensor(logged), "penalty": penalty}, gradients)

"""LoRA-drop: the share of every module's LoRA output, the modules that keep a pair, one pair for the others."""

from __future__ import annotations

import torch

from peftctl.methods import lora_drop
from peftctl.tuners.shared_pairs import OutputSizes, kinds, share
from scripts.parity._core import Fixture, Given, Values, differentiate, normal, total
from scripts.parity._naive import lora_gradients
from scripts.parity._product import attach, lora_layer, put

LAYERS, SCALE, THRESHOLD = 4, 6 / 3, 0.8

FIXTURE = Fixture(
    seed=2402,
    source="Zhou et al. 2024, arXiv 2402.07721, g_l = mean of ||s B_l A_l x_l||^2, "
    "I_l = g_l / sum g, the shortest prefix that reaches T",
    shapes="4 modules W (64, 32), r 3, 2 batches of x (2, 5, 32)",
    config={"r": 3, "alpha": 6, "threshold": THRESHOLD, "target_modules": ["gate_proj"]},
)


def given() -> Given:
    """Draw the modules (B of very different sizes), and the shared pair of the second stage."""
    draw = FIXTURE.generator()
    numbers = {"A": normal(draw, 3, 32), "B": normal(draw, 64, 3)}
    for layer in range(LAYERS):
        numbers[f"W{layer}"] = normal(draw, 64, 32, scale=0.2)
        numbers[f"A{layer}"] = normal(draw, 3, 32)
        numbers[f"B{layer}"] = normal(draw, 64, 3, scale=(0.4, 2.0, 0.3, 1.5)[layer])
        numbers[f"x{layer}"], numbers[f"g{layer}"] = normal(draw, 2, 2, 5, 32), normal(draw, 2, 5, 64)
    return numbers


def importance(given: Given) -> torch.Tensor:
    """Mean over every token of both batches, then shares."""
    sizes = []
    for layer in range(LAYERS):
        A, B = given[f"A{layer}"], given[f"B{layer}"]
        tokens = given[f"x{layer}"].flatten(0, -2)
        sizes.append(total(((SCALE * B @ (A @ token)) ** 2).sum() for token in tokens) / len(tokens))
    return torch.stack(sizes) / total(sizes)


def kept(shares: torch.Tensor, threshold: float) -> list[int]:
    """Largest first until their sum reaches the threshold."""
    order, reached = sorted(range(len(shares)), key=lambda layer: -shares[layer].item()), 0.0
    chosen: list[int] = []
    for layer in order:
        if reached >= threshold:
            break
        chosen.append(layer)
        reached += shares[layer].item()
    return sorted(chosen)


def naive(given: Given) -> Values:
    """Importance, choice; then the shared pair's outputs, and its gradient as the sum over the layers that share it."""
    shares = importance(given)
    private = kept(shares, THRESHOLD)
    outputs = {"importance": shares, "kept": torch.tensor(private)}
    gradients = {"A": torch.zeros_like(given["A"]), "B": torch.zeros_like(given["B"])}
    for layer in range(LAYERS):
        if layer in private:
            continue
        x, g = given[f"x{layer}"][0], given[f"g{layer}"]
        outputs[f"y{layer}"] = x @ (given[f"W{layer}"] + SCALE * given["B"] @ given["A"]).T
        found = lora_gradients(given["A"], given["B"], SCALE, x, g)
        gradients = {name: gradients[name] + found[name] for name in gradients}
    return Values(outputs, gradients)


def ours(given: Given) -> Values:
    """Measure and choose in the first stage; share and pass in the second."""
    _, model = attach("lora_drop", FIXTURE)
    names = [f"model.layers.{layer}.mlp.gate_proj" for layer in range(LAYERS)]
    made = []
    for i, name in enumerate(names):
        made.append(lora_layer(model, {"W": given[f"W{i}"], "A": given[f"A{i}"], "B": given[f"B{i}"]}, name)[0])
    with OutputSizes(model) as sizes, torch.no_grad():
        for i, layer in enumerate(made):
            for batch in given[f"x{i}"]:
                layer(batch)
    (names_of_kind,) = kinds(model).values()
    shares = lora_drop.importance("gate_proj", [sizes.means()[name] for name in names_of_kind])
    private = lora_drop.kept(shares, THRESHOLD)
    outputs = {"importance": torch.tensor(shares, dtype=torch.float64), "kept": torch.tensor(sorted(private))}
    sharing = [i for i in range(LAYERS) if i not in private]
    share(model, [[names_of_kind[i] for i in sharing]])
    pair = {"A": made[sharing[0]].lora_A["default"].weight, "B": made[sharing[0]].lora_B["default"].weight}
    put(given, pair)
    outputs |= {f"y{i}": made[i](given[f"x{i}"][0]) for i in sharing}
    loss = total((outputs[f"y{i}"] * given[f"g{i}"]).sum() for i in sharing)
    return Values(outputs, differentiate(loss, None, pair))

"""How far weights moved in magnitude and direction: DoRA's analysis, Liu et al. 2024 (arXiv 2402.09353, section 3.2).

A weight splits into vectors w_n of lengths m_n = |w_n|. Between W0 and W, over its k vectors:

    dM = 1/k * sum_n |m_n(W) - m_n(W0)|        dD = 1/k * sum_n (1 - cos(w_n(W), w_n(W0)))

The paper writes the vectors as columns of a (d, k) matrix. Here, as in its authors' code and in peft's DoRA, they are
the rows of torch's (d_out, d_in) weight: one for every output feature, or for every token of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from peftctl.artifacts.sides import Side
from peftctl.errors import UsageError

_ROWS = 2**22
"""Numbers of a weight that are looked at together, in float64."""


@dataclass(frozen=True)
class Change:
    """What happened to one weight matrix.

    Args:
        name: Of the weight, in the base model.
        shape: As stored.
        magnitude: dM, in units of the weights.
        direction: dD, 0 (none) to 2 (turned around), over the rows that are zero in neither matrix.
        length: Mean m_n(W0), to set dM beside.
        relative: |W - W0| / |W0|, Frobenius; None where W0 is 0.
    """

    name: str
    shape: tuple[int, ...]
    magnitude: float
    direction: float
    length: float
    relative: float | None


@dataclass(frozen=True)
class Comparison:
    """All weight matrices that two models do not share.

    Args:
        changes: In the order of the model.
        same: Matrices that are equal or the same tensor.
        vectors: Norms and biases that differ; they have no direction to speak of and are only counted.
    """

    changes: tuple[Change, ...]
    same: int
    vectors: int

    def kinds(self) -> dict[str, list[Change]]:
        """Return the changes by the layer's own name, e.g. q_proj: what the paper correlates over layers."""
        found: dict[str, list[Change]] = {}
        for change in self.changes:
            found.setdefault(layer_kind(change.name), []).append(change)
        return found


def compare(after: Side, before: Side) -> Comparison:
    """Compare two models weight by weight, holding one pair in memory at a time.

    Args:
        after: W.
        before: W0.

    Raises:
        UsageError: They have other weights or shapes.
    """
    _refuse_other_shapes(after, before)
    changes: dict[tuple[str, str, float, float], Change] = {}
    same = vectors = 0
    for name, new, old in _pairs(after, before):
        if torch.equal(new, old):
            same += new.dim() > 1
        elif new.dim() == 1:
            vectors += 1
        else:
            transposed = name in before.transposed
            change = measure(name, new.T if transposed else new, old.T if transposed else old)
            # A head that is tied to the embedding and trained with it is one matrix, with one change.
            changes.setdefault((*before.origin(name), change.magnitude, change.direction), change)
    shared = {before.origin(n) for n, shape in before.shapes.items() if len(shape) > 1} & set(
        map(after.origin, after.shapes)
    )
    return Comparison(tuple(changes.values()), same + len(shared), vectors)


def measure(name: str, after: torch.Tensor, before: torch.Tensor) -> Change:
    """Return the change of one weight.

    Args:
        name: Of the weight.
        after: W, (d_out, d_in); further leading dimensions, as of stacked experts, count as rows.
        before: W0, likewise.
    """
    width = before.shape[-1]
    moved = turned = length = error = size = 0.0
    rows = directed = 0
    step = max(1, _ROWS // width)
    for new, old in zip(after.reshape(-1, width).split(step), before.reshape(-1, width).split(step), strict=True):
        new, old = new.double(), old.double()
        m, m0 = new.norm(dim=1), old.norm(dim=1)
        both = (m > 0) & (m0 > 0)
        unit, unit0 = new[both] / m[both, None], old[both] / m0[both, None]
        # 1 - cos of unit vectors, without the cancellation that 1 - <u, u0> suffers where hardly anything turned.
        turned += float((unit - unit0).square().sum()) / 2
        moved += float((m - m0).abs().sum())
        length += float(m0.sum())
        error += float((new - old).square().sum())
        size += float(m0.square().sum())
        rows += len(old)
        directed += int(both.sum())
    return Change(
        name=name,
        shape=tuple(before.shape),
        magnitude=moved / rows,
        direction=turned / directed if directed else 0.0,
        length=length / rows,
        relative=math.sqrt(error / size) if size else None,
    )


def correlation(changes: Sequence[Change]) -> float | None:
    """Return Pearson's correlation of dM and dD over layers; None for fewer than three, or where one is constant.

    The paper finds it positive for LoRA and negative for full fine-tuning and DoRA.
    """
    if len(changes) < 3:
        return None
    points = torch.tensor([[c.magnitude, c.direction] for c in changes], dtype=torch.float64)
    centred = points - points.mean(0)
    spread = centred.square().sum(0).prod().sqrt()
    return float(centred.prod(1).sum() / spread) if spread > 0 else None


def layer_kind(name: str) -> str:
    """Return the last part of the name of a weight's module, e.g. q_proj."""
    parts = [part for part in name.split(".") if part != "weight"]
    return parts[-1]


def _pairs(after: Side, before: Side) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the weights that are not the same tensor on both sides; a tied pair comes once."""
    seen = set()
    for name in before.shapes:
        origins = (after.origin(name), before.origin(name))
        if origins[0] != origins[1] and origins not in seen:
            seen.add(origins)
            yield name, after.get(name), before.get(name)


def _refuse_other_shapes(after: Side, before: Side) -> None:
    names = sorted(after.shapes.keys() ^ before.shapes.keys())
    if names:
        side = after if names[0] in after.shapes else before
        raise UsageError(
            f"{after.target} and {before.target} are different models: {len(names)} weights are in one alone, "
            f"e.g. {names[0]} of {side.target}; compare models of one architecture and size"
        )
    for name, shape in before.shapes.items():
        if after.shapes[name] != shape:
            raise UsageError(
                f"{after.target} and {before.target} are different models: {name} is {_by(after.shapes[name])} and "
                f"{_by(shape)}; compare models of one architecture and size"
            )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

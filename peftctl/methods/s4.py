"""S4, Parameter-Efficient Fine-Tuning Design Spaces: Chen et al. 2023, ICLR 2023 (https://arxiv.org/abs/2301.01821).

The paper searches over which layers are grouped, how many parameters a layer gets, which groups train, and by what. Its
result, which is trained here:

    grouping    four groups of consecutive blocks, a spindle: N1 < N2 = N3 > N4
    parameters  the same number in every block
    groups      all of them train
    strategies  G1: adapter, LoRA   G2: adapter, prefix   G3: adapter, prefix, biases   G4: prefix, biases, LoRA

A block has b = budget * P / L parameters, P those of the base and L its blocks. Biases take what there is of them; what
is left is dealt evenly to the other strategies of the group, which take the largest size that fits:

    m = (b_A - d) // (2d + 1)     n = b_P // kv row of the block's attention     r = b_L // sum of (d_in + d_out)

The adapter stands behind the feed-forward part, LoRA at the projections of `target_modules`, the prefix in all
attention of the block, and a bias is b + δ with δ trained. Blocks without biases, such as Llama's, deal their share out
again. An encoder and a decoder are grouped each by itself. Where not even the smallest sizes fit they are taken all the
same, and a notice says so.

Not verified: the groups' sizes; here N2 = N3 = ceil(L / 3), and N1 and N4 share the rest: 5, 10, 10, 5 of 30 blocks. In
five blocks or fewer, or seven, outer groups are empty. The authors' code has no grouping, it is UniPELT by another
name, so there was nothing to compare with. Not verified: the assignment above is the one found for
T5-base, as surveys quote it; for T5-3B the paper is said to find another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.errors import UsageError
from peftctl.methods import _heads, _targets, base
from peftctl.methods._union import IDENTITY_NOTE, MERGE_NOTE, Part, UnionKeys, UnionMethod, bottlenecks, prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftctl.models.attentions import Attention

Strategy = Literal["adapter", "lora", "prefix", "bias"]
FOUND: list[list[Strategy]] = [
    ["adapter", "lora"],
    ["adapter", "prefix"],
    ["adapter", "prefix", "bias"],
    ["prefix", "bias", "lora"],
]
"""The paper's result."""


class Config(base.MethodConfig):
    """The `method:` section of S4."""

    name: Literal["s4"] = "s4"
    budget: Annotated[float, Field(gt=0, lt=1)] = 0.005
    """Trained parameters, as a share of the base's."""
    strategies: list[list[Strategy]] = Field(default_factory=lambda: [list(group) for group in FOUND])
    """What trains in each of the four groups of blocks, from the first to the last."""
    activation: Literal["gelu", "relu", "silu"] = "relu"
    """φ of the adapters."""
    prefix_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the prefix at the start."""
    target_modules: str | list[str] | None = None
    """Linear layers with LoRA: name suffixes or a regular expression; left out, peft's choice for the architecture."""

    @field_validator("strategies")
    @classmethod
    def _are_four(cls, value: list[list[Strategy]]) -> list[list[Strategy]]:
        if len(value) != 4 or not all(group and len(set(group)) == len(group) for group in value):
            raise ValueError("expected four groups, each with one strategy or more, and none twice")
        return value


@dataclass(frozen=True)
class Block:
    """What a block of the base has, by module name.

    Args:
        group: 0 to 3.
        end: The last layer of its feed-forward part.
        width: d.
        attentions: What attends in it.
        targets: LoRA's -> (d_in, d_out).
        biases: Module with a bias -> its size.
    """

    group: int
    end: str
    width: int
    attentions: Sequence[Attention]
    targets: Mapping[str, tuple[int, int]]
    biases: Mapping[str, int]


@dataclass(frozen=True)
class Sizes:
    """What the strategies of a block have: m, n and r, 0 where there is none, and whether its biases train."""

    bottleneck: int
    tokens: int
    rank: int
    biases: bool


class Method(UnionMethod):
    """A strategy for each of four groups of blocks, with the same number of parameters in every block."""

    Config = Config
    config: Any
    card = base.Card(
        title="S4",
        paper="Chen et al. 2023, arXiv 2301.01821",
        category="hybrid",
        summary="Adapters, prefixes, LoRA and biases, each in the blocks where the paper's search has found them best.",
        trains="by block: D and U of an adapter, the prefix, A and B, changes of biases; a classifier's head",
        count="at most budget * P / L a block, in whole m, n and r: 2dm + m + d, n * kv row, r (d_in + d_out), biases",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note=MERGE_NOTE,
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        supports=frozenset({"4bit", "8bit", "gradient_checkpointing", "resume"}),
    )

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return what each group came to, and where the budget is too small for it."""
        blocks = self._blocks(model)
        room = self._room(model, len(blocks))
        lines = []
        for group in range(4):
            mine = [block for block in blocks if block.group == group]
            if mine:
                size, over = self._sizes(mine[0], room), self._spent(mine[0], room) > room
                text = _said(size) + ("; the budget is below the smallest sizes" if over else "")
                lines.append(f"group {group + 1}, {len(mine)} blocks: {text}")
        return lines

    def members(self, model: PreTrainedModel, task: str) -> list[Part]:
        """Return the parts: for each strategy one for every size that it has.

        Raises:
            UsageError: It is not known where the architecture attends or where its sublayers end.
        """
        from peftctl.methods._bottleneck import Chosen

        blocks = self._blocks(model)
        room = self._room(model, len(blocks))
        alike: dict[Sizes, list[Block]] = {}
        for block in blocks:
            alike.setdefault(self._sizes(block, room), []).append(block)
        parts: list[Part] = []
        for size, some in alike.items():
            if size.tokens:
                layers = [layer for block in some for layer in block.attentions]
                parts += prefixes(layers, self._keys(size), some[0].width, self.config.prefix_std)
            if size.bottleneck:
                chosen = Chosen("behind", {block.end: block.width for block in some})
                parts += bottlenecks(chosen, self._keys(size), {"init_std": 0.02, "up_std": 0.0})
            if size.rank:
                widths = {name: pair for block in some for name, pair in block.targets.items()}
                count = sum(size.rank * sum(pair) for pair in widths.values())
                parts.append(Part("low_rank", list(widths), {"r": size.rank}, count))
            if size.biases:
                sizes = {name: count for block in some for name, count in block.biases.items()}
                parts.append(Part("bias", list(sizes), {}, sum(sizes.values())))
        return parts

    def _keys(self, size: Sizes) -> UnionKeys:
        return UnionKeys(
            name="s4",
            num_virtual_tokens=max(1, size.tokens),
            bottleneck=max(1, size.bottleneck),
            activation=self.config.activation,
            prefix_std=self.config.prefix_std,
        )

    def _room(self, model: PreTrainedModel, blocks: int) -> float:
        """Return b, the parameters of a block."""
        from peftctl.models.quantize import parameter_count

        return self.config.budget * (parameter_count(model) - _heads.head_parameters(model)) / blocks  # type: ignore[no-any-return]

    def _sizes(self, block: Block, room: float) -> Sizes:
        """Return the largest sizes whose sum is at most `room`, 1 where even that is more."""
        strategies = [s for s in self.config.strategies[block.group] if s != "bias" or block.biases]
        biases = sum(block.biases.values()) if "bias" in strategies else 0
        others = [s for s in strategies if s != "bias"]
        share = (room - biases) / max(1, len(others))
        units = {
            "adapter": (block.width, 2 * block.width + 1),
            "prefix": (0, sum(layer.row for layer in block.attentions)),
            "lora": (0, sum(d_in + d_out for d_in, d_out in block.targets.values())),
        }
        fits = {s: max(1, int((share - units[s][0]) // units[s][1])) for s in others}
        return Sizes(fits.get("adapter", 0), fits.get("prefix", 0), fits.get("lora", 0), biases > 0)

    def _spent(self, block: Block, room: float) -> int:
        """Return the parameters that a block has."""
        size, d = self._sizes(block, room), block.width
        adapter = 2 * d * size.bottleneck + size.bottleneck + d if size.bottleneck else 0
        prefix = size.tokens * sum(layer.row for layer in block.attentions)
        lora = size.rank * sum(map(sum, block.targets.values()))
        return adapter + prefix + lora + (sum(block.biases.values()) if size.biases else 0)

    def _blocks(self, model: PreTrainedModel) -> list[Block]:
        from peftctl.models.anatomy import places, sublayer_ends
        from peftctl.models.attentions import attentions

        linear = _targets.matched_modules(model, "all-linear")
        ends = sublayer_ends(model, linear)["mlp"]
        homes = {place.block: (place.home, end) for end in ends for place in places(model, [end])}
        targets = self._targets(model)
        layers = attentions(model)
        found = []
        for name, (home, end) in homes.items():
            stack = [block for block, (other, _) in homes.items() if other == home]
            found.append(
                Block(
                    group=groups(len(stack))[stack.index(name)],
                    end=end,
                    width=model.config.get_text_config().hidden_size,
                    attentions=[layer for layer in layers if layer.name.startswith(f"{name}.")],
                    targets={n: pair for n, pair in targets.items() if n.startswith(f"{name}.")},
                    biases=_biases(model, name),
                )
            )
        return found

    def _targets(self, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        from torch import nn

        chosen = _targets.matched_modules(model, _targets.resolve_targets(model, self.config.target_modules))
        for name, module in chosen.items():
            if isinstance(module, nn.Embedding):
                raise UsageError(f"method.target_modules: {name} is an embedding; s4 takes linear layers only")
        return {name: _targets.in_out_features(module) for name, module in chosen.items()}


def groups(blocks: int) -> list[int]:
    """Return the group of each of so many consecutive blocks, 0 to 3: a spindle."""
    middle = math.ceil(blocks / 3)
    rest = max(0, blocks - 2 * middle)
    sizes = (rest // 2, middle, middle, rest - rest // 2) if rest > 1 else (0, middle, middle, rest)
    return [group for group, size in enumerate(sizes) for _ in range(size)][:blocks]


def _biases(model: PreTrainedModel, block: str) -> dict[str, int]:
    from torch import nn

    found = {}
    for name, module in model.get_submodule(block).named_modules():
        bias = module._parameters.get("bias")
        if isinstance(bias, nn.Parameter):
            found[f"{block}.{name}"] = bias.numel()
    return found


def _said(size: Sizes) -> str:
    sized: Iterable[tuple[str, int]] = (
        ("adapter m", size.bottleneck), ("prefix n", size.tokens), ("LoRA r", size.rank)
    )  # fmt: skip
    return ", ".join([*(f"{name} {value}" for name, value in sized if value), *(["biases"] if size.biases else [])])

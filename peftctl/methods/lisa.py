"""LISA: Layerwise Importance Sampled AdamW, Pan et al. 2024 (https://arxiv.org/abs/2403.17919).

    every K steps:  S ~ uniform over the subsets of gamma among L blocks;   W_b trains for b in S, all other blocks rest

The embedding, the output head, the final norm and whatever else is outside of the blocks always train. No adapter: the
weights themselves change, in float32 under autocast as in full fine-tuning, and the result is a whole model.

A resting block has no gradient and no optimizer state, so neither weight decay nor a moment moves it: AdamW's two
copies exist for gamma blocks at a time. The authors' code leaves the moments of blocks that rest in place, so its
memory grows towards that of full fine-tuning; here a block forgets them when it leaves S, and starts anew when it comes
back. A block that is drawn twice in a row keeps them: with gamma = L this is full fine-tuning, bit for bit. Draws
follow from the seed and their number alone, the same in every process. An encoder-decoder has two stacks: gamma blocks
of each train. Not verified: the paper's own gamma for a 7B model is said to be 2; the authors' script has 1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from peftctl.errors import UsageError
from peftctl.methods import _groups, base
from peftctl.methods._lengths import in_steps
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Config(base.MethodConfig):
    """The `method:` section of LISA."""

    name: Literal["lisa"] = "lisa"
    gamma: Positive = 2
    """How many blocks train at a time; of an encoder-decoder, in either stack."""
    interval: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0, lt=1.0)] = 20
    """K: optimizer steps, or fraction of the run, between two draws."""


class Method(base.Method):
    """Random blocks take turns."""

    Config = Config
    autocast = True
    leaves_out = True
    card = base.Card(
        title="LISA",
        paper="Pan et al. 2024, arXiv 2403.17919",
        category="selective",
        summary="Full weights of a few random blocks train, drawn anew every K steps; embedding and head always train.",
        trains="embedding, head, final norm, and gamma blocks at a time",
        count="all parameters outside of the blocks, plus gamma * those of a block (the largest, where they differ)",
        tasks=("causal_lm", "seq2seq_lm", "seq_cls", "token_cls"),
        merge_note="the result is a whole model already",
        disable_note="there is no adapter: the weights themselves are other ones",
        needs="checkpoints as large as full fine-tuning's: any block may have changed",
        supports=frozenset({"new_tokens", "gradient_checkpointing", "resume"}),
    )

    def load_options(self) -> base.LoadOptions:
        """Ask for float32 master weights."""
        return base.LoadOptions(dtype="float32")

    def count(self, model: PreTrainedModel) -> int:
        """Return what trains at a time: all outside of the blocks, and the gamma largest blocks of each stack."""
        stacks = self._stacks(model)
        resting = [block for stack in stacks for i, block in enumerate(stack) if i not in self._largest(stack)]
        everything = sum(p.numel() for p in model.parameters())
        return everything - sum(p.numel() for block in resting for p in block.parameters())

    def notices(self, model: PreTrainedModel) -> list[str]:
        """Return how many blocks train at a time."""
        depths = " + ".join(str(len(stack)) for stack in self._stacks(model))
        return [f"{self.config.gamma} of {depths} blocks train at a time, and all that is outside of the blocks"]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Let as much train as ever does at a time; the first draw is made where training begins."""
        self._seed = context.recipe.train.seed
        self._draws = 1
        model.requires_grad_(True)
        for stack in self._stacks(model):
            _wake(stack, self._largest(stack))
        return model

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Let everything train while the optimizer is built: it, and every checkpoint, must hold every block."""
        model.requires_grad_(True)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return groups for every block, whose state is forgotten where it rests, and for all outside of the blocks."""
        blocks = [block for stack in self._stacks(model) for block in stack]
        inside, outside = _groups.apart(model, (p for block in blocks for p in block.parameters()))
        assert len(inside) == sum(len(list(block.parameters())) for block in blocks)  # no block shares tensors
        groups = [group for block in blocks for group in _groups.by_decay(block.parameters(), train)]
        return [*groups, *_groups.by_decay(outside, train)]

    def callbacks(self, model: Any) -> Sequence[base.Callback]:
        """Return the draws."""
        return (_Draws(self),)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return how many draws there were: with the seed, the blocks of each follow."""
        return {"draws": self._draws}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Go on from the same draw, with an optimizer over everything as `enter` has it."""
        self._draws = state["draws"]
        model.requires_grad_(True)

    def begin(self, info: base.StepInfo) -> None:
        """Let the blocks of the draw at hand train."""
        for stack, chosen in zip(self._stacks(info.model), self._drawn(info.model), strict=True):
            _wake(stack, chosen)

    def draw(self, info: base.StepInfo) -> None:
        """Draw anew; blocks that leave forget what the optimizer knew of them."""
        before = self._drawn(info.model)
        self._draws += 1
        after = self._drawn(info.model)
        with info.whole():
            stacks = zip(self._stacks(info.model), before, after, strict=True)
            leaving = [stack[i] for stack, old, new in stacks for i in sorted(old - new)]
            info.forget(p for block in leaving for p in block.parameters())
        self.begin(info)
        info.log["draws"] = self._draws

    def _drawn(self, model: Any) -> list[set[int]]:
        """Return the blocks of the draw at hand, of each stack."""
        return [
            # Seeded by a text, which Python hashes alike on every machine; torch's random state is not touched.
            set(random.Random(f"{self._seed}/{self._draws}/{i}").sample(range(len(stack)), self.config.gamma))
            for i, stack in enumerate(self._stacks(model))
        ]

    def _largest(self, stack: nn.ModuleList) -> set[int]:
        sizes = [sum(p.numel() for p in block.parameters()) for block in stack]
        return set(sorted(range(len(stack)), key=lambda i: -sizes[i])[: self.config.gamma])

    def _stacks(self, model: Any) -> list[nn.ModuleList]:
        """Return the list of blocks, or of an encoder-decoder those of encoder and decoder.

        Raises:
            UsageError: They are not found, or have fewer than gamma blocks.
        """
        stacks = _encoder_and_decoder(model) if model.config.is_encoder_decoder else [_blocks(model)]
        for stack in stacks:
            if self.config.gamma > len(stack):
                raise UsageError(f"method.gamma: the model has {len(stack)} blocks, got {self.config.gamma}; lower it")
        return stacks


class _Draws(base.Callback):
    """Draws every K steps, where steps are left."""

    def __init__(self, method: Method):
        self.method = method

    def stage_begins(self, info: base.StepInfo) -> None:
        """Let blocks rest only now: the optimizer and the engine were built over all of them."""
        self.method.begin(info)

    def after_step(self, info: base.StepInfo) -> None:
        """Draw at multiples of K."""
        interval = max(1, in_steps(self.method.config.interval, info.total_steps))
        if info.step % interval == 0 and info.step < info.total_steps:
            self.method.draw(info)


def _wake(stack: nn.ModuleList, chosen: set[int]) -> None:
    """Let the chosen blocks train, and no others."""
    for i, block in enumerate(stack):
        block.requires_grad_(i in chosen)


def _blocks(model: Any) -> nn.ModuleList:
    from peftctl.models.anatomy import block_list

    return block_list(model)[1]


def _encoder_and_decoder(model: Any) -> list[nn.ModuleList]:
    """Return the blocks of either stack.

    Raises:
        UsageError: A stack is not one list of blocks beside other things.
    """
    from torch import nn

    stacks = []
    for part in (model.get_encoder(), model.get_decoder()):
        lists = [child for child in part.children() if isinstance(child, nn.ModuleList)]
        if len(lists) != 1:
            raise UsageError(
                f"method.name: lisa draws blocks, and a {type(part).__name__} has {len(lists)} lists of them; "
                "take method full"
            )
        stacks += lists
    return stacks

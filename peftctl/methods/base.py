"""The interface of a method: what trains, how it is attached, and what its result is.

A method is one file in this folder: a `Config` (its `method:` section), a `card`, and one class named `Method`.
Files here import no torch at module level, so that recipes can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftctl.recipe.schema import Recipe, Section, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from peftctl.data.encode import EncodedRow
    from peftctl.data.formats import Example
    from peftctl.models.supervised import Supervised

Feature = Literal["4bit", "8bit", "zero2", "zero3", "gradient_checkpointing", "packing", "resume", "new_tokens"]
Gate = Literal["trains", "moved"]


class MethodConfig(Section):
    """Base of every `method:` section."""

    name: str
    """The method: the file's name in `peftctl/methods/`."""


class AdapterConfig(MethodConfig):
    """Base of the sections of methods whose result is an adapter that training can go on from."""

    init_from: str | None = None
    """A finished run or adapter of the same method and shape: training goes on from its weights."""


@dataclass(frozen=True)
class Card:
    """What a reader must know of a method before choosing it; every claim is probed by a test."""

    title: str
    paper: str
    category: Literal["baseline", "prompt", "adapter", "hybrid", "selective", "lora"]
    summary: str
    trains: str
    count: str
    """Closed form of the trainable parameters, in the paper's symbols; `Method.count` computes it."""
    tasks: tuple[str, ...] = ("causal_lm",)
    mergeable: bool = False
    merge_note: str = ""
    identity_at_init: bool = True
    identity_note: str = ""
    disable_note: str = ""
    """Why switching the adapter off does not give back the base; empty where it does, exactly."""
    needs: str = ""
    supports: frozenset[Feature] = frozenset()
    gates_off: frozenset[Gate] = frozenset()
    """Post-conditions that do not apply, e.g. a method that trains nothing."""


@dataclass(frozen=True)
class LoadOptions:
    """What a method asks of the model before it exists; None keeps the recipe's value."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Stage:
    """A stretch of training with a fixed set of optimized tensors.

    Args:
        name: Written to metrics.jsonl.
        steps: Optimizer steps; or a fraction of the run's; or None, for what the recipe says: `epochs` over the rows of
            the stage, or its share of `max_steps`, which is dealt evenly to the stages without steps of their own.
        rows: Chooses from the training rows, at least one; None takes all.
    """

    name: str = "main"
    steps: int | float | None = None
    rows: Callable[[Sequence[EncodedRow]], Sequence[EncodedRow]] | None = None

    def choose(self, rows: Sequence[EncodedRow]) -> Sequence[EncodedRow]:
        """Return the training rows of this stage."""
        return rows if self.rows is None else self.rows(rows)


Batches = Callable[[Stage], "Iterable[Mapping[str, torch.Tensor]]"]
"""Stage -> its training rows, one a batch and on the CPU."""


@dataclass(frozen=True)
class Context:
    """What `apply` may need besides the model."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass
class StepInfo:
    """State of the run that callbacks see. `step` counts finished optimizer steps of the stage.

    Engines may have divided the tensors that train, and their gradients, among processes: look at them inside of
    `with info.whole():` only, where they are whole; changes of the tensors are kept, of gradients not.
    """

    step: int
    total_steps: int
    model: Any
    forget: Callable[[Iterable[Any]], None]
    """Drops the optimizer's state of parameters, which must fill groups of `Method.param_groups`; inside of `whole`."""
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    log: dict[str, float] = field(default_factory=dict)
    """Numbers put here go to the next line of metrics.jsonl."""


class Callback:
    """Schedules of a method; every hook may do nothing. Values and requires_grad may change, not the optimized set.

    The two hooks around the optimizer are left out where the step is, because its gradient is not finite.
    """

    def stage_begins(self, info: StepInfo) -> None:
        """Before the first step of a stage, also after a resume."""

    def before_optimizer(self, info: StepInfo) -> None:
        """Gradients are complete and clipped, weights are still old."""

    def after_optimizer(self, info: StepInfo) -> None:
        """Weights are new, the clipped gradients are still there; `info.step` does not count this step yet."""

    def after_step(self, info: StepInfo) -> None:
        """The step is finished and counted, gradients are gone."""


class Method:
    """One way to fine-tune. Every hook but `apply` has a working default."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    card: ClassVar[Card]
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Dotted recipe path -> value that the method implies where the recipe is silent."""
    unread: ClassVar[frozenset[str]] = frozenset()
    """Dotted recipe paths that this method never reads: setting one is an error."""
    autocast: ClassVar[bool] = False
    """True where float32 copies of base weights train: the forward then runs under autocast in the recipe's dtype."""
    leaves_out: ClassVar[bool] = False
    """True where a step may have no gradient for a tensor that the optimizer owns, which then stays as it is."""
    loss_reads_weights: ClassVar[bool] = False
    """True where `loss` reads tensors that train outside of the forward pass: ZeRO-3 then keeps them whole."""

    whole_batches: ClassVar[bool] = False
    """True where a part of the loss is of a micro-batch as a whole, which then goes through the model at once."""

    def __init__(self, config: Any):
        self.config = config
        self.new_token_ids: Sequence[int] = ()
        """Ids of `model.add_tokens`, known before `count` and `apply`; the model has rows for them by then."""
        self.base_reads_rows = True
        """False where rows hold tokens that only the method's model can read: it is measured before training, then."""

    def load_options(self) -> LoadOptions:
        """Return what the model must be loaded with."""
        return LoadOptions()

    def inputs(self) -> Mapping[str, Sequence[str]]:
        """Return finished adapters of the same base that this run builds on, by the recipe key that names them."""
        return {}

    def prepare_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], recipe: Recipe
    ) -> None:
        """Change the tokenizer or its chat template before rows are encoded, knowing the training rows."""

    def count(self, model: PreTrainedModel) -> int:
        """Return the closed-form number of trainable parameters on this base model, before `apply`."""
        raise NotImplementedError

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return lines on what the configuration selects on this base model, for the user to read before training."""
        return ()

    def apply(self, model: PreTrainedModel, context: Context) -> Any:
        """Inject, patch, initialise or choose what trains; return the model to train (often a PeftModel)."""
        raise NotImplementedError

    def stages(self, recipe: Recipe) -> Sequence[Stage]:
        """Return the stages, the main one last."""
        return (Stage(),)

    def enter(self, model: Any, stage: Stage, batches: Batches) -> None:
        """Prepare the model where a stage begins, before its optimizer is built. Not called where one is resumed."""

    def calibrate(self, model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Look at real rows, one a batch and on the CPU, before the first stage. Not called where a run is resumed."""

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]] | None:
        """Return optimizer groups over every trainable tensor; None takes one group with the recipe's values.

        A group may have an `lr` of its own: every schedule multiplies it.
        """
        return None

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """Return the optimizer of these groups; None takes the recipe's."""
        return None

    def schedule_steps(self, total_steps: int) -> int:
        """Return after how many steps of the stage the recipe's schedule, warm-up included, begins anew."""
        return total_steps

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """Return what the recipe's schedule is multiplied by at a step of the stage, counted from 0."""
        return 1.0

    def callbacks(self, model: Any) -> Sequence[Callback]:
        """Return the schedules of this method."""
        return ()

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the named parts of the loss of one micro-batch.

        `loss` is the *sum* of cross-entropies over supervised tokens; the trainer divides it by the supervised
        tokens of the global batch. Further parts are means; the trainer divides them by the accumulation, adds
        them in training only, and logs each under its name.
        """
        return {"loss": forward(batch).cross_entropy()}

    def fields(self) -> Sequence[str]:
        """Return names of batch fields besides input_ids, attention_mask and labels."""
        return ()

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return what resume needs beyond the tensors that the optimizer owns: masks, frozen factors, scores.

        A method with callbacks reads buffers and values of its own here, no parameters: they may be divided by then.
        """
        return {}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, in a model that `apply` has just made or that has trained further.

        Afterwards the model has the trainable tensors of that moment, by name and shape; their values are loaded next.
        """

    def parts(self, model: Any) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return what later runs can build on besides the artefact, as name -> tensors; asked before `export`.

        The run keeps each as parts/NAME.safetensors.
        """
        return {}

    def export(self, model: Any) -> Any:
        """Return the artefact: a PeftModel (goes to adapter/) or a PreTrainedModel (goes to model/)."""
        return model

    def config_changes(self, model: Any) -> Mapping[str, Any]:
        """Return what the base's configuration must be changed to for the artefact, by key: `rope_parameters`.

        What `export` returned is asked. Loading and merging change the base before the adapter is attached.
        """
        return {}

"""P-tuning v2, Liu et al. 2022 (https://arxiv.org/abs/2110.07602): prefix tuning for understanding, with a task head.

In every layer, n trained keys and values stand before those of the text, as in `prefix_tuning`:

    head(x) = softmax(q [P_k; K]^T / sqrt(d_h)) [P_v; V],   [P_k; P_v] = dropout(E),   E: (n, 2 L h_kv d_h)

The table E is trained directly, N(0, 1) at first, with the head of the classifier, which is new and random; the base is
frozen. The head reads what it reads without a prefix: the state of the real first token for a class of the text, and
one state a token for tags, because a prefix adds keys and values but no position to the output.

With `tasks` and `target` training has two stages, the paper's optional multi-task learning:

    mixture     all of data.sources together: one table for all, and a head for each source
    main        the target's rows alone: the table goes on from there, with the target's head

A step has no gradient for the head of a source that none of its rows is from, which stays as it is, weight decay
included. What is saved is the table and the target's head. All heads start as one random head, and have all classes of
`data.labels`: those of the other sources never occur in a source's rows, and its head learns so. Held-out rows are read
by the target's head.

Where we, or peft, differ from the paper:
- Dropout on the prefix is the authors' (their head's, 0.1 in BERT); peft has none, so ours is around its table.
- On BERT the text begins at position n, as in the authors' code: rows may be n tokens shorter.
- peft's `disable_adapter` fails on an encoder's classifier behind a prefix, and the trained head would stay anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from peftctl.errors import UsageError
from peftctl.methods import _tasks, base
from peftctl.methods._heads import head_parameters
from peftctl.methods._prefix import CHECKPOINTING, IDENTITY_NOTE, MERGE_NOTE, PrefixKeys, PrefixMethod
from peftctl.methods.orthogonal_lora import rows_of
from peftctl.recipe.schema import DataSection, Positive, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised


class Config(PrefixKeys):
    """The `method:` section of P-tuning v2."""

    name: Literal["p_tuning_v2"] = "p_tuning_v2"
    tasks: Positive = 1
    """How many data sets the first stage learns together: as many as `data.sources` has. With 1 there is no such stage,
    and all rows have one head."""
    target: int | str | None = None
    """With tasks: the source that the second stage is on, by its place in `data.sources`, from 0, or its file's name
    without the ending."""

    @model_validator(mode="after")
    def _go_together(self) -> Config:
        if (self.tasks > 1) != (self.target is not None):
            raise ValueError(f"tasks and target go together; got tasks {self.tasks} and target {self.target}")
        return self


class Method(PrefixMethod):
    """A table of keys and values before every layer's own, and the head of the task."""

    config: Config
    Config = Config
    leaves_out = True
    card = base.Card(
        title="P-tuning v2",
        paper="Liu et al. 2022, arXiv 2110.07602",
        category="prompt",
        summary="Prefixes in every layer and a new head: classes of texts and of words at the level of fine-tuning.",
        trains="the prefix and the head, or a head for each source in a first stage; the base is frozen",
        count="n * 2L*kv + head; K heads in the first stage of K tasks",
        tasks=("seq_cls", "token_cls"),
        merge_note=MERGE_NOTE,
        identity_at_init=False,
        identity_note=IDENTITY_NOTE,
        disable_note="peft can't switch off a prefix before an encoder's classifier, and the head is trained with it",
        needs=f"{CHECKPOINTING} Encoders whose attention reads a cache: BERT, RoBERTa, ELECTRA, not DeBERTa.",
        supports=frozenset({"resume", "4bit"}),
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return the prefix and the head, or what trains first: a head for each task."""
        return super().count(model) + (self.config.tasks - 1) * head_parameters(model)

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put a prefix before every layer, and give each task a head where there are several.

        Raises:
            UsageError: The architecture takes no prefix, or tasks, sources and target do not go together.
        """
        from peftctl.tuners.task_heads import divide_heads

        keys, data = self.config, context.recipe.data
        if keys.tasks > 1:
            _tasks.refuse_other_number(keys.tasks, data)
        peft_model = super().apply(model, context)
        if keys.target is not None:
            divide_heads(peft_model, keys.tasks, _place(keys.target, data))
        return peft_model

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return the stage on all sources and that on the target; the latter alone where there is one task."""
        if self.config.target is None:
            return (base.Stage(),)
        rows = partial(rows_of, source=_place(self.config.target, recipe.data))
        return base.Stage("mixture"), base.Stage(rows=rows)

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Leave the target's head alone where its stage begins."""
        from peftctl.tuners.task_heads import heads_of, keep_targets_head

        if stage.name == "main" and heads_of(model):
            keep_targets_head(model)

    def fields(self) -> Sequence[str]:
        """Return the task of each row, where there are several."""
        return ("task_ids",) if self.config.tasks > 1 else ()

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, each row's by the head of its task."""
        from peftctl.tuners.task_heads import rows_of_tasks

        if self.config.tasks == 1:
            return super().loss(model, batch, forward)
        read = {name: value for name, value in batch.items() if name != "task_ids"}
        with rows_of_tasks(model, batch["task_ids"]):
            return super().loss(model, read, forward)

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return whether the heads of all tasks train, or the target's alone."""
        from peftctl.tuners.task_heads import heads_of

        return {"mixture": bool(heads_of(model))}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore which heads there are."""
        from peftctl.tuners.task_heads import heads_of, keep_targets_head

        if heads_of(model) and not state["mixture"]:
            keep_targets_head(model)


def _place(target: int | str, data: DataSection) -> int:
    """Return the place of a source among `data.sources`.

    Raises:
        UsageError: There is no such source.
    """
    names = list(_tasks.names_of_sources(data))
    if target in names:
        return names.index(str(target))
    if isinstance(target, int) and 0 <= target < len(names):
        return target
    shown = ", ".join(names)
    raise UsageError(f"method.target: expected one of {shown}, or a place from 0 to {len(names) - 1}, got {target}")

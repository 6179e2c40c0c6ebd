"""Multitask prompt tuning (MPT): Wang et al. 2023 (https://arxiv.org/abs/2303.02861).

    a row of task k is read as  [P_k; E(x)],   P_k = P * (u_k v_k^T) elementwise
    P: (n, d) shared,   u_k: (n, r), v_k: (r, d) of task k

Every source of `data.sources` is a task, in their order, and their weights say how often each is drawn; rows of all
tasks share batches. With `data.train` alone there is one task. P, u and v train, with a learning rate for P and
another for u and v. Held-out rows of a `data.eval` belong to no source: they are read with the last task's prompt. Rows
that `data.eval_fraction` held out are read with their own task's while it trains (`train.eval_steps`), and before and
after with that of the last.

Each P_k starts as P, whose first values are those of prompt tuning: the first column of u_k and row of v_k are 1, and
of further ranks u_k is drawn from N(0, 0.02^2) and v_k is 0. peft draws all of u and v from N(0, 0.02^2), which makes
prompts that are nearly 0. The result is a plain prompt for each task, multiplied out: the last one's in adapter/, the
others' in adapter/TASK/. A task is called as its source's file, `a` for a.jsonl, or by its number, from 0, where these
do not tell sources apart; `peftctl.load(run, task=...)` takes the number in any case.

Of the paper this is training on the mixture of sources; the prompts of single tasks that it distils from (losses on
logits and hidden states) are not offered yet, and neither is its second run from the mean of the source tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.methods import _prompts, _tasks, base
from peftctl.recipe.schema import Positive, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SPREAD = 0.02
"""Standard deviation of u beyond the first rank: peft's, too."""


class Config(_prompts.InitKeys):
    """The `method:` section of multitask prompt tuning."""

    name: Literal["multitask_prompt_tuning"] = "multitask_prompt_tuning"
    tasks: Positive = 1
    """How many tasks train together: as many as `data.sources` has; 1 where there is one `data.train`."""
    ranks: Positive = 1
    """r: rank of the factor that makes the shared prompt that of a task."""
    task_lr_ratio: Annotated[float, Field(gt=0)] = 4 / 3
    """u and v learn at this multiple of train.learning_rate; the paper has 0.4 beside 0.3."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished prompt is multiplied out; go on from it with method.name: prompt_tuning")
        return value


class Method(base.Method):
    """One prompt for several tasks, multiplied by a factor of low rank for each."""

    config: Config
    Config = Config
    names: Sequence[str] = ()
    """Of the tasks, known once the method is applied."""
    card = base.Card(
        title="Multitask prompt tuning",
        paper="Wang et al. 2023, arXiv 2303.02861",
        category="prompt",
        summary="One prompt trained on several sources at once, times a low-rank factor for each; every task's "
        "prompt is saved; distillation from prompts of single tasks is not offered yet.",
        trains="the shared prompt P, and u and v of every task",
        count="n*d + K*r*(n+d), K tasks",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        supports=_prompts.SUPPORTS,
    )

    def count(self, model: PreTrainedModel) -> int:
        """Return n*d + K*r*(n+d)."""
        n, d = self.config.num_virtual_tokens, _prompts.width(model)
        return n * d + self.config.tasks * self.config.ranks * (n + d)

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return what becomes of several tasks, or that there is only one."""
        if self.config.tasks == 1:
            return ["multitask_prompt_tuning: one task; it shares a prompt between several data.sources"]
        return [
            f"multitask_prompt_tuning: {self.config.tasks} tasks, one a source; adapter/ will hold the prompt of the "
            "last, which held-out rows are measured with before and after training, and its folders the others'"
        ]

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put the prompts before the model.

        Raises:
            UsageError: `tasks` is not the number of sources.
        """
        from peft import MultitaskPromptTuningConfig

        from peftctl.tuners.prompts import TaskPromptsForCausalLM, TaskPromptsForSeq2SeqLM

        keys = self.config
        _tasks.refuse_other_number(keys.tasks, context.recipe.data)
        self.names = _tasks.names_of_sources(context.recipe.data)
        task = context.recipe.model.task
        config = MultitaskPromptTuningConfig(
            **_prompts.peft_keys(model, keys.num_virtual_tokens, task),
            num_tasks=keys.tasks,
            num_ranks=keys.ranks,
            prompt_tuning_init="RANDOM",
        )
        kind = TaskPromptsForSeq2SeqLM if task == "seq2seq_lm" else TaskPromptsForCausalLM
        peft_model = kind(model, config)
        _start_as_shared(peft_model.prompt_encoder["default"])
        _prompts.start_prompt(peft_model, keys, context)
        return peft_model

    def fields(self) -> Sequence[str]:
        """Return the task of each row."""
        return ("task_ids",)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return the shared prompt, and u and v with a learning rate of their own."""
        encoder = model.prompt_encoder["default"]
        own = [encoder.prefix_task_cols, encoder.prefix_task_rows]
        rate = train.learning_rate * self.config.task_lr_ratio
        return [
            {"params": [encoder.embedding.weight], "weight_decay": train.weight_decay},
            {"params": own, "weight_decay": train.weight_decay, "lr": rate},
        ]

    def export(self, model: Any) -> Any:
        """Return the last task's prompt, multiplied out, with those that other tasks have in its place."""
        from peftctl.tuners.task_tensors import set_tasks

        prompts = task_prompts(model)
        plain = _prompts.as_prompt_tuning(model, prompts[-1])
        if len(prompts) > 1:
            place = "prompt_encoder.default.embedding.weight"
            own = {name: {place: prompt} for name, prompt in zip(self.names, prompts, strict=True)}
            set_tasks(plain, self.names[-1], own)
        return plain


def task_prompts(model: Any) -> torch.Tensor:
    """Return the prompt of every task, (tasks, n, d)."""
    encoder = model.prompt_encoder["default"]
    return (encoder.embedding.weight * (encoder.prefix_task_cols @ encoder.prefix_task_rows)).detach()


def _start_as_shared(encoder: Any) -> None:
    """Make every u v^T a matrix of ones, in place."""
    cols, rows = encoder.prefix_task_cols.data, encoder.prefix_task_rows.data
    cols.normal_(std=_SPREAD)
    cols[..., 0] = 1
    rows.zero_()
    rows[:, 0] = 1

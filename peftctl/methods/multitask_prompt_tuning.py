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

With `teachers`, a finished prompt for each task, training on the mixture is distilled from what the same model says
behind prompt T_k of a row's own task:

    L = L_CE + lambda (L_KL + L_MSE),   L_KL = mean KL(p(y | T_k, x) || p(y | P_k, x)),   L_MSE = mean (h_T - h_P)^2

h: (d) is what the head reads. Both means are over the supervised tokens of a row, then over rows, so that batches of
one size add up to a larger one. The teacher reads without dropout. (not verified: lambda 0.9, the learning rates, which
way around the KL is, and which layers' hidden states the paper compares: here the last, where logits are compared)

A second run learns the target: `source_run` names the finished one, whose P it starts from with the mean over tasks of
u and that of v, each by itself, for every task of its own. A run keeps its factors in parts/ for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from peftctl.errors import UsageError
from peftctl.methods import _prompts, _tasks, base
from peftctl.methods._earlier import read_part, read_prompts
from peftctl.recipe.schema import Positive, Rate, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.models.supervised import Supervised

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
    teachers: str | list[str] = Field(default=[])
    """Finished runs with a prompt each, one a task in their order, of this length and base: training is distilled from
    them. A folder of runs stands for all in it, by name."""
    distill_weight: Rate = 0.9
    """lambda: weight of the parts `distill_logits` and `distill_hidden` of the loss, with teachers."""
    source_run: str | None = None
    """A finished run of this method: P, and the mean of u and of v over its tasks, are the first values here."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished prompt is multiplied out; go on from it with method.name: prompt_tuning")
        return value

    @property
    def teacher_runs(self) -> list[str]:
        """The runs of `teachers`."""
        return [self.teachers] if isinstance(self.teachers, str) else self.teachers


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
        "prompt is saved. Can be distilled from prompts of single tasks, and start a target from the mean of sources.",
        trains="the shared prompt P, and u and v of every task",
        count="n*d + K*r*(n+d), K tasks",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        supports=_prompts.SUPPORTS,
    )

    def inputs(self) -> Mapping[str, Sequence[str]]:
        """Return the teachers, and the run to start from."""
        start = self.config.source_run
        return {"method.teachers": self.config.teacher_runs, "method.source_run": [start] if start else []}

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
            UsageError: `tasks` is not the number of sources, or of teachers; or what earlier runs hold does not fit.
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
        encoder = peft_model.prompt_encoder["default"]
        _start_as_shared(encoder)
        if keys.source_run:
            _start_as_sources(encoder, keys.source_run)
        else:
            _prompts.start_prompt(peft_model, keys, context)
        if keys.teacher_runs:
            encoder.register_buffer("teachers", self._teachers(model), persistent=False)
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

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, and with teachers how far the model is from what it says behind their prompts."""
        if not self.config.teacher_runs or not self.config.distill_weight:
            return super().loss(model, batch, forward)
        import torch

        from peftctl.models.supervised import count_supervised
        from peftctl.tuners.distillation import divergence, mean_of_rows, mean_square, states_before_head
        from peftctl.tuners.prompts import teaching

        with states_before_head(model) as states:
            with teaching(model):
                teacher = forward(batch)
            student = forward(batch)
        counts = torch.tensor([count_supervised(model, row[None]) for row in batch["labels"]])
        counts = counts.to(student.logits.device)
        weight = self.config.distill_weight
        return {
            "loss": student.cross_entropy(),
            "distill_logits": weight * mean_of_rows(divergence(teacher.logits, student.logits), counts),
            "distill_hidden": weight * mean_of_rows(mean_square(*states), counts),
        }

    def parts(self, model: Any) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return the factors, from which a target can start."""
        return {"factors": {name: p.detach() for name, p in _factors(model.prompt_encoder["default"]).items()}}

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

    def _teachers(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the teachers' prompts, (tasks, n, d), on the model's device."""
        keys = self.config
        if len(keys.teacher_runs) != keys.tasks:
            raise UsageError(
                f"method.teachers: expected {keys.tasks}, one for each of data.sources, got {len(keys.teacher_runs)}; "
                "correct it, or remove it"
            )
        shape = (keys.num_virtual_tokens, _prompts.width(model))
        return read_prompts(keys.teacher_runs, "method.teachers", shape).to(model.device)


def task_prompts(model: Any) -> torch.Tensor:
    """Return the prompt of every task, (tasks, n, d)."""
    encoder = model.prompt_encoder["default"]
    return (encoder.embedding.weight * (encoder.prefix_task_cols @ encoder.prefix_task_rows)).detach()


def _factors(encoder: Any) -> dict[str, Any]:
    """Return P: (n, d), u: (tasks, n, r) and v: (tasks, r, d)."""
    return {"shared": encoder.embedding.weight, "u": encoder.prefix_task_cols, "v": encoder.prefix_task_rows}


def _start_as_sources(encoder: Any, run: str) -> None:
    """Give an encoder P of a finished run, and every task the mean of the run's u and of its v, in place.

    Raises:
        UsageError: The run has no factors, or some of another shape.
    """
    found, ours = read_part(run, "factors", "method.source_run"), _factors(encoder)
    theirs = {name: found[name] if name == "shared" else found[name].mean(0) for name in ours}
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    expected = {name: tuple(p.shape if name == "shared" else p.shape[1:]) for name, p in ours.items()}
    if shapes != expected:
        raise UsageError(
            f"method.source_run: expected factors of shapes {list(expected.values())}, got {list(shapes.values())} of "
            f"{run}; give its num_virtual_tokens and ranks, and its base"
        )
    for name, value in theirs.items():
        ours[name].data.copy_(value.expand_as(ours[name]))


def _start_as_shared(encoder: Any) -> None:
    """Make every u v^T a matrix of ones, in place."""
    cols, rows = encoder.prefix_task_cols.data, encoder.prefix_task_rows.data
    cols.normal_(std=_SPREAD)
    cols[..., 0] = 1
    rows.zero_()
    rows[:, 0] = 1

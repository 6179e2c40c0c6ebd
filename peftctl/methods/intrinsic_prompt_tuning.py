"""Intrinsic prompt tuning (IPT): Exploring Universal Intrinsic Task Subspace via Prompt Tuning, Qin et al. 2021
(https://arxiv.org/abs/2110.07867).

    z_i = W1 P_i + b1,   decode(z) = W3 tanh(W2 z + b2) + b3,   P^_i = decode(z_i)
    P_i: (n d) prompt of source task i, flat,   z: (d_I),   W1: (d_I, n d),   W2: (hidden, d_I),   W3: (n d, hidden)

Prompts of many tasks lie near a surface of few dimensions. Stages, of which the first is the paper's multi-task
subspace finding and the second its intrinsic subspace tuning:

    subspace    L = L_CE(P^_i, rows of task i) + alpha mean_i (P^_i - P_i)^2;  W1, W2, W3 and their biases train
    intrinsic   L = L_CE(decode(z), rows of the target);  z alone trains, N(0, 0.02^2) at first, the decoder is frozen
    prompt      on request: L = L_CE(P), prompt tuning from P = decode(z)

`prompts` names finished runs, a source task each, in the order of `data.sources`; one more source, the last, is the
target, which the first stage never sees. The decoder is kept in parts/ of the run: another run, on another task, takes
it by `decoder` in the place of prompts, and has the last one or two stages alone. The result is a plain prompt.

Where we differ from the paper:
- mean_i is over all source prompts at every step, not over those of the rows at hand: it is the same in expectation
  where tasks are drawn alike, and does not depend on how a step is cut into batches.
- The authors smooth labels by 0.1: `train.label_smoothing`, here for all stages.
- Their third stage follows an example of theirs; z could go on training with it, and does not.
- The encoder is dropped after the first stage; of the authors' variants 0 to 6 this is type 1.
- Held-out rows of a `data.eval` belong to the target. In the first stage, they are read with what z decodes to.
(not verified: the paper's grid of d_I beyond 3, 5, 10, 50, 100 and 250)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from peftctl.errors import UsageError
from peftctl.methods import _prompts, base
from peftctl.methods._earlier import read_part, read_prompts
from peftctl.methods._groups import by_decay
from peftctl.methods._lengths import Length, in_steps
from peftctl.methods.orthogonal_lora import rows_of
from peftctl.recipe.schema import Positive, Rate, Recipe, TrainSection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from peftctl.data.encode import EncodedRow
    from peftctl.models.supervised import Supervised
    from peftctl.tuners.intrinsic_prompt import IntrinsicPrompt

_SUBSPACE, _INTRINSIC, _PROMPT = "subspace", "intrinsic", "prompt"


class Config(_prompts.PromptKeys):
    """The `method:` section of intrinsic prompt tuning."""

    name: Literal["intrinsic_prompt_tuning"] = "intrinsic_prompt_tuning"
    prompts: str | list[str] = Field(default=[])
    """Finished runs with a prompt each, of one length and base: one a source of `data.sources`, in their order, before
    the target, the last source. A folder of runs stands for all in it, by name."""
    decoder: str | None = None
    """In the place of prompts: a finished run of this method, whose decoder is taken as it is."""
    intrinsic_dim: Positive = 50
    """d_I: numbers that a task trains."""
    hidden: Positive = 768
    """Width of the decoder's middle layer."""
    reconstruction_weight: Rate = 200.0
    """alpha: weight of the part `reconstruction` of the first stage's loss."""
    subspace_learning_rate: Rate = 1e-4
    """Of the first stage; train.learning_rate is that of z."""
    subspace_steps: Length | None = None
    """Optimizer steps, or fraction of the run, of the first stage; left out, train.epochs over the source tasks' rows,
    or an equal share of train.max_steps."""
    prompt_steps: Length = 0
    """Optimizer steps, or fraction of the run, of prompt tuning from what z decodes to, at the end; 0 for none."""
    prompt_learning_rate: Rate | None = None
    """Of that stage; left out, train.learning_rate."""

    @field_validator("init_from")
    @classmethod
    def _starts_anew(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("a finished prompt has no z; go on from it with method.name: prompt_tuning")
        return value

    @model_validator(mode="after")
    def _either(self) -> Config:
        if bool(self.prompts) == bool(self.decoder):
            given = "both" if self.decoder else "neither"
            raise ValueError(f"expected prompts to learn a decoder from, or a finished run's decoder; got {given}")
        return self

    @property
    def runs(self) -> list[str]:
        """The runs of `prompts`."""
        return [self.prompts] if isinstance(self.prompts, str) else self.prompts


class Method(base.Method):
    """A prompt in the coordinates of a surface that prompts of other tasks lie near."""

    config: Config
    Config = Config
    card = base.Card(
        title="Intrinsic prompt tuning",
        paper="Qin et al. 2021, arXiv 2110.07867",
        category="prompt",
        summary="Learns a surface of few dimensions from the prompts of finished runs, then trains a new task's "
        "coordinates on it; what is saved is a plain prompt.",
        trains="an autoencoder of prompts first, then z alone",
        count="d_I*n*d + d_I + d_I*hidden + hidden + hidden*n*d + n*d at first, then d_I; d_I alone with a finished "
        "run's decoder; n*d in the last stage, if any. n*d are kept",
        tasks=_prompts.PROMPT_TASKS,
        merge_note=_prompts.MERGE_NOTE,
        identity_at_init=False,
        identity_note=_prompts.IDENTITY_NOTE,
        needs="Finished prompts of one length, the paper has 100, with the rows that each was trained on; or the run "
        "that has learned the surface.",
        supports=_prompts.SUPPORTS,
    )

    def inputs(self) -> Mapping[str, Sequence[str]]:
        """Return the runs with prompts, or the one with a decoder."""
        if self.config.decoder:
            return {"method.decoder": [self.config.decoder]}
        return {"method.prompts": self.config.runs}

    def count(self, model: PreTrainedModel) -> int:
        """Return the parameters of the autoencoder, which train first; d_I where it is given."""
        if self.config.decoder:
            return self.config.intrinsic_dim
        size = self.config.num_virtual_tokens * _prompts.width(model)
        dim, hidden = self.config.intrinsic_dim, self.config.hidden
        return size * dim + dim + dim * hidden + hidden + hidden * size + size

    def notices(self, model: PreTrainedModel) -> Sequence[str]:
        """Return what trains after the autoencoder."""
        keys, lines = self.config, []
        if not keys.decoder:
            lines.append(
                f"intrinsic_prompt_tuning: first an autoencoder of {len(keys.runs)} prompts trains, then z, "
                f"{keys.intrinsic_dim} numbers"
            )
        if keys.prompt_steps:
            size = keys.num_virtual_tokens * _prompts.width(model)
            lines.append(f"intrinsic_prompt_tuning: at the end the prompt itself trains, {size:,} numbers")
        return lines

    def apply(self, model: PreTrainedModel, context: base.Context) -> Any:
        """Put a decoded prompt before the model, with the autoencoder or a finished run's decoder.

        Raises:
            UsageError: Prompts and sources do not go together, or what earlier runs hold does not fit.
        """
        from peft import PromptTuningConfig

        from peftctl.tuners.intrinsic_prompt import (
            DecodedPromptForCausalLM,
            DecodedPromptForSeq2SeqLM,
            IntrinsicPrompt,
        )

        keys, task = self.config, context.recipe.model.task
        self.stages(context.recipe)  # refuses lengths that do not fit before weights load
        settings = _prompts.peft_keys(model, keys.num_virtual_tokens, task)
        kind = DecodedPromptForSeq2SeqLM if task == "seq2seq_lm" else DecodedPromptForCausalLM
        prompts = None if keys.decoder else self._prompts(model, context)
        with model.device if model.device.type == "meta" else nullcontext():
            shape = (keys.num_virtual_tokens, _prompts.width(model))
            encoder = IntrinsicPrompt(shape, keys.intrinsic_dim, keys.hidden, prompts)
        if keys.decoder:
            _take_decoder(encoder, keys.decoder)
        peft_model = kind(model, PromptTuningConfig(**settings, prompt_tuning_init="RANDOM"))
        peft_model.prompt_encoder["default"] = encoder.to(model.device)
        return peft_model

    def stages(self, recipe: Recipe) -> Sequence[base.Stage]:
        """Return the stages that the section asks for.

        Raises:
            UsageError: `max_steps` has no step for one.
        """
        keys, whole = self.config, recipe.train.max_steps
        lengths: dict[str, int | float | None] = {} if keys.decoder else {_SUBSPACE: keys.subspace_steps}
        lengths |= {_INTRINSIC: None} | ({_PROMPT: keys.prompt_steps} if keys.prompt_steps else {})
        if whole is not None:
            lengths = dict(_dealt(lengths, whole))
        return [base.Stage(name, steps, self._rows(name)) for name, steps in lengths.items()]

    def enter(self, model: Any, stage: base.Stage, batches: base.Batches) -> None:
        """Freeze what has trained, and begin with what is next."""
        _encoder(model).go_on(stage.name)

    def fields(self) -> Sequence[str]:
        """Return the task of each row."""
        return ("task_ids",)

    def param_groups(self, model: Any, train: TrainSection) -> list[dict[str, Any]]:
        """Return what trains at this stage, with the stage's learning rate."""
        keys = self.config
        rates = {_SUBSPACE: keys.subspace_learning_rate, _INTRINSIC: train.learning_rate}
        rates[_PROMPT] = train.learning_rate if keys.prompt_learning_rate is None else keys.prompt_learning_rate
        trainable = [p for p in model.parameters() if p.requires_grad]
        return by_decay(trainable, train, lr=rates[_encoder(model).stage])

    def loss(
        self, model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
    ) -> dict[str, torch.Tensor]:
        """Return the cross-entropy, and in the first stage how far the autoencoder is from the prompts."""
        parts = super().loss(model, batch, forward)
        encoder = _encoder(model)
        if encoder.stage == _SUBSPACE and self.config.reconstruction_weight:
            parts["reconstruction"] = self.config.reconstruction_weight * encoder.take_error()
        return parts

    def state_dict(self, model: Any) -> dict[str, Any]:
        """Return the stage, and what is frozen in it: the decoder, z."""
        encoder = _encoder(model)
        return {"stage": encoder.stage, "frozen": encoder.frozen()}

    def load_state_dict(self, model: Any, state: Mapping[str, Any]) -> None:
        """Restore the stage and what is frozen in it."""
        encoder = _encoder(model)
        encoder.go_on(state["stage"])
        for name, value in state["frozen"].items():
            encoder.get_parameter(name).data.copy_(value)

    def parts(self, model: Any) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return the decoder, where this run has learned it."""
        return {} if self.config.decoder else {"decoder": _encoder(model).decoder.state_dict()}

    def export(self, model: Any) -> Any:
        """Return the prompt as the model reads it, a plain one."""
        return _prompts.as_prompt_tuning(model, _encoder(model)(1, None)[0])

    def _prompts(self, model: PreTrainedModel, context: base.Context) -> torch.Tensor:
        """Return the source tasks' prompts, (tasks, n, d), on the model's device."""
        runs, sources = self.config.runs, len(context.recipe.data.sources or ())
        if sources != len(runs) + 1:
            raise UsageError(
                f"data.sources: expected {len(runs) + 1}, one for each of method.prompts and the target last, got "
                f"{sources}; correct one of them"
            )
        shape = (self.config.num_virtual_tokens, _prompts.width(model))
        return read_prompts(runs, "method.prompts", shape).to(model.device)

    def _rows(self, stage: str) -> Callable[[Sequence[EncodedRow]], Sequence[EncodedRow]] | None:
        """Return what chooses a stage's rows: those of all source tasks, or of the target."""
        if self.config.decoder:
            return None
        target = len(self.config.runs)
        tasks = range(target) if stage == _SUBSPACE else [target]
        return lambda rows: [row for task in tasks for row in rows_of(rows, task)]


def _encoder(model: Any) -> IntrinsicPrompt:
    return model.prompt_encoder["default"]


def _dealt(lengths: Mapping[str, int | float | None], whole: int) -> Mapping[str, int]:
    """Return the optimizer steps of every stage; those without a length share what the others leave.

    Raises:
        UsageError: There is not a step for each.
    """
    steps = {name: max(1, in_steps(length, whole)) for name, length in lengths.items() if length is not None}
    free = [name for name in lengths if name not in steps]
    rest = whole - sum(steps.values())
    if rest < len(free):
        raise UsageError(
            f"train.max_steps: expected at least {whole - rest + len(free)}, a step for every stage, got {whole}; "
            "raise it, or shorten method.subspace_steps or method.prompt_steps"
        )
    share, more = divmod(rest, len(free))
    steps |= {name: share + (i < more) for i, name in enumerate(free)}
    return {name: steps[name] for name in lengths}


def _take_decoder(encoder: IntrinsicPrompt, run: str) -> None:
    """Give an encoder the decoder of a finished run, in place.

    Raises:
        UsageError: The run has none, or one of other dimensions.
    """
    found = read_part(run, "decoder", "method.decoder")
    theirs = {name: tuple(value.shape) for name, value in found.items()}
    ours = {name: tuple(p.shape) for name, p in encoder.decoder.named_parameters()}
    if theirs != ours:
        raise UsageError(
            f"method.decoder: expected a decoder of shapes {list(ours.values())}, got {list(theirs.values())} of "
            f"{run}; give its num_virtual_tokens, intrinsic_dim and hidden, and its base"
        )
    if encoder.z.device.type != "meta":
        encoder.decoder.load_state_dict(found)

"""The typed recipe: every key, its type, its unit and its default. Imports no torch.

The `method` section is not here: its schema belongs to the method (`methods/NAME.py`) and is passed in.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny

Task = Literal["causal_lm", "seq2seq_lm", "seq_cls", "token_cls"]
CLASSIFICATION = ("seq_cls", "token_cls")
"""Tasks that name classes; a pretrained checkpoint does not hold their head."""
DType = Literal["float32", "bfloat16", "float16"]
Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "labelled_text", "tokens_tags"]
Metric = Literal[
    "loss",
    "perplexity",
    "token_accuracy",
    "exact_match",
    "rouge_l",
    "contains",
    "regex",
    "accuracy",
    "macro_f1",
    "entity_f1",
]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"]
Scheduler = Literal["constant", "linear", "cosine", "constant_with_warmup"]

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, nothing is coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """The base model."""

    name_or_path: str
    """Hub id, local directory, .gguf file, or the alias of an embedded demo model."""
    task: Task = "causal_lm"
    """What the model does; decides its head and the data formats that fit."""
    dtype: DType | Literal["auto"] = "bfloat16"
    """Type of the frozen weights and of the computation; what trains is kept in float32. `auto` is bfloat16 where the
    hardware multiplies it, else float32; the resolved recipe says which."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; left out, peftctl chooses by device and row length."""
    adapters: list[str] = []
    """Finished runs or adapters of this model, merged into it, in this order, before the method is attached."""
    add_tokens: list[str] = []
    """New tokens, each then one id; their embedding rows train and are saved with the adapter."""


class QuantizationSection(Section):
    """How the frozen base weights are stored."""

    bits: Literal[4, 8] | None = None
    """Bits a weight; left out, weights keep `model.dtype`."""
    type: Literal["nf4", "fp4", "int8"] | None = None
    """Number format: nf4 or fp4 for 4 bits, int8 for 8; left out, nf4 or int8."""
    double_quant: bool | None = None
    """Quantise the scales of 4-bit blocks too; left out, true for 4 bits."""
    compute_dtype: DType | None = None
    """Type that 4-bit weights are multiplied in; left out, `model.dtype`."""


class Source(Section):
    """One of several sources of training rows."""

    path: str | list[str]
    """File(s), glob, directory or hub id."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an epoch sees each of its rows: 2 twice; 0.25 a quarter of them, drawn by the seed, the same ones in
    every epoch."""
    format: Format | None = None
    """How its rows are laid out; left out, `data.format`."""
    columns: dict[str, str] | None = None
    """Our field name -> the name in its files; left out, `data.columns`."""


class DataSection(Section):
    """Rows, their format, and what of them is trained on."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["train"]}, {"required": ["sources"]}]})

    train: str | list[str] | None = None
    """File(s), glob, directory or hub id: json, jsonl, csv, parquet, arrow, txt. This or `sources` is required."""
    sources: list[Source] | None = None
    """Several sources with weights, e.g. [{path: new.jsonl}, {path: old.jsonl, weight: 0.25}]."""
    eval: str | list[str] | None = None
    """Held-out rows, in the same format."""
    eval_fraction: OpenShare | None = None
    """Share of the training rows to hold out where there is no `eval`."""
    format: Format = "messages"
    """How a row is laid out."""
    columns: dict[str, str] = {}
    """Our field name -> the name in your file, e.g. {prompt: input, completion: target}."""
    template: str = "chat"
    """`chat` (the tokenizer's own), `alpaca`, or a "{...}" string over the row's fields."""
    max_length: Positive = 1024
    """Tokens a row; longer rows are cut at the end."""
    labels: list[str | int] | None = None
    """Classes of seq_cls and token_cls, by number; left out, those of the training rows in sorted order. Whole numbers
    in rows count into it, from 0, where it has names."""
    loss_on: Literal["completion", "last_turn", "all"] = "completion"
    """`completion` (every assistant turn), `last_turn`, or `all` tokens."""
    packing: bool = False
    """Several rows in one sequence, without attention between them."""
    pad_to_multiple_of: Positive | None = None
    """Pad batches to a multiple of this many tokens."""
    max_dropped: Share = 0.05
    """Share of rows without a supervised token (they are dropped) above which the run is refused."""


class TrainSection(Section):
    """The optimisation loop."""

    output_dir: str
    """The run directory."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: Positive | None = None
    """Optimizer steps; where given, wins over `epochs`."""
    batch_size: Positive = 8
    """Rows a process and micro-step."""
    gradient_accumulation: Positive = 1
    """Micro-steps an optimizer step."""
    tokens_per_pass: Positive | None = None
    """Tokens, padding included, that go through the model at once: a micro-batch of more takes several passes, with the
    same gradient and less memory. Left out, 1024 on CPUs and whole micro-batches on GPUs."""
    learning_rate: Rate = 2e-4
    """Peak learning rate."""
    scheduler: Scheduler = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Share | None = None
    """Share of the optimizer steps over which the learning rate rises from 0."""
    warmup_steps: Count | None = None
    """The same in optimizer steps."""
    weight_decay: Rate = 0.0
    """Decay of matrices, not of vectors: decoupled from the gradient, but for sgd, which adds it to the gradient."""
    optimizer: Optimizer = "adamw"
    """Optimizer of the trainable tensors."""
    max_grad_norm: Rate = 1.0
    """Clip the global gradient norm to this; 0 never clips."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds data order, initialisation and dropout."""
    logging_steps: Positive = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_steps: Positive | None = None
    """Optimizer steps between two held-out losses; left out, only before and after."""
    save_steps: Positive | None = None
    """Optimizer steps between two checkpoints; left out, once an epoch."""
    save_total_limit: Positive = 2
    """Checkpoints that are kept; those that `load_best` needs come on top."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    tf32: bool = True
    """Multiply float32 matrices in TF32 where the GPU has it: faster, with a mantissa of 10 bits."""
    report_to: list[Literal["tensorboard", "wandb"]] = []
    """Trackers that get the metrics too."""
    neftune_noise: Rate = 0.0
    """NEFTune's alpha: uniform noise of size alpha / sqrt(seq * d), seq being the row's own length, on the input
    embeddings, in training only."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the vocabulary, in training only."""
    load_best: bool = False
    """Give back the weights of the checkpoint with the lowest held-out loss instead of the last ones."""
    early_stopping: Positive | None = None
    """End after so many held-out losses (see `eval_steps`) in a row without a new lowest one."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not finite: end the run after a checkpoint, or leave the step out."""


class BackendSection(Section):
    """What the processes of a run share, as many as the launcher starts."""

    name: Literal["single", "deepspeed", "fsdp"] = "single"
    """`single`: each process holds everything, and gradients are averaged (DDP); `deepspeed` divides by `config`;
    `fsdp` divides weights, gradients and optimizer among the processes (PyTorch's FSDP2)."""
    config: str | None = None
    """A DeepSpeed configuration, e.g. configs/deepspeed/zero2.json."""


class EvalSection(Section):
    """What `peftctl eval`, and `train` before and after, measure on the held-out rows."""

    metrics: list[Metric] | None = None
    """Metrics; exact_match, rouge_l, contains and regex generate answers. Left out: loss, perplexity and
    token_accuracy; for seq_cls loss, accuracy and macro_f1; for token_cls loss, accuracy, and entity_f1 where the
    labels are BIO tags, else macro_f1."""
    max_new_tokens: Positive = 256
    """Tokens a generated answer may have."""
    batch_size: Positive = 8
    """Rows a batch."""
    rows: Positive | None = None
    """Only the first so many held-out rows for metrics by generation; loss always takes all."""
    pattern: str | None = None
    """What `contains` and `regex` look for; left out, `contains` looks for the reference answer."""


class Recipe(Section):
    """One run: model, method, data and training."""

    model: ModelSection
    quantization: QuantizationSection = QuantizationSection()
    method: SerializeAsAny[Any]
    data: DataSection
    train: TrainSection
    backend: BackendSection = BackendSection()
    eval: EvalSection = EvalSection()


# Keys of other tools, and of the recipe language's design, for what is done without being asked for: refused by name.
NOT_NEEDED = {
    "data.streaming": "rows of large files are encoded part by part to a table on disk and read from there",
    "train.max_tokens_per_batch": "train.tokens_per_pass bounds what is in memory without changing the rows of a step",
}

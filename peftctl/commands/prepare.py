"""What train, check and dry runs share: everything that can be known before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from peftctl.backends import processes
from peftctl.backends.device import current_device, fast_dtype, usable_cores
from peftctl.commands.earlier import base_tokenizer, earlier_adapters, refuse_unfit_inputs, refuse_unfit_start
from peftctl.data.classes import with_labels
from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all, overlap, training_rows
from peftctl.data.encode import EncodedRow
from peftctl.data.examples import Examples, load_examples
from peftctl.data.formats import Example
from peftctl.data.supervision import SupervisionReport
from peftctl.errors import UsageError
from peftctl.evaluation.metrics import metric_names
from peftctl.methods import _matrix, registry
from peftctl.methods.base import Card, Context, Method
from peftctl.models.aliases import cache_root
from peftctl.models.classifier import Head
from peftctl.models.load import meta_model
from peftctl.models.quantize import refuse_without_library
from peftctl.models.vocabulary import add_tokens, fit_vocabulary
from peftctl.recipe.schema import CLASSIFICATION, ModelSection, Recipe
from peftctl.training.precision import autocast_type
from peftctl.training.sharing import Sharing, read_sharing


@dataclass(frozen=True)
class Prepared:
    """A recipe whose data are encoded and whose method fits the model's shapes.

    Args:
        recipe: The resolved recipe.
        method: Configured, not yet applied.
        tokenizer: With the method's changes.
        train_rows: Encoded rows that are trained on.
        eval_rows: Held-out rows; may be empty.
        eval_examples: The held-out rows before encoding, for generation.
        train_report: Supervision of the training rows.
        eval_report: Supervision of the held-out rows, if any.
        data_fingerprint: Changes with any token or label of the training rows.
        trainable: Trainable parameters, by the method's closed form.
        total: Parameters of the base.
        applied: The model with the method applied, on the meta device.
        divided: Whether each process is to hold only a part of the model.
        notices: What the method's configuration selects, where the recipe alone does not tell, and what this machine
            does otherwise.
    """

    recipe: Recipe
    method: Method
    tokenizer: Any
    train_rows: Sequence[EncodedRow]
    eval_rows: Sequence[EncodedRow]
    eval_examples: Sequence[Example]
    train_report: SupervisionReport
    eval_report: SupervisionReport | None
    data_fingerprint: str
    trainable: int
    total: int
    applied: Any
    divided: bool
    notices: Sequence[str]


def prepare(
    recipe: Recipe, *, allow_stand_in: bool = False, device: str | None = None, world_size: int | None = None
) -> Prepared:
    """Check the method against the model's shapes, then read and encode the data.

    Args:
        recipe: The recipe.
        allow_stand_in: Plan with shipped shapes, and another tokenizer, where the model can't be had here.
        device: Kind of the device that is planned for; left out, this machine's.
        world_size: How many processes are planned for; left out, those of this run.

    Raises:
        UsageError: The method does not fit the task, the model, the training options or the engine.
        DataError: Rows are wrong, or too many have nothing to train on.
    """
    recipe = with_concrete_dtype(recipe)
    method = registry.get(recipe.method.name)(recipe.method)
    refuse_unsupported(recipe, method)
    sharing = read_sharing(
        recipe, world_size or processes.size(), offloads=False, autocast=autocast_type(recipe, method)
    )
    refuse_unproven(recipe, sharing)
    earlier_adapters(recipe)
    refuse_unfit_inputs(recipe, method)
    examples = None
    if recipe.model.task in CLASSIFICATION:  # the head has as many rows as the data have labels
        examples = load_examples(recipe.data, recipe.train.seed)
        recipe = with_classes(recipe, examples)
    tokenizer = base_tokenizer(recipe, allow_stand_in=allow_stand_in) if examples else None
    model = meta_model(as_trained(recipe, method), allow_stand_in=allow_stand_in, head=head_of(recipe, tokenizer))
    refuse_float16(recipe, method.card, device or current_device().type)
    tokenizer = tokenizer or base_tokenizer(recipe, allow_stand_in=allow_stand_in)
    method.new_token_ids = add_tokens(tokenizer, recipe.model.add_tokens)
    fit_rows(model, recipe, tokenizer)
    notices = [*method.notices(model), *_optimizer_notices(recipe, device or current_device().type)]
    total = sum(p.numel() for p in model.parameters())
    trainable, applied = attach_to_shapes(recipe, method, model)
    examples = examples or load_examples(recipe.data, recipe.train.seed)
    method.prepare_tokenizer(tokenizer, examples.distinct, recipe)
    cache = cache_root()
    task, workers = recipe.model.task, usable_cores()
    train_rows, train_report, data_fingerprint = training_rows(
        examples, tokenizer, recipe.data, cache, task, recipe.train.seed, workers
    )
    eval_rows: list[EncodedRow] = []
    eval_report = None
    if examples.eval:
        eval_rows, eval_report = encode_all(examples.eval, tokenizer, recipe.data, cache, task, workers)
        refuse_leak(train_rows, eval_rows)
    return Prepared(
        recipe=recipe,
        method=method,
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_rows=eval_rows,
        eval_examples=examples.eval,
        train_report=train_report,
        eval_report=eval_report,
        data_fingerprint=data_fingerprint,
        trainable=trainable,
        total=total,
        applied=applied,
        divided=sharing.stage == 3,
        notices=notices,
    )


def with_concrete_dtype(recipe: Recipe) -> Recipe:
    """Return the recipe with `model.dtype: auto` replaced by what this machine is fast in."""
    if recipe.model.dtype != "auto":
        return recipe
    model = recipe.model.model_copy(update={"dtype": fast_dtype()})
    return recipe.model_copy(update={"model": model})


def with_classes(recipe: Recipe, examples: Examples) -> Recipe:
    """Return the recipe of a classifier with the labels that its data have.

    Raises:
        DataError: There is only one label, or a row has another than `data.labels` names.
        UsageError: A metric does not fit the labels.
    """
    recipe = recipe.model_copy(update={"data": with_labels(recipe.data, examples.train, examples.eval)})
    metric_names(recipe.eval, recipe.model.task, recipe.data.labels or ())
    return recipe


def head_of(recipe: Recipe, tokenizer: Any) -> Head | None:
    """Return what the head of a recipe's classifier is made for; None for a language model."""
    if recipe.model.task not in CLASSIFICATION or recipe.data.labels is None:
        return None
    pad = None if tokenizer is None else Collator(tokenizer).pad_id
    return Head([str(label) for label in recipe.data.labels], pad)


def fit_rows(model: Any, recipe: Recipe, tokenizer: Any) -> None:
    """Give a base model rows for tokens that this recipe, or an adapter that it merges, has added."""
    if recipe.model.add_tokens or recipe.model.adapters:
        fit_vocabulary(model, len(tokenizer))


def shapes(recipe: Recipe, method: Method, model: Any = None) -> tuple[int, int]:
    """Apply the method to a model without weights; return (trainable, base) parameter counts.

    Args:
        recipe: The recipe.
        method: Its method.
        model: The base on the meta device, with rows for new tokens; left out, it is built from the recipe.

    Raises:
        UsageError: Targets match nothing, or the method does not know the architecture.
    """
    model = meta_model(recipe.model) if model is None else model
    total = sum(p.numel() for p in model.parameters())
    return attach_to_shapes(recipe, method, model)[0], total


def attach_to_shapes(recipe: Recipe, method: Method, base: Any) -> tuple[int, Any]:
    """Apply the method to a base on the meta device; return (trainable parameters by its closed form, the model).

    Raises:
        UsageError: Targets match nothing, or the method does not know the architecture.
    """
    trainable = method.count(base)
    model = method.apply(base, Context(recipe))
    refuse_unfit_start(recipe, model)
    return trainable, model


def as_trained(recipe: Recipe, method: Method) -> ModelSection:
    """Return the recipe's model in the type that its weights have in training."""
    dtype = method.load_options().dtype or recipe.model.dtype
    return recipe.model.model_copy(update={"dtype": dtype})


def refuse_unsupported(recipe: Recipe, method: Method) -> None:
    """Raise where the method's card does not claim what the recipe asks for."""
    name, card = recipe.method.name, method.card
    if recipe.model.task not in card.tasks:
        raise UsageError(f"model.task: {name} does not do {recipe.model.task}; it does: {', '.join(card.tasks)}")
    if recipe.train.gradient_checkpointing and "gradient_checkpointing" not in card.supports:
        raise UsageError(f"train.gradient_checkpointing: {name} does not support it; remove it")
    refuse_quantization(recipe, card)
    if recipe.model.add_tokens and "new_tokens" not in card.supports:
        raise UsageError(
            f"model.add_tokens: {name} does not train the rows of new tokens; take lora or full, or remove it"
        )
    optimizer = recipe.train.optimizer
    if optimizer.endswith("bit") and find_spec("bitsandbytes") is None:
        raise UsageError(
            f"train.optimizer: {optimizer} needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or set it to adamw"
        )
    for tracker in recipe.train.report_to:  # each is the name of its package
        if find_spec(tracker) is None:
            raise UsageError(f"train.report_to: {tracker} is not installed; pip install 'peftctl[{tracker}]'")


def refuse_float16(recipe: Recipe, card: Card, device: str) -> None:
    """Raise where small gradients would vanish: the loss must be scaled in float16, which a CPU has no scaler for."""
    if recipe.model.dtype == "float16" and device == "cpu" and "trains" not in card.gates_off:
        raise UsageError("model.dtype: float16 trains on GPUs only; take bfloat16, float32 or auto")


def refuse_unproven(recipe: Recipe, sharing: Sharing) -> None:
    """Raise where trying the method through the engine that the recipe asks for has failed."""
    engine = sharing.engine
    bits = recipe.quantization.bits
    storage = {4: "nf4", 8: "int8"}[bits] if bits else ("float32" if recipe.model.dtype == "float32" else "bfloat16")
    why = _matrix.refusal(recipe.method.name, storage, engine)
    if why:
        raise UsageError(
            f"backend: {recipe.method.name} does not work through {_matrix.ENGINES[engine]} on a {storage} base: "
            f"{why}; see `peftctl methods --matrix` for what does"
        )


def _optimizer_notices(recipe: Recipe, device: str) -> list[str]:
    paged = recipe.train.optimizer.startswith("paged") and device == "cpu"
    return ["paged optimizers run unpaged on a CPU"] if paged else []


def refuse_quantization(recipe: Recipe, card: Card) -> None:
    """Raise where the method can't train over a quantised base, or nothing here can quantise one."""
    bits = recipe.quantization.bits
    if bits is None:
        return
    if f"{bits}bit" not in card.supports:
        raise UsageError(
            f"quantization.bits: {recipe.method.name} can't train over a base of {bits} bits; "
            "remove `quantization:`, or take a method that can, e.g. qlora"
        )
    refuse_without_library()
    if current_device().type == "mps":
        raise UsageError("quantization.bits: bitsandbytes has no kernels for Apple's GPUs; remove it")


def refuse_leak(train_rows: Sequence[EncodedRow], eval_rows: Sequence[EncodedRow]) -> None:
    """Raise where the held-out rows are the training rows again."""
    shared = overlap(train_rows, eval_rows)
    if shared == len(eval_rows):
        raise UsageError("data.eval: every held-out row is also a training row; hold out other rows")

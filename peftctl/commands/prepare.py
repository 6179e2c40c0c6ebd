"""What train, check and dry runs share: everything that can be known before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from peftctl.backends.device import fast_dtype
from peftctl.data.dataset import encode_all, fingerprint, load_examples, overlap
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.data.supervision import SupervisionReport
from peftctl.errors import UsageError
from peftctl.methods import registry
from peftctl.methods.base import Context, Method
from peftctl.models.aliases import cache_root
from peftctl.models.load import load_tokenizer, meta_model
from peftctl.recipe.schema import Recipe


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


def prepare(recipe: Recipe) -> Prepared:
    """Check the method against the model's shapes, then read and encode the data.

    Raises:
        UsageError: The method does not fit the task, the model or the training options.
        DataError: Rows are wrong, or too many have nothing to train on.
    """
    recipe = with_concrete_dtype(recipe)
    method = registry.get(recipe.method.name)(recipe.method)
    refuse_unsupported(recipe, method)
    trainable, total = shapes(recipe, method)
    tokenizer = load_tokenizer(recipe.model)
    examples = load_examples(recipe.data, recipe.train.seed)
    method.prepare_tokenizer(tokenizer, examples.train, recipe)
    cache = cache_root()
    train_rows, train_report = encode_all(examples.train, tokenizer, recipe.data, cache=cache)
    eval_rows: list[EncodedRow] = []
    eval_report = None
    if examples.eval:
        eval_rows, eval_report = encode_all(examples.eval, tokenizer, recipe.data, cache=cache)
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
        data_fingerprint=fingerprint(train_rows),
        trainable=trainable,
        total=total,
    )


def with_concrete_dtype(recipe: Recipe) -> Recipe:
    """Return the recipe with `model.dtype: auto` replaced by what this machine is fast in."""
    if recipe.model.dtype != "auto":
        return recipe
    model = recipe.model.model_copy(update={"dtype": fast_dtype()})
    return recipe.model_copy(update={"model": model})


def shapes(recipe: Recipe, method: Method) -> tuple[int, int]:
    """Apply the method to a model without weights; return (trainable, base) parameter counts.

    Raises:
        UsageError: Targets match nothing, or the method does not know the architecture.
    """
    model = meta_model(recipe.model)
    total = sum(p.numel() for p in model.parameters())
    expected = method.count(model)
    method.apply(model, Context(recipe))
    return expected, total


def refuse_unsupported(recipe: Recipe, method: Method) -> None:
    """Raise where the method's card does not claim what the recipe asks for."""
    name, card = recipe.method.name, method.card
    if recipe.model.task not in card.tasks:
        raise UsageError(f"model.task: {name} does not do {recipe.model.task}; it does: {', '.join(card.tasks)}")
    if recipe.train.gradient_checkpointing and "gradient_checkpointing" not in card.supports:
        raise UsageError(f"train.gradient_checkpointing: {name} does not support it; remove it")
    for tracker in recipe.train.report_to:  # each is the name of its package
        if find_spec(tracker) is None:
            raise UsageError(f"train.report_to: {tracker} is not installed; pip install 'peftctl[{tracker}]'")


def refuse_leak(train_rows: Sequence[EncodedRow], eval_rows: Sequence[EncodedRow]) -> None:
    """Raise where the held-out rows are the training rows again."""
    shared = overlap(train_rows, eval_rows)
    if shared == len(eval_rows):
        raise UsageError("data.eval: every held-out row is also a training row; hold out other rows")

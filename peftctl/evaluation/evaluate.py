"""Everything that `eval.metrics` asks of a model, on held-out rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.data.prompts import generation_prompts
from peftctl.errors import UsageError
from peftctl.evaluation.classes import classify
from peftctl.evaluation.generation import generate, prompts_of, refuse_overlong
from peftctl.evaluation.loss import held_out_loss
from peftctl.evaluation.metrics import METRICS, metric_names
from peftctl.models.classifier import classification_task, labels_of
from peftctl.recipe.schema import DataSection, EvalSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalResult:
    """What was measured.

    Args:
        metrics: Name -> value, as `eval.metrics` asks, in its order.
        samples: Of each generated answer: prompt, reference, prediction and where, its row; of a classifier text in
            place of prompt.
    """

    metrics: dict[str, float]
    samples: list[dict[str, str]]


def evaluate_rows(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    encoded_rows: Sequence[EncodedRow],
    data: DataSection,
    eval_section: EvalSection,
    collate: Callable[[Sequence[EncodedRow]], Mapping[str, torch.Tensor]],
) -> EvalResult:
    """Measure what `eval.metrics` names; answers are generated once for all metrics that need them.

    Args:
        model: A causal language model, an encoder-decoder or a classifier.
        tokenizer: Its tokenizer.
        examples: Held-out rows before encoding; `eval.rows` limits how many are answered.
        encoded_rows: The same rows encoded, for loss, perplexity and token accuracy: always all.
        data: How prompts are rendered.
        eval_section: What to measure.
        collate: Pads rows to a batch.

    Raises:
        UsageError: `eval.pattern` is missing or no regular expression, or rows have no answers or no room for one.
    """
    if task := classification_task(model):
        wanted = metric_names(eval_section, task, labels_of(model))
        return _classes(model, wanted, examples[: eval_section.rows], encoded_rows, eval_section, collate)
    wanted = metric_names(eval_section, "causal_lm")
    generated = [name for name in wanted if name in METRICS]
    _check_pattern(wanted, eval_section)
    values: dict[str, float] = {}
    samples: list[dict[str, str]] = []
    if len(generated) < len(wanted):
        values |= held_out_loss(model, encoded_rows, collate, eval_section.batch_size)
    if generated:
        samples = _answers(model, tokenizer, examples[: eval_section.rows], data, eval_section, generated)
        values |= {name: _mean(name, samples, eval_section.pattern) for name in generated}
    return EvalResult({name: values[name] for name in wanted}, samples)


def _classes(
    model: Any,
    wanted: Sequence[str],
    examples: Sequence[Example],
    rows: Sequence[EncodedRow],
    section: EvalSection,
    collate: Callable[[Sequence[EncodedRow]], Mapping[str, torch.Tensor]],
) -> EvalResult:
    found = classify(model, rows, collate, section.batch_size)
    if unknown := [name for name in wanted if name not in found.metrics]:
        raise UsageError(f"eval.metrics: a classifier has no {', '.join(unknown)}; take {', '.join(found.metrics)}")
    texts = {example.where: example.text or " ".join(example.tokens or ()) for example in examples}
    samples = [
        {"where": row.where, "text": texts[row.where], "reference": " ".join(true), "prediction": " ".join(guess)}
        for row, true, guess in zip(rows, found.expected, found.predicted, strict=True)
        if row.where in texts
    ]
    return EvalResult({name: found.metrics[name] for name in wanted}, samples)


def _check_pattern(wanted: Sequence[str], section: EvalSection) -> None:
    if "regex" not in wanted:
        return
    if section.pattern is None:
        raise UsageError("eval.pattern: missing; eval.metrics has regex, so give the regular expression")
    try:
        re.compile(section.pattern)
    except re.error as error:
        raise UsageError(f"eval.pattern: {section.pattern!r} is no regular expression: {error}; correct it") from error


def _answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    data: DataSection,
    section: EvalSection,
    metrics: Sequence[str],
) -> list[dict[str, str]]:
    task = prompts_of(model)
    prompts: list[list[int]] = []
    samples: list[dict[str, str]] = []
    for example in examples:
        for prompt, reference in generation_prompts([example], tokenizer, data, task):
            refuse_overlong(model, len(prompt), f"{example.where}: the prompt")
            prompts.append(prompt)
            text = str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))
            samples.append({"where": example.where, "prompt": text, "reference": reference})
    if not prompts:
        raise UsageError(f"eval.metrics: no held-out row has an answer to generate; remove {', '.join(metrics)}")
    answers = generate(model, tokenizer, prompts, max_new_tokens=section.max_new_tokens, batch_size=section.batch_size)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [sample | {"prediction": text} for sample, text in zip(samples, texts, strict=True)]


def _mean(name: str, samples: Sequence[Mapping[str, str]], pattern: str | None) -> float:
    """Return a metric's mean; `regex`, and `contains` where a pattern is given, look for that instead of the answer."""
    own = pattern if name in ("regex", "contains") else None
    return fmean(METRICS[name](sample["prediction"], own or sample["reference"]) for sample in samples)

"""Losses over wrong answers (T-Few, Liu et al. 2022, section 3.2), beside the cross-entropy of the right one.

    L_UL = mean over rows of  -1/sum_n T_n  sum_n sum_t log(1 - p(y_nt | x, y_n,<t)),     n over the wrong answers
    L_LN = mean over rows of  -log(exp b_0 / sum_n exp b_n),   b_n = 1/T_n sum_t log p(y_nt | x, y_n,<t),  b_0: right

T_n are the trained-on tokens of answer n, its end included. A row without wrong answers adds 0, so that micro-batches
of as many rows add up to the step's mean. The paper's log(1 - p) is taken as it stands, from the logits of all other
tokens, which stays finite. T-Few's code has log(1 - p + 1e-2), at most 4.6 a token, its mean is that over all wrong
tokens of a batch, and its weights for both losses are 0 unless they are set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftctl.errors import UsageError

if TYPE_CHECKING:
    import torch

    from peftctl.data.formats import Example
    from peftctl.models.supervised import Supervised

_OWN = ("input_ids", "attention_mask", "labels")


def forward_with_choices(
    model: Any, batch: Mapping[str, torch.Tensor], forward: Callable[..., Supervised]
) -> tuple[Supervised, list[torch.Tensor], list[torch.Tensor]]:
    """Run the rows of a batch and their wrong answers in one pass.

    Args:
        model: That is trained.
        batch: With the fields of `choices`.
        forward: Of the trainer.

    Returns:
        (the right answers, as `forward` gives them without wrong ones; logits, (tokens, vocab), and labels, (tokens,),
        of every answer: of the rows first, then of the wrong ones).
    """
    import torch

    from peftctl.models.supervised import count_supervised

    both = {name: torch.cat([batch[name], batch[f"choice_{name}"]]) for name in _OWN}
    found = forward(both)
    counts = [count_supervised(model, labels[None]) for labels in both["labels"].unbind()]
    right = sum(counts[: len(batch["labels"])])
    rows = replace(found, logits=found.logits[:right], labels=found.labels[:right])
    return rows, list(found.logits.split(counts)), list(found.labels.split(counts))


def unlikelihood(
    logits: list[torch.Tensor], labels: list[torch.Tensor], owners: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return L_UL.

    Args:
        logits: Of every answer, (tokens, vocab); those of the rows first, then the wrong ones.
        labels: Of every answer, (tokens,).
        owners: (wrong answers,), the row of each.
        rows: How many rows there are.
    """
    import torch

    total = _wide(logits[0]).sum() * 0  # in the graph also where no row has a wrong answer
    sums, tokens = [total] * rows, [0] * rows
    for z, y, row in zip(logits[rows:], labels[rows:], owners.tolist(), strict=True):
        wide = _wide(z)
        others = torch.logsumexp(wide.scatter(1, y[:, None], -torch.inf), dim=-1)
        sums[row] = sums[row] + (torch.logsumexp(wide, dim=-1) - others).sum()
        tokens[row] += len(y)
    return sum((own / count for own, count in zip(sums, tokens, strict=True) if count), total) / rows


def length_normalised(
    logits: list[torch.Tensor], labels: list[torch.Tensor], owners: torch.Tensor, rows: int
) -> torch.Tensor:
    """Return L_LN; arguments as of `unlikelihood`."""
    import torch

    total = _wide(logits[0]).sum() * 0
    scores = [_mean_log_probability(z, y) for z, y in zip(logits, labels, strict=True)]
    for row in sorted(set(owners.tolist())):
        answers = [scores[row], *(scores[rows + i] for i, owner in enumerate(owners.tolist()) if owner == row)]
        total = total - torch.stack(answers).log_softmax(dim=0)[0]
    return total / rows


def refuse_without_choices(weights: Mapping[str, float], examples: Sequence[Example]) -> None:
    """Raise a UsageError where a loss over wrong answers has a weight and no training row has any."""
    asked = [name for name, weight in weights.items() if weight]
    if asked and not any(example.wrong_answers for example in examples):
        raise UsageError(
            f"method.{asked[0]}: no training row has wrong answers; give them as a list in the field wrong_answers of "
            "format prompt_completion or alpaca, e.g. with data.columns {wrong_answers: rejected}"
        )


def _mean_log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _wide(logits).log_softmax(dim=-1).gather(1, labels[:, None]).mean()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return logits if logits.dtype is torch.float64 else logits.float()

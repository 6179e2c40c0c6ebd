"""Forward passes that compute logits only at positions that predict a supervised token.

A decoder-only model predicts at each position the token that follows in its input. The decoder of an encoder-decoder
reads the labels shifted by one, with a start token before them, and predicts at each position the label of the same.

A classifier names a class of a row (`seq_cls`) or of each word at its first piece (`token_cls`); nothing is shifted.

The logits of the other positions do not enter the loss, so leaving them out changes neither the loss nor a gradient; it
saves their share of the head's matrix product and of (batch x seq x vocab) memory. A pre-hook on the output
embeddings picks the rows, so the model's own code (a LoRA on the head, soft-capping, logit scales) runs unchanged.

Where the head is a frozen matrix, and the model hands its output on as it is, the head waits: the cross-entropy makes
logits and their gradient a piece at a time and keeps neither. A loss that asks for the logits gets them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from peftctl.errors import UsageError
from peftctl.models.classifier import classification_task
from peftctl.models.cross_entropy import HeadCrossEntropy, SummedCrossEntropy

IGNORED = -100
_UNREAD = {"labels", "choice_input_ids", "choice_attention_mask", "choice_labels", "choice_rows"}
"""Fields of a batch that no model reads: labels, and wrong answers for losses of their own."""


@dataclass(frozen=True)
class Supervised:
    """The supervised positions of a batch, row after row.

    Args:
        logits: (n, vocab), of the positions that predict the supervised tokens; of a classifier (n, classes).
        labels: (n,), the supervised tokens, or the classes.
        smoothing: ε, the share of the target that `cross_entropy` spreads evenly over the vocabulary.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    smoothing: float = 0.0

    def cross_entropy(self) -> torch.Tensor:
        """Return the scalar sum of cross-entropies, in float32 or wider; 0, still with a graph, where n is 0."""
        return SummedCrossEntropy.apply(self.logits, self.labels, self.smoothing)

    def correct(self) -> torch.Tensor:
        """Return the scalar number of labels that have the highest logit."""
        return (self.logits.argmax(dim=-1) == self.labels).sum()


class _BeforeHead(Supervised):
    """The same with a head that waits; with logits, as `dataclasses.replace` gives them, it is like any other.

    Args:
        logits: None lets (n, vocab) logits be made when they are asked for.
        labels: (n,).
        smoothing: ε.
        head: A frozen matrix.
        states: (n, d), what the head is applied to.
    """

    head: torch.nn.Linear
    states: torch.Tensor

    def __init__(
        self,
        logits: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float = 0.0,
        head: torch.nn.Linear | None = None,
        states: torch.Tensor | None = None,
    ):
        made = {} if logits is None else {"logits": logits}
        vars(self).update(labels=labels, smoothing=smoothing, head=head, states=states, **made)

    @cached_property
    def logits(self) -> torch.Tensor:  # type: ignore[override]
        """Return (n, vocab), with a graph."""
        return self.head(self.states)

    def cross_entropy(self) -> torch.Tensor:
        if "logits" in vars(self):
            return super().cross_entropy()
        return HeadCrossEntropy.apply(self.states, self.head.weight, self.head.bias, self.labels, self.smoothing)


def supervised_forward(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    wrapper: Any = None,
    *,
    smoothing: float = 0.0,
    lean: bool = False,
) -> Supervised:
    """Run a model and return its logits at supervised positions.

    Token 0 of a row is never supervised in a causal model, whatever its label: there is nothing to predict it from.

    Args:
        model: A causal language model, an encoder-decoder or a classifier, also inside a PeftModel; prompts that
            lengthen the sequence are fine.
        batch: input_ids and attention_mask, (batch, seq), and labels, (batch, seq), padded on either side. Labels of
            an encoder-decoder have a length of their own and are padded on the right; those of `seq_cls` stand in the
            first column. Further fields are passed on, but for wrong answers.
        wrapper: What to call in place of the model: the engine around it that several processes train through.
        smoothing: ε of the result.
        lean: Let the head wait, as `head_can_wait` in the training layer allows it.

    Returns:
        n = `count_supervised(model, labels)`.
    """
    labels = batch["labels"]
    predicted = _predicted(model, labels)
    # Found once and early: every look-up by a mask would make the host wait for the device.
    row, position = (predicted != IGNORED).nonzero(as_tuple=True)
    places = _Places(row, position, labels.shape[1])
    inputs = inputs_of(model, batch)
    if classification_task(model):
        return _classified(model, wrapper or model, inputs, labels, places, smoothing)
    head = model.get_output_embeddings() if lean else None
    with _rows_before_head(model, places) as happened, handing_on(head):
        logits = (wrapper or model)(**inputs, use_cache=False).logits
    # A model that has no head module, or does not call it, returns all positions.
    chosen = logits.squeeze(0) if happened else places.pick(logits)
    targets = predicted[row, position].to(chosen.device)
    return _BeforeHead(None, targets, smoothing, head, chosen) if lean else Supervised(chosen, targets, smoothing)


@dataclass(frozen=True)
class Given:
    """What a head has got: its version then, and whether autocast would have cast it."""

    states: torch.Tensor
    version: int
    cast: bool

    def as_it_is(self) -> bool:
        """Tell whether nobody has changed it."""
        return self.states._version == self.version and not self.cast


@contextmanager
def handing_on(head: torch.nn.Linear | None) -> Iterator[list[Given]]:
    """Let a head return what it gets; yield what it has got."""
    given: list[Given] = []
    if head is None:
        yield given
        return

    def hand_on(states: torch.Tensor) -> torch.Tensor:
        given.append(Given(states, states._version, torch.is_autocast_enabled(states.device.type)))
        return states

    head.forward = hand_on  # type: ignore[method-assign, assignment]
    try:
        yield given
    finally:
        del head.forward


def inputs_of(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the model reads of a batch."""
    inputs = {name: value for name, value in batch.items() if name not in _UNREAD}
    if model.config.is_encoder_decoder and not classification_task(model):
        inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    return inputs


def _classified(
    model: Any, called: Any, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor, places: _Places, smoothing: float
) -> Supervised:
    """Return the logits of the rows, or of the first pieces of words, that have a class."""
    cached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    logits = called(**inputs, **cached).logits
    chosen = logits[places.row.to(logits.device)] if logits.dim() == 2 else places.pick(logits)
    return Supervised(chosen, labels[places.row, places.position].to(chosen.device), smoothing)


def count_supervised(model: Any, labels: torch.Tensor) -> int:
    """Return the number of tokens, or of classes, that a model predicts and is trained on."""
    return int((_predicted(model, labels) != IGNORED).sum())


def decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return what the decoder of an encoder-decoder reads to predict labels, (batch, seq), by the model's own rule.

    Raises:
        UsageError: The architecture has no such rule.
    """
    try:
        shift = model.prepare_decoder_input_ids_from_labels
    except AttributeError as error:
        kind = model.config.model_type
        raise UsageError(f"model.task: the {kind} architecture can't be trained as seq2seq_lm here") from error
    return shift(labels=labels)


def _predicted(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the labels that positions 0, 1, ... of the logits predict."""
    task = classification_task(model)
    if task == "seq_cls":
        return labels[:, :1]
    return labels if task or model.config.is_encoder_decoder else labels[:, 1:]


@dataclass(frozen=True)
class _Places:
    """Where the supervised tokens are predicted: (n,) rows, (n,) positions in rows of `seq` tokens."""

    row: torch.Tensor
    position: torch.Tensor
    seq: int

    def pick(self, states: torch.Tensor) -> torch.Tensor:
        """Pick (n, d) of (batch, prompt + seq, d): prompt methods lengthen rows on the left."""
        length = states.shape[1]
        flat = self.row * length + (length - self.seq) + self.position
        return states.flatten(0, 1).index_select(0, flat.to(states.device))


@contextmanager
def _rows_before_head(model: Any, places: _Places) -> Iterator[list[bool]]:
    """Let the model's head see only these places; the yielded list is empty until that has happened."""
    happened: list[bool] = []

    def pick(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].dim() != 3:
            return None
        happened.append(True)
        # (1, n, d): code after the head may index logits as (batch, seq, vocab).
        return (places.pick(args[0]).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        yield happened
    finally:
        if handle is not None:
            handle.remove()

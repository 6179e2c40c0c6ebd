"""New tokens: the tokenizer learns them, and the model gets rows for them that start as the mean of the old ones.

A mean row makes a new token as likely as an average one, whatever the text (Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models"); random rows can make it likelier than all others. The library's own mean
adds noise, drawn after a decomposition of a (d, d) matrix; ours draws nothing, so that a resumed run starts alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftctl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Teach a tokenizer new tokens, each of one id; return their ids, in the order of `tokens`.

    They are found in text as they are written, and decoding shows them: they are not special tokens.

    Raises:
        UsageError: One is blank, listed twice or known already, so that no new row would train for it.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for position, token in enumerate(tokens):
        where = f"model.add_tokens: '{token}'"
        if not token.strip():
            raise UsageError(f"{where} is blank; expected text such as <tool>")
        if token in tokens[:position]:
            raise UsageError(f"{where} is listed twice; list it once")
        if token in known:
            raise UsageError(
                f"{where} is a token of this model already (id {known[token]}); remove it, its row is not new"
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    for token, expected in zip(tokens, ids, strict=True):
        found = tokenizer.encode(token, add_special_tokens=False)
        if found != [expected]:
            raise UsageError(
                f"model.add_tokens: '{token}' is cut into {len(found)} tokens; another added token begins it, or the "
                "tokenizer changes its text: choose another spelling"
            )
    return ids


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Return how many rows the input embedding has, also under an adapter; often more than the tokenizer has tokens."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def fit_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give a model at least `rows` rows in its input embedding and output head, in place; it never gets fewer.

    Works on the meta device; a tied head stays tied.

    Args:
        model: A plain model, before any adapter is attached.
        rows: `len(tokenizer)`.
    """
    old = vocabulary_rows(model)
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    grown = {id(p): p for end in ends if end is not None for p in end.parameters()}  # a tied head's weight once
    for tensor in grown.values():
        if tensor.device.type != "meta":
            with torch.no_grad():
                tensor[old:] = tensor[:old].float().mean(dim=0).to(tensor.dtype)

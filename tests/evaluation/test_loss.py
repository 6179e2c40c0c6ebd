"""Held-out loss: the plain mean over supervised tokens, whatever the batches are."""

import math

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import UsageError
from peftctl.evaluation.loss import held_out_loss
from tests.tiny import tiny_llama, tiny_tokenizer


def rows(count=7):
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(4, 400, (3 + 2 * i,), generator=generator).tolist()
        made.append(EncodedRow(ids, [-100] * 2 + ids[2:], f"data.jsonl:{i + 1}"))
    return made


@torch.no_grad()
def by_hand(model, examples):
    """One row at a time, one token at a time."""
    losses, hits = [], []
    for row in examples:
        log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position, label in enumerate(row.labels[1:], start=1):
            if label != -100:
                losses.append(-float(log_probs[position - 1, label]))
                hits.append(int(log_probs[position - 1].argmax()) == label)
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def likely_rows(model, examples):
    """Rows whose last token is the model's own choice, so that accuracy is not 0."""
    made = []
    for row in examples:
        token = int(model(torch.tensor([row.input_ids])).logits[0, -1].argmax())
        made.append(EncodedRow([*row.input_ids, token], [*row.labels, token], row.where))
    return made


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_equals_the_mean_over_tokens(batch_size):
    model = tiny_llama().double()
    held_out = likely_rows(model, rows())
    loss, accuracy, tokens = by_hand(model, held_out)
    result = held_out_loss(model, held_out, Collator(tiny_tokenizer()), batch_size)
    assert result == {
        "loss": pytest.approx(loss, rel=1e-9),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-9),
        "token_accuracy": pytest.approx(accuracy),
        "supervised_tokens": tokens,
    }
    assert 0 < result["token_accuracy"] < 1


def test_modes_and_gradients_are_as_before():
    model = tiny_llama().train()
    model.model.norm.eval()
    held_out_loss(model, rows(), Collator(tiny_tokenizer()), 4)
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_dropout_is_off():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_dropout=0.9, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(), config).train()
    first, second = (held_out_loss(model, rows(), Collator(tiny_tokenizer()), 4) for _ in range(2))
    assert first == second


def test_a_hopeless_model_has_infinite_perplexity():
    model = tiny_llama(tie=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert held_out_loss(model, rows(), Collator(tiny_tokenizer()), 4)["perplexity"] == math.inf


@pytest.mark.parametrize("held_out", [[], [EncodedRow([5, 6], [5, -100], "data.jsonl:1")]])
def test_nothing_to_predict(held_out):
    with pytest.raises(UsageError, match=r"^data\.eval: no held-out row has a token to predict"):
        held_out_loss(tiny_llama(), held_out, Collator(tiny_tokenizer()), 4)

"""What eval.metrics asks for, from one generation."""

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.dataset import encode_all
from peftctl.data.formats import Example, Message
from peftctl.errors import UsageError
from peftctl.evaluation import evaluate
from peftctl.evaluation.evaluate import evaluate_rows
from peftctl.evaluation.loss import held_out_loss
from peftctl.recipe.schema import DataSection, EvalSection
from tests.tiny import tiny_llama, tiny_tokenizer

DATA = DataSection(train="train.jsonl")


def chat(i, question, answer):
    return Example(f"eval.jsonl:{i}", messages=[Message("user", question), Message("assistant", answer)])


EXAMPLES = [chat(1, "Book a table", "yes"), chat(2, "for two people please", "no, friday"), chat(3, "tell", "7")]


def measure(metrics, examples=EXAMPLES, model=None, data=DATA, **fields):
    tokenizer = tiny_tokenizer()
    encoded = [row for row in encode_all(examples, tokenizer, data)[0] if row.dropped_reason is None]
    section = EvalSection(metrics=metrics, **({"max_new_tokens": 8, "batch_size": 2} | fields))
    return evaluate_rows(model or tiny_llama(), tokenizer, examples, encoded, data, section, Collator(tokenizer))


def answer_with(monkeypatch, texts):
    """Replace generation; return what it is asked."""
    asked = []

    def generate(model, tokenizer, prompts, *, max_new_tokens, batch_size):
        asked.append((prompts, max_new_tokens, batch_size))
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(evaluate, "generate", generate)
    return asked


def test_loss_metrics_alone_generate_nothing(monkeypatch):
    asked = answer_with(monkeypatch, [])
    result = measure(["token_accuracy", "loss"])
    rows, _ = encode_all(EXAMPLES, tiny_tokenizer(), DATA)
    expected = held_out_loss(tiny_llama(), rows, Collator(tiny_tokenizer()), 2)
    assert list(result.metrics) == ["token_accuracy", "loss"] and result.samples == [] and not asked
    assert result.metrics == {name: pytest.approx(expected[name]) for name in result.metrics}


def test_one_generation_serves_all_metrics(monkeypatch):
    asked = answer_with(monkeypatch, ["yes", "no, monday", "it is 7"])
    result = measure(["loss", "exact_match", "rouge_l", "contains", "regex"], pattern=r"no|\d")
    assert len(asked) == 1 and asked[0][1:] == (8, 2)
    assert result.metrics["exact_match"] == pytest.approx(1 / 3)
    assert result.metrics["rouge_l"] == pytest.approx((1 + 2 / 4 + 2 / 4) / 3)
    assert result.metrics["regex"] == pytest.approx(2 / 3)
    assert result.metrics["contains"] == 0  # eval.pattern is looked for as it stands
    assert result.metrics["loss"] > 0


def test_contains_looks_for_the_reference_without_a_pattern(monkeypatch):
    answer_with(monkeypatch, ["yes", "no, monday", "it is 7"])
    assert measure(["contains"]).metrics == {"contains": pytest.approx(2 / 3)}


def test_samples_and_the_rows_limit(monkeypatch):
    asked = answer_with(monkeypatch, ["yes", "no"])
    result = measure(["exact_match"], rows=2)
    assert len(asked[0][0]) == 2
    assert result.samples[1] == {
        "prompt": "<|im_start|>user\nfor two people please<|im_end|>\n<|im_start|>assistant\n",
        "reference": "no, friday",
        "prediction": "no",
        "where": "eval.jsonl:2",
    }


def test_what_the_model_has_learned_is_what_it_answers():
    torch.manual_seed(0)
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    rows, _ = encode_all(EXAMPLES, tokenizer, DATA)
    collate = Collator(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch = collate(rows)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = measure(["exact_match", "token_accuracy"], model=model)
    assert result.metrics == {"exact_match": 1.0, "token_accuracy": 1.0}
    assert [sample["prediction"] for sample in result.samples] == ["yes", "no, friday", "7"]


def test_plain_templates():
    data = DataSection(train="train.jsonl", format="prompt_completion", template="{prompt}")
    examples = [Example("eval.jsonl:1", prompt="Q: two\nA: ", completion="2")]
    sample = measure(["rouge_l"], examples, data=data).samples[0]
    assert (sample["prompt"], sample["reference"]) == ("Q: two\nA: ", "2")


def test_rows_without_answers():
    data = DataSection(train="train.txt", format="text")
    text = [Example("eval.txt:1", text="Book a table")]
    with pytest.raises(UsageError, match="no held-out row has an answer to generate; remove exact_match, rouge_l"):
        measure(["loss", "exact_match", "rouge_l"], text, data=data)
    assert measure(["loss"], text, data=data).metrics["loss"] > 0


def test_a_prompt_without_room_is_named_by_its_row():
    data = DataSection(train="train.jsonl", max_length=4096)
    long = [EXAMPLES[0], chat(2, "answer " * 600, "no")]
    with pytest.raises(UsageError, match=r"^eval\.jsonl:2: the prompt has \d+ tokens, but .* 512 positions"):
        measure(["exact_match"], long, data=data)


@pytest.mark.parametrize(
    ("pattern", "message"), [(None, "eval.pattern: missing"), ("(", "is no regular expression: missing \\)")]
)
def test_patterns_that_can_not_work(pattern, message):
    with pytest.raises(UsageError, match=message):
        measure(["regex"], pattern=pattern)

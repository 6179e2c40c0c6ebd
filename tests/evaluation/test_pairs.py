"""Encoder-decoders: held-out loss by hand, answers as the library gives them row by row, text in and text out."""

import peft
import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import UsageError
from peftctl.evaluation.evaluate import evaluate_rows
from peftctl.evaluation.generation import answer_room, generate
from peftctl.evaluation.loss import held_out_loss
from peftctl.evaluation.streaming import stream_text
from peftctl.recipe.schema import EvalSection
from tests.data.rows import example, section
from tests.tiny import tiny_bart, tiny_t5, tiny_tokenizer

# Lengths 1, 3, 5, 5, 9: several paddings and one equal pair.
PROMPTS = [[17, 40, 8], [99], [200, 201, 5, 6, 7], [12, 13, 14, 15, 16], [50, 51, 52, 53, 54, 55, 56, 57, 58]]


def lively(build):
    """A model whose answers depend on the prompt: fresh ones repeat one token whatever they read."""
    model = build()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q.", "k.", "v.", "q_proj", "k_proj", "v_proj", "wo", "fc2", "EncDec")):
            parameter.data += torch.randn_like(parameter) * 0.7
    return model


def lora():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(lively(tiny_t5), config).eval()


def prompted():
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(lively(tiny_t5), config).eval()


MODELS = {"t5": lambda: lively(tiny_t5), "bart": lambda: lively(tiny_bart), "lora": lora, "prompt": prompted}


@torch.no_grad()
def plain_loop(model, prompt, count):
    """Whole forwards of both stacks, without cache, padding or library generation."""
    row = torch.tensor([prompt])
    start = model.config.decoder_start_token_id
    written = [start]
    for _ in range(count):
        out = model(
            input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=torch.tensor([written]),
            use_cache=False,
        )  # fmt: skip
        token = int(out.logits[0, -1].argmax())
        if token == 2:
            break
        written.append(token)
    return written[1:]


@pytest.mark.parametrize("name", MODELS)
def test_batches_equal_a_plain_loop(name):
    model, tokenizer = MODELS[name](), tiny_tokenizer(None)
    expected = [plain_loop(model, prompt, 10) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 2  # different answers, so a mix-up would show
    for batch_size in (1, 2, 5):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=batch_size) == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_answers_are_the_librarys_row_by_row(name):
    model, tokenizer = MODELS[name](), tiny_tokenizer(None)
    model.generation_config.forced_eos_token_id = None  # a setting of its own, which does not apply to ours
    got = generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=5)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        row = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, num_beams=1)[0, 1:].tolist()
        assert answer == row[: row.index(2) if 2 in row else len(row)]


@pytest.mark.parametrize("name", ["t5", "bart", "lora"])
def test_a_streamed_answer_is_the_generated_one(name):
    model, tokenizer = MODELS[name](), tiny_tokenizer(None)
    for prompt in PROMPTS:
        (ids,) = generate(model, tokenizer, [prompt], max_new_tokens=10, batch_size=1)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(stream_text(model, tokenizer, prompt, max_new_tokens=10)) == text


def test_prompt_and_answer_have_their_own_positions():
    """BART has 64 on either side; T5 counts distances and has no limit."""
    model, tokenizer = MODELS["bart"](), tiny_tokenizer(None)
    assert answer_room(model, 60) == 64 and answer_room(tiny_t5(), 10**6) > 10**6
    model.generation_config.eos_token_id = None
    tokenizer = type("Endless", (), {"pad_token_id": 3, "eos_token_id": None, "chat_template": None})()
    (answer,) = generate(model, tokenizer, [[5] * 64], max_new_tokens=99, batch_size=1)
    assert len(answer) == 64
    with pytest.raises(UsageError, match="prompt 1 has 65 tokens, but the model has only 64 positions"):
        generate(model, tokenizer, [[5] * 65], max_new_tokens=1, batch_size=1)


def rows(count=7):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(4, 400, (n,), generator=generator).tolist()  # noqa: E731
    return [EncodedRow(draw(3 + i), draw(9 - i), f"data.jsonl:{i + 1}", paired=True) for i in range(count)]


@torch.no_grad()
def by_hand(model, examples):
    """One row at a time, by the library's loss."""
    losses, hits = [], []
    for row in examples:
        labels = torch.tensor([row.labels])
        log_probs = model(input_ids=torch.tensor([row.input_ids]), labels=labels).logits[0].log_softmax(-1)
        losses += [-float(log_probs[i, label]) for i, label in enumerate(row.labels)]
        hits += (log_probs.argmax(-1) == labels[0]).tolist()
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_held_out_loss_is_the_mean_over_labels(build, batch_size):
    model = lively(build).double()
    loss, accuracy, tokens = by_hand(model, rows())
    result = held_out_loss(model, rows(), Collator(tiny_tokenizer()), batch_size)
    assert result["loss"] == pytest.approx(loss, rel=1e-9)
    assert (result["token_accuracy"], result["supervised_tokens"]) == (pytest.approx(accuracy), tokens)


def test_metrics_by_generation():
    data, tokenizer, model = (
        section(format="prompt_completion", template="{prompt}"),
        tiny_tokenizer(None),
        lively(tiny_t5),
    )
    prompts = ["answer", "the question with"]
    written = [
        tokenizer.decode(plain_loop(model, tokenizer(p).input_ids, 6), skip_special_tokens=True) for p in prompts
    ]
    assert all(text.strip() for text in written)
    examples = [example(data, prompt=p, completion=c) for p, c in zip(prompts, (written[0], "no"), strict=True)]
    result = evaluate_rows(
        model,
        tokenizer,
        examples,
        [],
        data,
        EvalSection(metrics=["exact_match"], max_new_tokens=6),
        Collator(tokenizer),
    )
    assert result.metrics == {"exact_match": 0.5}
    assert [sample["prompt"] for sample in result.samples] == prompts
    assert [sample["prediction"] for sample in result.samples] == written

"""T-Few's losses over wrong answers: naively in float64, in training only, and the same however a step is cut up."""

import json
import math
from dataclasses import replace

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.errors import UsageError
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods.base import Method as Plain
from peftctl.methods.ia3 import Config, Method
from peftctl.models.supervised import supervised_forward
from tests.methods.helpers import applied, recipe
from tests.methods.test_ia3 import for_task, randomise
from tests.tiny import tiny_llama, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, trained_tensors, workload

WEIGHTS = {"unlikelihood": 0.5, "length_normalised": 2.0}


def answered(prompt, answer, paired=False, wrong=()):
    ids = prompt if paired else prompt + answer
    labels = answer if paired else [-100] * len(prompt) + answer
    return EncodedRow(ids, labels, "rows:1", paired=paired, wrong=tuple(wrong))


def choices(paired=False):
    """Three rows with two, no and one wrong answer, all of other lengths."""

    def row(prompt, right, *others):
        return answered(prompt, right, paired, [answered(prompt, other, paired) for other in others])

    return [
        row([5, 6, 7], [8, 9, 2], [10, 2], [11, 12, 13, 14, 2]),
        row([20, 21], [22, 2]),
        row([30, 31, 32, 33], [34, 2], [35, 36, 37, 2]),
    ]


def log_probabilities(model, row):
    """log p of each token of the answer, from the softmax over the vocabulary of a row alone, and log(1 - p)."""
    if row.paired:
        labels = torch.tensor([row.labels])
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(input_ids=torch.tensor([row.input_ids]), decoder_input_ids=shifted).logits[0]
        targets = row.labels
    else:
        start = sum(label == -100 for label in row.labels)
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, start - 1 : -1]
        targets = row.input_ids[start:]
    p = torch.softmax(logits, dim=-1)[torch.arange(len(targets)), torch.tensor(targets)]
    return p.log(), (1 - p).log()


def naive(model, rows):
    lm, ul, ln = 0.0, 0.0, 0.0
    for row in rows:
        right, _ = log_probabilities(model, row)
        lm = lm - right.sum()
        if not row.wrong:
            continue
        others = [log_probabilities(model, other) for other in row.wrong]
        ul = ul - sum(rest.sum() for _, rest in others) / sum(len(rest) for _, rest in others)
        scores = [math.exp(part.mean()) for part in (right, *(log_p for log_p, _ in others))]
        ln = ln - math.log(scores[0] / sum(scores))
    return lm, ul / len(rows), ln / len(rows)


def batch_of(rows, fields=("choices",)):
    return Collator(tiny_tokenizer(), None, fields)(rows)


@pytest.mark.parametrize(("base", "task"), [(tiny_llama, "causal_lm"), (tiny_t5, "seq2seq_lm")])
def test_the_losses_are_the_papers_equations_in_float64(base, task):
    chosen = Method(Config(**WEIGHTS))
    model = chosen.apply(base().double(), for_task(task)).double().eval()
    randomise(model)
    rows = choices(paired=task == "seq2seq_lm")
    parts = chosen.loss(model, batch_of(rows), lambda batch: supervised_forward(model, batch))
    with torch.no_grad():
        lm, ul, ln = naive(model, rows)
    assert list(parts) == ["loss", "unlikelihood", "length_normalised"]
    for name, expected in (("loss", lm), ("unlikelihood", 0.5 * ul), ("length_normalised", 2.0 * ln)):
        assert parts[name].item() == pytest.approx(float(expected), rel=1e-9), name


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_loss_stands_alone_and_lowers_what_it_is_about(name):
    chosen = Method(Config(**{name: 1.0}))
    model = applied(chosen, tiny_llama()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(8):
        parts = chosen.loss(model, batch_of(choices()), lambda batch: supervised_forward(model, batch))
        assert set(parts) == {"loss", name}
        optimizer.zero_grad()
        parts[name].backward()
        optimizer.step()
        values.append(parts[name].item())
    assert values[-1] < 0.9 * values[0]


def test_a_sure_wrong_answer_has_a_finite_loss_and_gradient():
    from peftctl.methods._choices import unlikelihood

    z = torch.zeros(1, 8)
    z[0, 3] = 200.0  # p is 1 in float32, and log(1 - p) minus infinity
    z.requires_grad_(True)
    right = torch.zeros(1, 8, requires_grad=True)
    loss = unlikelihood([right, z], [torch.tensor([1]), torch.tensor([3])], torch.tensor([0]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(200 - math.log(7)) and z.grad[0, 3] == pytest.approx(1.0)


def test_without_weights_the_loss_is_todays_bit_for_bit(tmp_path):
    chosen, plain = Method(Config()), Plain(Config())
    assert chosen.fields() == ()
    model = applied(chosen, tiny_llama())
    with_them, without = batch_of(choices(), chosen.fields()), batch_of([replace(r, wrong=()) for r in choices()])
    ours = chosen.loss(model, with_them, lambda batch: supervised_forward(model, batch))
    theirs = plain.loss(model, {k: without[k] for k in with_them}, lambda batch: supervised_forward(model, batch))
    assert ours.keys() == theirs.keys() == {"loss"} and torch.equal(ours["loss"], theirs["loss"])


def work(folder, chosen=None, rows=None, **train):
    made = workload(folder, chosen or Method(Config(**WEIGHTS)), **train)
    rows = rows if rows is not None else choices() * 4
    return replace(
        made, train_rows=rows, eval_rows=choices(), collate=Collator(tiny_tokenizer(), None, made.method.fields())
    )


def lines(made):
    return [json.loads(line) for line in made.run.metrics.read_text().splitlines()]


def test_zero_weights_train_as_rows_without_wrong_answers(tmp_path):
    tensors = []
    for name, rows in (("a", choices() * 4), ("b", [replace(row, wrong=()) for row in choices() * 4])):
        tensors.append(trained_tensors(train(work(tmp_path / name, Method(Config()), rows, max_steps=4))[0]))
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_parts_are_logged_by_name_and_the_held_out_loss_has_none_of_them(tmp_path):
    made = work(tmp_path, max_steps=2, eval_steps=2)
    model, _ = train(made)
    steps = [line for line in lines(made) if "loss" in line]
    assert all(line["unlikelihood"] > 0 and line["length_normalised"] > 0 for line in steps)
    evaluated = next(line["eval_loss"] for line in lines(made) if "eval_loss" in line)
    bare = [replace(row, wrong=()) for row in choices()]
    assert evaluated == pytest.approx(held_out_loss(model, bare, Collator(tiny_tokenizer()), 4)["loss"], rel=1e-6)


def test_accumulated_micro_batches_train_as_one_batch(tmp_path):
    tensors, parts = [], []
    for name, cut in (("a", {"batch_size": 4}), ("b", {"batch_size": 2, "gradient_accumulation": 2})):
        made = work(tmp_path / name, max_steps=3, **cut)
        tensors.append(trained_tensors(train(made)[0]))
        parts.append([(line["unlikelihood"], line["length_normalised"]) for line in lines(made) if "loss" in line])
    for one, other in zip(*parts, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_batch_without_wrong_answers_or_rows_adds_nothing():
    chosen = Method(Config(**WEIGHTS))
    model = applied(chosen, tiny_llama())
    for rows in (choices()[1:2], []):
        parts = chosen.loss(model, batch_of(rows), lambda batch: supervised_forward(model, batch))
        assert parts["unlikelihood"].item() == parts["length_normalised"].item() == 0
        sum(parts.values()).backward()


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_without_wrong_answers_are_refused_by_name(name):
    row = Example("rows:1", prompt="a", completion="b")
    asked, settings = Method(Config(**{name: 1.0})), recipe(Config())
    with pytest.raises(UsageError, match=rf"^method\.{name}: no training row has wrong answers; give them"):
        asked.prepare_tokenizer(tiny_tokenizer(), [row], settings)
    asked.prepare_tokenizer(tiny_tokenizer(), [row, replace(row, wrong_answers=("c",))], settings)
    Method(Config()).prepare_tokenizer(tiny_tokenizer(), [row], settings)

"""The training loop on an encoder-decoder: counts, accumulation, checkpointing, stop and go on."""

import json
import random
from dataclasses import replace

import pytest
import torch

from peftctl.data.collate import Collator
from peftctl.data.encode import EncodedRow
from peftctl.errors import Interrupted
from peftctl.methods import adalora, lora
from tests.tiny import tiny_t5, tiny_tokenizer
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

LORA = {"r": 4, "target_modules": ["q", "v"]}
METHODS = {
    "lora": lambda: lora.Method(lora.Config(**LORA, dropout=0.1)),
    "adalora": lambda: adalora.Method(
        adalora.Config(init_r=4, target_r=2, delta_t=1, dropout=0.1, target_modules=["q", "v"])
    ),
}


def pairs(count=16, seed=0):
    """Rows of 6 to 20 tokens with 3 to 9 labels."""
    draw = random.Random(seed)
    sides = lambda low, high: [draw.randrange(4, 390) for _ in range(draw.randrange(low, high))]  # noqa: E731
    return [EncodedRow(sides(6, 21), sides(3, 10), f"rows:{i + 1}", paired=True) for i in range(count)]


def work(folder, method=None, **train_keys):
    made = workload(folder, method or lora.Method(lora.Config(**LORA)), **train_keys)
    recipe = made.recipe.model_copy(update={"model": made.recipe.model.model_copy(update={"task": "seq2seq_lm"})})
    return replace(made, recipe=recipe, train_rows=pairs(), eval_rows=pairs(5, seed=1))


def lines(made):
    return [json.loads(line) for line in made.run.metrics.read_text().splitlines()]


def test_the_logged_loss_is_the_librarys_mean_over_all_labels_of_the_step(tmp_path):
    """Uneven rows weigh by their labels, the first of each included, not by micro-batch."""
    made = work(tmp_path, max_steps=1, batch_size=4, gradient_accumulation=4)
    _, totals = train(made, model=tiny_t5())
    batch = Collator(tiny_tokenizer(), None)(pairs())
    assert lines(made)[0]["loss"] == pytest.approx(tiny_t5()(**batch).loss.item(), rel=1e-5)
    labels = sum(len(row.labels) for row in pairs())
    assert totals.supervised_tokens == labels
    assert totals.train_tokens == labels + sum(len(row.input_ids) for row in pairs())


def test_accumulation_equals_one_large_batch(tmp_path):
    large, _ = train(work(tmp_path / "a", max_steps=4, batch_size=8), model=tiny_t5())
    small, _ = train(work(tmp_path / "b", max_steps=4, batch_size=2, gradient_accumulation=4), model=tiny_t5())
    for name, tensor in trained_tensors(large).items():
        torch.testing.assert_close(trained_tensors(small)[name], tensor, rtol=1e-3, atol=2e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = train(work(tmp_path / "a", max_steps=3), model=tiny_t5())
    saving, _ = train(work(tmp_path / "b", max_steps=3, gradient_checkpointing=True), model=tiny_t5())
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(saving)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_equals_straight(tmp_path, name):
    straight, _ = train(work(tmp_path / "straight", METHODS[name](), max_steps=7), model=tiny_t5())
    with pytest.raises(Interrupted):
        train(work(tmp_path / "stopped", METHODS[name](), max_steps=7, reporter=StopAt(3)), model=tiny_t5())
    resumed = work(tmp_path / "stopped", METHODS[name](), max_steps=7)
    again, _ = train(resumed, resumed.run.latest_checkpoint(), model=tiny_t5())
    for key, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[key], tensor), key

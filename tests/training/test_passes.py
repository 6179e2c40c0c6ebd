"""A micro-batch in several passes is the same step as one pass."""

import itertools
import json

import pytest
import torch

from peftctl.methods import adalora, lora, molora
from peftctl.recipe.schema import BackendSection
from peftctl.training.passes import CPU_TOKENS, cut, pass_tokens
from tests.training.helpers import train, trained_tensors, workload


@pytest.mark.parametrize("tokens", [1, 12, 20, 33, 60, 1000])
def test_parts_hold_all_rows_in_order_and_no_more_tokens_than_asked_for(tokens):
    lengths = [3, 5, 5, 8, 13, 21]
    parts = [lengths[part] for part in cut(lengths, tokens)]
    assert [one for part in parts for one in part] == lengths
    assert all(len(part) == 1 or len(part) * max(part) <= tokens for part in parts)
    for part, after in itertools.pairwise(parts):  # no part could have taken the next row too
        assert (len(part) + 1) * max(*part, after[0]) > tokens


def test_without_a_limit_or_rows_there_is_one_part():
    assert cut([3, 500], None) == [slice(0, 2)]
    assert cut([], 10) == [slice(0, 0)]


def metrics(work):
    return [json.loads(line) for line in work.run.metrics.read_text().splitlines()]


METHODS = {
    "lora": lambda: lora.Method(lora.Config(r=4, target_modules="all-linear")),
    "a further loss": lambda: adalora.Method(adalora.Config(init_r=4, target_r=2, target_modules="all-linear")),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_losses_and_weights_are_those_of_whole_micro_batches(tmp_path, name, accumulation, monkeypatch):
    """Rows have 6 to 20 tokens, so that four take two passes or three."""
    shapes = []
    forward = torch.nn.Embedding.forward
    monkeypatch.setattr(
        torch.nn.Embedding, "forward", lambda self, ids: (shapes.append(ids.shape), forward(self, ids))[1]
    )
    found = {}
    for limit in (None, 30):
        shapes.clear()
        work = workload(
            tmp_path / str(limit), METHODS[name](), tokens_per_pass=limit, gradient_accumulation=accumulation
        )
        model, totals = train(work)
        found[limit] = trained_tensors(model), [line["loss"] for line in metrics(work)], totals, list(shapes)
    (whole, losses, totals, once), (parts, again, same, several) = found[None], found[30]
    assert len(several) > 1.5 * len(once) and all(n == 1 or n * seq <= 30 for n, seq in several)
    assert (totals.train_tokens, totals.supervised_tokens) == (same.train_tokens, same.supervised_tokens)
    assert again == pytest.approx(losses, abs=1e-5)
    for key, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[key], rtol=2e-3, atol=2e-5)


def test_who_decides_how_many_tokens_go_through_at_once(tmp_path):
    plain = workload(tmp_path)
    recipe, method = plain.recipe, plain.method
    assert (pass_tokens(recipe, method, "cpu"), pass_tokens(recipe, method, "cuda")) == (CPU_TOKENS, None)
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens_per_pass": 64})})
    assert pass_tokens(asked, method, "cuda") == 64
    assert pass_tokens(asked, molora.Method(molora.Config()), "cpu") is None  # its losses are of micro-batches
    divided = recipe.model_copy(update={"backend": BackendSection(name="fsdp")})
    assert pass_tokens(divided, method, "cpu") is None

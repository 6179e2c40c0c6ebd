"""The ensemble of LoRA-Dropout: the naive mean of probabilities, and what `eval --ensemble` makes of it."""

import json

import pytest
import torch
from peft import PeftModel

import peftctl
from peftctl import cli
from peftctl.commands.evaluate import evaluate
from peftctl.data.collate import Collator
from peftctl.errors import UsageError
from peftctl.evaluation.classes import classify
from peftctl.evaluation.ensemble import ensemble_forward
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods.base import Context
from peftctl.methods.lora_dropout import Config, Method
from peftctl.tuners.dropped_factors import Members
from tests.commands.helpers import write_recipe
from tests.evaluation.test_classes import BIO, classifier, tag_rows, text_rows
from tests.evaluation.test_loss import likely_rows, rows
from tests.methods.helpers import applied, recipe
from tests.methods.lora_family import randomise
from tests.tiny import tiny_llama, tiny_tokenizer

QV = {"target_modules": ["q_proj", "v_proj"]}
OVER = {
    "lora": {"r": 4, "dropout": 0.1},
    "adalora": {"over": "adalora", "adalora": {"init_r": 3, "target_r": 2}},
}
COLLATE = Collator(tiny_tokenizer())


def stock(folder, over="lora"):
    """Return an adapter as plain peft reads it back, in float64."""
    model = randomise(applied(Method(Config(**QV, **OVER[over])), tiny_llama()), std=0.5)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny_llama(), folder).double().eval()


@torch.no_grad()
def member_probabilities(model, masks, ids):
    """Return the probabilities of every member, from weights that are multiplied by hand and merged into the base."""
    found = []
    for masks_of_one in masks:
        base = tiny_llama().double()
        layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]
        for (name, layer), m_in, m_out in zip(layers, masks_of_one[::2], masks_of_one[1::2], strict=True):
            weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += m_out * layer.get_delta_weight("default") * m_in
        found.append(base(input_ids=torch.tensor([ids])).logits[0].softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("over", OVER)
def test_the_loss_is_that_of_the_naive_mean_of_probabilities(tmp_path, over):
    model = stock(tmp_path, over)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held_out = likely_rows(model, rows())
    masks = Members(model, 0.4, 3, seed=5).masks
    losses, hits, single = [], [], []
    for row in held_out:
        each = member_probabilities(model, masks, row.input_ids)
        for position, label in enumerate(row.labels[1:], start=1):
            if label != -100:
                mean = each.mean(0)[position - 1]
                losses.append(-float(mean[label].log()))
                hits.append(int(mean.argmax()) == label)
                single.append(-float(each[0, position - 1, label].log()))
    for batch_size in (1, 3):
        found = held_out_loss(
            model, held_out, COLLATE, batch_size, forward=ensemble_forward(model, 0.4, 3, seed=5)
        )  # every member keeps its masks, whatever the batches are
        assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
        assert found["token_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert abs(sum(single) - sum(losses)) > 1e-3  # one member alone is another model
    for name, tensor in model.state_dict().items():  # and the model is itself again
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("count", [1, 3])
def test_without_a_share_it_is_one_forward(tmp_path, count):
    model = stock(tmp_path)
    plain = held_out_loss(model, rows(), COLLATE, 3)
    found = held_out_loss(model, rows(), COLLATE, 3, forward=ensemble_forward(model, 0.0, count, seed=1))
    assert found == {name: pytest.approx(value, rel=1e-9) for name, value in plain.items()}


def test_masks_are_the_shares_and_differ_by_member_and_seed(tmp_path):
    model = stock(tmp_path)
    first, again, other = (Members(model, 0.25, 20, seed).masks for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first[0], first[1], strict=True))
    values = torch.cat([mask.flatten() for masks in first for mask in masks])
    assert set(values.tolist()) == {0.0, 1 / 0.75}
    assert abs(float((values == 0).double().mean()) - 0.25) < 0.02


@pytest.mark.parametrize(("kind", "labels", "make"), [("Sequence", "abc", text_rows), ("Token", BIO, tag_rows)])
def test_classifiers_average_the_probabilities_of_classes(kind, labels, make):
    wanted = recipe(Config(r=4, target_modules=["query", "value"]))
    task = "seq_cls" if kind == "Sequence" else "token_cls"
    wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"task": task})})
    model = Method(wanted.method).apply(classifier(kind, labels), Context(wanted))
    randomise(model, std=0.5)
    members = Members(model, 0.4, 3, seed=5)
    forward, held_out = ensemble_forward(model, 0.4, 3, seed=5), make()
    losses, guesses = [], []
    for row in held_out:
        each = []
        for _ in members:
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([row.input_ids])).logits
            each.append(logits.reshape(-1, logits.shape[-1]).double().softmax(-1))
        mean = torch.stack(each).mean(0)
        named = [(i, label) for i, label in enumerate(row.labels) if label != -100]
        losses += [-float(mean[i, label].log()) for i, label in named]
        guesses.append([labels[int(mean[i].argmax())] for i, _ in named])
    found = classify(model, held_out, COLLATE, 4, forward)
    assert found.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.predicted == guesses


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=OVER)
def run(request, tmp_path_factory, tiny_dir):
    """The run of a recipe, with dropped factors."""
    folder = tmp_path_factory.mktemp("run")
    path = write_recipe(folder, tiny_dir, {"name": "lora_dropout", "p": 0.5, **OVER[request.param], **QV})
    return peftctl.train(peftctl.load_recipe(path, ["train.learning_rate=0.1"])).run


def test_eval_measures_the_ensemble_the_same_each_time(run):
    mean = evaluate(str(run)).metrics
    assert "ensemble" not in json.loads((run / "eval.json").read_text())
    found = [evaluate(str(run), ensemble=3, with_base=True) for _ in range(2)]
    assert found[0].metrics == found[1].metrics
    assert json.loads((run / "eval.json").read_text())["ensemble"] == 3
    by_row = evaluate(str(run), ["eval.batch_size=1"], ensemble=3).metrics
    assert by_row["loss"] == pytest.approx(found[0].metrics["loss"], rel=1e-5)
    assert abs(mean["loss"] - found[0].metrics["loss"]) > 1e-4
    assert found[0].base == evaluate(str(run), with_base=True).base  # which has no masks
    adapter = evaluate(str(run / "adapter"), recipe=str(run / "recipe.yaml"), ensemble=3)
    assert adapter.metrics == found[0].metrics


def test_answers_are_generated_by_the_mean_module(run):
    overrides = ["eval.metrics=[exact_match]", "eval.max_new_tokens=4"]
    assert evaluate(str(run), overrides, ensemble=3).samples == evaluate(str(run), overrides).samples


def test_without_masks_there_is_no_ensemble(tmp_path, tiny_dir, capsys):
    path = write_recipe(tmp_path, tiny_dir)
    plain = peftctl.train(peftctl.load_recipe(path)).run
    with pytest.raises(UsageError, match=r"--ensemble takes an adapter of lora_dropout; this is an adapter of lora$"):
        evaluate(str(plain), ensemble=4)
    with pytest.raises(UsageError, match=r"--ensemble takes an adapter of lora_dropout; this is a whole model$"):
        evaluate(str(tiny_dir), recipe=str(path), ensemble=4)
    assert cli.run(["eval", str(plain), "--ensemble", "2", "--tasks", "some"]) == 2
    assert "--ensemble measures held-out rows, not --tasks" in capsys.readouterr().err

"""The conformance suite: what every method must hold on every tiny model that its card claims, found by its file.

`conformance.py` says how cases are made and what they are trained on; a failure names method, model and check.
"""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers.modeling_layers import GradientCheckpointingLayer

import peftctl
from peftctl.artifacts.merge import merge
from peftctl.commands.prepare import refuse_unsupported
from peftctl.errors import UsageError
from peftctl.methods import registry
from peftctl.models.load import AUTO_CLASSES, load_model
from peftctl.models.quantize import is_quantized
from peftctl.recipe.schema import QuantizationSection
from peftctl.recipe.write import dump_recipe
from tests.methods import conformance
from tests.methods.conformance import EARLY, HALF, PROBE, Bench, same
from tests.methods.conformance_models import AGAIN, CARDS, CASES, LABELS, MODELS, REFUSED, TRAINING, head_of

RELOAD = Path(__file__).with_name("reload.py")
ROOT = Path(__file__).parents[2]
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
COMMON_FILES = {"README.md", "peftctl.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def on(pairs):
    """Parametrise a check over (method, model)."""
    return pytest.mark.parametrize("case", pairs, ids="-".join, indirect=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Everything that is trained, for all checks."""
    return Bench(tmp_path_factory.mktemp("conformance"))


@pytest.fixture
def case(request, bench):
    """A method on a tiny model."""
    return bench.case(*request.param)


# -- before training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names())
def test_the_method_section_of_the_recipe_reads_back(name, tmp_path):
    recipe = peftctl.load_recipe(name)
    method = registry.get(name)
    assert recipe.method.name == name
    assert method.Config(**recipe.method.model_dump()) == recipe.method
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe, unread=method.unread), encoding="utf-8")
    assert peftctl.load_recipe(path).method == recipe.method
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["method"]["name"] == name


@pytest.mark.parametrize("name", registry.names())
def test_the_card_gives_its_reasons(name):
    card = CARDS[name]
    assert card.mergeable or card.merge_note
    assert card.identity_at_init or card.identity_note
    assert set(card.tasks) <= set(AUTO_CLASSES)


@pytest.mark.parametrize(("pair", "message"), REFUSED.items(), ids=lambda value: "-".join(value))
def test_a_model_that_lacks_what_trains_is_refused(pair, message, bench):
    case = bench.case(*pair)
    for base in (case.meta(), case.base()):
        with pytest.raises(UsageError, match=message):
            case.method().count(base)
        with pytest.raises(UsageError, match=message):
            case.apply(case.method(), base)


@on(CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_starts_as_the_base(case, training):
    model = case.apply(case.method(), case.base()).train(training)
    start = conformance.probe_logits(model, PROBE)
    base = case.bench.answers(case.model)
    if case.card.identity_at_init:
        assert same(start, base)
    elif case.trains:
        assert not same(start[-len(base) :], base, 1e-3), "the card says that it does not"
    else:
        assert torch.equal(start, base)


@on(CASES)
def test_what_trains_is_what_is_counted_also_without_weights(case):
    shapes = case.apply(case.method(), case.meta())
    sizes = {name: p.numel() for name, p in shapes.named_parameters() if p.requires_grad}
    model = case.apply(case.method(), case.base())
    assert sizes == {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.device.type == "meta" for p in shapes.parameters())
    assert case.method().count(case.meta()) == case.method().count(case.base()) == sum(sizes.values())
    assert bool(sizes) == case.trains


# -- training ------------------------------------------------------------------------------------------------------


@on(TRAINING)
def test_the_optimizer_owns_exactly_what_trains(case):
    straight = case.straight
    assert straight.seen.optimized == straight.trainable
    assert set(conformance.tensors_of(straight.checkpoint)) == straight.trainable


@on(TRAINING)
def test_three_steps_move_every_tensor_that_trains_and_by_its_gradient(case):
    straight = case.straight
    early = straight.seen.early
    still = [name for name in straight.trainable if torch.equal(early[name], straight.initial[name])]
    assert not still
    first = [straight.seen.gradients[step] for step in range(1, EARLY + 1)]
    idle = [name for name in straight.trainable if not any(g[name].any() for g in first if name in g)]
    assert not idle, "only weight decay moves them"


@on(CASES)
def test_nothing_frozen_moves(case):
    straight = case.straight
    assert straight.initial.keys() <= straight.final.keys()
    frozen = straight.initial.keys() - straight.trainable
    assert [name for name in sorted(frozen) if not torch.equal(straight.initial[name], straight.final[name])] == []
    assert not straight.base_moved
    assert not straight.base_lost


@on(TRAINING)
def test_the_loss_falls_on_one_batch(case):
    losses = case.straight.losses()
    assert len(losses) == 2 * HALF
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) / 3 < 0.995 * losses[0]


@on(AGAIN)
def test_stopped_and_resumed_equals_straight(case):
    assert "resume" in case.card.supports
    method = case.method()
    model = case.apply(method, case.base())
    case.train(method, model, case.recipe, "resumed", case.straight.checkpoint)
    found, expected = conformance.everything(model), case.straight.final
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@on(AGAIN)
def test_two_batches_of_two_equal_one_of_four(case):
    recipe = case.recipe_with("train", batch_size=2, gradient_accumulation=2)
    compare(case, case.continued("accumulated", recipe))


@on(AGAIN)
def test_recomputed_activations_change_no_gradient_or_are_refused(case):
    recipe = case.recipe_with("train", gradient_checkpointing=True)
    if "gradient_checkpointing" not in case.card.supports:
        with pytest.raises(UsageError, match=r"^train\.gradient_checkpointing"):
            refuse_unsupported(recipe, case.method())
        return
    refuse_unsupported(recipe, case.method())
    runs = Counter()
    compare(case, case.continued("recomputed", recipe, lambda model: count_forwards(model, runs)))
    assert max(runs.values()) == 2


def count_forwards(model, runs):
    """Count training forwards of the modules without parts in a block, but for norms: some adapters call them again."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for leaf in {leaf for block in blocks for leaf in block.modules()}:
        if not list(leaf.children()) and not isinstance(leaf, torch.nn.LayerNorm):
            leaf.register_forward_pre_hook(lambda module, _: runs.update([id(module)] if module.training else []))


def compare(case, continued):
    """Assert that a step's gradients are those of the straight run, which had the same weights."""
    expected = case.straight.seen.gradients[HALF + 1]
    assert continued.gradients.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(continued.gradients[name], gradient, rtol=1e-4, atol=3e-6 * scale, msg=name)
    rows = MODELS[case.model].rows()
    supervised = sum(sum(label != -100 for label in row.labels) for row in rows)
    assert continued.supervised_tokens == (HALF + 1) * supervised


# -- the artefact --------------------------------------------------------------------------------------------------


def reloaded(request, bench, how):
    """Load the artefacts of all cases that were asked for in one process; return the folder of their answers."""
    items = [item for item in request.session.items if request.fixturename in item.fixturenames]
    out = bench.root / f"reloaded-{how}"
    out.mkdir()
    jobs = []
    for name, model in (item.callspec.params["case"] for item in items):
        try:
            straight = bench.case(name, model).straight
        except Exception:  # its own check says what is wrong
            continue
        place = straight.run.path if how == "peftctl" else straight.saved.folder
        auto_class, base = AUTO_CLASSES[MODELS[model].task], bench.section(model).name_or_path
        jobs.append(
            {
                "artefact": str(place), "base": base, "auto_class": auto_class, "rows": PROBE,
                "options": {"num_labels": len(LABELS)} if head_of(model) else {},
                "out": str(out / f"{name}-{model}.pt"),
            }
        )  # fmt: skip
    listed = out / "jobs.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    environment = os.environ | ({"PYTHONPATH": str(ROOT)} if how == "peftctl" else {"PYTHONPATH": ""})
    done = subprocess.run(
        [sys.executable, str(RELOAD), how, str(listed)], capture_output=True, text=True, cwd=out, env=environment
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def with_peftctl(request, bench):
    """Answers of all artefacts as a new process loads them."""
    return reloaded(request, bench, "peftctl")


@pytest.fixture(scope="module")
def with_peft(request, bench):
    """Answers of all artefacts as a process without peftctl loads them."""
    return reloaded(request, bench, "peft")


def answer(folder, case):
    """Return the logits of a case, or the text of what went wrong."""
    case.straight  # noqa: B018  # says what is wrong with a case that could not be trained
    file = folder / f"{case.name}-{case.model}.pt"
    return torch.load(file) if file.is_file() else file.with_suffix(".txt").read_text(encoding="utf-8")


@on(CASES)
def test_a_fresh_process_answers_as_what_was_trained(case, with_peftctl):
    logits, expected = answer(with_peftctl, case), case.straight.saved.logits
    assert not isinstance(logits, str), logits
    assert same(logits, expected)
    assert same(expected, case.bench.answers(case.model), 1e-3) != case.trains


@on(CASES)
def test_plain_peft_answers_as_what_was_trained(case, with_peft):
    logits, saved = answer(with_peft, case), case.straight.saved
    if isinstance(logits, str):  # a tuner type of ours, which the model card says how to load
        kind = json.loads((saved.folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        assert kind.startswith("PEFTCTL_") and logits == f"KeyError: '{kind}'", logits
        card = (saved.folder / "README.md").read_text(encoding="utf-8")
        assert f"import peftctl.tuners  # first: it adds the adapter type {kind} to peft" in card
    else:
        assert same(logits, saved.logits)


@on(CASES)
def test_the_artefact_has_its_files_and_tensors_and_no_more(case):
    saved = case.straight.saved
    whole = MODEL_FILES - ({"generation_config.json"} if head_of(case.model) else set())
    own = {"model": whole, "adapter": ADAPTER_FILES if saved.keys else set()}[saved.folder.name]
    further = json.loads((saved.folder / "peftctl.json").read_text(encoding="utf-8"))["tasks"][1:]
    assert {p.name for p in saved.folder.iterdir()} == COMMON_FILES | own | set(further)
    tensors = conformance.tensors_of(saved.folder)
    if saved.keys is not None:
        assert tensors.keys() == saved.keys
        frozen = [t for name, t in case.base().named_parameters() if t.ndim > 1]
        copied = [n for n, t in tensors.items() if any(t.shape == w.shape and torch.equal(t, w) for w in frozen)]
        assert not copied, "the base's own weights"


@on(CASES)
def test_merged_equals_unmerged_or_is_refused(case):
    output = case.folder / "merged"
    straight = case.straight
    if not case.card.mergeable:
        whole = straight.saved.folder.name == "model"
        with pytest.raises(UsageError, match="already a whole model" if whole else "can't be merged: .") as refused:
            merge(straight.run.path, output)
        assert whole or case.card.merge_note in str(refused.value)
        assert not output.exists()
        return
    merge(straight.run.path, output, dtype="float32")
    section = case.bench.section(case.model).model_copy(update={"name_or_path": str(output)})
    merged = conformance.probe_logits(load_model(section, dtype="float32"), PROBE)
    assert same(merged, straight.saved.logits, 1e-4)


@on(CASES)
def test_switched_off_it_is_the_base_or_the_card_says_why_not(case):
    base, straight = case.bench.answers(case.model), case.straight
    for logits in (straight.off, straight.saved.off):
        if logits is None:
            assert case.card.disable_note or not case.trains, "it can't be switched off, and the card does not say so"
        else:
            assert case.card.disable_note or torch.equal(logits, base)


# -- other types of weights ----------------------------------------------------------------------------------------


def two_steps(case, base, name, **section):
    """Train two steps on a base; assert that everything stays finite and what is frozen as it was."""
    recipe = case.recipe_with("model", **section) if section else case.recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 2})})
    method = case.method()
    model = case.start(method, base)
    before = conformance.everything(model)
    case.train(method, model, recipe, name)
    after = conformance.everything(model)
    assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
    trainable = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert [n for n in before if n not in trainable and not torch.equal(before[n], after[n])] == []
    assert any(not torch.equal(before[name], after[name]) for name in trainable)
    assert conformance.probe_logits(model.eval(), PROBE).isfinite().all()


@on(AGAIN)
def test_on_a_bfloat16_base_all_is_finite(case):
    two_steps(case, case.base("bfloat16"), "bfloat16", dtype="bfloat16")


@on(AGAIN)
def test_on_an_nf4_base_it_trains_or_is_refused(case):
    recipe = case.recipe_with("quantization", bits=4)
    if "4bit" not in case.card.supports:
        with pytest.raises(UsageError, match=r"^quantization\.bits"):
            refuse_unsupported(recipe, case.method())
        return
    refuse_unsupported(recipe, case.method())
    section = case.bench.section(case.model)
    four = QuantizationSection(bits=4)
    base = load_model(section, device="cpu", quantization=four, head=head_of(case.model))
    assert is_quantized(base)
    two_steps(case, base, "nf4")

"""The training loop: scaling of the loss, accumulation, parts, stages, refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from peftctl.console import Reporter
from peftctl.data.collate import Collator
from peftctl.errors import RunError
from peftctl.methods import lora
from peftctl.methods._groups import by_decay
from peftctl.methods.base import Callback, Context, Stage
from peftctl.recipe.schema import DataSection, ModelSection, Recipe, TrainSection
from peftctl.training.optimizers import check_partition
from peftctl.training.stages import stage_steps
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.training.helpers import rows, train, trained_tensors, workload


def workload_recipe(**train_keys):
    """Return a recipe that only says how long to train."""
    train_section = TrainSection(output_dir="run", **train_keys)
    return Recipe(
        model=ModelSection(name_or_path="tiny"), method=CONFIG, data=DataSection(train="rows"), train=train_section
    )


CONFIG = lora.Config(r=4, target_modules="all-linear")


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_logged_loss_is_the_mean_over_supervised_tokens_of_the_whole_step(tmp_path):
    """Uneven rows weigh by their supervised tokens, not by micro-batch."""
    work = workload(tmp_path, lora.Method(CONFIG), max_steps=1, batch_size=6, gradient_accumulation=4)
    train(work)
    batch = Collator(tiny_tokenizer(), None)(rows())
    logits = tiny_llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert lines(work.run)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_equals_one_large_batch(tmp_path, batch, accumulation):
    large, _ = train(workload(tmp_path / "a", lora.Method(CONFIG), max_steps=5, batch_size=8))
    small, _ = train(
        workload(tmp_path / "b", lora.Method(CONFIG), max_steps=5, batch_size=batch, gradient_accumulation=accumulation)
    )
    for name, tensor in trained_tensors(large).items():
        torch.testing.assert_close(trained_tensors(small)[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_extra_parts_are_means_over_the_accumulation_and_logged_by_name(tmp_path, accumulation):
    class WithPenalty(lora.Method):
        def loss(self, model, batch, forward):
            return super().loss(model, batch, forward) | {"penalty": torch.tensor(0.5, requires_grad=True)}

    work = workload(
        tmp_path, WithPenalty(CONFIG), max_steps=2, batch_size=8 // accumulation, gradient_accumulation=accumulation
    )
    train(work)
    for line in lines(work.run):
        assert line["penalty"] == pytest.approx(0.5)
        assert line["loss"] == pytest.approx(line["loss_loss"] + 0.5, rel=1e-5)


def test_stages_run_in_order_with_a_step_that_never_restarts(tmp_path):
    class TwoStages(lora.Method):
        entered = ()

        def stages(self, recipe):
            return (Stage("warm", steps=0.5), Stage("main"))

        def enter(self, model, stage, batches):
            self.entered = (*self.entered, stage.name)
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(stage.name == "main")

    method = TwoStages(CONFIG)
    work = workload(tmp_path, method, max_steps=4)
    model, totals = train(work)
    assert method.entered == ("warm", "main")
    assert [(line["step"], line["stage"]) for line in lines(work.run)] == [
        (1, "warm"), (2, "warm"), (3, "main"), (4, "main"), (5, "main"), (6, "main")
    ]  # fmt: skip
    assert totals.steps == 6
    resumed, _ = train(workload(tmp_path, TwoStages(CONFIG), max_steps=4), work.run.checkpoints / "checkpoint-6")
    assert all(torch.equal(t, trained_tensors(resumed)[n]) for n, t in trained_tensors(model).items())


def test_a_stage_trains_on_its_own_rows_and_stages_share_the_steps(tmp_path):
    seen = []

    class Halves(lora.Method):
        def stages(self, recipe):
            return (Stage("first", rows=lambda rows: rows[:4]), Stage("second", rows=lambda rows: rows[4:12]))

        def enter(self, model, stage, batches):
            seen.append((stage.name, len(list(batches(stage)))))

        def loss(self, model, batch, forward):
            seen.append(len(batch["input_ids"]))
            return super().loss(model, batch, forward)

    work = workload(tmp_path / "epochs", Halves(CONFIG), max_steps=None, epochs=2, batch_size=4)
    train(work)
    assert seen == [("first", 4), 4, 4, ("second", 8), 4, 4, 4, 4]
    shared = workload(tmp_path / "steps", Halves(CONFIG), max_steps=5)
    train(shared)
    assert [line["stage"] for line in lines(shared.run)] == ["first"] * 3 + ["second"] * 2


def test_stages_have_steps_of_their_own_or_their_share():
    recipe = workload_recipe(max_steps=7, batch_size=2, gradient_accumulation=2)
    stages = (Stage("a", steps=3), Stage("b", steps=0.5), Stage("c"), Stage("d"))
    assert stage_steps(stages, recipe, rows(24), 1) == [3, 4, 4, 3]
    by_epochs = workload_recipe(max_steps=None, epochs=1.5, batch_size=2, gradient_accumulation=2)
    assert stage_steps(stages, by_epochs, rows(24), 1) == [3, 4, 9, 9]
    assert stage_steps(stages, by_epochs, rows(24), 2) == [3, 2, 5, 5]
    few = (Stage("e", rows=lambda every: every[:1]), Stage("f", steps=0.01))
    assert stage_steps(few, by_epochs, rows(24), 1) == [2, 1]


def test_a_schedule_that_begins_anew_warms_up_again(tmp_path):
    class Twice(lora.Method):
        def schedule_steps(self, total_steps):
            return total_steps // 2

    settings = {"max_steps": 8, "warmup_steps": 2, "scheduler": "linear", "learning_rate": 0.01}
    twice = workload(tmp_path / "twice", Twice(CONFIG), **settings)
    train(twice)
    once = workload(tmp_path / "once", lora.Method(CONFIG), **settings | {"max_steps": 4})
    train(once)
    expected = [line["learning_rate"] for line in lines(once.run) if "learning_rate" in line]
    found = [line["learning_rate"] for line in lines(twice.run) if "learning_rate" in line]
    assert found == pytest.approx(2 * expected) and len(set(expected)) > 2


def test_callbacks_see_every_step_and_write_to_the_log(tmp_path):
    seen = []

    class Watch(Callback):
        def stage_begins(self, info):
            seen.append(("begin", info.step))

        def before_optimizer(self, info):
            seen.append(("before", info.step))

        def after_optimizer(self, info):
            seen.append(("after", info.step))

        def after_step(self, info):
            info.log["watched"] = float(info.step)

    class Watched(lora.Method):
        def callbacks(self, model):
            return (Watch(),)

    work = workload(tmp_path, Watched(CONFIG), max_steps=2)
    train(work)
    assert seen == [("begin", 0), ("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert [line["watched"] for line in lines(work.run)] == [1.0, 2.0]


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_weight_changes(tmp_path):
    class Diverges(lora.Method):
        def loss(self, model, batch, forward):
            return {"loss": super().loss(model, batch, forward)["loss"] * float("nan")}

    work = workload(tmp_path, Diverges(CONFIG))
    torch.manual_seed(0)
    model = work.method.apply(tiny_llama(), Context(work.recipe))
    before = trained_tensors(model)
    from peftctl.training.stages import run_stages

    with pytest.raises(RunError, match=r"step 1: the gradient is not finite.*learning_rate"):
        run_stages(work, model, None)
    assert all(torch.equal(t, before[n]) for n, t in trained_tensors(model).items())


class DivergesAt(lora.Method):
    """LoRA whose loss is NaN on the batches that hold a token."""

    token = -1

    def loss(self, model, batch, forward):
        bad = float("nan") if (batch["input_ids"] == self.token).any() else 1.0
        return {"loss": super().loss(model, batch, forward)["loss"] * bad}


def diverging(folder, **settings):
    """Return a workload one of whose 24 rows makes the loss NaN, and the place of that row."""
    work = workload(folder, DivergesAt(CONFIG), max_steps=12, batch_size=2, save_steps=100, **settings)
    row = work.train_rows[5]
    row.input_ids[1] = work.method.token = 399  # no other row has it
    return work, row.where


def test_a_gradient_that_is_not_finite_names_its_step_and_rows_and_leaves_a_checkpoint(tmp_path):
    work, where = diverging(tmp_path)
    with pytest.raises(RunError, match=r"step \d+: the gradient is not finite; its rows: .*rows:") as caught:
        train(work)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert step > 1 and where in str(caught.value).split("; ")[1]
    checkpoint = work.run.latest_checkpoint()
    assert checkpoint.name == f"checkpoint-{step - 1}" and checkpoint.name in str(caught.value)
    assert all(torch.isfinite(t).all() for t in load_file(checkpoint / "trainable.safetensors").values())


def test_a_step_that_is_left_out_changes_no_weight_and_no_moment(tmp_path):
    seen = {}

    class Watch(Reporter):
        def notice(self, text):
            seen["notice"] = text

    class Watched(Callback):
        def build(self, groups):
            self.optimizer, self.hooked = torch.optim.AdamW(groups), 0
            return self.optimizer

        def after_optimizer(self, info):
            self.hooked += 1

        def after_step(self, info):
            if len(seen) == 1:  # the step that was left out
                later = self.state(info)
                seen["same"] = all(torch.equal(tensor, later[name]) for name, tensor in self.earlier.items())
                assert self.hooked == info.step - 1
            self.earlier = self.state(info)

        def state(self, info):
            moments = {
                f"{i} {key}": value.clone()
                for i, entry in enumerate(self.optimizer.state.values())
                for key, value in entry.items()
            }
            return {n: p.clone() for n, p in trained_tensors(info.model).items()} | moments

    work, where = diverging(tmp_path, on_nan="skip")
    watched = Watched()
    work.method.callbacks, work.method.optimizer = lambda model: [watched], watched.build
    object.__setattr__(work, "reporter", Watch())
    model, totals = train(work)
    assert where in seen["notice"] and seen["notice"].endswith("left out") and seen["same"]
    assert totals.steps == 12 and all(torch.isfinite(t).all() for t in trained_tensors(model).values())
    assert [math.isfinite(line["loss"]) for line in lines(work.run)].count(False) == 1


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    plain, _ = train(workload(tmp_path / "a", lora.Method(CONFIG), max_steps=3))
    checkpointed, _ = train(workload(tmp_path / "b", lora.Method(CONFIG), max_steps=3, gradient_checkpointing=True))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(checkpointed)[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_every_optimizer_of_the_schema_moves_every_trainable_tensor(tmp_path, optimizer):
    work = workload(tmp_path, lora.Method(CONFIG), max_steps=3, optimizer=optimizer, scheduler="constant")
    model, _ = train(work)
    torch.manual_seed(0)
    initial = trained_tensors(work.method.apply(tiny_llama(), Context(work.recipe)))
    assert all(not torch.equal(t, initial[n]) for n, t in trained_tensors(model).items())


def test_lines_carry_what_is_documented_at_the_steps_that_were_asked_for(tmp_path):
    work = workload(
        tmp_path,
        lora.Method(CONFIG),
        max_steps=7,
        logging_steps=3,
        eval_steps=7,
        neftune_noise=1.0,
        label_smoothing=0.1,
    )
    train(work)
    *trained, held_out = lines(work.run)
    assert [line["step"] for line in trained] == [1, 3, 6, 7] and held_out["step"] == 7
    common = {"step", "stage", "epoch"}
    speed = {"tokens_per_second", "supervised_tokens_per_second"}
    assert all(line.keys() == common | speed | {"loss", "learning_rate", "grad_norm"} for line in trained)
    measured = {"eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_supervised_tokens"}
    assert held_out.keys() == common | measured


def test_held_out_loss_is_logged_between(tmp_path):
    work = workload(tmp_path, lora.Method(CONFIG), max_steps=4, eval_steps=2)
    train(work)
    assert [line["step"] for line in lines(work.run) if "eval_loss" in line] == [2, 4]


def test_vectors_do_not_decay_and_every_tensor_is_in_one_group():
    model = tiny_llama()
    groups = by_decay(model.parameters(), TrainSection(output_dir="run", weight_decay=0.1))
    check_partition(model, groups)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[0]["params"].pop(), "is in no optimizer group"),
        (lambda g: g[1]["params"].append(g[0]["params"][0]), "is in 2 optimizer groups"),
        (lambda g: g[1]["params"].append(torch.nn.Parameter(torch.zeros(1))), "a foreign tensor does not train"),
    ],
)
def test_wrong_groups_are_refused(change, message):
    model = tiny_llama()
    groups = by_decay(model.parameters(), TrainSection(output_dir="run"))
    change(groups)
    with pytest.raises(RunError, match=message):
        check_partition(model, groups)

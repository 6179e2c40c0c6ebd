"""NeFT: cosines by hand, the lowest of all rows, a start from the base, scores of an earlier run, kills."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

import peftctl
from peftctl.errors import ArtifactError, RunError, UsageError
from peftctl.methods.base import Stage
from peftctl.methods.neft import Config, Method, cosines, turned
from peftctl.tuners.row_delta import layers, rows_of
from tests.commands.helpers import write_recipe
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.stopping import stopped_equals_straight
from tests.tiny import save_tiny, tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload

IDS = torch.arange(1, 25).reshape(2, 12)
SFT, MAIN = Stage("sft", 2), Stage(steps=4)
ROWS = 4 * (32 + 16 + 16 + 32 + 64 + 64 + 32)


def method(**keys):
    return Method(Config(**{"ratio": 0.06, "sft": 0.3, **keys}))


def tuned(chosen, base=tiny_llama):
    """Return a model after the first stage."""
    model = applied(chosen, base())
    chosen.calibrate(model, [])
    chosen.enter(model, SFT, None)
    run_steps(model, 3)
    return model


def fitted(chosen, base=tiny_llama):
    """Return a model at the beginning of the main stage."""
    model = tuned(chosen, base)
    chosen.enter(model, MAIN, None)
    return model.eval()


def linears(base):
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def merged(model):
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


def chosen_rows(model):
    return {(name, row) for name, rows in rows_of(model).items() for row in rows.tolist()}


# -- scores ---------------------------------------------------------------------------------------------------------


def test_cosines_are_the_naive_ones_and_those_of_equal_rows_are_1():
    torch.manual_seed(0)
    rows, after = torch.randn(2, 6, 9, dtype=torch.float64)
    after[0] = rows[0]
    rows[1] = after[1] = 0
    rows[2] = 0
    after[3] = 7.5 * rows[3]
    after[4] = -rows[4]
    found = cosines(rows, after)
    assert found[0] == found[1] == 1 and found[2] == 0
    assert found[3].item() == pytest.approx(1, abs=1e-14) and found[4].item() == pytest.approx(-1, abs=1e-14)
    torch.testing.assert_close(found[5], functional.cosine_similarity(rows[5], after[5], dim=0), rtol=1e-12, atol=0)


def test_a_turn_too_small_for_float32_is_seen():
    model = applied(method(), tiny_llama())
    method_rows = {name: torch.arange(m.out_features) for name, m in linears(tiny_llama()).items()}
    Method(Config()).load_state_dict(model, {"rows": method_rows})
    layer = dict(layers(model))["model.layers.0.mlp.up_proj"]
    layer.delta_weight["default"].data[5, 0] = 1e-4
    score = turned(model)["model.layers.0.mlp.up_proj"]
    row = layer.weight[5].double()
    cosine = functional.cosine_similarity(row, row + 1e-4 * nn.functional.one_hot(torch.tensor(0), 32), dim=0)
    assert 0 < score[5] < 1e-8 and score[5].item() == pytest.approx(1 - cosine.item(), rel=1e-3)
    assert score.count_nonzero() == 1


def test_a_row_that_only_grew_is_not_chosen():
    chosen = method(ratio=1 / ROWS)
    model = applied(chosen, tiny_llama())
    chosen.enter(model, SFT, None)
    found = dict(layers(model))
    grown, turning = found["model.layers.1.mlp.up_proj"], found["model.layers.2.self_attn.k_proj"]
    grown.delta_weight["default"].data[3] = 5 * grown.weight[3]
    turning.delta_weight["default"].data[7, 0] = 0.05
    chosen.enter(model, MAIN, None)
    assert chosen_rows(model) == {("model.layers.2.self_attn.k_proj", 7)}


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, lambda: tiny_of("gpt2", "cpu")])
def test_the_lowest_cosines_of_all_layers_are_chosen(base):
    chosen = method()
    model = applied(chosen, base())
    chosen.enter(model, SFT, None)
    run_steps_of(model)
    after, before = merged(model), dict(base().named_parameters())
    scores = []
    for name, layer in layers(model):
        weights = [t[f"{name}.weight"].detach().double() for t in (before, after)]
        weights = [w.T for w in weights] if type(layer.get_base_layer()).__name__ == "Conv1D" else weights
        scores += [(float(c), name, j) for j, c in enumerate(functional.cosine_similarity(*weights, dim=1))]
    chosen.enter(model, MAIN, None)
    k = round(0.06 * len(scores))
    assert chosen_rows(model) == {(name, j) for _, name, j in sorted(scores)[:k]}
    assert len({len(rows) for rows in rows_of(model).values()}) > 1, "not a share of each layer"


def run_steps_of(model):
    ids = torch.arange(1, 25).reshape(2, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


# -- the main stage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.03, 0.06, 0.12, 1.0])
def test_as_many_rows_train_as_the_ratio_says(ratio):
    model = fitted(method(ratio=ratio))
    assert len(chosen_rows(model)) == round(ratio * ROWS)
    random = applied(method(ratio=ratio, select="random"), tiny_llama())
    method(ratio=ratio, select="random")
    assert sum(random.peft_config["default"].counts.values()) == round(ratio * ROWS)


def test_it_begins_from_the_base_and_not_from_the_tuned_model():
    chosen = method()
    model = tuned(chosen)
    reference = tiny_llama()(input_ids=IDS).logits
    assert not torch.equal(model.eval()(input_ids=IDS).logits, reference)
    chosen.enter(model, MAIN, None)
    assert torch.equal(model.eval()(input_ids=IDS).logits, reference)
    assert all(not layer.delta_weight["default"].any() for _, layer in layers(model))


def test_with_decay_clipping_and_accumulation_only_chosen_rows_differ(tmp_path):
    settings = {"weight_decay": 0.3, "max_grad_norm": 0.1, "gradient_accumulation": 2, "batch_size": 2, "max_steps": 6}
    model, _ = train(workload(tmp_path, method(), **settings))
    after, found = merged(model), rows_of(model)
    for name, p in tiny_llama().named_parameters():
        rows = found.get(name.removesuffix(".weight"), torch.tensor([]))
        changed = (after[name] != p).nonzero()
        assert set(changed[:, 0].tolist()) == set(rows.tolist()), name
    reference = tiny_llama()(input_ids=IDS).logits
    with model.eval().disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)


def test_merged_it_answers_as_it_was_trained(tmp_path):
    model, _ = train(workload(tmp_path, method(), max_steps=6))
    logits = model.eval()(input_ids=IDS).logits
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_random_rows_are_as_many_drawn_by_the_seed_and_need_no_first_stage():
    def drawn(seed):
        chosen = method(select="random")
        model = chosen.apply(tiny_llama(), context_of(seed))
        chosen.calibrate(model, [])
        return chosen_rows(model)

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(drawn(0)) == len(chosen_rows(fitted(method())))
    assert [stage.name for stage in method(select="random").stages(recipe())] == ["main"]
    assert not method(select="random").notices(tiny_llama())


def context_of(seed):
    from peftctl.methods.base import Context

    return Context(recipe(seed=seed))


@pytest.mark.parametrize(("stage", "step"), [("sft", 1), ("sft", 2), ("main", 1), ("main", 3)])
def test_a_run_that_is_killed_in_any_stage_goes_on(tmp_path, stage, step):
    stopped_equals_straight(tmp_path, method, stage, step, max_steps=7)


def test_random_rows_outlive_a_kill(tmp_path):
    stopped_equals_straight(tmp_path, lambda: method(select="random"), "main", 2, max_steps=4)


def test_metrics_say_what_each_stage_trains(tmp_path):
    work = workload(tmp_path, method(), max_steps=7)
    model, _ = train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    said = {line["stage"]: (line["rows"], line["trainable_parameters"]) for line in lines if "rows" in line}
    weights = sum(m.weight.numel() for m in linears(tiny_llama()).values())
    assert said == {
        "sft": (ROWS, weights),
        "main": (round(0.06 * ROWS), sum(t.numel() for t in trained_tensors(model).values())),
    }
    assert f"{weights:,} parameters train in the first 30% of the run" in method().notices(tiny_llama())[0]


def test_the_count_deals_the_rows_evenly():
    chosen = method(ratio=0.5)
    per_block = 32 * 32 // 2 * 2 + 16 * 32 // 2 * 2 + 64 * 32 // 2 * 2 + 32 * 64 // 2
    assert chosen.count(tiny_llama()) == 4 * per_block


# -- scores of an earlier run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished run of full fine-tuning, with the folder of its base."""
    folder = tmp_path_factory.mktemp("full")
    base = save_tiny(folder / "base")
    path = write_recipe(folder, base, {"name": "full"})
    peftctl.train(peftctl.load_recipe(path, ["train.max_steps=3", "eval.metrics=[loss]"]))
    return peftctl.load_recipe(path).train.output_dir, base


def test_a_finished_run_of_full_gives_the_scores(full, tmp_path):
    run, base = full
    chosen = method(scores_from=run)
    assert [stage.name for stage in chosen.stages(recipe())] == ["main"]
    assert not chosen.notices(tiny_llama())
    model = applied_on(chosen, base)
    chosen.calibrate(model, [])
    after = load(run).named_parameters()
    after = {name: p.detach().double() for name, p in after}
    scores = [
        (float(c), name, j)
        for name, module in linears(tiny_llama()).items()
        for j, c in enumerate(cosines_of(module, after[f"{name}.weight"]))
    ]
    assert chosen_rows(model) == {(name, j) for _, name, j in sorted(scores)[: round(0.06 * ROWS)]}
    assert torch.equal(model.eval()(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
    path = write_recipe(tmp_path, base, {"name": "neft", "scores_from": run})
    result = peftctl.train(peftctl.load_recipe(path, ["train.max_steps=2", "eval.metrics=[loss]"]))
    assert result.summary["steps"] == 2


def load(run):
    return peftctl.load(run)[0]


def cosines_of(module, after):
    return functional.cosine_similarity(module.weight.detach().double(), after, dim=1)


def applied_on(chosen, base):
    from peftctl.methods.base import Context

    plain = recipe()
    section = plain.model.model_copy(update={"name_or_path": str(base)})
    return chosen.apply(tiny_llama(), Context(plain.model_copy(update={"model": section})))


def test_earlier_runs_that_do_not_fit_are_refused(full, tmp_path):
    run, _ = full
    with pytest.raises(UsageError, match=r"method\.scores_from: nowhere holds no model with its weights"):
        method(scores_from="nowhere").notices(tiny_llama())
    with pytest.raises(UsageError, match=r"has no model\.decoder\..*\.weight; give a run of the same base"):
        method(scores_from=run).notices(tiny_opt())
    with pytest.raises(UsageError, match=r"\.weight of .* is \(32, 32\), expected \(.*\); give a run"):
        method(scores_from=run).notices(tiny_of("llama", hidden_size=64))
    with pytest.raises(UsageError, match=r"began from .*base, this recipe from tiny"):
        applied(method(scores_from=run), tiny_llama())
    broken = shutil.copytree(f"{run}/model", tmp_path / "model")
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="is damaged or cut off"):
        method(scores_from=str(broken)).notices(tiny_llama())


def test_a_run_that_changed_nothing_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "same")
    chosen = method(scores_from=str(folder))
    model = applied_on(chosen, folder)
    with pytest.raises(RunError, match="neft: full fine-tuning has changed no row"):
        chosen.calibrate(model, [])


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens is an embedding; neft takes linear layers only"),
        ({"ratio": 1e-6}, r"method\.ratio: 1e-06 of 1,024 rows is none; raise it"),
    ],
)
def test_selections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        method(**keys).count(tiny_llama())


def test_random_rows_of_an_earlier_run_are_refused():
    with pytest.raises(ValueError, match="random rows have no scores"):
        Config(select="random", scores_from="run")

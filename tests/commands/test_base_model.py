"""Going on from earlier work: adapters merged into the base first, and training an adapter further."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftctl
from peftctl import cli
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.fold import fold
from peftctl.artifacts.load import attach, locate
from peftctl.artifacts.merge_order import merge_in_order
from peftctl.commands import base_model
from peftctl.commands.check import check
from peftctl.errors import ArtifactError, UsageError
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection
from tests.artifacts.helpers import ROWS, make_info, make_recipe, random_lora
from tests.commands.helpers import write_recipe
from tests.tiny import save_tiny, tiny_llama

LORA = {"name": "lora", "r": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


def train(path, *overrides, **options):
    return peftctl.train(peftctl.load_recipe(path, overrides), **options)


def recipe_in(folder, base, *, adapters=(), method=LORA, **sections):
    folder.mkdir()
    constant = {"max_steps": 4, "scheduler": "constant"}
    path = write_recipe(folder, base, method=method, train=constant | sections.pop("train", {}), **sections)
    if adapters:
        path.write_text(path.read_text().replace("  dtype:", f"  adapters: {[str(a) for a in adapters]}\n  dtype:"))
    return path


def damp(run, factor=0.1):
    """Make a run's adapter another one."""
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftctl.commands.train.loss_curve", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, tiny_dir):
    """Two finished runs on the tiny model, side by side; tests must not write into them."""
    folder = tmp_path_factory.mktemp("earlier")
    train(recipe_in(folder / "first", tiny_dir))
    train(recipe_in(folder / "second", tiny_dir, train={"seed": 5}))
    return folder / "first" / "run", folder / "second" / "run"


@pytest.fixture(scope="module")
def on_first(tmp_path_factory, tiny_dir, earlier):
    """A run on the base with the first earlier adapter merged in; tests must not write into it."""
    return train(recipe_in(tmp_path_factory.mktemp("on") / "first", tiny_dir, adapters=earlier[:1]))


def logits(target):
    return probe_logits(peftctl.load(str(target))[0], ROWS)


def folded(base, *adapters):
    """The base with adapters folded in one after the other, in float32, by hand."""
    model = load_model(ModelSection(name_or_path=str(base), dtype="float32"))
    for adapter in adapters:
        model, _ = fold(attach(model, locate(adapter)), torch.float32)
    return probe_logits(model, ROWS)


# -- model.adapters ----------------------------------------------------------------------------------------------


def test_adapters_are_merged_in_order_before_the_method_is_attached(tmp_path, tiny_dir, earlier):
    result = train(recipe_in(tmp_path / "new", tiny_dir, adapters=earlier))
    base = result.run / "base"
    torch.testing.assert_close(logits(base), folded(tiny_dir, *earlier), atol=1e-5, rtol=0)
    assert (logits(base) - logits(tiny_dir)).abs().max() > 0.1
    record = json.loads((base / "peftctl.json").read_text())
    assert [a["name"] for a in record["adapters"]] == ["run", "run"] and record["base"]["name"] == str(tiny_dir)
    config = json.loads((result.artefact / "adapter_config.json").read_text())
    manifest = json.loads((result.artefact / "peftctl.json").read_text())
    assert config["base_model_name_or_path"] == manifest["base"]["name"] == str(base)
    assert manifest["base"]["made_of"]["adapters"] == record["adapters"]
    assert "merged into the base before | run (lora), run (lora)" in (result.artefact / "README.md").read_text()
    assert peftctl.load_recipe(result.run / "recipe.yaml").model.adapters == [str(a) for a in earlier]
    assert result.summary["eval"]["before"]["loss"] == pytest.approx(
        peftctl.evaluate(str(base), recipe=str(result.run / "recipe.yaml")).metrics["loss"], rel=1e-6
    )
    assert not [p for p in result.run.iterdir() if p.name.startswith(".")]


def test_plain_peft_and_transformers_load_the_result(on_first):
    from peft import AutoPeftModelForCausalLM

    plain = AutoPeftModelForCausalLM.from_pretrained(on_first.artefact).eval()
    torch.testing.assert_close(probe_logits(plain, ROWS), logits(on_first.run), atol=1e-6, rtol=0)


def test_a_moved_run_takes_its_base_along_also_into_a_merge(tmp_path, on_first):
    expected = logits(on_first.run)
    moved = shutil.copytree(on_first.run, tmp_path / "moved")
    for name in ("adapter_config.json", "peftctl.json"):
        file = moved / "adapter" / name
        file.write_text(file.read_text().replace(str(on_first.run), "/gone"))
    torch.testing.assert_close(logits(moved), expected, atol=0, rtol=0)
    torch.testing.assert_close(logits(tmp_path / "moved" / "adapter"), expected, atol=0, rtol=0)
    peftctl.merge(str(moved), tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, atol=1e-4, rtol=0)


def test_an_adapter_on_a_merged_base_can_be_merged_again_behind_the_same(tmp_path, tiny_dir, earlier, on_first):
    second = on_first.run
    third = train(recipe_in(tmp_path / "third", tiny_dir, adapters=[earlier[0], second])).run
    torch.testing.assert_close(logits(third / "base"), logits(second), atol=1e-4, rtol=0)
    alone = recipe_in(tmp_path / "alone", tiny_dir, adapters=[second])
    with pytest.raises(UsageError, match=r"adapter of another base: .* with run merged in; list exactly these before"):
        check(peftctl.load_recipe(alone))
    wrong = recipe_in(tmp_path / "wrong", tiny_dir, adapters=[earlier[1], second])
    with pytest.raises(UsageError, match="adapter of another base"):
        check(peftctl.load_recipe(wrong))


def test_resume_uses_the_merged_base_again_unless_an_adapter_changed(tmp_path, tiny_dir, earlier, monkeypatch):
    first = shutil.copytree(earlier[0], tmp_path / "first")
    path = recipe_in(tmp_path / "new", tiny_dir, adapters=[first])
    result = train(path)
    whole = (result.artefact / "adapter_model.safetensors").read_bytes()
    for name in ("summary.json", "adapter", "checkpoints"):  # as after a kill before the first checkpoint
        entry = result.run / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    monkeypatch.setattr(base_model, "merge_in_order", None)
    again = train(path, resume=True)
    assert (again.artefact / "adapter_model.safetensors").read_bytes() == whole
    (again.run / "summary.json").unlink()
    damp(first)
    with pytest.raises(UsageError, match=r"changed since it was merged into .*/base; start over with --fresh"):
        train(path, resume=True)
    monkeypatch.undo()
    fresh = train(path, fresh=True)
    torch.testing.assert_close(logits(fresh.run / "base"), folded(tiny_dir, first), atol=1e-5, rtol=0)


def test_a_failed_gate_leaves_no_base(tmp_path, tiny_dir, earlier):
    broken = shutil.copytree(earlier[0], tmp_path / "broken")
    damp(broken, float("inf"))
    path = recipe_in(tmp_path / "new", tiny_dir, adapters=[earlier[1], broken])
    with pytest.raises(ArtifactError):
        train(path)
    left = {p.name for p in (tmp_path / "new" / "run").iterdir()}
    assert "base" not in left and not [name for name in left if "base" in name]


def test_the_base_is_stored_as_the_base_was_and_rounded_once(tmp_path):
    base = save_tiny(tmp_path / "base", tiny_llama(dtype="bfloat16"))
    adapters = []
    for seed in (1, 2):
        recipe = make_recipe(base, tmp_path / f"r{seed}", dtype="bfloat16")
        adapters.append(saved(recipe, random_lora(load_model(recipe.model), seed=seed, std=0.02)))
    results = merge_in_order([locate(a) for a in adapters], tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16} and [r.dtype for r in results] == [
        "float32",
        "bfloat16",
    ]
    exact = load_model(ModelSection(name_or_path=str(base), dtype="float32"))
    for adapter in adapters:
        exact, _ = fold(attach(exact, locate(adapter)), torch.float32)
    for name, tensor in exact.state_dict().items():
        if name in stored:
            torch.testing.assert_close(stored[name], tensor.to(torch.bfloat16), atol=0, rtol=2**-8)


def saved(recipe, model):
    from peftctl.artifacts.rundir import RunDir
    from peftctl.artifacts.save import save_artifact
    from peftctl.models.load import load_tokenizer

    run = RunDir(recipe.train.output_dir)
    save_artifact(model, load_tokenizer(recipe.model), run, make_info(recipe, model))
    return run.adapter


def test_several_runs_merge_from_the_command_line(tmp_path, tiny_dir, earlier, capsys):
    assert cli.run(["merge", *map(str, earlier), "--output", str(tmp_path / "merged"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["layers"] == 16 and figures["output"] == str(tmp_path / "merged") and figures["positions"] > 20
    torch.testing.assert_close(logits(tmp_path / "merged"), folded(tiny_dir, *earlier), atol=1e-5, rtol=0)


def test_an_adapter_of_plain_peft_is_merged_too(tmp_path, tiny_dir, earlier):
    plain = shutil.copytree(earlier[1] / "adapter", tmp_path / "plain")
    (plain / "peftctl.json").unlink()
    merge_in_order([locate(earlier[0]), locate(plain)], tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), folded(tiny_dir, *earlier), atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "merged" / "peftctl.json").read_text())
    assert [a["method"] for a in record["adapters"]] == ["lora", "peft"]
    merge_in_order([locate(plain)], tmp_path / "alone")
    torch.testing.assert_close(logits(tmp_path / "alone"), folded(tiny_dir, earlier[1]), atol=1e-5, rtol=0)


def test_a_dry_run_checks_the_adapters_and_merges_nothing(tmp_path, tiny_dir, earlier, monkeypatch):
    monkeypatch.setattr(base_model, "merge_in_order", None)
    path = recipe_in(tmp_path / "new", tiny_dir, adapters=earlier)
    assert check(peftctl.load_recipe(path)).trainable > 0
    assert not (tmp_path / "new" / "run").exists()


def test_adapters_that_can_not_be_merged_are_refused_before_anything_is_written(tmp_path, tiny_dir, earlier):
    other = save_tiny(tmp_path / "other", tiny_llama(seed=9))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_text("model: {}\n")
    shots = tmp_path / "shots"
    shutil.copytree(earlier[0], shots)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (shots / "adapter" / name).unlink()
    unmergeable = shutil.copytree(earlier[0], tmp_path / "unmergeable")
    manifest = unmergeable / "adapter" / "peftctl.json"
    manifest.write_text(manifest.read_text().replace('"method": "lora"', '"method": "hard_prompt"'))
    cases = [
        (
            other,
            earlier[0],
            r"model.adapters: .* is an adapter of another base: .* fingerprint \w{12}, .*other has \w{12}$",
        ),
        (tiny_dir, unfinished, "model.adapters: .*not finished"),
        (tiny_dir, shots, "model.adapters: .* holds a tokenizer with its template and no weights"),
        (tiny_dir, unmergeable, "model.adapters: .*Hard prompt can't be merged"),
        (tiny_dir, other, "model.adapters: .*other is a whole model, not an adapter"),
    ]
    for i, (base, adapter, message) in enumerate(cases):
        path = recipe_in(tmp_path / f"new{i}", base, adapters=[adapter])
        with pytest.raises(UsageError, match=message):
            train(path)
        assert not (tmp_path / f"new{i}" / "run").exists()


def test_a_run_does_not_write_over_what_it_comes_from(tmp_path, tiny_dir, earlier):
    first = shutil.copytree(earlier[0], tmp_path / "first")
    path = recipe_in(tmp_path / "new", tiny_dir, adapters=[first])
    with pytest.raises(UsageError, match=r"first lies in train.output_dir"):
        train(path, f"train.output_dir={first}", fresh=True)
    assert (first / "adapter" / "adapter_model.safetensors").is_file()


# -- method.init_from --------------------------------------------------------------------------------------------


def test_training_goes_on_at_the_loss_where_the_first_run_ended(tmp_path, tiny_dir, earlier):
    path = recipe_in(tmp_path / "new", tiny_dir, method=LORA | {"init_from": str(earlier[0])})
    ended = json.loads((earlier[0] / "summary.json").read_text())["eval"]["after"]
    result = train(path)
    assert result.summary["eval"]["before"] == pytest.approx(ended, rel=1e-6)
    assert result.summary["eval"]["after"]["loss"] < ended["loss"]
    assert json.loads((result.run / "adapter" / "peftctl.json").read_text())["base"]["name"] == str(tiny_dir)


def test_the_start_gives_the_finished_adapter_s_logits_and_is_what_must_move(tmp_path, tiny_dir, earlier):
    path = recipe_in(tmp_path / "new", tiny_dir, method=LORA | {"init_from": str(earlier[0])})
    with pytest.raises(ArtifactError, match="nothing was learned"):
        train(path, "train.learning_rate=0.0")
    seen = started(path)
    torch.testing.assert_close(seen, logits(earlier[0]), atol=0, rtol=0)


def started(path):
    """Return the logits of the model that training begins with."""
    from peftctl.artifacts.start import load_start, start_of
    from peftctl.commands.prepare import prepare
    from peftctl.methods.base import Context

    recipe = peftctl.load_recipe(path)
    ready = prepare(recipe)
    model = ready.method.apply(load_model(recipe.model), Context(recipe))
    load_start(start_of(recipe), model)
    return probe_logits(model.eval(), ROWS)


def test_a_resumed_run_does_not_start_from_the_adapter_again(tmp_path, tiny_dir, earlier, monkeypatch):
    from peftctl.errors import RunError
    from tests.commands.test_train import Killer

    method = LORA | {"init_from": str(earlier[0])}
    straight = train(recipe_in(tmp_path / "a", tiny_dir, method=method))
    path = recipe_in(tmp_path / "b", tiny_dir, method=method, train={"save_steps": 1})
    with pytest.raises(RunError, match="--resume"):
        train(path, reporter=Killer(2))
    monkeypatch.setattr("peftctl.commands.train.load_start", None)
    resumed = train(path, resume=True)
    name = "adapter_model.safetensors"
    assert (straight.artefact / name).read_bytes() == (resumed.artefact / name).read_bytes()
    assert resumed.summary["eval"]["before"] == straight.summary["eval"]["before"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"has method.r 4, this recipe has 8"),
        ({"alpha": 3}, r"has method.alpha 16, this recipe has 3"),
        ({"target_modules": ["q_proj"]}, r"has other targets than this recipe: 8 tensors differ"),
        ({"rank_pattern": {"q_proj": 2}}, r"has method.rank_pattern None, this recipe has {'q_proj': 2}"),
    ],
)
def test_an_adapter_of_another_shape(tmp_path, tiny_dir, earlier, change, message):
    path = recipe_in(tmp_path / "new", tiny_dir, method=LORA | {"init_from": str(earlier[0])} | change)
    with pytest.raises(UsageError, match=f"^method.init_from: {earlier[0]} {message}"):
        check(peftctl.load_recipe(path))


def test_starts_that_do_not_fit(tmp_path, tiny_dir, earlier):
    other = save_tiny(tmp_path / "other", tiny_llama(seed=9))
    method = LORA | {"init_from": str(earlier[0])}
    with pytest.raises(UsageError, match=r"method.init_from: .*run is an adapter of another base"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "a", other, method=method)))
    with pytest.raises(UsageError, match=r"trained without model.adapters"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "b", tiny_dir, adapters=earlier[1:], method=method)))
    with pytest.raises(UsageError, match="is a whole model, not an adapter"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "c", tiny_dir, method=LORA | {"init_from": str(tiny_dir)})))
    ia3 = shutil.copytree(earlier[0], tmp_path / "ia3")
    (ia3 / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(UsageError, match="was trained with lora, this recipe has lora"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "d", tiny_dir, method=LORA | {"init_from": str(ia3)})))


def test_a_start_on_a_merged_base_goes_on_behind_the_same_adapters(tmp_path, tiny_dir, earlier, on_first):
    method = LORA | {"init_from": str(on_first.run)}
    third = train(recipe_in(tmp_path / "third", tiny_dir, adapters=earlier[:1], method=method))
    assert third.summary["eval"]["before"] == pytest.approx(on_first.summary["eval"]["after"], rel=1e-6)
    with pytest.raises(UsageError, match="with run merged in; list exactly these"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "alone", tiny_dir, method=method)))


# -- with what LoRA trains beside its factors ----------------------------------------------------------------------


TOKENS = ["<tool>", "<call>", "<end>", "<a1>", "<a2>", "<a3>"]  # the tokenizer has 396, the model 400 rows


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory, tiny_dir):
    """A run that added tokens and trained a norm whole."""
    folder = tmp_path_factory.mktemp("tokens")
    path = recipe_in(
        folder / "first", tiny_dir, method=LORA | {"modules_to_save": ["norm"]}, model={"add_tokens": TOKENS}
    )
    return train(path)


def test_new_tokens_of_an_earlier_adapter_are_part_of_the_merged_base(tmp_path, tiny_dir, with_tokens, earlier):
    result = train(recipe_in(tmp_path / "new", tiny_dir, adapters=[with_tokens.run]))
    base, tokenizer = peftctl.load(str(result.run / "base"))
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(range(396, 402))
    assert base.get_input_embeddings().weight.shape[0] == 402
    torch.testing.assert_close(logits(result.run / "base"), logits(with_tokens.run), atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match=r"added tokens that .*run does not know; list it last"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "order", tiny_dir, adapters=[with_tokens.run, earlier[0]])))


def test_training_goes_on_with_new_tokens_and_whole_modules(tmp_path, tiny_dir, with_tokens):
    method = LORA | {"modules_to_save": ["norm"], "init_from": str(with_tokens.run)}
    result = train(recipe_in(tmp_path / "new", tiny_dir, method=method, model={"add_tokens": TOKENS}))
    assert result.summary["eval"]["before"] == pytest.approx(with_tokens.summary["eval"]["after"], rel=1e-6)
    with pytest.raises(UsageError, match=r"method.init_from: .* has .*trainable_token_indices|other targets"):
        check(peftctl.load_recipe(recipe_in(tmp_path / "without", tiny_dir, method=method)))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_plain_base_goes_on_over_the_quantised_one(tmp_path, tiny_dir, earlier, bits):
    method = LORA | {"init_from": str(earlier[0])}
    result = train(recipe_in(tmp_path / "new", tiny_dir, method=method, quantization={"bits": bits}))
    ended = json.loads((earlier[0] / "summary.json").read_text())["eval"]["after"]["loss"]
    start = result.summary["eval"]["before"]["loss"]
    assert start == pytest.approx(ended, abs=0.5) and start != ended

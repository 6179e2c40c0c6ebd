"""`model.add_tokens` from recipe to merged model: rows are trained, saved, reloaded and folded; ties are kept."""

import json

import pytest
import torch

import peftctl
from peftctl.commands.prepare import refuse_unsupported
from peftctl.errors import UsageError
from peftctl.methods import registry
from peftctl.models.fingerprint import weights_fingerprint
from peftctl.models.load import load_model
from peftctl.recipe.schema import ModelSection
from tests.commands.helpers import write_recipe
from tests.methods.helpers import recipe as make_recipe
from tests.tiny import save_tiny, tiny_llama

TOKENS = ["<tool>", "<end>", "<a>", "<b>", "<c>", "<d>"]  # more than the base has spare rows for
LORA = {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def recipe_with_tokens(folder, method=LORA, *, tie=True, dtype="float32", **sections):
    """Write a recipe whose answers begin and end with new tokens."""
    base = save_tiny(folder / "base", tiny_llama(tie=tie, dtype=dtype))
    path = write_recipe(folder, base, method, model={"add_tokens": TOKENS, "dtype": dtype}, **sections)
    for name, first in (("train.jsonl", 0), ("eval.jsonl", 100)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"<a>{i}<b>"},
                    {"role": "assistant", "content": f"<tool>{i}<c><d><end>"},
                ]
            }
            for i in range(first, first + 12)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return peftctl.load_recipe(path)


@pytest.fixture(scope="module", params=[(True, "float32"), (False, "bfloat16")], ids=["tied", "untied bfloat16"])
def run(request, tmp_path_factory):
    tie, dtype = request.param
    folder = tmp_path_factory.mktemp("run")
    return tie, folder, peftctl.train(recipe_with_tokens(folder, tie=tie, dtype=dtype))


def logits(model, tokenizer):
    ids = tokenizer("<tool>7<c><d><end>", return_tensors="pt")["input_ids"]
    assert sorted(i for i in ids[0].tolist() if i >= 396) == [396, 397, 400, 401]
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_the_run_counts_the_new_rows_and_records_the_vocabulary(run):
    tie, _, result = run
    assert result.summary["trainable_parameters"] == 4 * 4 * (64 + 48) + (1 if tie else 2) * 6 * 32
    manifest = json.loads((result.artefact / "peftctl.json").read_text())
    assert manifest["config_changes"] == {"vocab_size": 402}


def test_the_fingerprint_is_of_the_base_as_it_lies_on_disk(run):
    _, folder, result = run
    manifest = json.loads((result.artefact / "peftctl.json").read_text())
    plain = load_model(ModelSection(name_or_path=str(folder / "base"), dtype=manifest["base"]["dtype"]))
    assert manifest["base"]["fingerprint"] == weights_fingerprint(plain)


def test_the_adapter_holds_the_rows_and_no_whole_embedding(run):
    from safetensors.torch import load_file

    tie, _, result = run
    tensors = load_file(result.artefact / "adapter_model.safetensors")
    rows = {name: t for name, t in tensors.items() if "lora" not in name}
    assert [tuple(t.shape) for t in rows.values()] == [(6, 32)] * (1 if tie else 2)


def test_every_new_row_has_moved_from_the_mean(run):
    _, folder, result = run
    model, _ = peftctl.load(result.run)
    plain = load_model(ModelSection(name_or_path=str(folder / "base"), dtype="float32"))
    mean = plain.get_input_embeddings().weight.mean(dim=0)
    assert ((model.get_input_embeddings().weight[396:].float() - mean).abs().amax(dim=1) > 1e-2).all()
    assert torch.equal(model.get_input_embeddings().weight[:396].float(), plain.get_input_embeddings().weight[:396])


def test_merging_gives_a_whole_model_of_the_larger_vocabulary(run, tmp_path):
    tie, _, result = run
    outcome = peftctl.merge(result.run, tmp_path / "merged", dtype="float32")
    assert outcome.layers == 8 + 2
    merged, tokenizer = peftctl.load(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer) == 402
    assert merged.config.tie_word_embeddings == tie == (merged.lm_head.weight is merged.model.embed_tokens.weight)
    unmerged, same = peftctl.load(result.run, dtype="float32")
    torch.testing.assert_close(logits(merged, tokenizer), logits(unmerged, same), rtol=1e-4, atol=1e-4)


def test_the_model_card_says_how_many_rows_the_base_needs(run):
    _, _, result = run
    card = (result.artefact / "README.md").read_text()
    lines = card[card.index("```python") + 9 :].split("```")[0].replace("DIRECTORY", str(result.artefact))
    assert "base.resize_token_embeddings(402)" in lines
    names: dict = {}
    exec(lines, names)  # as a reader would
    ours, tokenizer = peftctl.load(result.run)
    assert torch.equal(logits(names["model"].eval(), names["tokenizer"]), logits(ours, tokenizer))


def test_full_fine_tuning_writes_a_model_of_the_larger_vocabulary(tmp_path):
    result = peftctl.train(recipe_with_tokens(tmp_path, {"name": "full"}, train={"max_steps": 2}))
    model, tokenizer = peftctl.load(result.run)
    assert model.config.vocab_size == len(tokenizer) == 402
    assert result.summary["trainable_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["last_layers", "hard_prompt"])
def test_methods_that_train_no_rows_refuse_new_tokens(name):
    method = registry.get(name)
    recipe = make_recipe(method.Config())
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"add_tokens": TOKENS})})
    with pytest.raises(UsageError, match=f"model.add_tokens: {name} does not train the rows of new tokens"):
        refuse_unsupported(recipe, method(recipe.method))


def test_a_resumed_run_goes_on_with_the_same_rows(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    results = []
    for folder in (whole, cut):
        folder.mkdir()
        recipe = recipe_with_tokens(folder, train={"save_steps": 3})
        if folder is cut:
            _stop_after_three(recipe)
            results.append(peftctl.train(recipe, resume=True))
        else:
            results.append(peftctl.train(recipe))
    adapters = [(r.artefact / "adapter_model.safetensors").read_bytes() for r in results]
    assert adapters[0] == adapters[1]


def _stop_after_three(recipe):
    """Leave what a kill after the third step leaves."""
    import shutil

    run = peftctl.train(recipe).run
    shutil.rmtree(run / "adapter")
    (run / "summary.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != "checkpoint-3":
            shutil.rmtree(checkpoint)

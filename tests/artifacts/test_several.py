"""Several adapters on one base: switched in place, and mixed in one batch."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import peftctl
from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.locate import locate
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.save import save_artifact
from peftctl.artifacts.several import activate, adapter_names, load_several
from peftctl.errors import UsageError
from peftctl.models.load import load_model, load_tokenizer
from tests.artifacts.helpers import ROWS, make_info, make_recipe, random_lora
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer

# Rows of several lengths, padded on the left as generation pads them.
IDS = torch.tensor([[3, 3, 9, 20, 31], [41, 300, 2, 17, 8], [3, 60, 61, 62, 63], [70, 71, 72, 73, 74]])
MASK = (IDS != 3).long()


def write(folder, base, seed, dtype="float32", **config):
    """Write a finished run whose adapter is random."""
    recipe = make_recipe(base, folder, dtype=dtype)
    plain = load_model(recipe.model)
    run = RunDir(folder)
    save_artifact(random_lora(plain, seed=seed, **config), load_tokenizer(recipe.model), run, make_info(recipe, plain))
    run.write_text(run.recipe, f"model:\n  name_or_path: {base}\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("several") / "plain")


@pytest.fixture(scope="module")
def runs(base):
    """Adapters of different ranks and targets, called a, b and c."""
    folder = base.parent
    b = write(folder / "b", base, 2, r=8, lora_alpha=32)
    return write(folder / "a", base, 1), b, write(folder / "c", base, 3, target_modules=["q_proj", "lm_head"])


def copy_of(run, place, **config):
    """Copy a run and change its adapter_config.json."""
    copy = shutil.copytree(run, place)
    file = copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return copy


def forward(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, **options).logits


def test_every_adapter_answers_as_it_does_alone(base, runs):
    model, tokenizer = peftctl.load(runs)
    assert list(model.peft_config) == ["a", "b", "c"] and model.active_adapter == "a" and not model.training
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    alone = [probe_logits(peftctl.load(run)[0], ROWS) for run in runs]
    assert (alone[0] - alone[1]).abs().max() > 0.1 < (alone[1] - alone[2]).abs().max()
    torch.testing.assert_close(probe_logits(model, ROWS), alone[0], atol=0, rtol=0)
    for name, expected in [
        *zip("abc", alone, strict=True),
        ("base", probe_logits(tiny_llama(), ROWS)),
        ("b", alone[1]),
    ]:
        activate(model, name)
        torch.testing.assert_close(probe_logits(model, ROWS), expected, atol=1e-6, rtol=0)
    model.set_adapter("c")
    torch.testing.assert_close(probe_logits(model, ROWS), alone[2], atol=1e-6, rtol=0)


def test_rows_of_a_padded_batch_under_different_adapters_equal_single_runs(base, runs):
    model, _ = peftctl.load(runs)
    names = ["b", "__base__", "c", "a"]
    mixed = forward(model, adapter_names=names)
    for row, name in enumerate(names):
        one = load_model_of(base, runs, name)
        kept = MASK[row].bool()
        torch.testing.assert_close(mixed[row][kept], forward(one)[row][kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(forward(model), forward(load_model_of(base, runs, "a")), atol=1e-6, rtol=0)


def load_model_of(base, runs, name):
    return tiny_llama() if name == "__base__" else peftctl.load(dict(zip("abc", runs, strict=True))[name])[0]


def test_generation_mixes_rows_too(base, runs):
    model, _ = peftctl.load(runs)
    names = ["c", "a", "__base__", "b"]
    options = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    mixed = model.generate(input_ids=IDS, adapter_names=names, **options)
    singles = [load_model_of(base, runs, name).generate(input_ids=IDS, **options) for name in names]
    assert mixed.tolist() == [single[row].tolist() for row, single in enumerate(singles)]
    assert len({tuple(single[3].tolist()) for single in singles}) == 4  # the adapters do say different things


def test_the_layer_that_trains_mixes_rows_in_eval():
    from peftctl.methods.lora import Config, Method
    from tests.methods.helpers import applied

    model = applied(Method(Config(r=4, target_modules=["q_proj", "v_proj"])), tiny_llama())
    model.add_adapter("other", model.peft_config["default"])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    mixed = forward(model, adapter_names=["other", "__base__", "default", "other"])
    model.set_adapter("other")
    torch.testing.assert_close(mixed[[0, 3]], forward(model)[[0, 3]], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed[1], forward(tiny_llama())[1], atol=1e-5, rtol=0)


# -- names -------------------------------------------------------------------------------------------------------


def test_names_are_short_and_unique_and_none_that_torch_or_peft_would_confuse(base, runs, tmp_path):
    places = ["x/same", "y/same", "x/lora-v1.5", "x/train", "x/q_proj", "x/0", "x/base"]
    copies = [shutil.copytree(runs[0], tmp_path / place) for place in places]
    names = adapter_names([locate(copy) for copy in copies])
    assert names == ["x/same", "y/same", "lora-v1_5", "x/train", "x/q_proj", "x/0", "x/base"]
    model, _ = peftctl.load([runs[1], *copies])
    expected = probe_logits(peftctl.load(runs[0])[0], ROWS)
    for name in names:
        activate(model, name)
        torch.testing.assert_close(probe_logits(model, ROWS), expected, atol=1e-6, rtol=0)
    assert adapter_names([locate(runs[0] / "adapter"), locate(runs[1] / "adapter")]) == ["a", "b"]


def test_the_same_adapter_twice(runs):
    with pytest.raises(UsageError, match="/a/adapter: is given twice"):
        peftctl.load([runs[0], runs[0] / "adapter"])


# -- what can't share --------------------------------------------------------------------------------------------


def refusal(*targets):
    with pytest.raises(UsageError) as caught:
        peftctl.load(list(targets))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_base_is_refused_before_weights_load(base, runs, tmp_path, monkeypatch):
    other = save_tiny(tmp_path / "other", tiny_llama(seed=9))
    stranger = write(tmp_path / "stranger", other, 1)
    monkeypatch.setattr("peftctl.artifacts.several.load_base", None)
    assert "stranger: is an adapter of another base" in refusal(runs[0], stranger)


def test_a_base_without_a_record_is_compared_by_its_weights(base, runs, tmp_path):
    plain = shutil.copytree(runs[1], tmp_path / "plain")
    (plain / "adapter" / "peftctl.json").unlink()
    model, _ = peftctl.load([plain, runs[0]])
    assert list(model.peft_config) == ["plain", "a"]
    other = save_tiny(tmp_path / "other", tiny_llama(seed=9))
    stranger = write(tmp_path / "stranger", other, 1)
    assert "stranger: is an adapter of another base" in refusal(plain, stranger)


def test_whole_models_templates_prompts_other_types_and_biases(base, runs, tmp_path):
    assert "is a whole model; only adapters of one base" in refusal(runs[0], base)
    shots = shutil.copytree(runs[0], tmp_path / "shots")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (shots / "adapter" / name).unlink()
    assert "shots: holds a template and no weights" in refusal(shots, runs[0])
    prompt = copy_of(runs[0], tmp_path / "prompt", peft_type="PROMPT_TUNING", num_virtual_tokens=4)
    assert "prompt: PROMPT_TUNING is a prompt, which can't share" in refusal(runs[0], prompt)
    scales = copy_of(runs[0], tmp_path / "scales", peft_type="IA3")
    assert "scales: is IA3, " in refusal(runs[0], scales)
    biased = copy_of(runs[0], tmp_path / "biased", bias="all")
    assert "biased: trains biases of the base itself" in refusal(runs[0], biased)
    grown = shutil.copytree(runs[0], tmp_path / "grown")
    manifest = grown / "adapter" / "peftctl.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config_changes": {"vocab_size": 401}}))
    assert "grown: its change of the base's configuration ({'vocab_size': 401}) is not that of" in refusal(
        runs[0], grown
    )
    with pytest.raises(UsageError, match="expected at least one adapter"):
        peftctl.load([])
    with pytest.raises(UsageError, match="has no task 'x'"):
        peftctl.load([runs[0]], task="x")


def test_another_vocabulary(base, runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    tokenizer = load_tokenizer(make_recipe(base, tmp_path).model)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(Path(other) / "adapter")
    assert "other: its tokenizer has other tokens than that of" in refusal(runs[1], other)


def test_tokenizers_keep_their_own_templates(base, runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "other")
    tokenizer = load_tokenizer(make_recipe(base, tmp_path).model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(Path(other) / "adapter")
    several = load_several([runs[1], other])
    assert several.tokenizer is several.tokenizers["b"]
    assert several.tokenizers["other"].chat_template == "{{ messages[0]['content'] }}"


def test_a_batch_is_never_mixed_where_peft_would_pass_over_the_names(base, runs, tmp_path):
    whole = write(tmp_path / "whole", base, 4, modules_to_save=["norm"])
    model, _ = peftctl.load([runs[0], whole])
    torch.testing.assert_close(forward(model), forward(peftctl.load(runs[0])[0]), atol=1e-6, rtol=0)
    activate(model, "whole")
    torch.testing.assert_close(forward(model), forward(peftctl.load(whole)[0]), atol=1e-6, rtol=0)
    activate(model, "base")
    torch.testing.assert_close(forward(model), forward(tiny_llama()), atol=1e-6, rtol=0)
    activate(model, "a")
    with pytest.raises(UsageError, match=r"adapter_names: adapters with whole modules .* can't share a batch"):
        forward(model, adapter_names=["a", "whole", "a", "a"])
    model, _ = peftctl.load(runs)
    with pytest.raises(UsageError, match="adapter_names: no adapter 'd'"):
        forward(model, adapter_names=["a", "b", "c", "d"])


def test_types_whose_tuner_drops_the_names(base, tmp_path):
    from peft import IA3Config, get_peft_model

    targets = []
    for i in (1, 2):
        config = IA3Config(
            target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_model(make_recipe(base, tmp_path).model), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3 * i)
        model.save_pretrained(tmp_path / f"scales{i}")
        targets.append(tmp_path / f"scales{i}")
    model, _ = peftctl.load(targets)
    activate(model, "scales2")
    torch.testing.assert_close(forward(model), forward(peftctl.load(targets[1])[0]), atol=1e-6, rtol=0)
    for call in (model, model.generate):
        with pytest.raises(UsageError, match="adapters of this type can't share a batch"):
            call(input_ids=IDS, attention_mask=MASK, adapter_names=["scales1"] * 4)

"""`peftctl model`: the tree, what targets select, and the ranks of recipes and adapters."""

import json
import re
import shutil

import pytest
from safetensors import safe_open

from peftctl.models.outline import collapse, outline, ranges
from tests.artifacts.helpers import lora_run
from tests.commands.helpers import write_recipe
from tests.commands.looking import refused, report, run
from tests.tiny import save_tiny, tiny_llama


def expanded(name):
    """Return the names that `layers.{0..2,5}.x` stands for."""
    found = re.search(r"\{(.*)\}", name)
    if found is None:
        return [name]
    parts = [part.split("..") for part in found[1].split(",")]
    numbers = [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]
    return [name.replace(found[0], str(n)) for n in numbers]


def test_the_tree_shows_equal_blocks_once_and_counts_tied_weights_once(capsys, tiny_dir):
    content = report(capsys, tiny_dir)
    rows = {m["name"]: m for m in content["modules"]}
    assert content["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert sum(m["parameters"] for m in content["modules"] if m["depth"] == 0) == content["parameters"]
    block = rows["model.layers.{0..3}"]
    assert block["count"] == 4 and block["parameters"] == 4 * sum(
        p.numel() for p in tiny_llama().model.layers[0].parameters()
    )
    assert rows["model.layers.{0..3}.mlp.down_proj"]["shape"] == "32x64"
    assert rows["lm_head"]["tied_to"] == "model.embed_tokens.weight" and rows["lm_head"]["parameters"] == 0
    assert content["bytes"]["float32"] == 4 * content["parameters"]


def test_an_untied_head_counts(capsys, tmp_path):
    content = report(capsys, save_tiny(tmp_path / "untied", tiny_llama(tie=False)))
    head = next(m for m in content["modules"] if m["name"] == "lm_head")
    assert head["tied_to"] is None and head["parameters"] == 400 * 32


def test_the_words_and_a_pattern_are_counted_as_lora_would(capsys, tiny_dir):
    content = report(capsys, tiny_dir, "--targets", "[q_proj, v_proj]", "--rank", "3")
    assert content["selections"] == {
        "all-linear": {"modules": 28, "lora_parameters": 4 * 3 * (64 + 48 + 48 + 64 + 96 * 3)},
        "attention": {"modules": 16, "lora_parameters": 4 * 3 * (64 + 48 + 48 + 64)},
        "mlp": {"modules": 12, "lora_parameters": 4 * 3 * 96 * 3},
        "--targets": {"modules": 8, "lora_parameters": 4 * 3 * (64 + 48)},
    }
    marked = {m["name"]: m["selected_by"] for m in content["modules"] if m["selected_by"]}
    assert marked["model.layers.{0..3}.self_attn.q_proj"] == ["all-linear", "attention", "--targets"]
    assert marked["model.layers.{0..3}.mlp.up_proj"] == ["all-linear", "mlp"]


def test_blocks_that_a_pattern_tells_apart_are_shown_apart(capsys, tiny_dir):
    content = report(capsys, tiny_dir, "--targets", r".*layers\.[02]\..*q_proj")
    assert [m["name"] for m in content["modules"] if m["selected"]] == ["model.layers.{0,2}.self_attn.q_proj"]
    assert {m["name"] for m in content["modules"]} >= {"model.layers.{0,2}", "model.layers.{1,3}"}


def test_a_pipe_gets_plain_lines_that_are_never_folded(capsys, tiny_dir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = run(capsys, tiny_dir, "--targets", "[q_proj]")
    assert code == 0
    lines = out.splitlines()
    row = next(line for line in lines if "q_proj" in line and "Linear" in line)
    assert row.startswith("      q_proj ") and row.split() == [
        "q_proj", "Linear", "32x32", "4,096", "all-linear,", "attention,", "--targets",
    ]  # fmt: skip
    assert any("tied to model.embed_tokens.weight" in line for line in lines)
    assert lines[-1].split() == ["--targets", "[q_proj]", "4", "2,048", "4.100%"]


def test_an_encoder_decoder_has_a_tree(capsys, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4)
    content = report(capsys, save_tiny(tmp_path / "t5", T5ForConditionalGeneration(config)))
    assert content["architecture"] == "T5ForConditionalGeneration"
    assert "encoder.block.{1..2}.layer.0.SelfAttention.q" in {m["name"] for m in content["modules"]}


def test_a_classifier_is_shown_with_its_head(capsys, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32))
    content = report(capsys, save_tiny(tmp_path / "bert", model))
    assert content["architecture"] == "BertForSequenceClassification"
    assert "classifier" in {m["name"] for m in content["modules"]}


def test_blocks_of_blocks_keep_their_numbers():
    from torch import nn

    model = nn.Module()
    model.grid = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)]) for _ in range(3))
    rows = outline(model, {})
    assert [(r.name, r.count, r.parameters) for r in rows] == [("grid.{0..2}.{0..1}", 6, 36), ("grid.{0..2}.2", 3, 27)]
    assert ranges([5, 0, 1, 2]) == "{0..2,5}" and ranges([7]) == "7"
    assert collapse(["a.0.b", "a.1.b", "a.3.c", "d"]) == {
        "a.0.b": "a.{0..1}.b", "a.1.b": "a.{0..1}.b", "a.3.c": "a.3.c", "d": "d",
    }  # fmt: skip


def test_a_recipe_shows_rank_alpha_and_scale_by_pattern(capsys, tmp_path, tiny_dir):
    recipe = write_recipe(tmp_path, tiny_dir, {"name": "lora", "r": 4, "alpha": 8, "target_modules": "[qv]_proj"})
    content = report(
        capsys, recipe, "method.target_modules=[q_proj, v_proj]",
        "method.rank_pattern={layers.1.self_attn.q_proj: 2}", "method.alpha_pattern={v_proj: 6}",
    )  # fmt: skip
    found = {
        row["name"]: (row["count"], row["r"], row["alpha"], row["scale"], row["parameters"])
        for row in content["adapted"]
    }
    assert found == {
        "model.layers.{0,2..3}.self_attn.q_proj": (3, 4, 8.0, 2.0, 3 * 4 * 64),
        "model.layers.1.self_attn.q_proj": (1, 2, 8.0, 4.0, 2 * 64),
        "model.layers.{0..3}.self_attn.v_proj": (4, 4, 6.0, 1.5, 4 * 4 * 48),
    }
    assert content["parameters"] == sum(row[-1] for row in found.values())


@pytest.mark.parametrize("method", ["full", "last_layers"])
def test_other_methods_show_what_trains(capsys, tmp_path, tiny_dir, method):
    content = report(capsys, write_recipe(tmp_path, tiny_dir, {"name": method}))
    rows = {row["name"]: row for row in content["adapted"]}
    model = tiny_llama()
    trained = model if method == "full" else model.model.layers[2:]
    assert content["parameters"] == sum(p.numel() for p in trained.parameters())
    blocks = "{0..3}" if method == "full" else "{2..3}"
    up = rows[f"model.layers.{blocks}.mlp.up_proj.weight"]
    assert up["shape"] == [64, 32] and up["r"] is None and up["count"] == (4 if method == "full" else 2)


def test_a_method_that_trains_nothing_says_so(capsys, tiny_dir):
    arguments = ("hard_prompt", f"model.name_or_path={tiny_dir}")
    assert report(capsys, *arguments)["adapted"] == []
    assert "nothing trains" in run(capsys, *arguments)[1]


def test_a_shipped_recipe_goes_by_its_name(capsys):
    assert report(capsys, "lora")["method"] == "lora"


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 6}},
        {"use_rslora": True, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
        {"use_dora": True},
    ],
    ids=["patterns", "rslora-embedding", "dora"],
)
def test_an_adapters_files_tell_what_its_layers_do(capsys, tmp_path, config, monkeypatch):
    from peft.tuners.lora import LoraLayer

    from peftctl.artifacts.load import load

    finished, _ = lora_run(tmp_path, **config)
    model, _ = load(finished.path)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    shutil.rmtree(tmp_path / "base")  # it needs the adapter's files alone
    content = report(capsys, finished.path)
    low_rank = [row for row in content["adapted"] if row["r"] is not None]
    found = {name: row for row in low_rank for name in expanded(row["name"])}
    assert found.keys() == layers.keys() and sum(row["count"] for row in low_rank) == len(layers)
    for name, layer in layers.items():
        row = found[name]
        assert (row["r"], row["alpha"]) == (layer.r["default"], layer.lora_alpha["default"])
        assert row["scale"] == pytest.approx(layer.scaling["default"])
        assert row["shape"] == list(layer.get_base_layer().weight.shape)
    with safe_open(finished.adapter / "adapter_model.safetensors", "pt") as tensors:
        total = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    assert content["parameters"] == total
    if "modules_to_save" in config:
        norm = next(row for row in content["adapted"] if row["name"] == "model.norm.weight")
        assert norm["r"] is None and norm["parameters"] == 32


def test_files_of_two_adapters_do_not_pass_for_one(capsys, tmp_path):
    finished, _ = lora_run(tmp_path)
    config = finished.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 16}))
    assert "have rank 4, adapter_config.json says 16" in refused(capsys, finished.path)


def test_ranks_that_adalora_found_stand_in_the_shapes(capsys, tmp_path, tiny_dir):
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, lora_alpha=8, target_modules=["q_proj"], total_step=10
    )
    model = get_peft_model(tiny_llama(), config)
    names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    ranks = [1, 3, 3, 6]
    config.rank_pattern = {name: [i < rank for i in range(6)] for name, rank in zip(names, ranks, strict=True)}
    config.base_model_name_or_path = str(tiny_dir)
    model.save_pretrained(tmp_path / "adapter")
    rows = report(capsys, tmp_path / "adapter")["adapted"]
    found = {name: (row["r"], row["scale"]) for row in rows for name in expanded(row["name"])}
    assert found == {f"model.layers.{i}.self_attn.q_proj": (r, 8 / r) for i, r in enumerate(ranks)}

"""`peftctl model A --against B` on real runs and their checkpoints, and what the command refuses."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from peftctl import cli
from tests.commands.helpers import write_recipe
from tests.commands.looking import refused, report, run
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_dir):
    """A finished run of six steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    method = {
        "name": "lora",
        "r": 4,
        "alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["layers.0.mlp.up_proj"],
    }
    recipe = write_recipe(folder, tiny_dir, method, train={"save_steps": 2, "save_total_limit": 3})
    assert cli.run(["train", str(recipe)]) == 0
    return folder / "run"


def test_a_run_against_its_base_and_its_checkpoints(capsys, trained, tiny_dir):
    content = report(capsys, trained, "--against", tiny_dir)
    assert {kind: s["layers"] for kind, s in content["kinds"].items()} == {"q_proj": 4, "v_proj": 4, "up_proj": 1}
    assert content["changed_vectors"] == 0 and content["same_matrices"] == 20
    assert all(0 < c["magnitude"] < c["length"] and 0 < c["direction"] < 1 for c in content["changes"])
    assert -1 <= content["kinds"]["q_proj"]["correlation"] <= 1 and content["kinds"]["up_proj"]["correlation"] is None

    checkpoints = trained / "checkpoints"
    assert report(capsys, trained, "--against", checkpoints / "checkpoint-6")["changes"] == []
    on_base = report(capsys, checkpoints / "checkpoint-6", "--against", tiny_dir)
    assert on_base["changes"] == content["changes"]
    early = report(capsys, checkpoints / "checkpoint-4", "--against", checkpoints / "checkpoint-2")
    assert len(early["changes"]) == 9
    assert sum(c["relative"] for c in early["changes"]) < sum(c["relative"] for c in content["changes"])


def test_the_tables_of_a_comparison(capsys, trained, tiny_dir):
    code, out, _ = run(capsys, trained, "--against", tiny_dir)
    assert code == 0
    assert "model.layers.3.self_attn.q_proj" in out and "by kind of layer" in out
    assert "9 matrices differ, 20 are equal" in out and "2402.09353" in out
    code, out, _ = run(capsys, tiny_dir, "--against", tiny_dir)
    assert code == 0 and out.strip() == "no weight differs (29 matrices compared)"


def test_a_fully_trained_run_is_a_model_and_so_are_its_checkpoints(capsys, tmp_path, tiny_dir):
    recipe = write_recipe(tmp_path, tiny_dir, {"name": "full"}, train={"max_steps": 2, "learning_rate": 1e-3})
    assert cli.run(["train", str(recipe)]) == 0
    content = report(capsys, tmp_path / "run", "--against", tiny_dir)
    assert len(content["changes"]) == 29 and content["changed_vectors"] == 9
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert report(capsys, checkpoint, "--against", tiny_dir)["changes"] == content["changes"]
    assert report(capsys, tmp_path / "run")["parameters"] == sum(p.numel() for p in tiny_llama().parameters())


def test_new_tokens_do_not_stand_in_the_way(capsys, tmp_path, tiny_dir):
    recipe = write_recipe(
        tmp_path, tiny_dir, {"name": "lora", "r": 4, "target_modules": ["q_proj"]}, model={"add_tokens": ["<tool>"]},
        train={"max_steps": 2},
    )  # fmt: skip
    assert "trainable_tokens_delta" in "".join(row["name"] for row in report(capsys, recipe)["adapted"])
    assert cli.run(["train", str(recipe)]) == 0
    content = report(capsys, tmp_path / "run", "--against", tiny_dir)
    assert {kind: s["layers"] for kind, s in content["kinds"].items()} == {"embed_tokens": 1, "q_proj": 4}
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert report(capsys, checkpoint, "--against", tiny_dir)["changes"] == content["changes"]


def test_what_can_not_be_shown_is_refused_in_one_line(capsys, tmp_path, tiny_dir, trained):
    assert "did you mean 'q_proj'" in refused(capsys, tiny_dir, "--targets", "[q_porj]")
    assert refused(capsys, tiny_dir, "--targets", "nothing").startswith("error: --targets: 'nothing'")
    assert "expected all-linear" in refused(capsys, tiny_dir, "--targets", "{a: b}")
    assert "no such directory" in refused(capsys, tmp_path / "nothing")
    assert "no such recipe" in refused(capsys, tmp_path / "nothing.yaml")
    (tmp_path / "empty").mkdir()
    assert "holds neither a run, an adapter nor a model" in refused(capsys, tmp_path / "empty")
    assert "is a model; KEY=VALUE changes a recipe" in refused(capsys, tiny_dir, "method.r=4")
    assert "is an adapter" in refused(capsys, trained, "--targets", "mlp")
    assert "is a checkpoint" in refused(capsys, trained / "checkpoints" / "checkpoint-2")
    assert "--against compares" in refused(capsys, trained, "--against", tiny_dir, "--targets", "mlp")


def test_an_unfinished_run_is_refused(capsys, tmp_path, trained, tiny_dir):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "recipe.yaml", tmp_path / "run")
    for arguments in ([tmp_path / "run"], [tiny_dir, "--against", tmp_path / "run"]):
        assert "this run is not finished" in refused(capsys, *arguments)


def test_a_damaged_checkpoint_is_named(capsys, tmp_path, trained, tiny_dir):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    weights = folder / "checkpoints" / "checkpoint-2" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "trainable.safetensors: is damaged" in refused(capsys, weights.parent, "--against", tiny_dir)
    save_file({"other": torch.ones(2)}, weights)
    assert "tensors that the recipe's model does not have, e.g. other" in refused(
        capsys, weights.parent, "--against", tiny_dir
    )

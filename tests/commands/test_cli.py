"""The command line as users meet it: help, exit codes, one message for each known error."""

import json
import os
import re
import subprocess
import sys

import pytest

from peftctl import cli
from tests.commands.helpers import REPOSITORY, peftctl, write_recipe


def run(capsys, *arguments):
    """Run in this process; return (exit code, stdout, stderr)."""
    code = cli.run([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "command", ["", "train", "eval", "merge", "export", "check", "model", "recipes", "methods", "chat"]
)
def test_help_exists_for_every_command(capsys, command):
    code, out, _ = run(capsys, *filter(None, [command, "--help"]))
    assert code == 0 and "Usage: peftctl" in out


def test_all_ways_to_launch_understand_local_rank(capsys):
    """deepspeed puts --local_rank before the subcommand."""
    assert run(capsys, "--local_rank=0", "methods")[0] == 0


def test_static_problems_exit_2_together_without_importing_torch(tmp_path, tiny_dir):
    path = write_recipe(
        tmp_path, tiny_dir, method={"name": "lora", "rnk": 8}, train={"learning_rte": 1, "epochs": "many"}
    )
    code = (
        "import sys\nfrom peftctl import cli\n"
        f"code = cli.run(['train', {str(path)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    for part in ("method.rnk", "train.learning_rte", "did you mean 'learning_rate'?", "train.epochs"):
        assert part in done.stderr
    assert re.search(rf"{re.escape(str(path))}:\d+:\d+: ", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.target_modules=[q_porj]", "did you mean 'q_proj'?"),
        ("train.learning_rate=fast", "command line: train.learning_rate"),
        ("train.nothing=1", "command line: train.nothing"),
        ("data.train=missing.jsonl", "missing.jsonl"),
        ("method.name=lorra", "did you mean 'lora'?"),
        ("model.task=seq_cls", "seq_cls"),
        ("train.report_to=[wandb]", "pip install 'peftctl[wandb]'"),
    ],
)
def test_wrong_values_are_one_message_and_exit_2(capsys, tmp_path, tiny_dir, override, message):
    code, _, err = run(capsys, "train", write_recipe(tmp_path, tiny_dir), override)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_resume_and_fresh_exclude_each_other(capsys, tmp_path, tiny_dir):
    code, _, err = run(capsys, "train", write_recipe(tmp_path, tiny_dir), "--resume", "--fresh")
    assert code == 2 and "exclude" in err


def test_dry_run_shows_the_resolved_recipe_and_writes_nothing(capsys, tmp_path, tiny_dir):
    code, out, _ = run(capsys, "train", write_recipe(tmp_path, tiny_dir), "--dry-run")
    assert code == 0
    assert "learning_rate: 0.01" in out and "memory plan" in out and "supervision" in out
    assert not (tmp_path / "run").exists()


def test_check_marks_what_is_trained_on(capsys, tmp_path, tiny_dir):
    code, out, _ = run(capsys, "check", write_recipe(tmp_path, tiny_dir), "--rows", "1")
    assert code == 0
    assert "⟦0<|im_end|>⟧" in out
    assert "answer with 0" in out and "⟦answer" not in out


def test_check_as_json_gives_ids_and_mask(capsys, tmp_path, tiny_dir):
    code, out, _ = run(capsys, "check", write_recipe(tmp_path, tiny_dir), "--rows", "2", "--json")
    report = json.loads(out)
    assert code == 0 and len(report["rows"]) == 2
    row = report["rows"][0]
    assert len(row["input_ids"]) == len(row["supervised"]) and 0 < sum(row["supervised"]) < len(row["supervised"])
    assert report["trainable"] > 0 and report["memory_total"] > 0


def test_check_says_when_the_plan_does_not_fit(capsys, tmp_path, tiny_dir):
    code, _, err = run(capsys, "check", write_recipe(tmp_path, tiny_dir), "--device", "cuda", "--memory", "100KB")
    assert code == 2 and "more than there is" in err


def test_methods_and_one_method(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    assert code == 0 and {"lora", "full", "last_layers", "hard_prompt"} <= {card["name"] for card in json.loads(out)}
    code, out, _ = run(capsys, "methods", "lora")
    assert code == 0 and "2106.09685" in out and "target_modules" in out and "Undefined" not in out
    assert "did you mean 'lora'?" in run(capsys, "methods", "lorra")[2]


def test_recipes_list_show_copy_schema(capsys, tmp_path):
    assert "quickstart" in run(capsys, "recipes", "list")[1]
    shown = run(capsys, "recipes", "show", "lora")[1]
    assert shown == (REPOSITORY / "recipes" / "lora.yaml").read_text()
    assert run(capsys, "recipes", "copy", "lora", tmp_path)[0] == 0
    assert (tmp_path / "lora.yaml").read_text() == shown
    code, _, err = run(capsys, "recipes", "copy", "lora", tmp_path)
    assert code == 2 and "exists already" in err
    assert json.loads(run(capsys, "recipes", "schema")[1])["properties"]


def test_recipes_list_shows_the_model(capsys):
    listed = {entry["name"]: entry for entry in json.loads(run(capsys, "recipes", "list", "--json")[1])}
    assert listed["lora"]["model"] == "smollm2-135m" and "Hu et al. 2021" in listed["lora"]["title"]
    assert all(entry["model"] for entry in listed.values())


def completed(*words):
    """Return what bash is offered for the last of these words, and the heavy packages imported for it."""
    code = (
        "import sys\nfrom peftctl import cli\n"
        "try:\n    cli.run([])\nfinally:\n"
        "    print('|', *({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    line = " ".join(["peftctl", *words])
    environment = {"_PEFTCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, **environment}
    )
    offered, heavy = done.stdout.split("|")
    return offered.split(), heavy.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "quick"], ["quickstart"]),
        (["check", "last_"], ["last_layers"]),
        (["recipes", "show", "hard"], ["hard_prompt"]),
        (["recipes", "copy", "hard"], ["hard_prompt"]),
        (["methods", "hard"], ["hard_prompt"]),
        (["expo"], ["export"]),
        (["train", "no-such-recipe"], []),
    ],
)
def test_the_shell_completes_names_without_importing_torch(words, expected):
    assert completed(*words) == (expected, [])


def test_the_completion_script_is_printed(capsys):
    # The shell as given, whatever shell this runs under.
    done = peftctl("--show-completion", "bash", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert done.returncode == 0 and "_peftctl_completion" in done.stdout and not done.stderr


def test_model_marks_what_a_target_selects(capsys, tiny_dir):
    code, out, _ = run(capsys, "model", tiny_dir, "--targets", "[q_proj]", "--json")
    report = json.loads(out)
    assert code == 0 and report["selected_modules"] == 4
    selected = [m["name"] for m in report["modules"] if m["selected"]]
    assert selected == ["model.layers.{0..3}.self_attn.q_proj"]


def test_eval_writes_a_table_and_eval_json(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    assert run(capsys, "train", path)[0] == 0
    code, out, _ = run(
        capsys, "eval", tmp_path / "run", "eval.metrics=[loss, exact_match]", "eval.max_new_tokens=4", "--base"
    )
    assert code == 0 and "base" in out and "exact_match" in out
    saved = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert saved["metrics"]["loss"] < saved["base"]["loss"]
    assert len(saved["samples"]) == 6 and {"prompt", "reference", "prediction"} <= saved["samples"][0].keys()


def test_merge_then_eval_and_chat_of_the_merged_model(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    assert run(capsys, "train", path)[0] == 0
    code, out, err = run(capsys, "merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err
    assert "kl" in out.lower()
    code, out, _ = run(capsys, "eval", tmp_path / "merged", "--recipe", path, "--json")
    merged = json.loads(out)["metrics"]["loss"]
    tuned = json.loads(run(capsys, "eval", tmp_path / "run", "--json")[1])["metrics"]["loss"]
    assert merged == pytest.approx(tuned, rel=1e-4)
    assert run(capsys, "chat", tmp_path / "merged", "--prompt", "answer with 3", "--max-new-tokens", "4")[0] == 0


@pytest.mark.parametrize("name", ["train", "merge", "eval"])
def test_no_library_speaks_in_between(tmp_path, tiny_dir, capsys, name):
    path = write_recipe(tmp_path, tiny_dir)
    assert run(capsys, "train", path)[0] == 0
    arguments = {
        "train": ["train", path, "--fresh"],
        "merge": ["merge", tmp_path / "run", "-o", tmp_path / "merged"],
        "eval": ["eval", tmp_path / "run"],
    }
    done = peftctl(*arguments[name])
    assert done.returncode == 0 and done.stderr == ""
    assert "accelerator" not in done.stdout


def test_export_shows_what_it_wrote(capsys, tmp_path, tiny_dir):
    code, out, err = run(capsys, "export", tiny_dir, "--format", "ollama", "--output", tmp_path / "out")
    assert code == 0, err
    assert f"written to {tmp_path / 'out'} (model, template chatml)" in out and "notice: Ollama's own" in out
    code, out, _ = run(capsys, "export", tiny_dir, "--output", tmp_path / "hf", "--json")
    assert code == 0
    content = {"output": str(tmp_path / "hf"), "content": "model", "template": None, "notices": [], "pushed": None}
    assert json.loads(out) == content


def test_export_refuses_to_push_before_it_writes(capsys, tmp_path, tiny_dir):
    for arguments, message in (
        (["--push", "nobody"], "expected OWNER/NAME"),
        (["--push", "me/model"], "HF_HUB_OFFLINE is set"),
        (["--public"], "--public has an effect with --push"),
    ):
        code, _, err = run(capsys, "export", tiny_dir, "--output", tmp_path / "out", *arguments)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["methods"], None),
        (["methods", "lora"], "keys"),
        (["recipes", "list"], None),
        (["model", "TINY"], "parameters"),
        (["train", "RECIPE", "--dry-run"], "trainable"),
        (["check", "RECIPE"], "trainable"),
    ],
)
def test_json_is_one_document_on_stdout(capsys, tmp_path, tiny_dir, arguments, key):
    places = {"TINY": tiny_dir, "RECIPE": write_recipe(tmp_path, tiny_dir)}
    code, out, err = run(capsys, *(places.get(a, a) for a in arguments), "--json")
    content = json.loads(out)
    assert code == 0 and not err
    assert key in content if key else {"name", "title"} <= content[0].keys()


def test_json_of_training_merging_and_measuring(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    for arguments, keys in (
        (["train", path], {"train_loss", "eval"}),
        (["eval", tmp_path / "run"], {"target", "metrics", "base", "samples"}),
        (["merge", tmp_path / "run", "-o", tmp_path / "merged"], {"max_delta", "kl", "output"}),
        (["export", tmp_path / "run", "-o", tmp_path / "out"], {"output", "content", "notices", "pushed"}),
    ):
        code, out, err = run(capsys, *arguments, "--json")
        assert code == 0, err
        document = out[out.index("{") :] if arguments[0] == "train" else out  # progress comes before a summary
        assert keys <= json.loads(document).keys()


def test_export_formats_that_are_not_there_are_refused_in_one_line(capsys, tmp_path, tiny_dir):
    code, _, err = run(capsys, "export", tiny_dir, "--format", "gguf", "--output", tmp_path / "out")
    assert code == 2 and "gguf" in err and len(err.strip().splitlines()) == 1


def test_missing_target_and_missing_recipe_are_known_errors(capsys, tmp_path):
    for arguments in (
        ["eval", tmp_path / "nothing"],
        ["train", tmp_path / "nothing.yaml"],
        ["merge", tmp_path, "-o", "x"],
    ):
        code, _, err = run(capsys, *arguments)
        assert code in (1, 2) and err.startswith("error: ") and "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    done = peftctl("train", tmp_path / "nothing.yaml", env={"PEFTCTL_DEBUG": "1"})
    assert "Traceback" in done.stderr
    assert "Traceback" not in peftctl("train", tmp_path / "nothing.yaml").stderr

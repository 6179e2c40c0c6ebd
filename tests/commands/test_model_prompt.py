"""`peftctl model` on soft prompts made with plain peft: the vocabulary tokens nearest to each virtual token."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands.looking import refused, report, run
from tests.tiny import tiny_llama, tiny_tokenizer


def prompt_adapter(folder, tiny_dir, config, tensor="prompt_embeddings", change=lambda prompt: None):
    """Write a prompt adapter with plain peft, and change its prompt."""
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), config)
    for own in model.peft_config.values():
        own.base_model_name_or_path = str(tiny_dir)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors[tensor])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def naive_nearest(vector, table, k):
    cosine = sorted(
        range(len(table)), key=lambda i: -float(torch.nn.functional.cosine_similarity(vector, table[i], dim=0))
    )
    distance = sorted(range(len(table)), key=lambda i: float((vector - table[i]).norm()))
    return cosine[:k], distance[:k]


def test_a_soft_prompt_shows_the_nearest_vocabulary_tokens(capsys, tmp_path, tiny_dir, monkeypatch):
    from peft import PromptTuningConfig

    table = tiny_llama().model.embed_tokens.weight.detach().double()
    torch.manual_seed(0)
    planted = torch.stack([table[65] * 3, table[70] + 1e-4, torch.randn(32).double()])
    folder = prompt_adapter(
        tmp_path / "prompt", tiny_dir, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        change=lambda prompt: prompt.copy_(planted),
    )  # fmt: skip
    monkeypatch.setattr("peftctl.models.stored.load_model", None)  # only the embedding is read
    monkeypatch.setattr("peftctl.artifacts.nearest._CHUNK", 150)
    content = report(capsys, folder, "--nearest", "4")
    tokens = content["virtual_tokens"]
    assert len(tokens) == 3 and content["method"] == "prompt_tuning"
    for token, vector in zip(tokens, planted.float().double(), strict=True):
        cosine, distance = naive_nearest(vector, table, 4)
        assert [t["id"] for t in token["cosine"]] == cosine and [t["id"] for t in token["l2"]] == distance
        assert token["norm"] == pytest.approx(float(vector.norm()))
    assert tokens[0]["cosine"][0]["value"] == pytest.approx(1.0) and tokens[0]["cosine"][0]["id"] == 65
    assert tokens[1]["l2"][0] == {
        "id": 70,
        "text": tiny_tokenizer().decode([70]),
        "value": pytest.approx(1e-4 * 32**0.5, rel=1e-2),
    }
    code, out, _ = run(capsys, folder)
    assert code == 0 and f"{tiny_tokenizer().decode([65])!r} 1" in out


def test_line_ends_in_tokens_are_escaped(capsys, tmp_path, tiny_dir):
    from peft import PromptTuningConfig

    newline = tiny_tokenizer().convert_tokens_to_ids("Ċ")
    table = tiny_llama().model.embed_tokens.weight.detach()
    folder = prompt_adapter(
        tmp_path / "prompt", tiny_dir, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1),
        change=lambda prompt: prompt.copy_(table[[newline]]),
    )  # fmt: skip
    code, out, _ = run(capsys, folder)
    assert code == 0 and r"'\n' 1" in out


def test_a_multitask_prompt_is_shown_for_each_task(capsys, tmp_path, tiny_dir):
    from peft import MultitaskPromptTuningConfig

    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2, num_ranks=1)
    folder = prompt_adapter(tmp_path / "prompt", tiny_dir, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    tokens = report(capsys, folder)["virtual_tokens"]
    assert [(t["task"], t["index"]) for t in tokens] == [("task 0", 0), ("task 0", 1), ("task 1", 0), ("task 1", 1)]
    factor = tensors["prefix_task_cols"][1] @ tensors["prefix_task_rows"][1]
    expected = (tensors["prompt_embeddings"] * factor).norm(dim=1)
    assert [t["norm"] for t in tokens[2:]] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_prefix_has_no_neighbours_among_tokens(capsys, tmp_path, tiny_dir):
    from peft import PrefixTuningConfig

    folder = prompt_adapter(
        tmp_path / "prefix", tiny_dir, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    assert "virtual_tokens" not in report(capsys, folder)
    assert "no vocabulary token is near it" in run(capsys, folder)[1]


def test_a_prompt_of_another_base_is_refused(capsys, tmp_path, tiny_dir):
    from peft import PromptTuningConfig

    folder = prompt_adapter(
        tmp_path / "prompt", tiny_dir, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    )
    save_file({"prompt_embeddings": torch.ones(1, 16)}, folder / "adapter_model.safetensors")
    assert "16 dimensions, the base's embedding has 32" in refused(capsys, folder)
    assert "is a prompt" in refused(capsys, folder, "--against", tiny_dir)

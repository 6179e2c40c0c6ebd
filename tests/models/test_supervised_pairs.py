"""Encoder-decoders: loss and every gradient equal the library's own loss, in float64."""

import peft
import pytest
import torch

from peftctl.errors import UsageError
from peftctl.models.supervised import count_supervised, decoder_inputs, supervised_forward
from tests.models.test_supervised import gradients
from tests.tiny import tiny_bart, tiny_llama, tiny_t5


def make_batch(seed=0):
    """Three rows: inputs of 9, 7, 5 tokens, labels of 4, 5, 6; each padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 400, (3, 9), generator=generator)
    labels = torch.randint(4, 400, (3, 6), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        ids[row, 9 - 2 * row :], mask[row, 9 - 2 * row :] = 3, 0
        labels[row, 4 + row :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tuned(base, targets):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    return peft.get_peft_model(base(), config)


def prompted(kind):
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_t5(), getattr(peft, kind)(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"))


MODELS = {
    "t5": tiny_t5,
    "bart": tiny_bart,
    "t5_lora": lambda: tuned(tiny_t5, ["q", "v"]),
    "bart_lora": lambda: tuned(tiny_bart, ["q_proj", "fc1"]),
    "prompt": lambda: prompted("PromptTuningConfig"),
    "prefix": lambda: prompted("PrefixTuningConfig"),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_librarys(name):
    model, batch = MODELS[name]().double(), make_batch()
    count = int((batch["labels"] != -100).sum())
    whole = model(**batch)  # the mean over labels
    expected = gradients(model, whole.loss * count)
    result = supervised_forward(model, batch)
    assert result.logits.shape == (count, 400) and count_supervised(model, batch["labels"]) == count == 15
    torch.testing.assert_close(result.cross_entropy(), whole.loss * count, rtol=1e-12, atol=0)
    got = gradients(model, result.cross_entropy())
    assert got.keys() == expected.keys() and got
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    assert any(bool(gradient.abs().sum() > 0) for gradient in got.values())


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_the_head_sees_supervised_positions_only_and_the_labels_follow(build):
    model, batch, seen = build(), make_batch(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape[-2]))
    result = supervised_forward(model, batch)
    handle.remove()
    assert seen == [15]
    full = model(**batch).logits
    chosen = batch["labels"] != -100
    torch.testing.assert_close(result.logits, full[chosen])
    assert result.labels.tolist() == batch["labels"][chosen].tolist()


def test_the_first_label_counts_for_an_encoder_decoder_only():
    labels = torch.tensor([[5, 6, -100]])
    assert count_supervised(tiny_t5(), labels) == 2
    assert count_supervised(tiny_llama(), labels) == 1


@pytest.mark.parametrize(("build", "start"), [(tiny_t5, 3), (tiny_bart, 2)])
def test_the_decoder_reads_labels_behind_its_start_token(build, start):
    assert decoder_inputs(build(), torch.tensor([[5, 6, -100]])).tolist() == [[start, 5, 6]]


def test_an_architecture_without_a_rule_is_refused():
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    config = M2M100Config(
        vocab_size=400, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    with pytest.raises(UsageError, match="the m2m_100 architecture can't be trained as seq2seq_lm here"):
        supervised_forward(M2M100ForConditionalGeneration(config), make_batch())

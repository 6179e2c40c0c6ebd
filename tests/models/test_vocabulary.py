"""New tokens: one id each, rows that start as the mean, ties kept, also without weights."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from peftctl.errors import UsageError
from peftctl.models.vocabulary import add_tokens, fit_vocabulary, vocabulary_rows
from tests.methods.architectures import tiny_of
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return PreTrainedTokenizerFast.from_pretrained(tmp_path)


def test_each_new_token_is_one_id_wherever_it_stands(tokenizer):
    size = len(tokenizer)
    assert add_tokens(tokenizer, ["<tool>", "<end>", "Ünïcode tok"]) == [size, size + 1, size + 2]
    ids = tokenizer("book<tool>a <end>table Ünïcode tok.")["input_ids"]
    assert [i for i in ids if i >= size] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "book<tool>a <end>table Ünïcode tok."


def test_no_tokens_change_nothing(tokenizer):
    before = tokenizer.get_vocab()
    assert add_tokens(tokenizer, []) == []
    assert tokenizer.get_vocab() == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|im_end|>"], r"model.add_tokens: '<\|im_end\|>' is a token of this model already \(id 2\); remove it"),
        (["<a>", "<a>"], "'<a>' is listed twice"),
        ([" "], "is blank"),
    ],
)
def test_tokens_that_would_get_no_row_of_their_own_are_refused(tokenizer, tokens, message):
    with pytest.raises(UsageError, match=message):
        add_tokens(tokenizer, tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_are_the_mean_and_old_rows_stay(tie, dtype):
    model, reference = (tiny_llama(tie=tie, dtype=dtype) for _ in range(2))
    state = torch.random.get_rng_state()
    fit_vocabulary(model, 403)
    fit_vocabulary(reference, 400)  # enough rows: untouched
    assert vocabulary_rows(model) == model.config.vocab_size == 403
    assert vocabulary_rows(reference) == reference.config.vocab_size == 400
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    for grown, old in (
        (model.model.embed_tokens.weight, reference.model.embed_tokens.weight),
        (model.lm_head.weight, reference.lm_head.weight),
    ):
        assert grown.dtype == old.dtype and torch.equal(grown[:400], old)
        mean = old.double().mean(dim=0)
        torch.testing.assert_close(grown[400:].double(), mean.expand(3, -1), rtol=8e-3, atol=1e-3)
    ids = torch.arange(1, 11).reshape(1, 10)
    assert torch.equal(model(input_ids=ids).logits[..., :400], reference(input_ids=ids).logits)
    fit_vocabulary(other := tiny_llama(tie=tie, dtype=dtype), 403)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
def test_without_weights_shapes_and_ties_are_those_with_weights(architecture):
    shapes = []
    for device in ("meta", "cpu"):
        model = tiny_of(architecture, device)
        fit_vocabulary(model, 70)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        shapes.append(({n: tuple(p.shape) for n, p in model.named_parameters()}, head.weight is embedding.weight))
        assert embedding.weight.device.type == device and model.config.vocab_size == 70
    assert shapes[0] == shapes[1]


def test_a_grown_model_is_saved_and_read_as_any_other(tmp_path):
    from peftctl.models.load import load_model
    from peftctl.recipe.schema import ModelSection

    model = tiny_llama()
    fit_vocabulary(model, 405)
    save_tiny(tmp_path, model)
    read = load_model(ModelSection(name_or_path=str(tmp_path), dtype="float32"))
    assert torch.equal(read.lm_head.weight, model.lm_head.weight) and read.config.vocab_size == 405

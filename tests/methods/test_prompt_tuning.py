"""Prompt tuning: where its vectors come from, what the model reads, and what training leaves alone."""

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.errors import UsageError
from peftctl.methods.base import Context
from peftctl.methods.prompt_tuning import Config, Method
from peftctl.models.supervised import supervised_forward
from tests.commands.helpers import write_recipe
from tests.methods.prompts import IDS, attached, behind, context, method, randomise, smollm2, table
from tests.tiny import save_tiny, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer

TEXT = "Book a table for two people"


def test_the_model_reads_the_prompt_and_then_the_row():
    for base in (tiny_llama, tiny_opt):
        model = randomise(attached(method("prompt_tuning"), base()).double())
        expected = behind(base().double(), table(model).detach())
        logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        assert logits.shape == (2, 5 + 12, 400)
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
        table(model).data[2] *= -2
        assert (model(input_ids=IDS).logits[:, 5:] - expected[:, 5:]).abs().max() > 1e-3


def test_the_loss_is_over_the_rows_own_tokens_only():
    """Of [P; x], x_t is predicted at P's length + t - 1, and nothing is predicted at P."""
    model = randomise(attached(method("prompt_tuning")))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    log_probabilities = behind(tiny_llama(), table(model).detach())[:, 5:-1].log_softmax(-1)
    naive = -sum(log_probabilities[row, t - 1, IDS[row, t]] for row in range(2) for t in range(1, 12))
    torch.testing.assert_close(supervised_forward(model, batch).cross_entropy(), naive, rtol=1e-5, atol=0)


# -- first values --------------------------------------------------------------------------------------------------


def with_vocabulary(tokens):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def origin(prompt, model):
    """Return which token each vector is the embedding of, exactly."""
    rows = model.get_input_embeddings().weight
    return [int((rows == vector).all(dim=1).nonzero()[0, 0]) for vector in prompt]


def test_vocab_draws_different_tokens_of_the_5000_first_by_the_seed():
    first, again, other = (
        origin(
            table(attached(Method(Config(num_virtual_tokens=400)), with_vocabulary(6000), seed=s)),
            with_vocabulary(6000),
        )
        for s in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 400 and 4500 < max(first) < 5000


def test_a_vocabulary_smaller_than_the_prompt_is_drawn_from_again():
    model = attached(method("prompt_tuning", num_virtual_tokens=225), with_vocabulary(100))
    ids = origin(table(model), with_vocabulary(100))
    assert set(ids[:100]) == set(ids[100:200]) == set(range(100)) and len(set(ids[200:])) == 25


def test_text_is_repeated_or_cut_to_n():
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    for n in (3, len(ids), 2 * len(ids) + 1):
        model = attached(method("prompt_tuning", init="text", init_text=TEXT, num_virtual_tokens=n))
        assert origin(table(model), tiny_llama()) == (ids * 3)[:n]


def test_a_prompt_of_text_answers_as_if_the_text_stood_there():
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    chosen = method("prompt_tuning", init="text", init_text=TEXT, num_virtual_tokens=len(ids))
    model = attached(chosen, tiny_llama().double())
    written = tiny_llama().double()(input_ids=torch.cat([torch.tensor([ids] * 2), IDS], dim=1)).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, written, rtol=1e-9, atol=1e-9)


def test_random_is_uniform_between_minus_and_plus_a_half():
    values = table(attached(method("prompt_tuning", init="random", num_virtual_tokens=200))).detach()
    assert -0.5 <= values.min() < -0.49 and 0.49 < values.max() <= 0.5
    assert values.var().item() == pytest.approx(1 / 12, rel=0.05)
    assert abs(values.mean()) < 0.02


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_values_are_float32_over_a_base_of_a_half_type(init):
    model = attached(method("prompt_tuning", init=init), tiny_llama(dtype="bfloat16"))
    assert table(model).dtype is torch.float32
    assert model(input_ids=IDS).logits.dtype is torch.bfloat16


def test_the_width_is_the_embeddings_where_the_model_projects_it():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=400, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=3,
    )  # fmt: skip
    chosen = method("prompt_tuning")
    assert chosen.count(OPTForCausalLM(config)) == 5 * 16
    assert attached(chosen, OPTForCausalLM(config))(input_ids=IDS).logits.shape == (2, 17, 400)


# -- what trains ---------------------------------------------------------------------------------------------------


def test_count_on_smollm2_is_the_papers_formula():
    assert Method(Config(num_virtual_tokens=20)).count(smollm2()) == 11_520


def test_every_row_of_an_encoders_prompt_gets_a_gradient():
    """peft's default allocates the rows twice and trains the first half."""
    model = attached(method("prompt_tuning", num_virtual_tokens=7), tiny_t5(), "seq2seq_lm")
    assert table(model).shape == (7, 32)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, :4]}
    supervised_forward(model, batch).cross_entropy().backward()
    assert (table(model).grad.abs().sum(dim=1) > 0).all()


def test_an_encoder_decoders_prompt_is_read_by_its_encoder():
    model = randomise(attached(method("prompt_tuning"), tiny_t5().double(), "seq2seq_lm").double())
    base, decoder = tiny_t5().double(), torch.tensor([[3, 7, 8], [3, 9, 9]])
    embedded = torch.cat([table(model).detach().expand(2, 5, 32), base.shared(IDS)], dim=1)
    expected = base(inputs_embeds=embedded, decoder_input_ids=decoder).logits
    logits = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=decoder).logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init": "text"}, "init is text, so give the text"),
        ({"init": "text", "init_text": "  "}, "init is text, so give the text"),
        ({"init_text": TEXT}, "is read with init: text alone"),
        ({"num_virtual_tokens": 0}, "greater than 0"),
        ({"init": "zeros"}, "'vocab', 'text' or 'random'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        Config(**keys)


def test_a_text_without_tokens_is_refused():
    class Mute:
        def __call__(self, *_, **__):
            return {"input_ids": []}

    chosen = method("prompt_tuning", init="text", init_text="?")
    with pytest.raises(UsageError, match=r"^method\.init_text: the tokenizer makes no token of '\?'"):
        chosen.apply(tiny_llama(), Context(context(chosen).recipe, Mute()))


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_classification_is_not_claimed(task):
    assert task not in Method.card.tasks


# -- going on from a finished prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", ["prompt_tuning", "p_tuning"])
def test_training_goes_on_from_a_finished_prompt(tmp_path, earlier):
    base = save_tiny(tmp_path / "base")
    keys = {"num_virtual_tokens": 4}
    first = peftctl.train(peftctl.load_recipe(write_recipe(tmp_path, base, {"name": earlier, **keys})))
    overrides = [f"method.init_from={first.run}", f"train.output_dir={tmp_path / 'second'}"]
    recipe = write_recipe(tmp_path, base, {"name": "prompt_tuning", **keys})
    second = peftctl.train(peftctl.load_recipe(recipe, overrides))
    assert second.summary["eval"]["before"] == first.summary["eval"]["after"]
    assert second.summary["eval"]["after"]["loss"] < first.summary["eval"]["after"]["loss"]
    with pytest.raises(UsageError, match=r"num_virtual_tokens 4, this recipe has 6"):
        peftctl.train(peftctl.load_recipe(recipe, [*overrides, "method.num_virtual_tokens=6"]), fresh=True)

"""P-tuning v2: what its head reads, what trains, dropout on the prefix, and the runs on classes and on tags."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification, LlamaForSequenceClassification

import peftctl
from peftctl.commands.prepare import prepare, refuse_unsupported
from peftctl.errors import Interrupted, UsageError
from peftctl.methods.p_tuning_v2 import Config, Method
from peftctl.models.supervised import supervised_forward
from tests.methods.helpers import recipe
from tests.methods.prefixes import IDS, attached, behind_prefix, encoder, gradient_of_rows, inputs, slices
from tests.tiny import save_tiny, tiny_bert, tiny_llama
from tests.training.test_resume import StopAt

TABLE = "prompt_encoder.default.embedding.weight"
HEAD = {f"base_model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")}


def method(**keys):
    return Method(Config(**{"num_virtual_tokens": 5, **keys}))


def bert(task="seq_cls", **config):
    kind = {"seq_cls": "BertForSequenceClassification", "token_cls": "BertForTokenClassification"}[task]
    return tiny_bert(kind=kind, num_labels=3, **config)


def made(task="seq_cls", dtype=torch.float32, **keys):
    return attached(method(**keys), bert(task).to(dtype), task)


def labels(task):
    return torch.tensor([[1] + [-100] * 11, [2] + [-100] * 11]) if task == "seq_cls" else IDS % 3


def steps(model, task, count=3, lr=1e-2):
    """Train on one batch as the trainer does; return the losses."""
    model.train()
    batch = inputs(model) | {"labels": labels(task).masked_fill(inputs(model)["attention_mask"] == 0, -100)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        part = supervised_forward(model, batch)
        loss = part.cross_entropy() / len(part.labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- what the head reads ---------------------------------------------------------------------------------------------


def states_behind_prefix(base, model):
    """Return the encoder's output for the real tokens, the prefix in the cache of a bare BERT."""
    from transformers import DynamicCache

    batch, cache = inputs(base), DynamicCache()
    for layer, (keys, values) in enumerate(slices(encoder(model).rows(), encoder(model).shape, 2)):
        cache.update(keys, values, layer)
    mask = torch.cat([torch.ones(2, 5, dtype=torch.long), batch["attention_mask"]], dim=1)
    return base.bert(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=cache)


def test_the_class_is_read_off_the_real_first_token():
    model, base = made(), bert()
    with torch.no_grad():
        states = states_behind_prefix(base, model).last_hidden_state
        assert states.shape[1] == 12
        pooled = torch.tanh(base.bert.pooler.dense(states[:, 0]))
        torch.testing.assert_close(model(**inputs(model)).logits, base.classifier(pooled), rtol=1e-5, atol=1e-5)


def test_every_real_token_has_its_tag():
    model, base = made("token_cls"), bert("token_cls")
    with torch.no_grad():
        logits = model(**inputs(model)).logits
        expected = base.classifier(states_behind_prefix(base, model).last_hidden_state)
    assert logits.shape == (2, 12, 3)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_decoder_reads_the_class_off_its_last_token():
    config = tiny_llama().config
    config.num_labels = 3

    def base():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()

    model = attached(method(), base(), "seq_cls")
    with torch.no_grad():
        expected = behind_prefix(base(), encoder(model).rows(), encoder(model).shape, inputs(model))
        torch.testing.assert_close(model(**inputs(model)).logits, expected, rtol=1e-5, atol=1e-5)


def test_text_on_bert_begins_behind_the_prefix():
    """A prefix of zeros that nothing attends to leaves the base on positions 5, 6, ..."""
    model, base = made(), bert()
    positions = []
    model.get_base_model().bert.embeddings.position_embeddings.register_forward_hook(
        lambda _, args, out: positions.append(args[0])
    )
    model(**inputs(model))
    assert torch.equal(positions[0].reshape(-1)[:12], torch.arange(5, 17))
    assert method().notices(base) == ["the prefix takes 5 of the model's 128 positions: a row may have 123 tokens"]


# -- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_the_keys_and_values_of_every_layer_have_a_gradient(task):
    """A prompt at the input alone would reach only the first."""
    model = made(task)
    gradient = gradient_of_rows(model, inputs(model))
    assert (gradient.view(5, 4, 32).abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_the_table_and_the_head_train_and_nothing_else(task):
    model = made(task, dropout=0.1)
    assert method().count(bert(task)) == 5 * 2 * 2 * 32 + 32 * 3 + 3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {TABLE, *HEAD}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == method().count(bert(task))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = steps(model, task)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {TABLE, *HEAD}
    assert losses[-1] < losses[0]


def test_the_table_starts_as_in_the_authors_code():
    table = encoder(attached(method(num_virtual_tokens=50), bert(), "seq_cls")).embedding.weight
    assert table.shape == (50, 128) and table.std().item() == pytest.approx(1.0, rel=0.05)


def test_dropout_is_on_the_keys_and_values_and_in_training_only():
    model = made(dropout=0.5)
    assert torch.equal(model(**inputs(model)).logits, model(**inputs(model)).logits)
    stored = encoder(model).train()(torch.zeros(2, 5, dtype=torch.long))
    assert 0.4 < (stored == 0).float().mean() < 0.6
    assert not torch.equal(stored[0], stored[1])  # each row of a batch has its own
    assert torch.equal(encoder(model).eval()(torch.zeros(1, 5, dtype=torch.long))[0], encoder(model).rows())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_a_half_base_table_and_head_train_in_float32(dtype):
    model = made(dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(map(math.isfinite, steps(model, "seq_cls")))


def test_peft_cant_switch_it_off():
    """Why the card has a note; once this fails the note can go."""
    model = made()
    with pytest.raises(UnboundLocalError), model.disable_adapter():
        pass
    assert "can't switch off" in Method.card.disable_note


# -- saved, read back, resumed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_the_export_is_a_flat_table_and_a_head_that_plain_peft_reads(tmp_path, task):
    model = made(task, dropout=0.3)
    steps(model, task)
    with torch.no_grad():
        method().export(model.train()).save_pretrained(tmp_path)  # must not draw dropout
        reference = model.eval()(**inputs(model)).logits
        again = PeftModel.from_pretrained(bert(task), str(tmp_path)).eval()
        assert torch.equal(again(**inputs(again)).logits, reference)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        "prompt_embeddings": (5, 128),
        "base_model.classifier.weight": (3, 32),
        "base_model.classifier.bias": (3,),
    }


ROWS = {
    "seq_cls": [{"text": f"answer with {i}", "label": ("book", "tell")[i % 2]} for i in range(30)],
    "token_cls": [{"tokens": ["book", "a", str(i)], "tags": ["O", "O", ("B-DAY", "B-HOUR")[i % 2]]} for i in range(30)],
}
FORMAT = {"seq_cls": "labelled_text", "token_cls": "tokens_tags"}
AFTER = {"seq_cls": "accuracy", "token_cls": "entity_f1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bert"), tiny_bert())


def run(tmp_path, folder, task, name="run", **keys):
    """Return the recipe of a small run; its rows lie beside it."""
    for part, rows in (("train", ROWS[task][:24]), ("eval", ROWS[task][24:])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(folder), "task": task, "dtype": "float32"},
                "method": {"name": "p_tuning_v2", "num_virtual_tokens": 5, "dropout": 0.1},
                "data": {
                    "train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"),
                    "format": FORMAT[task], "max_length": 64,
                },
                "train": {
                    "output_dir": str(tmp_path / name), "max_steps": 4, "batch_size": 4, "learning_rate": 0.01,
                    "logging_steps": 1,
                } | keys,
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    return peftctl.load_recipe(path)


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_a_run_is_saved_read_back_and_the_same_when_stopped_and_resumed(tmp_path, folder, task):
    straight = peftctl.train(run(tmp_path, folder, task))  # compares the logits read back with those trained
    assert AFTER[task] in straight.summary["eval"]["after"]
    with pytest.raises(Interrupted):
        peftctl.train(run(tmp_path, folder, task, "stopped"), reporter=StopAt(2))
    resumed = peftctl.train(run(tmp_path, folder, task, "stopped"), resume=True)
    first, second = (load_file(result.artefact / "adapter_model.safetensors") for result in (straight, resumed))
    assert first.keys() == second.keys() and len(first) == 3
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_the_card_does_not_claim_is_refused(tmp_path, folder):
    chosen = run(tmp_path, folder, "seq_cls", gradient_checkpointing=True)
    with pytest.raises(UsageError, match=r"^train\.gradient_checkpointing: p_tuning_v2 does not support it"):
        prepare(chosen)
    made = recipe(Config())
    model = made.model.model_copy(update={"task": "seq2seq_lm"})
    with pytest.raises(UsageError, match=r"^model\.task: p_tuning_v2 does not do seq2seq_lm"):
        refuse_unsupported(made.model_copy(update={"model": model}), method())


def test_encoders_without_a_cache_are_refused():
    config = DistilBertConfig(vocab_size=400, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    with pytest.raises(UsageError, match=r"^method\.name: the distilbert architecture takes no prefix"):
        attached(method(), DistilBertForSequenceClassification(config), "seq_cls")


def test_more_virtual_tokens_than_positions_are_refused():
    with pytest.raises(UsageError, match=r"^method\.num_virtual_tokens: must be below the model's 128 positions"):
        method(num_virtual_tokens=128).notices(bert())

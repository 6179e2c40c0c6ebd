"""BitFit: which tensors train, the authors' counts, exact reload, and its refusals."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel

from peftctl.artifacts.fold import fold
from peftctl.errors import UsageError
from peftctl.methods.base import Context
from peftctl.methods.bitfit import Config, Method
from peftctl.recipe.schema import ModelSection
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5


def classifier(kind="BertForSequenceClassification"):
    return tiny_bert(kind=kind, num_labels=3)


def attached(model, task="seq_cls", **config):
    asked = recipe().model_copy(update={"model": ModelSection(name_or_path="tiny", task=task, dtype="float32")})
    torch.manual_seed(0)
    return Method(Config(**config)).apply(model, Context(asked))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def train(model, steps=3):
    model.train()
    ids = torch.arange(4, 28).reshape(2, 12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        labels = torch.tensor([0, 2]) if model(input_ids=ids).logits.dim() == 2 else ids % 3
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def bert_base():
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig())


def test_the_counts_are_the_authors():
    """BERT-base: 102,912 biases of 109,482,240 parameters; 46,080 in queries and first layers; the head on top."""
    model = bert_base()
    head = sum(p.numel() for p in model.classifier.parameters())
    assert sum(p.numel() for p in model.bert.parameters()) == 109_482_240
    assert Method(Config()).count(model) - head == 102_912
    assert Method(Config(biases="query_and_mlp")).count(model) - head == 46_080
    with torch.device("meta"):
        large = BertForSequenceClassification(
            BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    head = sum(p.numel() for p in large.classifier.parameters())
    assert Method(Config()).count(large) - head == 272_384


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForTokenClassification"])
@pytest.mark.parametrize("biases", ["all", "query_and_mlp"])
def test_only_biases_and_the_head_change(kind, biases):
    base, task = classifier(kind), "seq_cls" if "Sequence" in kind else "token_cls"
    count = Method(Config(biases=biases)).count(base)
    model = attached(base, task, biases=biases)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    before = {name: p.clone() for name, p in model.named_parameters()}
    chosen = trainable(model)
    train(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= chosen
    # Softmax does not see what the bias of a key adds to all scores alike.
    assert all("key.bias" in name for name in chosen - changed)
    for name in chosen:
        assert name.endswith(".bias") or "classifier.modules_to_save" in name
    if biases == "query_and_mlp":
        places = {name.rsplit(".layer.", 1)[-1][2:] for name in chosen if "classifier" not in name}
        assert places == {"attention.self.query.bias", "intermediate.dense.bias"}
    else:
        of_base = {
            f"base_model.model.{name}" for name, _ in classifier(kind).named_parameters() if name.endswith(".bias")
        }
        of_base -= {"base_model.model.classifier.bias"}
        assert of_base <= chosen


def test_what_a_layer_adds_does_not_depend_on_its_input():
    """y' - y = b' - b for every x."""
    model = attached(classifier())
    layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(5, 32)
    before = layer(x).detach()
    train(model)
    delta = layer(x) - before
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(delta, delta[:1].expand_as(delta), rtol=0, atol=1e-5)


def test_the_model_starts_as_the_base():
    ids = torch.arange(4, 16).reshape(1, 12)
    expected = classifier()(input_ids=ids).logits
    assert torch.equal(attached(classifier())(input_ids=ids).logits, expected)


@pytest.mark.parametrize("biases", ["all", "query_and_mlp"])
def test_plain_peft_loads_the_same_model(tmp_path, biases):
    model = train(attached(classifier(), biases=biases))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith(".bias") or "classifier" in name for name in stored)
    again = PeftModel.from_pretrained(classifier(), str(tmp_path)).eval()
    ids = torch.arange(4, 28).reshape(2, 12)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(again(input_ids=ids).logits, classifier()(input_ids=ids).logits)


def test_merging_leaves_a_plain_model():
    model = train(attached(classifier()))
    ids = torch.arange(4, 28).reshape(2, 12)
    expected = model(input_ids=ids).logits
    plain, _ = fold(model, torch.float32)
    assert type(plain) is BertForSequenceClassification
    assert torch.equal(plain(input_ids=ids).logits, expected)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in classifier().named_parameters()}


def test_a_decoder_with_biases_trains():
    model = applied(Method(Config()), tiny_opt())
    assert all(name.endswith(".bias") for name in trainable(model))
    losses = run_steps(model, 6)
    assert losses[-1] < losses[0]


def test_an_encoder_decoder_with_biases_trains_them_in_both_halves():
    model = attached(tiny_bart(), "seq2seq_lm")
    assert {name.split(".")[3] for name in trainable(model)} == {"encoder", "decoder"}
    assert "base_model.model.final_logits_bias" not in trainable(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_an_architecture_without_biases_is_refused(make):
    """T5's relative_attention_bias is a table, not a bias."""
    model = make()
    with pytest.raises(UsageError, match=r"bitfit trains biases, and the (llama|t5) architecture has none; take lora"):
        Method(Config()).count(model)
    with pytest.raises(UsageError, match="has none"):
        applied(Method(Config()), model)


def test_a_table_called_bias_stays_as_it_is():
    """MPNet has biases, and T5's table of relative positions."""
    from transformers import MPNetForSequenceClassification

    shape = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mpnet", **shape, intermediate_size=32)
    model = attached(MPNetForSequenceClassification(config))
    table = "base_model.model.mpnet.encoder.relative_attention_bias.weight"
    assert table in dict(model.named_parameters()) and table not in trainable(model)


def test_fused_queries_are_refused_for_the_subset():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=99, **sizes))
    with pytest.raises(UsageError, match=r"method.biases: no query"):
        Method(Config(biases="query_and_mlp")).count(model)


def test_a_head_of_two_modules_trains_whole(tmp_path):
    """DistilBERT's pre_classifier is one that peft does not know of."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    def make():
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=99, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
        ).eval()

    count = Method(Config()).count(make())
    model = attached(make())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert any("pre_classifier.modules_to_save.default.weight" in name for name in trainable(model))
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    ids = torch.arange(4, 28).reshape(2, 12)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_encoder_without_head_counts_its_biases_alone():
    assert Method(Config()).count(tiny_bert()) == sum(
        p.numel() for name, p in BertModel(tiny_bert().config).named_parameters() if name.endswith(".bias")
    )

"""MoLoRA, and what all mixtures share: what trains, which tokens count, the load in metrics.jsonl."""

import json

import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import UsageError
from peftctl.methods.base import Context, StepInfo
from peftctl.methods.molora import Config, Method
from peftctl.tuners.routing import layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.routed import (
    IDS,
    batch,
    check_moves,
    check_quantised,
    check_resume,
    experts,
    observed,
    parts,
    randomise,
)
from tests.tiny import tiny_bart, tiny_bert, tiny_llama, tiny_opt, tiny_t5
from tests.training.helpers import train, workload

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def method(**keys):
    return Method(Config(**{"experts": 4, "r": 2, "alpha": 4, **keys}))


def logits(model, ids=IDS):
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# -- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_starts_as_the_base_exactly(base):
    reference = logits(base())
    model = applied(method(), base())
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode), reference)


def test_counts_are_those_of_the_formula():
    widths = [(32, 32)] * 2 + [(32, 16)] * 2 + [(32, 64)] * 2 + [(64, 32)]
    expected = 4 * sum(4 * (2 * (d_in + d_out) + d_in) for d_in, d_out in widths)
    assert method().count(tiny_llama()) == expected
    model = applied(method(), tiny_llama())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert len(experts(model)) == 28
    # r (d_in + d_out) of the feed-forward part is 30 * 3 * (576 + 1536) a rank, and routers come on top.
    smollm2 = tiny_of("llama", **SMOLLM2)
    found = Method(Config(experts=8, r=4, target_modules="mlp")).count(smollm2)
    assert found == 6_082_560 + 30 * 8 * (576 + 576 + 1536) == 6_727_680


def test_every_target_has_its_own_router_and_starts_from_a_normal_distribution():
    model = applied(method(experts=8, r=4), tiny_llama())
    found = list(experts(model).values())
    assert len({id(one.router) for one in found}) == len(found)
    for drawn in ([one.router for one in found], [one.pairs()[0][0] for one in found]):
        values = torch.cat([p.flatten() for p in drawn])
        assert values.std().item() == pytest.approx(0.02, rel=0.03)
    assert not any(one.pairs()[0][1].any() for one in found)


@pytest.mark.parametrize("keys", [{}, {"k": 2}], ids=["dense", "top_k"])
def test_three_steps_move_experts_and_routers_and_nothing_else(keys):
    check_moves(applied(method(**keys), tiny_llama()))


def test_an_embedding_and_more_choices_than_experts_are_refused():
    with pytest.raises(UsageError, match=r"model\.embed_tokens is an embedding; molora takes linear layers only"):
        method(target_modules=["embed_tokens"]).count(tiny_llama())
    with pytest.raises(ValidationError, match="k: expected at most experts, which is 4, got 5"):
        method(k=5)


def test_a_classifiers_head_trains_whole_and_has_no_experts():
    base = tiny_bert(kind="BertForSequenceClassification", num_labels=3)
    with pytest.raises(UsageError, match="selects the classifier's head only"):
        method(target_modules=["classifier"]).count(base)
    assert method(target_modules=["query"]).count(base) == 2 * 4 * (2 * 64 + 32) + 3 * 33


def test_top_k_of_all_experts_learns_what_dense_does():
    dense, sparse = applied(method(), tiny_llama().double()), applied(method(k=4), tiny_llama().double())
    randomise(dense.double())
    for one, other in zip(experts(dense).values(), experts(sparse.double()).values(), strict=True):
        other.router.data = one.router.data.clone()
        (a, b), pieces = one.pairs()[0], other.pairs()
        for (low, high), down, up in zip(pieces, a.split(2), b.split(2, dim=1), strict=True):
            low.data, high.data = down.detach().clone(), up.detach().clone()
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_a_quantised_base(tmp_path, bits):
    check_quantised(tmp_path, method, bits)


@pytest.mark.parametrize("keys", [{}, {"k": 1, "dropout": 0.1}], ids=["dense", "top_k"])
def test_stopped_and_resumed_equals_straight(tmp_path, keys):
    check_resume(tmp_path, lambda: method(**keys))


def test_it_learns_in_bfloat16():
    model = applied(method(), tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = run_steps(model, 4, lr=1e-2)
    assert losses[-1] < losses[0]


# -- idle experts --------------------------------------------------------------------------------------------------


class Idle(Method):
    """Routers that can't choose the last two of four experts."""

    def apply(self, model, context):
        made = randomise(super().apply(model, context))
        for one in experts(made).values():
            one.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
            one.router.data = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None] * one.router.data.abs()
        return made


def experts_of(model):
    return {f"{name}.{n}": p.detach() for name, one in experts(model).items() for n, p in one.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_expert_that_nobody_chose_stands_still_also_under_weight_decay(tmp_path, accumulation):
    chosen = Idle(Config(experts=4, r=2, k=1))
    before = experts_of(applied(chosen, tiny_llama()))
    train_keys = {"gradient_accumulation": accumulation, "max_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-3}
    after = experts_of(train(workload(tmp_path, chosen, **train_keys))[0])
    still = {name for name, p in after.items() if torch.equal(p, before[name])}
    idle = {name for name in after if name.rsplit(".", 1)[-1] in ("A_2", "B_2", "A_3", "B_3")}
    assert idle <= still
    assert not {name for name in still if name.endswith("router")}
    places = {name.rsplit(".", 1)[0] for name in after}
    assert not [place for place in places if {f"{place}.B_0", f"{place}.B_1"} <= still]


def test_momentum_does_not_move_an_expert_that_is_no_longer_chosen():
    chosen = method(k=1)
    model = randomise(applied(chosen, tiny_llama()))
    stand_still = chosen.callbacks(model)[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    one = experts(model)["model.layers.0.mlp.up_proj"]
    moved = []
    for favourite in (0, 1):
        one.router.data.zero_()
        one.router.data[favourite] = 10 * torch.ones(32)
        one.register_forward_pre_hook(lambda _, args: (args[0].abs(),))
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        before = [[t.detach().clone() for t in pair] for pair in one.pairs()]
        stand_still.before_optimizer(StepInfo(0, 2, model, lambda _: None))
        assert [a.grad is None and b.grad is None for a, b in one.pairs()] == [e != favourite for e in range(4)]
        optimizer.step()
        moved.append([not torch.equal(a, old) for (a, _), (old, _) in zip(one.pairs(), before, strict=True)])
    assert moved == [[e == favourite for e in range(4)] for favourite in (0, 1)]


def test_a_start_whose_b_is_0_keeps_the_zero_gradients_of_chosen_experts():
    chosen = method(k=1)
    model = applied(chosen, tiny_llama())
    model(input_ids=IDS, labels=IDS).loss.backward()
    chosen.callbacks(model)[1].before_optimizer(StepInfo(0, 2, model, lambda _: None))
    pairs = [pair for one in experts(model).values() for pair in one.pairs()]
    assert any(a.grad is not None and not a.grad.any() and b.grad.any() for a, b in pairs)
    assert all((a.grad is None) == (b.grad is None) for a, b in pairs)


def test_a_dense_mixture_needs_no_such_care():
    assert len(method().callbacks(None)) == 1 and len(method(k=1).callbacks(None)) == 2


# -- which tokens count --------------------------------------------------------------------------------------------


def classifier(task, kind):
    """Apply to a tiny encoder with a head of three classes."""
    made = recipe()
    made = made.model_copy(update={"model": made.model.model_copy(update={"task": task})})
    return method().apply(tiny_bert(kind=kind, num_labels=3), Context(made))


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_bert], ids=lambda make: make.__name__)
def test_every_layer_sees_the_tokens_of_the_batch_and_not_the_padding(base):
    tags = base is tiny_bert
    model = classifier("token_cls", "BertForTokenClassification") if tags else applied(method(), base())
    randomise(model).eval()
    short, padded = observed(model, batch()), observed(model, batch(pad=5))
    assert short.keys() == padded.keys() == experts(model).keys()
    for name, layer in short.items():
        assert layer.probabilities.shape == (2, 12, 4) and layer.mask.shape == (2, 12)
        assert layer.mask.sum() == padded[name].mask.sum() == 24
        torch.testing.assert_close(padded[name].probabilities[:, :12], layer.probabilities, rtol=1e-4, atol=1e-5)


def test_a_layer_behind_a_pooler_sees_one_state_a_row():
    model = classifier("seq_cls", "BertForSequenceClassification")
    labels = torch.tensor([[1], [2]])
    found = observed(model, {**batch(), "labels": labels})
    assert found["bert.pooler.dense"].mask.shape == (2, 1)
    assert found["bert.encoder.layer.0.attention.self.query"].mask.shape == (2, 12)


@pytest.mark.parametrize(("base", "cross"), [(tiny_t5, "EncDecAttention"), (tiny_bart, "encoder_attn")])
def test_of_an_encoder_decoder_cross_keys_and_values_see_the_encoders_tokens(base, cross):
    model = applied(method(), base())
    labels = torch.tensor([[7, 8, 9, -100, -100], [7, 8, 9, 5, 2]])
    found = observed(model, {**batch(pad=2), "labels": labels})
    for name, layer in found.items():
        role = name.rsplit(".", 1)[-1].removesuffix("_proj")
        encoded = "encoder." in name.removeprefix("model.")[:8] or (cross in name and role in "kv")
        assert (layer.mask.shape, layer.mask.sum()) == (((2, 14), 24) if encoded else ((2, 5), 8)), name
    assert sum(cross in name for name in found) == 8


def test_a_process_without_rows_routes_no_token():
    model = applied(method(), tiny_llama())
    nothing = {name: t[:1, :1] for name, t in batch().items()}
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    assert not any(layer.mask.any() for layer in observed(model, nothing).values())
    chosen = method()
    chosen.load.count(list(observed(model, nothing).values()))
    assert set(chosen.load.shares().values()) == {0.0}


# -- the load ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"k": 2}], ids=["dense", "top_k"])
def test_the_load_is_the_share_over_tokens_and_layers_of_a_block(keys):
    chosen = method(**keys)
    model = randomise(applied(chosen, tiny_llama()))
    first, second = batch(pad=3), batch(ids=torch.arange(30, 40).reshape(1, 10))
    seen = []
    for inputs in (first, second):
        assert set(parts(chosen, model, inputs)) == {"loss"}
        seen.append(observed(model, inputs))
    expected = torch.zeros(4)
    for found, tokens in zip(seen, (12, 10), strict=True):
        for name, layer in found.items():
            if name.startswith("model.layers.2."):
                for row in layer.gates[:, :tokens]:
                    for token in row:
                        expected += token if not keys else (token > 0).float() / 2
    expected /= 7 * (2 * 12 + 10)
    shares = chosen.load.shares()
    assert len(shares) == 4 * 4 and not chosen.load.sums
    assert [shares[f"expert_load/2/{e}"] for e in range(4)] == pytest.approx(expected.tolist(), abs=1e-4)


def test_blocks_of_an_encoder_decoder_are_named():
    chosen = method()
    model = applied(chosen, tiny_t5())
    parts(chosen, model, {**batch(), "labels": torch.tensor([[7, 8], [7, 9]])})
    blocks = {name.split("/")[1] for name in chosen.load.shares()}
    assert blocks == {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)}


def test_the_load_is_in_the_lines_of_metrics_that_have_a_loss(tmp_path):
    work = workload(tmp_path, method(k=1), max_steps=5, logging_steps=2, gradient_accumulation=2)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5]
    for line in lines:
        loads = {key: value for key, value in line.items() if key.startswith("expert_load/")}
        assert len(loads) == (16 if "loss" in line else 0)
        if loads:
            for block in range(4):
                own = [loads[f"expert_load/{block}/{e}"] for e in range(4)]
                assert sum(own) == pytest.approx(1, abs=3e-4) and min(own) >= 0


@pytest.mark.parametrize("keys", [{}, {"k": 2}], ids=["dense", "top_k"])
def test_recomputed_activations_change_nothing_and_leave_nothing_behind(keys):
    gradients = []
    for recompute in (False, True):
        chosen = method(**keys)
        model = randomise(applied(chosen, tiny_llama())).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        parts(chosen, model, batch())["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        assert all(layer.listener is None for layer in layers(model).values())
        assert sum(chosen.load.sums["0"]).item() == pytest.approx(7 * 24 * (keys.get("k", 1)), rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)

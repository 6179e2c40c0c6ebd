"""SparseAdapter: scores against their definitions, the exact share that stays, and that nothing else ever moves."""

import json
from itertools import islice

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.data.collate import Collator
from peftctl.errors import Interrupted, RunError, UsageError
from peftctl.methods.sparse_adapter import Config, Method
from peftctl.tuners.bottleneck import BottleneckConfig
from peftctl.tuners.into_plain import into_plain
from peftctl.tuners.perceptrons import Perceptron
from peftctl.tuners.sparse_adapters import sparse_adapters
from peftctl.tuners.sparse_scores import scores
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import SMOLLM2, logits
from tests.tiny import tiny_bart, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import rows, run_stages, workload
from tests.training.test_resume import StopAt

D, BLOCKS = 32, 4


def method(**keys):
    return Method(Config(**{"bottleneck": 8, "sparsity": 0.6, "rows": 6, "init_std": 0.1, **keys}))


def batches(count=24, seed=0):
    collate = Collator(tiny_tokenizer(), None)
    return (collate([row]) for row in rows(count, seed))


def first_of(count):
    return islice(batches(), count)


def fitted(chosen=None, base=tiny_llama):
    """Return a model whose entries are chosen."""
    model = applied(chosen or method(), base())
    (chosen or method()).calibrate(model, batches())
    return model


def kept(model):
    return {name: module.indices.clone() for name, module in sparse_adapters(model)}


def entries(model):
    """Return name -> D and U in one vector, as the model computes with them."""
    return {name: module.flat().detach().clone() for name, module in sparse_adapters(model)}


def drawn():
    """Return the model with the dense adapters that the same seed draws."""
    ends = ["o_proj", "down_proj"]
    config = BottleneckConfig(bottleneck=8, activation="relu", init_std=0.1, up_std=0.1, target_modules=ends)
    base = tiny_llama()
    torch.manual_seed(0)
    return get_peft_model(base, config)


def dense_adapters(model):
    named = model.get_base_model().named_modules()
    return {name.rsplit(".", 2)[0]: m for name, m in named if isinstance(m, Perceptron)}


def joined(perceptron, of=lambda p: p):
    return torch.cat([of(perceptron.down.weight).flatten(), of(perceptron.up.weight).flatten()]).detach()


def fit(work, checkpoint=None, base=tiny_llama):
    """Apply, calibrate unless resumed, and train, as `train` does."""
    model = applied(work.method, base())
    if checkpoint is None:
        work.method.calibrate(model, batches())
    return model, run_stages(work, model, checkpoint)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_snip_is_the_gradient_of_the_loss_in_the_mask():
    found = scores("snip", applied(method(), tiny_llama()), first_of(5), 0)
    model = drawn()
    masks = []
    for perceptron in dense_adapters(model).values():
        for layer in (perceptron.down, perceptron.up):
            mask = torch.ones_like(layer.weight, requires_grad=True)
            masks.append(mask)
            weight = layer.weight.detach()
            del layer._parameters["weight"]
            layer.weight = mask * weight
    total = 0
    for batch in first_of(5):
        labels = batch["labels"][0, 1:]
        log_p = model(input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        total = total - sum(log_p[i, label] for i, label in enumerate(labels) if label != -100)
    gradients = torch.autograd.grad(total, masks)
    assert len(found) == 2 * BLOCKS
    for i, name in enumerate(dense_adapters(model)):
        expected = torch.cat([g.flatten() for g in gradients[2 * i : 2 * i + 2]]).abs().view(2, -1)
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-7)
        assert found[name].any(dim=1).all()


def test_magnitude_is_the_size_of_what_was_drawn():
    found = scores("magnitude", applied(method(), tiny_llama()), [], 0)
    for name, perceptron in dense_adapters(drawn()).items():
        assert torch.equal(found[name].flatten(), joined(perceptron, torch.abs))


def test_synflow_of_relu_is_the_product_of_the_paths_through_an_entry():
    found = scores("synflow", applied(method(), tiny_llama()), [], 0)
    for name, perceptron in dense_adapters(drawn()).items():
        down, up = perceptron.down.weight.detach().abs(), perceptron.up.weight.detach().abs()
        expected = torch.cat([(down * up.sum(0)[:, None]).flatten(), (up * down.sum(1)).flatten()])
        torch.testing.assert_close(found[name].flatten(), expected)


def test_random_scores_follow_from_the_seed_alone():
    first, again, other = (
        scores("random", applied(method(), tiny_llama(), s), [], n) for s, n in ((0, 1), (7, 1), (0, 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({score.sum().item() for score in first.values()}) == len(first)


@pytest.mark.parametrize("kind", ["snip", "synflow"])
def test_with_an_up_projection_of_zero_there_is_nothing_to_go_by_and_that_is_an_error(kind):
    chosen = method(score=kind)
    model = applied(chosen, tiny_llama())
    for _, module in sparse_adapters(model):
        module.start.view(2, -1)[1] = 0
    with pytest.raises(RunError, match=f"every {kind} score is 0; set method.score to magnitude"):
        chosen.calibrate(model, batches())


def test_scoring_leaves_no_trace_and_looks_at_the_first_rows_without_dropout():
    base = tiny_opt()
    for layer in base.model.decoder.layers:
        layer.dropout = 0.5
    chosen = method(rows=4)
    model = applied(chosen, base).train()
    before, state, seen = entries(model), torch.get_rng_state(), []

    def watched():
        for i, batch in enumerate(batches()):
            seen.append(i)
            yield batch

    first, again = (scores("snip", model, first_of(3), 0) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in entries(model).items())
    assert all(p.grad is None for p in model.parameters())
    chosen.calibrate(model, watched())
    assert seen == [0, 1, 2, 3]


def test_no_rows_and_broken_scores_are_errors():
    chosen = method()
    with pytest.raises(RunError, match="sparse_adapter: there is no training row"):
        chosen.calibrate(applied(chosen, tiny_llama()), [])
    broken = tiny_llama()
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"a snip score of .* is not finite; set model\.dtype"):
        chosen.calibrate(applied(chosen, broken), batches(1))


# -- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("score", ["snip", "magnitude", "random", "synflow"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8])
def test_the_share_that_stays_is_exact(sparsity, score, scope):
    chosen = method(sparsity=sparsity, score=score, scope=scope, rows=2)
    model = fitted(chosen)
    total = 2 * BLOCKS * 2 * D * 8
    found = kept(model)
    k = sum(map(len, found.values()))
    assert abs(k - (1 - sparsity) * total) <= 1
    for name, module in sparse_adapters(model):
        assert torch.equal(found[name].unique(), found[name])  # ascending, each once
        assert (module.indices < 2 * D * 8).all() and len(module.values) == len(found[name])
    if scope == "local":
        share = (1 - sparsity) * D * 8
        sizes = [(part.sum().item()) for i in found.values() for part in (i < D * 8, i >= D * 8)]
        assert all(abs(size - share) <= 1 for size in sizes)
    assert chosen.count(tiny_llama()) == k + 2 * BLOCKS * (8 + D)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == chosen.count(tiny_llama())


def test_what_stays_are_the_largest_scores_of_all_adapters_and_it_starts_as_drawn():
    chosen = method()
    found = scores("snip", applied(chosen, tiny_llama()), first_of(6), 0)
    model = fitted(chosen)
    threshold = torch.cat([score.flatten() for score in found.values()]).sort(descending=True).values
    smallest = threshold[sum(map(len, kept(model).values())) - 1]
    dense = dense_adapters(drawn())
    sizes = set()
    for name, indices in kept(model).items():
        chosen_ones = torch.zeros(2 * D * 8, dtype=torch.bool)
        chosen_ones[indices] = True
        assert torch.equal(chosen_ones, found[name].flatten() >= smallest)
        assert torch.equal(entries(model)[name], joined(dense[name]) * chosen_ones)
        sizes.add(len(indices))
    assert len(sizes) > 1


def test_four_times_the_width_at_three_quarters_has_as_many_active_weights():
    model, d = tiny_of("llama", **SMOLLM2), 576
    large, biases = Method(Config()).count(model), 60 * (256 + d)
    assert large - biases == Method(Config(bottleneck=64, sparsity=0)).count(model) - 60 * (64 + d) == 60 * 2 * 64 * d
    assert large == 60 * 2 * 64 * d + biases == 4_423_680 + 49_920


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5, tiny_bart])
def test_trainable_count_is_the_closed_form_also_before_entries_are_chosen(base):
    chosen = method()
    adapters = {"tiny_llama": 8, "tiny_opt": 4, "tiny_t5": 10, "tiny_bart": 10}[base.__name__]
    expected = round(0.4 * adapters * 2 * D * 8) + adapters * (D + 8)
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    for indices in kept(model).values():  # of both matrices, evenly
        assert abs((indices < D * 8).sum() - 0.2 * 2 * D * 8) <= 2


def test_only_entries_and_biases_train():
    names = {n.rsplit(".", 1)[1] for n, p in fitted().named_parameters() if p.requires_grad}
    assert names == {"values", "down_bias", "up_bias"}


def test_nothing_left_is_an_error():
    with pytest.raises(UsageError, match=r"method.sparsity: 0.9999 leaves none of 4,096 entries; lower it"):
        method(sparsity=0.9999).count(tiny_llama())
    chosen = method(sparsity=0.999, score="magnitude", target_modules=["o_proj"])
    with pytest.raises(
        RunError, match=r"among the 2 entries that stay is none of the \w+-projection behind model\.lay"
    ):
        chosen.calibrate(applied(chosen, tiny_llama()), [])


# -- training -------------------------------------------------------------------------------------------------------


def test_layer_is_the_papers_equation_in_float64():
    model = fitted(base=lambda: tiny_llama().double()).double()
    generator = torch.Generator().manual_seed(0)
    name, module = list(sparse_adapters(model))[3]
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    down, up = torch.zeros(8, D, dtype=torch.float64), torch.zeros(D, 8, dtype=torch.float64)
    for value, index in zip(module.values, module.indices.tolist(), strict=True):
        matrix, place = (down, index) if index < 8 * D else (up, index - 8 * D)
        matrix[place // matrix.shape[1], place % matrix.shape[1]] = value
    layer = model.get_base_model().get_submodule(name)
    x = torch.randn(5, layer.base_layer.in_features, dtype=torch.float64)
    h = x @ layer.base_layer.weight.T
    low = h @ down.T + module.down_bias
    torch.testing.assert_close(layer(x), h + (low * (low > 0)) @ up.T + module.up_bias, rtol=1e-12, atol=1e-12)


def test_left_out_entries_stay_zero_under_weight_decay_clipping_and_accumulation(tmp_path):
    work = workload(
        tmp_path, method(), max_steps=6, batch_size=2, gradient_accumulation=2, weight_decay=0.3, max_grad_norm=0.1
    )
    first = kept(fitted(method()))
    start = entries(fitted(method()))
    model, _ = fit(work)
    assert kept(model).keys() == first.keys()
    for name, value in entries(model).items():
        assert torch.equal(kept(model)[name], first[name])
        out = torch.ones_like(value, dtype=torch.bool)
        out[first[name]] = False
        assert out.any() and not value[out].any()
        assert (value != start[name])[~out].all()


def test_a_sparsity_of_zero_is_the_dense_run_with_the_same_seed():
    sparse, dense = fitted(method(sparsity=0)), drawn()
    assert torch.equal(logits(sparse), logits(dense))
    assert run_steps(sparse, 5, weight_decay=0.1) == run_steps(dense, 5, weight_decay=0.1)
    for name, perceptron in dense_adapters(dense).items():
        assert torch.equal(entries(sparse)[name], joined(perceptron))


def test_entries_decay_as_matrices_do_and_biases_do_not():
    chosen = method()
    model = fitted(chosen)
    groups = chosen.param_groups(model, recipe(chosen.config, weight_decay=0.3).train)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name.rsplit(".", 1)[1]: decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"values": 0.3, "down_bias": 0.0, "up_bias": 0.0}
    assert len(decay) == sum(p.requires_grad for p in model.parameters())


def test_stopped_and_resumed_equals_straight_with_the_same_mask(tmp_path):
    straight, _ = fit(workload(tmp_path / "a", method(), max_steps=8, weight_decay=0.1))
    with pytest.raises(Interrupted):
        fit(workload(tmp_path / "b", method(), max_steps=8, weight_decay=0.1, reporter=StopAt(5)))
    work = workload(tmp_path / "b", method(), max_steps=8, weight_decay=0.1)
    again, _ = fit(work, work.run.latest_checkpoint())
    for name, value in entries(straight).items():
        assert torch.equal(kept(again)[name], kept(straight)[name])
        assert torch.equal(entries(again)[name], value)


def test_disabled_it_is_the_base_although_it_does_not_start_there():
    reference = logits(tiny_llama())
    model = fitted()
    assert not torch.allclose(logits(model), reference, rtol=1e-3)
    run_steps(model, 2)
    with model.eval().disable_adapter():
        assert torch.equal(logits(model), reference)


def test_in_a_half_type_entries_are_float32_and_rounded_nowhere():
    model = fitted(base=lambda: tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = entries(model)
    run_steps(model, 1, lr=1e-5)
    moved = [(value != before[name])[kept(model)[name]].float().mean() for name, value in entries(model).items()]
    assert min(moved) > 0.5  # but for those behind a ReLU that is off


# -- the artefact ---------------------------------------------------------------------------------------------------


def test_it_is_saved_as_plain_adapters_with_zeros_that_answer_the_same(tmp_path):
    chosen = method()
    model = fitted(chosen)
    run_steps(model, 3, weight_decay=0.1)
    answer, values, masks = logits(model.eval()), entries(model), kept(model)
    exported = chosen.export(model)
    assert torch.equal(logits(exported), answer)
    exported.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["kind"], config["bottleneck"]) == ("PEFTCTL_BOTTLENECK", "plain", 8)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in values.items():
        start = f"base_model.model.{name}.bottleneck_adapter"
        found = torch.cat([tensors[f"{start}.{part}.weight"].flatten() for part in ("down", "up")])
        assert torch.equal(found, value)
        assert torch.equal(found.nonzero()[:, 0], masks[name])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), answer)
    assert not dict(sparse_adapters(exported)) and len(tensors) == 4 * 8


def test_turned_plain_it_keeps_its_mode():
    assert all(not m.training for m in dense_adapters(into_plain(fitted().eval())).values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"score": "grasp"}, "'snip', 'magnitude', 'random' or 'synflow'"),
        ({"init_std": 0}, "greater than 0"),
        ({"init_from": "runs/a"}, "chosen where the adapters start"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))

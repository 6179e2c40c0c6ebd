"""AdaMix: one expert at a time in training, their average otherwise, two routes held together, one adapter saved."""

import copy
import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

import peftctl.tuners  # noqa: F401  # peft learns the type
from peftctl.data.collate import Collator
from peftctl.errors import Interrupted
from peftctl.evaluation.loss import held_out_loss
from peftctl.methods.adamix import Config, Method, routes
from peftctl.models.supervised import supervised_forward
from peftctl.tuners.divergence import symmetric_divergence
from peftctl.tuners.expert_adapters import experts_of, set_routes, two_passes
from peftctl.tuners.into_plain import into_plain
from peftctl.tuners.perceptrons import Perceptron
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.methods.test_houlsby import IDS, SMOLLM2, logits
from tests.tiny import tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import rows, train, trained_tensors, workload
from tests.training.test_resume import StopAt

M = 4


def method(**keys):
    return Method(Config(**{"bottleneck": 6, "experts": M, **keys}))


def randomise(model, seed=0, std=0.3):
    """Give every expert values of its own; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in experts_of(model):
        for p in module.parameters():
            p.data = (std * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p)
    return model


def fitted(chosen=None, base=tiny_llama):
    chosen = chosen or method()
    return chosen, randomise(applied(chosen, base()))


def batch(count=4, seed=0):
    return Collator(tiny_tokenizer(), None)(rows(count, seed))


def loss_of(chosen, model, given):
    parts = chosen.loss(model, given, lambda it: supervised_forward(model, it))
    assert list(parts) == ["loss"]
    return parts["loss"]


# -- one adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [(True, False), (False, False), (False, True)], ids=["up", "none", "down"])
def test_training_takes_the_route_and_else_the_mean_as_in_the_paper_in_float64(shared):
    chosen = method(share_up=shared[0], share_down=shared[1])
    module = experts_of(randomise(applied(chosen, tiny_llama().double()).double()))[1]
    downs, ups = chosen.numbers
    assert (module.down.shape, module.up.shape) == ((downs, 6, 32), (ups, 32, 6))
    h = torch.randn(2, 5, 32, dtype=torch.float64)

    def plain(down, b, up, c):
        low = h @ down.T + b
        return low * 0.5 * (1 + torch.erf(low / 2**0.5)) @ up.T + c

    module.train()
    for i in range(downs):
        for j in range(ups):
            module.routes = [(i, j), (0, 0)]
            expected = plain(module.down[i], module.down_bias[i], module.up[j], module.up_bias[j])
            torch.testing.assert_close(module(h), expected, rtol=1e-12, atol=1e-12)
    module.eval()
    means = [sum(t.unbind()) / len(t) for t in (module.down, module.down_bias, module.up, module.up_bias)]
    torch.testing.assert_close(module(h), plain(*means), rtol=1e-12, atol=1e-12)


def test_of_two_passes_each_half_of_the_rows_takes_its_own_route():
    _, model = fitted(method(share_up=False))
    module = experts_of(model.train())[0]
    h = torch.randn(3, 5, 32)
    first, second = (1, 3), (2, 0)
    expected = []
    for route in (first, second):
        module.routes, module.passes = [route, route], 1
        expected.append(module(h))
    module.routes, module.passes = [first, second], 2
    torch.testing.assert_close(module(torch.cat([h, h])), torch.cat(expected))
    assert not torch.allclose(expected[0], expected[1])
    module.routes = [first, first]  # one product for both
    torch.testing.assert_close(module(torch.cat([h, h])), torch.cat([expected[0], expected[0]]))


def test_the_average_of_weights_is_another_thing_than_the_average_of_answers_unless_all_is_linear():
    _, model = fitted()
    module = experts_of(model)[0]
    h = torch.randn(7, 32)

    def compare():
        averaged = module.eval()(h)
        module.train()
        answers = []
        for i in range(M):
            module.routes = [(i, 0), (i, 0)]
            answers.append(module(h))
        return averaged, torch.stack(answers).mean(0)

    averaged, mean = compare()
    assert (averaged - mean).abs().max() > 1e-2
    module.activation = torch.nn.Identity()
    averaged, mean = compare()
    torch.testing.assert_close(averaged, mean)


def test_one_expert_is_the_plain_adapter_also_in_training():
    chosen, model = fitted(method(experts=1, consistency=False))
    plain = into_plain(copy.deepcopy(model))
    assert not experts_of(plain) and any(isinstance(m, Perceptron) for m in plain.modules())
    assert torch.equal(logits(plain.train()), logits(model.train()))
    assert run_steps(plain, 4) == pytest.approx(run_steps(model, 4), rel=1e-6)
    assert chosen.parameters(32) == 2 * 32 * 6 + 6 + 32


# -- routes ---------------------------------------------------------------------------------------------------------


def test_routes_are_uniform_and_independent_between_passes_projections_and_adapters():
    steps = 4000
    drawn = [routes(0, step, 2, (M, M)) for step in range(steps)]
    pairs = {
        "pass": [(step[0][0][0], step[0][1][0]) for step in drawn],
        "projection": [step[0][0] for step in drawn],
        "adapter": [(step[0][0][0], step[1][0][0]) for step in drawn],
        "step": [(a[1][1][1], b[1][1][1]) for a, b in pairwise(drawn)],
    }
    for name, found in pairs.items():
        counts = Counter(found)
        expected = len(found) / M**2
        chi_square = sum((counts[i, j] - expected) ** 2 / expected for i in range(M) for j in range(M))
        assert chi_square < 37.7, name  # 99.9% of 15 degrees of freedom


def test_routes_follow_from_seed_and_step_and_stay_in_range():
    assert routes(0, 7, 3, (4, 1)) == routes(0, 7, 3, (4, 1))
    assert routes(0, 7, 30, (4, 4)) != routes(0, 8, 30, (4, 4)) != routes(1, 8, 30, (4, 4))
    flat = [route for step in range(50) for own in routes(0, step, 3, (4, 1)) for route in own]
    assert {i for i, _ in flat} == {0, 1, 2, 3} and {j for _, j in flat} == {0}


def test_in_training_two_steps_differ_and_evaluation_never_does():
    chosen, model = fitted()
    model.train()
    first = logits(model)
    chosen.route(model, 1)
    assert not torch.allclose(logits(model), first)
    model.eval()
    answer = logits(model)
    chosen.route(model, 2)
    two_passes(model)
    assert torch.equal(logits(model), answer)


@pytest.mark.parametrize("share_up", [True, False])
def test_one_expert_of_each_adapter_has_a_gradient_in_a_step(share_up):
    chosen, model = fitted(method(consistency=False, share_up=share_up))
    chosen.route(model.train(), 3)
    loss_of(chosen, model, batch()).backward()
    for module, ((i, j), _) in zip(experts_of(model), routes(0, 3, 4, chosen.numbers), strict=True):
        for tensor, expected in ((module.down, i), (module.down_bias, i), (module.up, j), (module.up_bias, j)):
            assert [e for e, g in enumerate(tensor.grad.unbind()) if g.any()] == [expected]
        assert len(module.up) == (1 if share_up else M)


def test_with_two_passes_those_of_both_routes_have():
    chosen, model = fitted()
    chosen.route(model.train(), 3)
    loss_of(chosen, model, batch()).backward()
    for module, ((i, _), (other, _)) in zip(experts_of(model), routes(0, 3, 4, chosen.numbers), strict=True):
        assert {e for e, g in enumerate(module.down.grad.unbind()) if g.any()} == {i, other}


# -- the loss -------------------------------------------------------------------------------------------------------


def kl_both_ways(first, second, detached=True):
    """The loss as the authors' code has it, by the library."""
    held = (lambda t: t.detach()) if detached else (lambda t: t)
    p, q = first.softmax(-1), second.softmax(-1)
    parts = [(p, second), (q, first)]
    return sum(functional.kl_div(z.log_softmax(-1), held(t), reduction="sum") for t, z in parts) / 2


@pytest.mark.parametrize("n", [0, 5, 2500])
def test_the_divergence_and_its_gradient_are_those_of_detached_targets(n):
    torch.manual_seed(0)
    first, second = (torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = symmetric_divergence(first, second)
    expected = kl_both_ways(first, second)
    torch.testing.assert_close(found, expected if n else torch.zeros(()).double())
    gradients = torch.autograd.grad(3 * found, [first, second])
    for got, want in zip(gradients, torch.autograd.grad(3 * expected, [first, second]), strict=True):
        torch.testing.assert_close(got, want)
    if n:
        through = torch.autograd.grad(3 * kl_both_ways(first, second, detached=False), [first])[0]
        assert not torch.allclose(gradients[0], through, rtol=1e-2)


def test_in_a_half_type_it_is_computed_in_float32():
    torch.manual_seed(0)
    first, second = (torch.randn(50, 40).bfloat16() for _ in range(2))
    found = symmetric_divergence(first, second)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kl_both_ways(first.float(), second.float()))


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_the_loss_is_the_first_passs_cross_entropy_and_what_the_second_is_apart(base):
    chosen, model = fitted(base=base)
    model.train()
    found = loss_of(chosen, model, batch())
    drawn = [module.routes for module in experts_of(model)]
    set_routes(model, drawn)
    first = supervised_forward(model, batch())
    set_routes(model, [(second, second) for _, second in drawn])
    second = supervised_forward(model, batch())
    apart = kl_both_ways(first.logits, second.logits)
    assert apart > 0.01
    torch.testing.assert_close(found, first.cross_entropy() + apart, rtol=1e-5, atol=1e-5)
    assert chosen.consistency.tokens == len(first.labels)
    assert chosen.consistency.taken() == pytest.approx(apart.item() / len(first.labels), rel=1e-3)


def test_the_loss_of_a_step_is_the_sum_over_its_micro_batches():
    chosen, model = fitted(base=lambda: tiny_llama().double())
    model.double().train()
    given = batch(4)
    whole = loss_of(chosen, model, given)
    halves = [{name: value[part] for name, value in given.items()} for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, sum(loss_of(chosen, model, half) for half in halves))


def test_equal_experts_leave_the_cross_entropy_alone():
    chosen, model = fitted()
    for module in experts_of(model):
        for p in module.parameters():
            p.data = p.data[:1].expand_as(p).clone()
    model.train()
    found, plain = loss_of(chosen, model, batch()), supervised_forward(model.eval(), batch()).cross_entropy()
    assert chosen.consistency.taken() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found, plain)


def test_without_consistency_there_is_one_pass():
    chosen, model = fitted(method(consistency=False))
    seen = []
    experts_of(model.train())[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    torch.testing.assert_close(loss_of(chosen, model, batch(4)), supervised_forward(model, batch(4)).cross_entropy())
    assert seen == [4, 4]


# -- what trains ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [(True, False), (False, False), (False, True), (True, True)])
@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_trainable_count_is_the_closed_form(base, shared):
    chosen = method(share_up=shared[0], share_down=shared[1])
    blocks = {"tiny_llama": 4, "tiny_opt": 2, "tiny_t5": 4}[base.__name__]
    d, m = 32, 6
    downs, ups = (1 if shared[1] else M), (1 if shared[0] else M)
    expected = blocks * (downs * (d * m + m) + ups * (m * d + d))
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert len(experts_of(model)) == blocks


def test_count_on_smollm2_is_the_papers_formula():
    model, d, m = tiny_of("llama", **SMOLLM2), 576, 16
    assert Method(Config()).count(model) == 30 * (4 * (d * m + m) + (m * d + d)) == 1_401_600


def test_one_adapter_a_block_behind_the_feed_forward_part():
    _, model = fitted()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parts = ("down", "down_bias", "up", "up_bias")
    start = "base_model.model.model.layers"
    assert names == [f"{start}.{i}.mlp.down_proj.bottleneck_adapter.default.{part}" for i in range(4) for part in parts]


def test_biases_do_not_decay_although_they_lie_in_matrices():
    chosen, model = fitted()
    groups = chosen.param_groups(model, recipe(chosen.config, weight_decay=0.3).train)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert {name.rsplit(".", 1)[1]: value for name, value in found.items()} == {
        "down": 0.3, "down_bias": 0.0, "up": 0.3, "up_bias": 0.0,
    }  # fmt: skip


def test_experts_start_apart_and_the_model_as_the_base():
    model = applied(method(bottleneck=200, init_std=0.05), tiny_llama())
    module = experts_of(model)[0]
    stds = [expert.std().item() for expert in module.down]
    assert stds == pytest.approx([0.05 * 0.88] * M, rel=0.05)  # cut off at two deviations
    assert len({expert.sum().item() for expert in module.down}) == M
    assert not module.up.any() and not module.down_bias.any()
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode), logits(tiny_llama()))


# -- runs -----------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight_by_the_same_routes(tmp_path):
    straight, _ = train(workload(tmp_path / "a", method(), max_steps=8))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "b", method(), max_steps=8, reporter=StopAt(5)))
    work = workload(tmp_path / "b", method(), max_steps=8)
    again, _ = train(work, work.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name


def test_every_step_has_the_routes_of_its_number_and_logs_how_far_they_are_apart(tmp_path):
    seen = []

    class Watched(Method):
        def loss(self, model, batch, forward):
            seen.append([module.routes for module in experts_of(model)])
            return super().loss(model, batch, forward)

    work = workload(tmp_path, Watched(method().config), max_steps=4, batch_size=2, gradient_accumulation=2, seed=3)
    model, _ = train(work)
    steps = [routes(3, step, 4, (M, 1)) for step in range(4)]
    assert seen == [own for own in steps for _ in range(2)]
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    apart = [line["consistency"] for line in lines if "loss" in line]
    assert len(apart) == 4 and apart[0] == 0 and min(apart[1:]) > 0
    # Held-out rows are answered by the average, without the second part.
    eval_loss = held_out_loss(model, work.eval_rows, work.collate, 5)
    plain = held_out_loss(into_plain(model).train(), work.eval_rows, work.collate, 5)
    assert eval_loss == plain


# -- the artefact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_up", [True, False])
def test_it_is_saved_as_one_plain_adapter_that_answers_exactly_as_the_average_did(share_up, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    chosen, model = fitted(method(share_up=share_up))
    answer, experts = logits(model.eval()), experts_of(model)
    expected = {name: tensor.detach() for name, tensor in experts[2].plain_tensors().items()}
    exported = chosen.export(model)
    assert torch.equal(logits(exported), answer)
    exported.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["kind"], config["options"]) == ("PEFTCTL_BOTTLENECK", "plain", {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 4 * (2 * 32 * 6 + 6 + 32)
    start = "base_model.model.model.layers.2.mlp.down_proj.bottleneck_adapter."
    assert {n.removeprefix(start) for n in tensors if n.startswith(start)} == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[start + name], tensor)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), answer)


def test_in_a_half_type_the_saved_adapter_answers_the_same():
    chosen = method()
    model = applied(chosen, tiny_llama(dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    run_steps(randomise(model), 2)
    answer = logits(model.eval())
    assert answer.dtype == torch.bfloat16 and torch.equal(logits(chosen.export(model)), answer)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), logits(tiny_llama(dtype="bfloat16")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 0}, "greater than 0|greater than or equal to 1"),
        ({"bottleneck": 0}, "greater than 0|greater than or equal to 1"),
        ({"init_from": "runs/a"}, "mean of its experts and has lost them; remove it"),
    ],
)
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        recipe(Config(**keys))

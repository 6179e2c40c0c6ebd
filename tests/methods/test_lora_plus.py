"""LoRA+: which tensor learns at which rate, what a first step does, and that schedules and resumes keep the ratio."""

import pytest
import torch

from peftctl.errors import UsageError
from peftctl.methods import base, lora
from peftctl.methods.lora_plus import Config, Method
from peftctl.training.optimizers import check_partition
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload

QV = {"target_modules": ["q_proj", "v_proj"]}
SECTION = recipe(learning_rate=1e-4, weight_decay=0.1).train


def groups_of(method, model):
    """Return name -> (lr, weight decay) of every tensor in the method's groups."""
    groups = method.param_groups(model, SECTION)
    check_partition(model, groups)
    names = {id(p): n.split("base_model.model.")[1] for n, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_b_learns_ratio_times_as_fast_as_a():
    model = applied(Method(Config(ratio=8, **QV)), tiny_llama())
    groups = groups_of(Method(Config(ratio=8, **QV)), model)
    assert len(groups) == 4 * 2 * 2
    for name, (rate, decay) in groups.items():
        assert rate == pytest.approx(8e-4 if ".lora_B." in name else 1e-4, rel=1e-12), name
        assert decay == 0.1


def test_what_trains_beside_the_factors_learns_as_a_does_and_vectors_do_not_decay():
    """Whole modules with biases, parts of fused layers, and rows of new tokens; peft's own LoRA+ differs in all."""
    keys = {"modules_to_save": ["ln_f", "lm_head"], "target_modules": ["c_attn", "c_fc"], "parts": ["q", "v"]}
    method = Method(Config(**keys))
    groups = groups_of(method, applied(method, tiny_of("gpt2", "cpu", tie_word_embeddings=False)))
    fast = {name for name, (rate, _) in groups.items() if rate == pytest.approx(16e-4)}
    assert fast == {name for name in groups if ".lora_B." in name}
    assert any(name.endswith("rows") for name in fast) and any(name.endswith("weight") for name in fast)
    assert {name: group for name, group in groups.items() if "lora_" not in name} == {
        "transformer.ln_f.modules_to_save.default.weight": (1e-4, 0.0),
        "transformer.ln_f.modules_to_save.default.bias": (1e-4, 0.0),
        "lm_head.modules_to_save.default.weight": (1e-4, 0.1),
    }


def test_rows_of_new_tokens_learn_as_a_does():
    method = Method(Config(**QV))
    method.new_token_ids = [398, 399]
    groups = groups_of(method, applied(method, tiny_llama()))
    (name,) = [name for name in groups if "lora_" not in name]
    assert "token_adapter" in name and groups[name] == (1e-4, 0.1)


def test_the_first_step_has_the_size_of_the_rates():
    """AdamW's first step moves every entry with a gradient by its rate; A has none while B is zero."""
    for moved in (False, True):
        method = Method(Config(**QV))
        model = applied(method, tiny_llama())
        if moved:
            family.randomise(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(method.param_groups(model, recipe(learning_rate=1e-4).train))
        model.train()(input_ids=family.IDS, labels=family.IDS).loss.backward()
        optimizer.step()
        steps = {".lora_A.": 0.0, ".lora_B.": 0.0}
        for name, old in before.items():
            factor = next(f for f in steps if f in name)
            steps[factor] = max(steps[factor], float((model.get_parameter(name).detach() - old).abs().max()))
        assert steps[".lora_B."] == pytest.approx(1.6e-3, rel=1e-2)
        assert steps[".lora_A."] == (pytest.approx(1e-4, rel=1e-2) if moved else 0.0)


def test_a_ratio_of_one_is_lora_bit_for_bit(tmp_path):
    keys = {"r": 4, "dropout": 0.1, "modules_to_save": ["norm"], **QV}
    settings = {"max_steps": 5, "weight_decay": 0.1}
    plain, _ = train(workload(tmp_path / "lora", lora.Method(lora.Config(**keys)), **settings))
    plus, _ = train(workload(tmp_path / "plus", Method(Config(ratio=1, **keys)), **settings))
    other, _ = train(workload(tmp_path / "other", Method(Config(ratio=2, **keys)), **settings))
    for name, tensor in trained_tensors(plain).items():
        assert torch.equal(trained_tensors(plus)[name], tensor), name
        assert not torch.equal(trained_tensors(other)[name], tensor), name


class Watch(base.Callback):
    """Notes the rates of all groups at every step."""

    def __init__(self):
        self.rates = []

    def build(self, groups):
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def before_optimizer(self, info):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_schedules_keep_the_ratio(tmp_path, scheduler):
    watch = Watch()
    method = Method(Config(**QV))
    method.callbacks, method.optimizer = lambda model: (watch,), watch.build
    train(workload(tmp_path, method, max_steps=10, scheduler=scheduler, warmup_steps=2))
    assert len(watch.rates) == 10
    assert len({slow for slow, _ in watch.rates}) > 5
    for slow, fast in watch.rates:
        assert fast == pytest.approx(16 * slow, rel=1e-12)
    assert max(slow for slow, _ in watch.rates) == pytest.approx(1e-2)


def test_stopped_and_resumed_equals_straight_with_both_rates(tmp_path):
    family.check_resume(tmp_path, lambda: Method(Config(r=4, dropout=0.1, **QV)), learning_rate=1e-3)


def test_accumulation_equals_one_large_batch(tmp_path):
    family.check_accumulation(tmp_path, lambda: Method(Config(r=4, ratio=4, **QV)))


def test_an_embedding_is_refused():
    message = r"method.target_modules: model.embed_tokens is an embedding; lora_plus takes linear layers only"
    with pytest.raises(UsageError, match=message):
        Method(Config(target_modules=["embed_tokens", "q_proj"])).count(tiny_llama())


def test_a_ratio_of_zero_is_refused():
    with pytest.raises(ValueError, match="ratio"):
        Config(ratio=0)


@pytest.mark.parametrize("base_model", [tiny_llama, tiny_opt])
def test_starts_as_the_base_exactly_and_trains_the_factors_only(base_model):
    family.check_identity(Method(Config(target_modules="all-linear")), base_model)
    family.check_frozen_base(Method(Config(**QV)), base_model)


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=4)))


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    method = Method(Config(**QV))
    model = applied(method, family.quantized(tiny_dir, kind))
    assert len(groups_of(method, model)) == 4 * 2 * 2
    losses = run_steps(model, 3)
    assert losses[-1] < losses[0]


def test_the_adapter_is_a_plain_lora(tmp_path):
    family.check_saved(tmp_path, Method(Config(r=4, **QV)))
    assert Method(Config(target_modules="all-linear")).count(family.smollm2()) == 2_442_240

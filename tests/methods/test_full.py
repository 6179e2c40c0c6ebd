"""Full fine-tuning."""

import torch

from peftctl.methods.full import Config, Method
from tests.methods.helpers import applied, run_steps
from tests.tiny import tiny_llama


def test_counts_tied_weights_once():
    tied, untied = tiny_llama(tie=True), tiny_llama(tie=False)
    method = Method(Config())
    assert method.count(untied) - method.count(tied) == 400 * 32
    assert method.count(tied) == sum(p.numel() for p in {p.data_ptr(): p for p in tied.parameters()}.values())


def test_every_parameter_moves_and_the_head_stays_tied():
    model = applied(Method(Config()), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_steps(model, 3)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_learning_rate_zero_changes_nothing():
    model = applied(Method(Config()), tiny_llama())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run_steps(model, 2, lr=0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_asks_for_float32_master_weights_under_autocast():
    assert Method(Config()).load_options().dtype == "float32"
    assert Method.autocast

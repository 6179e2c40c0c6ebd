"""The conformance suite can fail: methods with one fault each, and the check that must see it."""

import pytest
import torch

from peftctl.methods import adalora, lora
from peftctl.methods.base import Callback
from tests.methods import test_conformance as checks
from tests.methods.conformance import Bench


def b_of_one_layer(model):
    return next(p for name, p in model.named_parameters() if "lora_B" in name)


class OneLeftOut(lora.Method):
    """Freezes one of the tensors that it counts."""

    def apply(self, model, context):
        applied = super().apply(model, context)
        b_of_one_layer(applied).requires_grad_(False)
        return applied


class Unused(lora.Method):
    """Trains a tensor that no output depends on: only weight decay moves it."""

    def apply(self, model, context):
        applied = super().apply(model, context)
        b_of_one_layer(applied).register_hook(torch.zeros_like)
        return applied


class MovesTheBase(lora.Method):
    """Changes a frozen weight in place."""

    class _Drift(Callback):
        def after_step(self, info):
            info.model.get_base_model().lm_head.weight.data[0, 0] += 1e-3

    def callbacks(self, model):
        return (self._Drift(),)


class NoIdentity(lora.Method):
    """Starts with an update that is not zero."""

    def apply(self, model, context):
        applied = super().apply(model, context)
        torch.nn.init.normal_(b_of_one_layer(applied), std=1e-2)
        return applied


class MeanLoss(lora.Method):
    """Returns a mean where the trainer expects a sum."""

    def loss(self, model, batch, forward):
        found = forward(batch)
        return {"loss": found.cross_entropy() / len(found.labels)}


class Forgets(adalora.Method):
    """Keeps no scores in a checkpoint."""

    def state_dict(self, model):
        return super().state_dict(model) | {name: {} for name in adalora._SCORES}


class Ascends(lora.Method):
    """Climbs the loss."""

    def apply(self, model, context):
        applied = super().apply(model, context)
        for parameter in applied.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.neg)
        return applied


class ChangedByExport(lora.Method):
    """Changes a weight of the base while it exports."""

    def export(self, model):
        model.get_base_model().model.norm.weight.data *= 2
        return super().export(model)


FAULTS = {
    OneLeftOut: checks.test_what_trains_is_what_is_counted_also_without_weights,
    Unused: checks.test_three_steps_move_every_tensor_that_trains_and_by_its_gradient,
    MovesTheBase: checks.test_nothing_frozen_moves,
    NoIdentity: lambda case: checks.test_it_starts_as_the_base(case, training=False),
    MeanLoss: checks.test_two_batches_of_two_equal_one_of_four,
    Forgets: checks.test_stopped_and_resumed_equals_straight,
    Ascends: checks.test_the_loss_falls_on_one_batch,
    ChangedByExport: checks.test_switched_off_it_is_the_base_or_the_card_says_why_not,
}


@pytest.mark.parametrize("method", FAULTS, ids=lambda method: method.__name__)
def test_a_fault_is_seen(method, tmp_path, monkeypatch):
    case = Bench(tmp_path).case("adalora" if issubclass(method, adalora.Method) else "lora", "llama")
    monkeypatch.setattr(case, "method", lambda: method(case.recipe.method))
    with pytest.raises(AssertionError):
        FAULTS[method](case)

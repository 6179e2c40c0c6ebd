"""A run's loss curve is that of the loop that one writes by hand, with none of what makes ours fast."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from peftctl.data.batching import GroupedBatches
from peftctl.data.collate import Collator
from peftctl.methods.lora import Config, Method
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.training.helpers import rows, train, trained_tensors, workload

STEPS = 12
SETTINGS = {"max_steps": STEPS, "batch_size": 6, "learning_rate": 3e-3, "scheduler": "linear", "warmup_ratio": 0.0}


def bare_curve(method, seed):
    """Return losses and tensors: whole padded batches, all logits, stock peft layers, the library's attention."""
    torch.manual_seed(0)
    keys = method.config
    config = LoraConfig(r=keys.r, lora_alpha=keys.alpha, target_modules=keys.target_modules, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=SETTINGS["learning_rate"], weight_decay=0.0)
    data, collate = rows(), Collator(tiny_tokenizer())
    order = GroupedBatches([len(row.input_ids) for row in data], batch_size=6, accumulation=1, seed=seed)
    losses = []
    while len(losses) < STEPS:
        order.set_epoch(len(losses) // len(order))
        for indices in order:
            batch = dict(collate([data[i] for i in indices]))
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            optimizer.param_groups[0]["lr"] = SETTINGS["learning_rate"] * (1 - len(losses) / STEPS)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses[:STEPS], trained_tensors(model)


@pytest.mark.parametrize("more", [{}, {"tokens_per_pass": 32}, {"gradient_checkpointing": True}])
def test_the_loss_curve_is_the_bare_loops(tmp_path, more):
    method = Method(Config(r=4, target_modules="all-linear"))
    work = workload(tmp_path, method, **SETTINGS, **more)
    trained, _ = train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    ours = [line["loss"] for line in lines if "loss" in line]
    theirs, tensors = bare_curve(method, work.recipe.train.seed)
    assert len(ours) == STEPS and max(ours) - min(ours) > 0.1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-5)
    for ours_, theirs_ in zip(trained_tensors(trained).values(), tensors.values(), strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-2, atol=1e-4)

"""FISH Mask: scores against brute force, the exact top k, what can and can not move, and what is saved."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from peftctl.artifacts.checks import check_moved, snapshot
from peftctl.data.collate import Collator
from peftctl.errors import ArtifactError, Interrupted, RunError, UsageError
from peftctl.methods.fishmask import Config, Method, fisher, largest
from peftctl.tuners.sparse_delta import SparseDeltaLayer, layers
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, run_steps
from tests.methods.test_houlsby import SMOLLM2
from tests.tiny import save_tiny, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import rows, run_stages, trained_tensors, workload
from tests.training.test_resume import StopAt

IDS = torch.arange(1, 25).reshape(2, 12)


def method(**keys):
    return Method(Config(**{"keep": 0.02, "rows": 6, **keys}))


def batches(count=24, seed=0, labels=None):
    collate = Collator(tiny_tokenizer(), None)
    return (collate([row]) for row in rows(count, seed))


def fitted(chosen=None, base=tiny_llama):
    """Return a model with its mask."""
    chosen = chosen or method()
    model = applied(chosen, base())
    chosen.calibrate(model, batches())
    return model


def masks(model):
    return {name: layer.delta_indices["default"] for name, layer in layers(model)}


def weights_of(model, base):
    """Return name -> W + Δ of all linear layers of a model, by the base's names."""
    adapted = dict(layers(model))
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            if name in adapted:
                adapted[name].merge()
                found[name] = adapted[name].weight.detach().clone()
                adapted[name].unmerge()
            else:
                found[name] = model.get_base_model().get_submodule(name).weight.detach().clone()
    return found


def fit(work, checkpoint=None, base=tiny_llama):
    """Apply, calibrate unless resumed, and train, as `train` does."""
    model = applied(work.method, base())
    if checkpoint is None:
        work.method.calibrate(model, batches())
    return model, run_stages(work, model, checkpoint)


# -- scores ---------------------------------------------------------------------------------------------------------


def brute_force(base, count):
    """Return name -> mean over rows of the squared gradient of a row's log likelihood, by whole gradients."""
    scores = {}
    for batch in batches(count):
        base.zero_grad()
        shifted = batch["labels"][0, 1:]
        log_p = base(input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1)
        sum(log_p[i, label] for i, label in enumerate(shifted) if label != -100).backward()
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                scores[name] = scores.get(name, 0) + module.weight.grad**2 / count
    return scores


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt])
def test_scores_are_the_mean_of_per_row_squares(base):
    model = applied(method(), base())
    found = fisher(model, batches(5))
    expected = brute_force(base(), 5)
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-3, atol=1e-8)


def test_the_square_of_the_batch_mean_is_another_thing():
    model = applied(method(), tiny_llama())
    found = fisher(model, batches(5))
    base = tiny_llama()
    for batch in batches(5):
        (base(**batch).loss * (batch["labels"][:, 1:] != -100).sum() / 5).backward()
    name = "model.layers.0.self_attn.v_proj"
    ratio = base.get_submodule(name).weight.grad.square().sum() / found[name].sum()
    assert ratio < 0.8


def test_scoring_leaves_no_trace_but_the_scores():
    model = applied(method(), tiny_llama()).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    fisher(model, batches(3))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_scores_are_made_without_dropout():
    base = tiny_opt()
    base.config.dropout = 0.5
    for layer in base.model.decoder.layers:
        layer.dropout = 0.5
    model = applied(method(), base).train()
    first, again = fisher(model, batches(2)), fisher(model, batches(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_only_the_first_n_rows_are_looked_at():
    seen = []

    def watched():
        for i, batch in enumerate(batches()):
            seen.append(i)
            yield batch

    chosen = method(rows=4)
    chosen.calibrate(applied(chosen, tiny_llama()), watched())
    assert seen == [0, 1, 2, 3]


def test_no_rows_and_broken_gradients_are_errors():
    model = applied(method(), tiny_llama())
    with pytest.raises(RunError, match="fishmask: there is no training row"):
        fisher(model, [])
    broken = tiny_llama()
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(RunError, match=r"fishmask: a gradient of .* is not finite; set model.dtype"):
        fisher(applied(method(), broken), batches(1))


# -- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 2600, 5000, 5067, 5077, 5100, 5117])
def test_the_k_largest_of_all_and_of_equals_the_first(k):
    """50 ties at 0.5, 40 zeros at the end."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "a": torch.rand(100, 50, generator=generator),
        "b": torch.rand(77, generator=generator) * 1e-30,
        "c": torch.zeros(40),
    }
    scores["a"][3] = 0.5
    found = largest(scores, k)
    flat = torch.cat([s.flatten() for s in scores.values()])
    best = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))[:k]
    offsets = {"a": 0, "b": 5000, "c": 5077}
    ours = [offsets[name] + int(i) for name, indices in found.items() for i in indices]
    assert ours == sorted(best)
    assert all(len(indices) for indices in found.values())


@pytest.mark.parametrize("base", [tiny_llama, tiny_opt, tiny_t5])
def test_the_count_is_the_closed_form_before_and_after_the_mask_is_known(base):
    chosen = method()
    linear = [m for n, m in base().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    expected = int(0.02 * sum(m.weight.numel() for m in linear))
    assert chosen.count(base()) == expected
    model = applied(chosen, base())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    if base is not tiny_t5:
        chosen.calibrate(model, batches())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
        assert sum(map(len, masks(model).values())) == expected
        sizes = {len(indices) for indices in masks(model).values()}
        assert len(sizes) > 3  # one ranking over all layers, not one a layer


def test_count_on_smollm2_is_half_a_percent_of_the_linear_weights():
    assert Method(Config()).count(tiny_of("llama", **SMOLLM2)) == int(0.005 * 30 * 3_538_944) == 530_841


def test_rows_decide_the_mask_and_equal_rows_give_it_again():
    first, again = masks(fitted()), masks(fitted())
    assert first.keys() == again.keys() and all(torch.equal(first[n], again[n]) for n in first)
    other = masks(fitted(method(rows=7)))
    assert first.keys() != other.keys() or any(not torch.equal(first[n], other[n]) for n in first)


def test_a_layer_without_any_entry_is_the_bases_again():
    chosen = method(keep=0.001)
    model = fitted(chosen)
    assert 0 < len(masks(model)) < 28
    inside = [m for m in model.modules() if isinstance(m, SparseDeltaLayer)]
    assert len(inside) == len(masks(model)) == len(model.peft_config["default"].counts)
    assert all(len(p) for p in model.parameters() if p.requires_grad)


def test_it_starts_as_the_base_exactly():
    for base in (tiny_llama, tiny_opt):
        model = fitted(base=base)
        assert torch.equal(model(input_ids=IDS).logits, base()(input_ids=IDS).logits)


# -- the layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True], ids=["Linear", "Conv1D"])
def test_layer_and_its_gradients_are_those_of_the_changed_weight_in_float64(turned):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = (Conv1D(5, 7) if turned else nn.Linear(7, 5)).double()
    layer = SparseDeltaLayer(base)
    layer.update_layer("default", 4)
    layer.choose("default", torch.tensor([0, 3, 17, 34]))
    layer.delta_values["default"].data = torch.randn(4).double()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weight = base.weight.detach().clone().flatten()
    values = layer.delta_values["default"].detach().clone().requires_grad_()
    for place, value in zip([0, 3, 17, 34], values, strict=True):
        weight = weight.index_add(0, torch.tensor([place]), value[None])
    weight = weight.view(base.weight.shape)
    naive = x.detach().clone().requires_grad_()
    expected = naive @ (weight if turned else weight.T) + base.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, naive.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta_values["default"].grad, values.grad, rtol=1e-12, atol=1e-12)


def test_two_active_adapters_add_up_where_they_overlap():
    base = nn.Linear(4, 3).double()
    layer = SparseDeltaLayer(base)
    for name, places in {"default": [1, 5], "other": [5, 7]}.items():
        layer.update_layer(name, 2)
        layer.choose(name, torch.tensor(places))
        layer.delta_values[name].data = torch.ones(2).double()
    layer.set_adapter(["default", "other"])
    delta = torch.zeros(12).double()
    delta[[1, 5, 7]] = torch.tensor([1.0, 2.0, 1.0]).double()
    x = torch.randn(6, 4).double()
    torch.testing.assert_close(layer(x), base(x) + x @ delta.view(3, 4).T, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_keeps_no_copy_of_the_weight():
    base = nn.Linear(64, 64)
    layer = SparseDeltaLayer(base)
    layer.update_layer("default", 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    copies = [t for t in kept if t.numel() == 64 * 64 and t.data_ptr() != base.weight.data_ptr()]
    assert kept and not copies


def test_merged_equals_unmerged_and_unmerging_is_exact():
    for dtype in ("float32", "bfloat16"):
        model = fitted(base=lambda dtype=dtype: tiny_llama(dtype=dtype))
        run_steps(model, 3)
        model.eval()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        logits = model(input_ids=IDS).logits
        model.merge_adapter(safe_merge=True)
        assert torch.equal(model(input_ids=IDS).logits, logits)
        model.unmerge_adapter()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert torch.equal(model.merge_and_unload()(input_ids=IDS).logits, logits)


# -- training -------------------------------------------------------------------------------------------------------


def test_with_weight_decay_adamw_and_clipping_only_masked_entries_change(tmp_path):
    base = tiny_llama()
    work = workload(tmp_path, method(), max_steps=5, weight_decay=0.3, max_grad_norm=0.1)
    model, _ = fit(work)
    after, mask, moved = weights_of(model, base), masks(model), 0
    for name, weight in after.items():
        changed = (weight != base.get_submodule(name).weight).flatten().nonzero()[:, 0].tolist()
        assert set(changed) <= set(mask.get(name, torch.tensor([])).tolist()), name
        moved += len(changed)
    assert moved > 0.9 * work.method.count(base)


def test_weight_decay_pulls_the_change_to_zero_not_the_weight():
    chosen = method()
    model = fitted(chosen)
    train = workload_train(weight_decay=0.5)
    (group,) = chosen.param_groups(model, train)
    assert group["weight_decay"] == 0.5
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    for p in group["params"]:
        p.data.fill_(0.1)
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW([group], lr=1.0).step()
    for p in group["params"]:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.05))


def workload_train(**keys):
    from peftctl.recipe.schema import TrainSection

    return TrainSection(output_dir="run", **keys)


def test_the_norm_that_clips_is_that_of_the_masked_gradient():
    model = fitted()
    model(input_ids=IDS, labels=IDS).loss.backward()
    graded = [p for p in model.parameters() if p.grad is not None]
    assert {id(p) for p in graded} == {id(p) for p in model.parameters() if p.requires_grad}
    base = tiny_llama()
    base(input_ids=IDS, labels=IDS).loss.backward()
    squares = sum(
        base.get_submodule(name).weight.grad.flatten()[indices.long()].square().sum()
        for name, indices in masks(model).items()
    )
    torch.testing.assert_close(nn.utils.get_total_norm([p.grad for p in graded]), squares.sqrt(), rtol=1e-4, atol=0)


def test_the_mask_is_the_same_at_the_end(tmp_path):
    before = {name: indices.clone() for name, indices in masks(fitted()).items()}
    model, _ = fit(workload(tmp_path, method(), max_steps=3))
    assert all(torch.equal(masks(model)[name], indices) for name, indices in before.items())


def test_disabled_it_is_the_base_and_the_base_never_moved(tmp_path):
    base = tiny_llama()
    model, _ = fit(workload(tmp_path, method(), max_steps=3, weight_decay=0.1))
    model.eval()
    reference = base(input_ids=IDS).logits
    assert not torch.equal(model(input_ids=IDS).logits, reference)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, reference)
    plain = {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(plain[name], p) for name, p in base.named_parameters())


def test_stopped_and_resumed_equals_straight(tmp_path):
    """Resume does not score again: mask and shapes come from the checkpoint."""
    straight, _ = fit(workload(tmp_path / "a", method(), max_steps=8))
    with pytest.raises(Interrupted):
        fit(workload(tmp_path / "b", method(), max_steps=8, reporter=StopAt(5)))
    work = workload(tmp_path / "b", method(), max_steps=8)
    again, _ = fit(work, work.run.latest_checkpoint())
    assert masks(again).keys() == masks(straight).keys()
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    for name, indices in masks(straight).items():
        assert torch.equal(masks(again)[name], indices)
    assert again.peft_config["default"].counts == straight.peft_config["default"].counts


def test_its_state_can_be_loaded_into_a_model_that_has_trained_further():
    chosen = method()
    model = fitted(chosen)
    state = chosen.state_dict(model)
    run_steps(model, 2)
    moved = trained_tensors(model)
    chosen.load_state_dict(model, state)
    assert all(torch.equal(moved[name], tensor) for name, tensor in trained_tensors(model).items())


def test_the_gate_on_what_moved_sees_a_run_that_moved_nothing(tmp_path):
    chosen = method()
    model = fitted(chosen)
    initial = snapshot(model)
    with pytest.raises(ArtifactError, match="nothing was learned"):
        check_moved(model, initial)
    run_steps(model, 1)
    check_moved(model, initial)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_gradient_checkpointing(checkpointing):
    model = fitted()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = fitted().train()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


# -- the artefact ---------------------------------------------------------------------------------------------------

PLAIN = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, stock, own, out = sys.argv[1:]
def logits(adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits
first = logits(stock)
assert not any(name.startswith("peftctl") for name in sys.modules)
import peftctl.tuners
torch.save([first, logits(own)], out)
"""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch, of peft's SHIRA
def test_both_artefacts_answer_alike_in_another_process_and_shira_without_peftctl(tmp_path):
    from safetensors.torch import load_file

    base = save_tiny(tmp_path / "base")
    chosen = method(as_shira=True)
    model = fitted(chosen)
    run_steps(model, 3)
    model.eval()
    with torch.no_grad():
        reference = model(input_ids=IDS).logits
    Method(Config()).export(model).save_pretrained(tmp_path / "own")
    exported = chosen.export(model)
    with torch.no_grad():
        assert torch.equal(exported(input_ids=IDS).logits, reference)
    exported.save_pretrained(tmp_path / "stock")
    types = [json.loads((tmp_path / f / "adapter_config.json").read_text())["peft_type"] for f in ("stock", "own")]
    assert types == ["SHIRA", "PEFTCTL_SPARSE_DELTA"]
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 2 * chosen.count(tiny_llama())
    arguments = [str(base), str(tmp_path / "stock"), str(tmp_path / "own"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", PLAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for logits in torch.load(tmp_path / "logits.pt"):
        assert torch.equal(logits, reference)


def test_a_mask_that_shira_can_not_hold_is_refused_before_training():
    with pytest.raises(UsageError, match=r"method\.as_shira: SHIRA can't hold this mask: the fullest layer asks for r"):
        fitted(method(as_shira=True, keep=0.6))


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, r"model\.embed_tokens is an embedding; fishmask takes linear layers"),
        ({"keep": 1e-9}, r"method\.keep: 1e-09 of .* weights is none; raise it"),
    ],
)
def test_selections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(UsageError, match=message):
        method(**keys).count(tiny_llama())


@pytest.mark.parametrize(("keys", "message"), [({"keep": 0}, "greater than 0"), ({"rows": 0}, "greater than")])
def test_sections_that_can_not_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Config(**keys)


def test_a_run_scores_rows_drawn_by_its_seed_and_its_gate_sees_that_nothing_moved(tmp_path, monkeypatch):
    """The rows of a file lie in some order, and a run whose values stay 0 is no success, whatever the mask is."""
    import peftctl
    from peftctl.methods import fishmask
    from tests.commands.helpers import write_recipe

    looked_at = []

    def watched(model, batches):
        kept = list(batches)
        looked_at.append([batch["input_ids"].tolist() for batch in kept])
        return fisher(model, kept)

    monkeypatch.setattr(fishmask, "fisher", watched)
    path = write_recipe(tmp_path, save_tiny(tmp_path / "base"), {"name": "fishmask", "keep": 0.02, "rows": 12})
    recipe = peftctl.load_recipe(path, ["train.max_steps=1", "train.learning_rate=1e-45", "eval.metrics=[loss]"])
    with pytest.raises(ArtifactError, match="nothing was learned"):
        peftctl.train(recipe)
    with pytest.raises(ArtifactError, match="nothing was learned"):
        peftctl.train(recipe, fresh=True)
    assert looked_at[0] == looked_at[1] and len(looked_at[0]) == 12
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    with pytest.raises(ArtifactError, match="nothing was learned"):
        peftctl.train(other, fresh=True)
    assert looked_at[2] != looked_at[0]

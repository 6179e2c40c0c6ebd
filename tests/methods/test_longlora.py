"""LongLoRA: what trains, who sees whom, and stretched positions from training to plain peft and the merged model."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.export import export
from peftctl.artifacts.load import load
from peftctl.artifacts.merge import merge
from peftctl.artifacts.rundir import RunDir
from peftctl.artifacts.save import save_artifact
from peftctl.errors import UsageError
from peftctl.evaluation.generation import position_limit
from peftctl.methods import lora
from peftctl.methods.longlora import Config, Method
from peftctl.models.load import load_model, load_tokenizer
from peftctl.models.rope import set_rope, stretched
from peftctl.models.supervised import supervised_forward
from tests.artifacts.helpers import ROWS, make_info, make_recipe
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, context
from tests.tiny import save_tiny, tiny_bloom, tiny_llama, tiny_opt

IDS = family.IDS
LONG = torch.arange(1, 41).reshape(2, 20)


def method(**keys):
    return Method(Config(**keys))


def roomy(make=tiny_llama, positions=1024):
    """Return a model that knows as many positions as the recipes of tests may have tokens a row."""
    model = make()
    model.config.max_position_embeddings = positions
    return model


def with_rows_of(tokens, **section):
    """Return a context of rows of at most so many tokens."""
    recipe = context().recipe
    data = recipe.data.model_copy(update={"max_length": tokens})
    return replace(
        context(),
        recipe=recipe.model_copy(update={"data": data, "model": recipe.model.model_copy(update=section)}),
    )


def fresh(make=tiny_llama, tokens=512, **keys):
    torch.manual_seed(0)
    return method(**keys).apply(make(), with_rows_of(tokens))


def trained_names(model):
    return {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}


# -- what trains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_factors_of_the_attention_the_embedding_and_all_norms_train(tie):
    model = fresh(lambda: tiny_llama(tie=tie))
    factors = {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{ab}.default.weight" for i in range(4) for p in "qkvo" for ab in "AB"
    }
    norms = {f"model.layers.{i}.{where}_layernorm" for i in range(4) for where in ("input", "post_attention")}
    whole = {f"{name}.modules_to_save.default.weight" for name in {*norms, "model.norm", "model.embed_tokens"}}
    assert trained_names(model) == factors | whole
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (head is embedding) == tie == head.requires_grad


def test_in_opt_learned_positions_stay_frozen():
    names = {name.split(".modules_to_save")[0] for name in trained_names(fresh(tiny_opt)) if "lora" not in name}
    norms = {f"model.decoder.layers.{i}.{n}_layer_norm" for i in range(2) for n in ("self_attn", "final")}
    assert {name for name in names if "norm" not in name} == {"model.decoder.embed_tokens"}
    assert names == norms | {"model.decoder.embed_tokens", "model.decoder.final_layer_norm"}


def test_count_on_smollm2_is_that_of_the_specification():
    base = family.smollm2()
    assert method().count(base) == 29_268_288 == 921_600 + 49_152 * 576 + 61 * 576
    notices = method().notices(base)
    assert notices == [
        "trained whole: model.embed_tokens, with lm_head tied to it, and 61 modules more, among them all norms"
    ]
    model = method().apply(family.smollm2(), with_rows_of(8192 // 4))
    assert family.trainable_count(model) == 29_268_288


def test_more_can_train_whole():
    keys = {"modules_to_save": ["layers.3.mlp"]}
    assert method(**keys).count(tiny_llama()) == method().count(tiny_llama()) + 3 * 32 * 64
    assert family.trainable_count(fresh(**keys)) == method(**keys).count(tiny_llama())


def test_only_what_trains_moves_and_switched_off_it_is_the_base():
    family.check_frozen_base(method(group=4), roomy)


def test_one_step_moves_the_tied_head_with_the_embedding():
    model = fresh(group=4)
    before = model.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


# -- the attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "tokens", "size"),
    [(0.25, 512, 128), (0.25, 100, 26), (0.1, 37, 4), (0.001, 512, 2), (1.0, 511, 512), (6, 512, 6), (1, 64, 64)],
)
def test_a_group_is_even_and_a_share_is_one_of_the_longest_row(group, tokens, size):
    model = fresh(tokens=tokens, group=group)
    assert model.config._attn_implementation == f"peftctl_shifted_{size}"


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_starts_as_the_base_in_evaluation_and_over_one_group_in_training(make):
    family.check_identity(method(), lambda: roomy(make) if make is tiny_llama else make_positions_of_opt())
    model = fresh(make, group=4)
    assert torch.equal(model(input_ids=LONG).logits, make()(input_ids=LONG).logits)
    assert not torch.allclose(model.train()(input_ids=LONG).logits, make()(input_ids=LONG).logits, atol=1e-2)


def make_positions_of_opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(**(tiny_opt().config.to_dict() | {"max_position_embeddings": 1024}))
    torch.manual_seed(0)
    return OPTForCausalLM(config).eval()


def test_training_sees_groups_only_and_no_future():
    model = fresh(group=4).train()
    before = model(input_ids=LONG).logits
    for j in (1, 3, 10, 19):
        changed = LONG.clone()
        changed[:, j:] += 200
        after = model(input_ids=changed).logits
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-5)
        assert not torch.isclose(after[:, j], before[:, j], atol=1e-3).all()
    model.eval()
    torch.testing.assert_close(model(input_ids=LONG).logits[:, :2], before[:, :2], rtol=0, atol=1e-5)


def test_training_keeps_no_cache_of_keys():
    model, caches = fresh(group=4).train(), []
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn")
    layer.register_forward_pre_hook(lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True)
    supervised_forward(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS})
    assert caches == [None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_change_no_gradient(reentrant):
    gradients = []
    for recomputed in (False, True):
        model = family.randomise(fresh(group=4)).train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        mask = torch.ones_like(LONG)
        mask[1, 9:] = 0
        model(input_ids=LONG, attention_mask=mask, labels=LONG, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_on_a_bfloat16_base():
    model = fresh(lambda: tiny_llama(dtype="bfloat16"), group=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()(input_ids=LONG, labels=LONG).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > len(gradients) / 2
    expected = fresh(group=4).train()(input_ids=LONG).logits.detach()
    room = 0.15 * float(expected.abs().max())
    torch.testing.assert_close(model(input_ids=LONG).logits.float(), expected, rtol=0, atol=room)


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    base = lambda: roomy(lambda: family.quantized(tiny_dir, kind))  # noqa: E731
    family.check_identity(method(), base)
    family.check_frozen_base(method(group=4), base)


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "qwen2", "phi3", "glm4", "mixtral"])
def test_other_architectures_train_in_groups(architecture):
    make = lambda: tiny_of(architecture, "cpu", **(NO_DROPOUT if architecture in ("gpt2", "phi3") else {}))  # noqa: E731
    model = method(group=4).apply(make(), with_rows_of(64))
    ids = torch.arange(1, 41).reshape(2, 20)
    plain = make()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=1e-6)
    in_groups = model.train()(input_ids=ids).logits
    torch.testing.assert_close(in_groups[:, :2], plain[:, :2], rtol=0, atol=1e-5)
    assert not torch.allclose(in_groups[:, 4:], plain[:, 4:], atol=1e-4)


# -- runs ------------------------------------------------------------------------------------------------------------


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: method(group=4, rope_factor=2.0, dropout=0.1))


def test_batches_of_rows_of_any_length_train_as_one(tmp_path):
    family.check_accumulation(tmp_path, lambda: method(group=8, rope_factor=2.0))


# -- stretched positions ---------------------------------------------------------------------------------------------


def test_with_a_factor_it_starts_as_the_base_with_stretched_positions():
    expected = tiny_llama()
    set_rope(expected, stretched(expected.config, 4.0))
    model = fresh(rope_factor=4.0)
    assert torch.equal(model(input_ids=LONG).logits, expected(input_ids=LONG).logits)
    assert not torch.allclose(model(input_ids=LONG).logits, tiny_llama()(input_ids=LONG).logits, atol=1e-2)
    assert position_limit(model) == 2048


def saved(folder, group=4, **keys):
    """Write base/ and run/ with a trained adapter into a folder; return the run and its logits."""
    base = save_tiny(folder / "base")
    chosen = Config(group=group, **keys)
    recipe = make_recipe(base, folder / "run", method=chosen)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 64})})
    plain, torch_method = load_model(recipe.model), Method(chosen)
    info = make_info(recipe, plain)
    torch.manual_seed(0)
    model = family.randomise(torch_method.apply(plain, replace(context(), recipe=recipe))).eval()
    model = torch_method.export(model)
    run = RunDir(folder / "run")
    logits = probe_logits(model, ROWS)
    save_artifact(model, load_tokenizer(recipe.model), run, info)
    run.write_text(run.recipe, f"model:\n  name_or_path: {base}\n")
    return run, logits


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run whose positions are stretched by 4."""
    return saved(tmp_path_factory.mktemp("long"), rope_factor=4.0)


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_the_artefact_records_the_factor_and_no_attention(long_run):
    run, _ = long_run
    assert json.loads((run.adapter / "peftctl.json").read_text())["config_changes"] == {"rope_parameters": ROPE}
    settings = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["ensure_weight_tying"]) == ("LORA", True)
    for file in ("peftctl.json", "adapter_config.json", "README.md"):
        assert "peftctl_shifted" not in (run.adapter / file).read_text()


def test_a_run_without_a_factor_records_none(tmp_path):
    run, _ = saved(tmp_path)
    assert json.loads((run.adapter / "peftctl.json").read_text())["config_changes"] == {}
    assert "rope" not in (run.adapter / "README.md").read_text().replace("method.rope", "")


def test_loaded_it_answers_as_it_was_trained_with_plain_attention(long_run):
    run, logits = long_run
    model, _ = load(run.path)
    assert torch.equal(probe_logits(model, ROWS), logits)
    assert model.config._attn_implementation == "sdpa"
    assert position_limit(model) == 2048
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_plain_peft_answers_alike_with_the_cards_lines_only(long_run, tmp_path):
    run, logits = long_run
    card = (run.adapter / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("DIRECTORY", str(run.adapter))
    assert re.search(r"\nrope = \{.*'factor': 4\.0.*\}\n", code)
    code += f"""
import sys, torch
assert "peftctl" not in sys.modules
def answers(model):
    with torch.inference_mode():
        return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0] for row in {ROWS}])
base = AutoModelForCausalLM.from_pretrained(base.config._name_or_path, dtype="float32")
without = PeftModel.from_pretrained(base, {str(run.adapter)!r})
torch.save([answers(model), answers(without)], {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, without = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
    assert (without - logits).abs().max() > 1e-2


def test_the_merged_model_says_it_in_its_configuration(long_run, tmp_path):
    run, logits = long_run
    merge(run.path, tmp_path / "merged", dtype="float32")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (written["rope_parameters"], written["max_position_embeddings"]) == (ROPE, 512)
    assert written["tie_word_embeddings"] and "peftctl_shifted" not in json.dumps(written)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(probe_logits(model, ROWS), logits, atol=1e-4, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_exported_folders_say_it(long_run, tmp_path):
    run, _ = long_run
    known = {False: "the base must be loaded with these positions, see below", True: "config.json here says so"}
    for merged, said in known.items():
        export(run.path, "hf", tmp_path / str(merged), merged=merged)
        card = (tmp_path / str(merged) / "README.md").read_text()
        assert f"Positions are divided by 4 (linear RoPE): {said}." in card
        assert (", rope_parameters=rope" in card) is not merged


def test_training_on_a_stretched_base_stretches_it_further(long_run, tmp_path):
    run, _ = long_run
    merge(run.path, tmp_path / "merged", dtype="float32")
    model = method(rope_factor=2.0).apply(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), with_rows_of(4096))
    assert model.config.rope_parameters == ROPE | {"factor": 8.0}
    assert method(rope_factor=2.0).config_changes(model) == {"rope_parameters": ROPE | {"factor": 8.0}}


def test_lora_changes_no_configuration():
    chosen = lora.Method(lora.Config())
    assert chosen.config_changes(applied(chosen, tiny_llama())) == {}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "keys", "section", "message"),
    [
        (tiny_opt, {"rope_factor": 2.0}, {}, r"^method\.rope_factor: got 2, but this opt model has no plain .* 1$"),
        (tiny_bloom, {}, {}, r"^method: longlora can't change how the bloom architecture attends; take lora$"),
        (tiny_llama, {}, {"attn_implementation": "eager"}, r"^model\.attn_implementation: .* got eager; remove it$"),
    ],
)  # fmt: skip
def test_a_model_that_it_does_not_fit_is_refused(make, keys, section, message):
    for base in (make(), make().to("meta")):
        with pytest.raises(UsageError, match=message):
            method(**keys).apply(base, with_rows_of(64, **section))


def test_other_stretched_positions_are_refused():
    base = tiny_llama()
    base.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UsageError, match=r"^method\.rope_factor: got 2, but this llama model"):
        method(rope_factor=2.0).apply(base, with_rows_of(64))


def test_a_sliding_window_is_refused():
    base = tiny_of("mistral", "cpu", sliding_window=16)
    with pytest.raises(UsageError, match=r"^method: this mistral model attends over a sliding window"):
        method().apply(base, with_rows_of(64))
    assert method().apply(tiny_of("mistral", "cpu", sliding_window=None), with_rows_of(64))


@pytest.mark.parametrize(("tokens", "factor", "wanted"), [(513, 1.0, 2), (1500, 2.0, 3), (4096, 1.0, 8)])
def test_rows_beyond_the_models_positions_are_refused_with_the_factor_that_helps(tokens, factor, wanted):
    with pytest.raises(UsageError, match=rf"^data\.max_length: got {tokens}, .* set method\.rope_factor={wanted}$"):
        fresh(tokens=tokens, rope_factor=factor)
    assert fresh(tokens=tokens, rope_factor=float(wanted))


@pytest.mark.parametrize(
    "keys", [{"group": 3}, {"group": 0}, {"group": 1.5}, {"group": -0.5}, {"rope_factor": 0.5}, {"rope_factor": 0}]
)
def test_values_that_make_no_sense_are_refused(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        Config(**keys)

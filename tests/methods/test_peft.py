"""Every type of the installed peft trains, is saved, reloads and merges, or is listed with a reason."""

import warnings
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, PeftType

from peftctl.artifacts.checks import probe_logits
from peftctl.artifacts.fold import fold
from peftctl.artifacts.manifest import ArtifactInfo
from peftctl.artifacts.parity import compare, require_exact
from peftctl.artifacts.save import save_artifact
from peftctl.errors import ArtifactError, Interrupted, UsageError
from peftctl.methods.base import Context
from peftctl.methods.peft import Config, Method
from peftctl.models.load import load_model, meta_model
from peftctl.models.supervised import supervised_forward
from peftctl.recipe.schema import ModelSection, QuantizationSection
from peftctl.training.stages import run_stages
from tests.methods.helpers import context, recipe, run_steps
from tests.tiny import save_tiny, tiny_bert, tiny_llama, tiny_opt, tiny_t5, tiny_tokenizer
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

# torch says it of FROD's own sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")

ROWS = [list(range(5, 17)), list(range(40, 60))]
IDS = torch.arange(1, 25).reshape(2, 12)
LINEAR = ["q_proj", "v_proj", "down_proj"]
PROMPT = {"num_virtual_tokens": 4}

CONFIGS = {
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 4, "adapter_layers": 2},
    "BEFT": {"target_modules": ["q_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": PROMPT,
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 8},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "ROAD": {"group_size": 4},
    "SHADOW": {},
    "SUPERTUNING": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}
"""Settings that fit a model of width 32. Types that are not here train with r 4, or none, on LINEAR."""
WHOLE = {
    "ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW",
    "TRAINABLE_TOKENS",
}  # fmt: skip
"""Types with targets of their own."""

CANNOT_TRAIN = {
    "ADALORA": r"^method\.type: .* schedule belongs to the training loop; take method\.name: adalora$",
    "MULTITASK_PROMPT_TUNING": r"^method\.type: .* task number with every row; take method\.name: multitask_",
    "POLY": r"^method\.type: .* task number with every row$",
    "XLORA": r"^method\.type: .* mixes adapters that are trained already$",
}
if find_spec("sklearn") is None:
    CANNOT_TRAIN["ADAMSS"] = r"^method\.config: ADAMSS: scikit-learn is required"

A_PROMPT = "a prompt can't be merged: it adds tokens, not weights"
CANNOT_MERGE = {
    "ADAPTION_PROMPT": "ADAPTION_PROMPT: adapters of this type can't be merged",
    "BEFT": "Base layer has no bias",  # Llama's have none; see the test on OPT
    "CARTRIDGE": A_PROMPT,
    "CPT": A_PROMPT,
    "LILY": "LILY: adapters of this type can't be merged",
    "PREFIX_TUNING": A_PROMPT,
    "PROMPT_TUNING": A_PROMPT,
    "P_TUNING": A_PROMPT,
    "SHADOW": "SHADOW: adapters of this type can't be merged",
}

PROMPTS = {"CARTRIDGE", "CPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
STARTS_ELSEWHERE = PROMPTS | {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}
NOT_IN_HALF_TYPES = {"ADAPTION_PROMPT", "LN_TUNING", "SHADOW"}
NO_RECOMPUTATION = {"CARTRIDGE", "PREFIX_TUNING"}
QUANTISED = {"HIRA", "IA3", "LORA", "PVERA", "RANDLORA", "ROAD"} | PROMPTS

TYPES = [str.__str__(kind) for kind in PeftType]
TRAINED = [kind for kind in TYPES if kind not in CANNOT_TRAIN]


def llama(dtype="float32"):
    """Return the first two blocks of the tiny Llama."""
    model = tiny_llama(dtype=dtype)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model


def keys_of(kind):
    """Return minimal settings of a type."""
    return CONFIGS.get(kind, {"r": 4}) | ({} if kind in WHOLE else {"target_modules": LINEAR})


def method(kind, **keys):
    return Method(Config(type=kind, config=keys_of(kind) | keys))


def reloaded(folder, dtype="float32"):
    """Return an adapter on a new base, as plain peft loads it."""
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(llama(dtype=dtype), folder)


def probe(model):
    torch.manual_seed(0)
    return probe_logits(model.eval(), ROWS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), llama())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a type three steps, once: (model, tensors before, folder, logits)."""
    made = {}

    def make(kind):
        if kind not in made:
            chosen = method(kind)
            work = workload(tmp_path_factory.mktemp(kind), chosen, max_steps=3)
            torch.manual_seed(0)
            model = chosen.apply(llama(), Context(work.recipe))
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            run_stages(work, model, None)
            exported = chosen.export(model).eval()
            logits = probe(exported)
            info = ArtifactInfo("peft", chosen.card, work.recipe, "0" * 64)
            made[kind] = (model, before, save_artifact(exported, tiny_tokenizer(), work.run, info), logits)
        return made[kind]

    return make


def test_every_type_of_the_installed_peft_is_tested_or_listed():
    assert set(CANNOT_TRAIN) < set(TYPES)
    assert set(CANNOT_MERGE) < set(TRAINED)


@pytest.mark.parametrize("kind", CANNOT_TRAIN)
def test_types_that_cannot_train_by_their_config_alone_are_refused(kind):
    chosen = Method(Config(type=kind, config={"r": 4, "target_modules": LINEAR} if kind == "ADAMSS" else {}))
    for call in (lambda: chosen.count(llama()), lambda: chosen.apply(llama(), context())):
        with pytest.raises(UsageError, match=CANNOT_TRAIN[kind]):
            call()


@pytest.mark.parametrize("kind", TRAINED)
def test_what_trains_is_counted_without_values_and_only_that_moves(kind, trained, base):
    model, before, _, _ = trained(kind)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    total = sum(before[name].numel() for name in trains)
    shapes = meta_model(ModelSection(name_or_path=str(base), dtype="float32"))
    assert method(kind).count(shapes) == method(kind).count(llama()) == total > 0
    applied = method(kind).apply(shapes, context())
    assert {p.device.type for p in applied.parameters()} == {"meta"}
    assert {n: p.numel() for n, p in applied.named_parameters() if p.requires_grad} == {
        name: before[name].numel() for name in trains
    }
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # What the last block tells the small network is for a next block, and there is none.
    idle = {name for name in trains if kind == "SHADOW" and ".1.shadow_update" in name}
    assert moved == trains - idle


@pytest.mark.parametrize("kind", TRAINED)
def test_it_starts_and_when_disabled_ends_as_the_base(kind, trained):
    torch.manual_seed(0)
    start, reference = probe(method(kind).apply(llama(), context())), probe(llama())
    far = start.shape != reference.shape or (start - reference).abs().max() > 1e-4
    assert far == (kind in STARTS_ELSEWHERE)
    model, _, _, logits = trained(kind)
    with model.disable_adapter():
        assert torch.equal(probe(model), reference)
    assert logits.shape != reference.shape or (logits - reference).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_saved_loads_in_plain_peft_and_merges_where_it_can(kind, trained):
    _, _, folder, logits = trained(kind)
    model = reloaded(folder)
    torch.testing.assert_close(probe(model), logits, rtol=0, atol=1e-5)
    if kind in CANNOT_MERGE:
        with pytest.raises((UsageError, ArtifactError), match=CANNOT_MERGE[kind]):
            fold(model, torch.float32)
        return
    plain, _ = fold(model, torch.float32)
    require_exact(compare(logits, probe(plain)), "merging")
    assert not isinstance(plain, PeftModel)


def gradients(kind, recompute):
    torch.manual_seed(0)
    wanted = recipe(gradient_checkpointing=recompute)
    model = method(kind).apply(llama(), Context(wanted)).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    parts = method(kind).loss(model, batch, lambda rows: supervised_forward(model, rows))
    sum(parts.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", TRAINED)
def test_recomputed_activations_give_the_same_gradients_or_are_refused(kind):
    if kind in NO_RECOMPUTATION:
        with pytest.raises(UsageError, match=r"^train\.gradient_checkpointing: .* cache"):
            gradients(kind, True)
        return
    plain, recomputed = gradients(kind, False), gradients(kind, True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINED)
def test_on_a_half_type_base_float32_trains_or_the_type_is_refused(kind, tmp_path):
    chosen = method(kind)
    if kind in NOT_IN_HALF_TYPES:
        with pytest.raises(UsageError, match=r"^model\.dtype: .* bfloat16 rounds small updates away; set float32$"):
            chosen.apply(llama(dtype="bfloat16"), context())
        return
    torch.manual_seed(0)
    model = chosen.apply(llama(dtype="bfloat16"), context())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    run_steps(model, 1)
    chosen.export(model).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    logits = probe(model)
    torch.testing.assert_close(
        probe(reloaded(tmp_path / "adapter", "bfloat16")), logits, rtol=0, atol=2**-8 * float(logits.abs().max())
    )


@pytest.mark.parametrize("kind", ["CARTRIDGE", "PVERA", "P_TUNING", "SHADOW", "SHIRA", "VBLORA", "VERA"])
def test_stopped_and_resumed_equals_straight_also_where_frozen_tensors_were_drawn(kind, tmp_path):
    """The resumed process draws others first: the seed alone must not be what makes them equal."""
    straight, _ = train(workload(tmp_path / "straight", method(kind), max_steps=4), model=llama())
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", method(kind), max_steps=4, reporter=StopAt(2)), model=llama())
    work = workload(tmp_path / "stopped", method(kind), max_steps=4)
    torch.manual_seed(99)
    model = work.method.apply(llama(), Context(work.recipe))
    run_stages(work, model, work.run.latest_checkpoint())
    expected = trained_tensors(straight)
    assert expected.keys() == trained_tensors(model).keys()
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(probe(model), probe(straight))


def test_biases_merge_where_there_are_some():
    model = method("BEFT").apply(tiny_opt(), context())
    run_steps(model, 2)
    logits = probe(model)
    plain, _ = fold(model, torch.float32)
    require_exact(compare(logits, probe(plain)), "merging")


def test_the_small_network_of_shadow_has_its_loss():
    chosen = method("SHADOW", auxiliary_loss_weight=0.25)
    model = chosen.apply(llama(), context())
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    parts = chosen.loss(model, batch, lambda rows: supervised_forward(model, rows))
    model(**batch)
    torch.testing.assert_close(parts["shadow"], 0.25 * model.base_model.last_shadow_loss)
    off = method("SHADOW", auxiliary_loss_weight=0.0)
    model = off.apply(llama(), context())
    assert off.loss(model, batch, lambda rows: supervised_forward(model, rows)).keys() == {"loss"}


# -- bases and tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINED)
def test_over_a_quantised_base_it_trains_and_leaves_that_alone_or_is_refused(kind, base):
    wanted = recipe().model_copy(update={"quantization": QuantizationSection(bits=4)})
    if kind not in QUANTISED:
        with pytest.raises(UsageError, match=rf"^quantization\.bits: peft has no {kind} for a base of 4 bits"):
            method(kind).apply(llama(), Context(wanted))
        return
    section = ModelSection(name_or_path=str(base), dtype="float32")
    quantised = load_model(section, device="cpu", quantization=wanted.quantization)
    weights = {name: p.detach().clone() for name, p in quantised.named_parameters()}
    assert method(kind).count(quantised) == method(kind).count(llama())
    model = method(kind).apply(quantised, Context(wanted))
    before = trained_tensors(model)
    run_steps(model, 3)
    idle = [name for name, tensor in trained_tensors(model).items() if torch.equal(tensor, before[name])]
    assert not idle
    plain = {
        n.removeprefix("base_model.").removeprefix("model.").replace("base_layer.", ""): p
        for n, p in model.named_parameters()
    }
    for name, tensor in weights.items():
        assert torch.equal(next(p for n, p in plain.items() if n.endswith(name.removeprefix("model."))), tensor), name


def for_task(task):
    wanted = recipe()
    return Context(wanted.model_copy(update={"model": wanted.model.model_copy(update={"task": task})}))


@pytest.mark.parametrize("task", ["seq_cls", "token_cls"])
def test_a_classifiers_head_trains_in_float32_and_is_counted(task):
    names = {"seq_cls": "BertForSequenceClassification", "token_cls": "BertForTokenClassification"}

    def make():
        return tiny_bert(kind=names[task], num_labels=3).bfloat16()

    chosen = Method(Config(type="HIRA", config={"r": 4, "target_modules": "all-linear"}))
    model = chosen.apply(make(), for_task(task))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert chosen.count(make()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {"base_model.model.classifier.modules_to_save.default.weight"} < trains
    assert not any("classifier.hira" in name for name in trains)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with pytest.raises(UsageError, match="PROMPT_TUNING does causal_lm here; for"):
        method("PROMPT_TUNING").count(make())
    with pytest.raises(UsageError, match="peft can't train a classifier's head beside TRAINABLE_TOKENS"):
        method("TRAINABLE_TOKENS").count(make())


def test_encoder_decoders_train_too():
    chosen = Method(Config(type="LOHA", config={"r": 2, "target_modules": ["q", "v"]}))
    model = chosen.apply(tiny_t5(), for_task("seq2seq_lm"))
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert chosen.count(tiny_t5()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    with pytest.raises(UsageError, match="PREFIX_TUNING does causal_lm here; for seq2seq_lm take a prompt method"):
        method("PREFIX_TUNING").count(tiny_t5())


# -- targets, notices and refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["mlp", "q_proj"], {"q_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r"model\.layers\.[1]\.mlp\.up_proj", {"up_proj"}),
    ],
)
def test_words_names_and_expressions_select_targets(targets, expected):
    model = method("HIRA", target_modules=targets).apply(llama(), context())
    names = {name.split(".hira_A")[0] for name, p in model.named_parameters() if ".hira_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in names} == expected
    assert len(names) == (1 if expected == {"up_proj"} else 2 * len(expected))


def test_targets_left_out_are_pefts_and_notices_say_so():
    assert Method(Config(type="HIRA")).notices(llama()) == ["target_modules: q_proj, v_proj (peft's choice)"]
    assert method("HIRA").notices(llama()) == []
    assert method("IA3").notices(llama()) == ["IA3: method.name: ia3 has the paper's settings"]
    assert any("cannot merge the BEFT adapter" in line for line in method("BEFT").notices(llama()))
    assert any("decomposes the base again" in line for line in method("PSOFT").notices(llama()))


def test_psoft_needs_the_signs_that_its_machine_found(trained):
    """Why there is a notice: with one singular pair's signs turned, what was saved means something else."""
    _, _, folder, logits = trained("PSOFT")
    model = reloaded(folder)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    a, b = layer._get_psoft_ab_cache_buffers("default")
    sign = torch.ones(len(a))
    sign[0] = -1
    before = probe(model)
    layer._set_psoft_ab_cache_buffers("default", sign[:, None] * a, b * sign)
    torch.testing.assert_close(before, logits, rtol=0, atol=1e-5)
    assert (probe(model) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("HIRRA", {}, r"^method\.type: the installed peft has no 'HIRRA'; did you mean 'HIRA'\?$"),
        ("hira", {}, r"^method\.type: the installed peft has no 'hira'; did you mean 'HIRA'\?$"),
        ("HIRA", {"rnak": 4}, r"^method\.config\.rnak: not a setting of HIRA; known: "),
        ("HIRA", {"hira_dropot": 0.1}, r"not a setting of HIRA; did you mean 'hira_dropout'\?$"),
        ("HIRA", {"peft_type": "HIRA"}, r"^method\.config\.peft_type: follows from the rest of the recipe; remove it$"),
        ("HIRA", {"task_type": "CAUSAL_LM"}, r"^method\.config\.task_type: follows"),
        ("HIRA", {"inference_mode": True}, r"^method\.config\.inference_mode: follows"),
        ("HIRA", {"base_model_name_or_path": "x"}, r"^method\.config\.base_model_name_or_path: follows"),
        ("HIRA", {"r": -1}, r"^method\.config: HIRA: `r` should be a positive integer value but"),
        ("HIRA", {"r": "eight"}, r"^method\.config: HIRA: "),
        ("HIRA", {"target_modules": ["q_porj"]}, r"^method\.config\.target_modules: 'q_porj' .* mean 'q_proj'\?$"),
        ("HIRA", {"target_modules": r".*\.qkv"}, r"^method\.config: HIRA: Target modules .* not found"),
        ("PROMPT_TUNING", {}, r"^method\.config\.num_virtual_tokens: PROMPT_TUNING needs it"),
        ("PROMPT_TUNING", PROMPT | {"prompt_tuning_init_text": "a"}, r"take method\.name: prompt_tuning"),
        ("LORA", {"init_lora_weights": "pissa"}, r"^method\.config\.init_lora_weights: pissa: it changes the base"),
        ("LORA", {"init_lora_weights": "olora"}, r"methods pissa, olora and lora do without$"),
        ("LORA", {"init_lora_weights": "eva"}, r"looks at data"),
        ("LORA", {"kasa_config": {"beta": 0.1}}, r"^method\.config\.kasa_config: it changes the base"),
        ("LORA", {"layer_replication": [[0, 2], [1, 2]]}, r"^method\.config\.layer_replication: it makes another base"),
        ("CPT", {"opt_weighted_loss_type": "decay"}, r"^method\.config\.opt_weighted_loss_type: it is a loss"),
        ("ADAMSS", {"use_asa": True}, r"^method\.config\.use_asa: its schedule belongs to the training loop; remove"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(kind, keys, message):
    for call in (Method(Config(type=kind, config=keys)).count, Method(Config(type=kind, config=keys)).notices):
        with pytest.raises(UsageError, match=message) as caught:
            call(llama())
        assert "\n" not in str(caught.value)

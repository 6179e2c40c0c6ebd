"""LoRA-Dropout: what a forward drops, over LoRA and over AdaLoRA, and the plain adapter that it leaves."""

import json

import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from peft.tuners.lora import LoraLayer

import peftctl
from peftctl.commands.prepare import refuse_unsupported
from peftctl.errors import Interrupted, RecipeError, UsageError
from peftctl.methods import adalora, lora
from peftctl.methods.lora_dropout import Config, Method
from peftctl.tuners.dropped_factors import DropFactors
from tests.commands.helpers import write_recipe
from tests.methods import lora_family as family
from tests.methods.architectures import tiny_of
from tests.methods.helpers import applied, recipe, run_steps
from tests.tiny import tiny_llama, tiny_opt
from tests.training.helpers import train, trained_tensors, workload
from tests.training.test_resume import StopAt

QV = {"target_modules": ["q_proj", "v_proj"]}
BUDGET = {"init_r": 6, "target_r": 2, "delta_t": 2}
OVER = {"lora": {"r": 4}, "adalora": {"over": "adalora", "adalora": BUDGET}}
both = pytest.mark.parametrize("over", OVER)


def method(over="lora", **keys):
    return Method(Config(**{**QV, **OVER[over], **keys}))


def double(over="lora", **keys):
    """A model in float64 with all that trains moved."""
    return family.randomise(applied(method(over, **keys), tiny_llama().double()).double(), std=0.3)


def layer_of(model):
    """The first adapted layer, of 32 inputs and as many outputs."""
    return next(m for m in model.modules() if isinstance(m, LoraLayer))


def factors(layer):
    """Return A: (r, d_in) and s B: (d_out, r), with lambda in A, so that their product is the update."""
    if isinstance(layer, AdaLoraLayer):
        scale = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)
        return layer.lora_A["default"] * layer.lora_E["default"], scale * layer.lora_B["default"]
    return layer.lora_A["default"].weight, layer.scaling["default"] * layer.lora_B["default"].weight


@torch.no_grad()
def update_of(layer):
    """Return the update (d_out, d_in) of one training forward: of unit vectors, as the tokens of four rows."""
    x = torch.eye(layer.in_features, dtype=torch.float64).reshape(4, -1, layer.in_features)
    return (layer(x) - layer.base_layer(x)).reshape(layer.in_features, -1).T


# -- the equation ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("p", [0.2, 0.6])
def test_a_forward_drops_whole_columns_and_rows_for_all_tokens(over, p):
    layer = layer_of(double(over, p=p)).train()
    a, b = factors(layer)
    seen = []
    for _ in range(2):
        ratio = update_of(layer) / (b @ a)
        rows, columns = ratio.abs().sum(1) > 0.5, ratio.abs().sum(0) > 0.5
        assert 0 < rows.sum() < 32 and 0 < columns.sum() < 32
        expected = torch.outer(rows.double(), columns.double()) / (1 - p) ** 2
        torch.testing.assert_close(ratio, expected, rtol=1e-6, atol=1e-6)
        seen.append((rows, columns))
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


@both
def test_masked_factors_are_masked_features(over):
    """W x + m_out (s B A (m_in x)), token by token."""
    layer = layer_of(double(over, p=0.4)).train()
    a, b = factors(layer)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    columns, rows = (torch.nn.functional.dropout(torch.ones(32, dtype=torch.float64), 0.4) for _ in range(2))
    w = layer.base_layer.weight
    naive = torch.stack([torch.stack([w @ v + rows * (b @ (a @ (columns * v))) for v in row]) for row in x])
    torch.testing.assert_close(found, naive, rtol=1e-12, atol=1e-12)


@both
def test_the_rank_is_never_dropped(over):
    layer = layer_of(double(over, p=0.3)).train()
    r = len(factors(layer)[0])
    assert [int(torch.linalg.matrix_rank(update_of(layer), rtol=1e-9)) for _ in range(20)] == [r] * 20


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_an_entry_of_the_update_is_zero_with_probability_2p_minus_p_squared(p):
    torch.manual_seed(0)
    a, b = torch.ones(1, 60), torch.ones(60, 1)
    zeros = [(down.T @ up.T == 0).double().mean() for down, up in (DropFactors(p)(a, b) for _ in range(300))]
    assert abs(float(torch.stack(zeros).mean()) - (2 * p - p**2)) < 0.02


def test_the_mean_over_masks_is_the_update():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    drop, total = DropFactors(0.3), torch.zeros(5, 6, dtype=torch.float64)
    for _ in range(4000):
        down, up = drop(a, b)
        total += up @ down
    # An entry of a mask pair has the deviation sqrt(1 / (1 - p)^2 - 1) = 1.02, so of their mean 0.016.
    torch.testing.assert_close(total / 4000 / (b @ a), torch.ones(5, 6, dtype=torch.float64), rtol=0, atol=0.08)


def test_without_a_share_it_is_lora_bit_for_bit(tmp_path):
    plain, _ = train(workload(tmp_path / "a", lora.Method(lora.Config(r=4, dropout=0.1, **QV)), max_steps=4))
    same, _ = train(workload(tmp_path / "b", method(p=0.0, dropout=0.1), max_steps=4))
    other, _ = train(workload(tmp_path / "c", method(p=0.1, dropout=0.1), max_steps=4))
    for name, tensor in trained_tensors(plain).items():
        assert torch.equal(trained_tensors(same)[name], tensor), name
        assert not torch.equal(trained_tensors(other)[name], tensor), name


def test_without_a_share_it_is_adalora(tmp_path):
    plain, _ = train(workload(tmp_path / "a", adalora.Method(adalora.Config(**BUDGET, **QV)), max_steps=8))
    same, _ = train(workload(tmp_path / "b", method("adalora", p=0.0), max_steps=8))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(same)[name], tensor, rtol=1e-3, atol=2e-5)


@both
def test_outside_of_training_nothing_is_dropped(over):
    model = double(over, p=0.6).eval()
    first, second = (model(input_ids=family.IDS).logits for _ in range(2))
    assert torch.equal(first, second)
    layer = layer_of(model)
    a, b = factors(layer)
    torch.testing.assert_close(update_of(layer), (b @ a).detach(), rtol=1e-9, atol=1e-9)


@both
def test_dropped_columns_and_rows_get_no_gradient(over):
    layer = layer_of(double(over, p=0.4)).train()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    torch.manual_seed(3)
    layer(x).sin().sum().backward()
    torch.manual_seed(3)
    columns, rows = (torch.nn.functional.dropout(torch.ones(32), 0.4) != 0 for _ in range(2))
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    a, b = (a, b) if over == "adalora" else (a.weight, b.weight)
    assert torch.equal((a.grad != 0).all(0), columns) and torch.equal((a.grad != 0).any(0), columns)
    assert torch.equal((b.grad != 0).all(1), rows) and torch.equal((b.grad != 0).any(1), rows)


@both
def test_starts_as_the_base_also_in_training(over):
    for base in (tiny_llama, tiny_opt):
        family.check_identity(method(over, p=0.6), base)


def test_parts_of_fused_layers_are_dropped_too():
    chosen = Method(Config(r=3, p=0.4, target_modules=["c_attn"], parts=["q", "v"]))
    model = family.double(chosen, lambda: tiny_of("gpt2", "cpu")).train()
    layer = layer_of(model)
    torch.manual_seed(3)
    layer(torch.randn(2, 5, layer.in_features, dtype=torch.float64)).sin().sum().backward()
    gradient = layer.lora_B["default"].rows.grad
    kept = (gradient != 0).all(1)
    assert 0 < kept.sum() < len(kept) and torch.equal((gradient != 0).any(1), kept)


# -- training ----------------------------------------------------------------------------------------------------------


@both
def test_the_same_seed_draws_the_same_with_and_without_recomputation(tmp_path, over):
    keys = {"p": 0.4, "dropout": 0.1}
    plain, _ = train(workload(tmp_path / "a", method(over, **keys), max_steps=3))
    again, _ = train(workload(tmp_path / "b", method(over, **keys), max_steps=3, gradient_checkpointing=True))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(again)[name], tensor, rtol=1e-6, atol=1e-8)


def test_stopped_and_resumed_equals_straight(tmp_path):
    family.check_resume(tmp_path, lambda: method(p=0.4))


@pytest.mark.parametrize("stop", [2, 5])
def test_over_adalora_stopped_and_resumed_equals_straight(tmp_path, stop):
    def make():
        return method("adalora", p=0.4, adalora={**BUDGET, "tinit": 2, "tfinal": 3, "delta_t": 1})

    straight, _ = train(workload(tmp_path / "straight", make(), max_steps=9))
    with pytest.raises(Interrupted):
        train(workload(tmp_path / "stopped", make(), max_steps=9, reporter=StopAt(stop)))
    resumed = workload(tmp_path / "stopped", make(), max_steps=9)
    again, _ = train(resumed, resumed.run.latest_checkpoint())
    for name, tensor in trained_tensors(straight).items():
        assert torch.equal(trained_tensors(again)[name], tensor), name
    assert sum(int((m.lora_E["default"] != 0).sum()) for m in again.modules() if isinstance(m, SVDLinear)) == 16


def test_over_adalora_the_budget_and_the_penalty_are_adaloras(tmp_path):
    chosen = method("adalora", p=0.6)
    assert chosen.loss_reads_weights
    work = workload(tmp_path, chosen, max_steps=8, eval_steps=4)
    train(work)
    lines = [json.loads(line) for line in work.run.metrics.read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert all(line["orthogonality"] > 0 for line in logged)
    assert logged[0]["rank_budget"] == 48 and logged[-1]["rank_budget"] == 16


@both
def test_the_base_stays_frozen_and_is_there_when_switched_off(over):
    family.check_frozen_base(method(over, p=0.1))


def test_encoder_decoders():
    family.check_encoder_decoder(Method(Config(r=4, p=0.1)))


@pytest.mark.parametrize("kind", family.KINDS)
def test_over_a_quantised_base(tiny_dir, kind):
    family.check_identity(method(p=0.5), lambda: family.quantized(tiny_dir, kind))
    model = applied(method(p=0.1), family.quantized(tiny_dir, kind))
    losses = run_steps(model, 4)
    assert losses[-1] < losses[0]
    layer = layer_of(model)
    x = torch.randn(2, 5, 32)
    assert not torch.equal(layer(x), layer(x))  # masks are drawn there too


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_its_input_once_and_no_update(over, dtype):
    base = tiny_llama(dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    layer = layer_of(applied(method(over, p=0.4), base))
    kept = family.kept_for_backward(layer, dtype=dtype)
    of_tokens = [(shape, kind) for shape, kind in kept if torch.Size(shape).numel() == 3 * 7 * 32]
    assert len(of_tokens) == 1 and of_tokens[0][1] == dtype
    assert sum(shape == (32, 32) for shape, _ in kept) <= 1  # W, to pass the gradient on


def test_count_is_the_adapters():
    assert Method(Config(r=8, target_modules="all-linear")).count(family.smollm2()) == 2_442_240
    over = Method(Config(over="adalora", adalora={"init_r": 12}, target_modules="all-linear"))
    assert over.count(family.smollm2()) == 3_665_880
    for chosen in (method(), method("adalora")):
        assert family.trainable_count(applied(chosen, tiny_llama())) == chosen.count(tiny_llama())


# -- the artefact ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_plain_lora_of_the_mean_module(tmp_path):
    folder = family.check_saved(tmp_path, method(p=0.4))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # peft, of its own adapters
def test_over_adalora_it_is_a_plain_adalora(tmp_path):
    from peft import PeftModel

    chosen = method("adalora", p=0.4)
    model, _ = train(workload(tmp_path / "run", chosen, max_steps=8, learning_rate=0.05))
    exported = chosen.export(model).eval()
    exported.save_pretrained(tmp_path / "adapter")
    logits = exported(input_ids=family.IDS).logits
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "ADALORA"
    assert not any(type(m).__module__.startswith("peftctl") for m in again.modules())
    assert (logits - tiny_llama()(input_ids=family.IDS).logits).abs().max() > 1e-3
    torch.testing.assert_close(again(input_ids=family.IDS).logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.merge_and_unload()(input_ids=family.IDS).logits, logits, rtol=0, atol=1e-4)


# -- its section -------------------------------------------------------------------------------------------------------


def section(folder, tiny_dir, **keys):
    return write_recipe(folder, tiny_dir, {"name": "lora_dropout", **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"over": "adalora", "r": 8},
            r"method: over adalora nothing reads r; remove, and give init_r, .* in method\.adalora",
        ),
        ({"over": "adalora", "parts": ["q"], "init": "gaussian"}, r"over adalora nothing reads init, parts; remove"),
        ({"adalora": {"init_r": 12}}, r"method\.adalora: expected nothing, since method\.over is lora; remove it"),
        ({"over": "adalora", "adalora": {"init_r": 4}}, r"method\.adalora: expected less than init_r"),
        ({"over": "adalora", "adalora": {"r": 4}}, r"method\.adalora\.r: unknown key"),
        ({"p": 1.0}, r"method\.p: expected a number of at least 0 and below 1"),
        ({"over": "dora"}, r"method\.over: expected one of lora, adalora, got"),
    ],
)
def test_sections_that_can_not_work_are_refused(tmp_path, tiny_dir, keys, message):
    with pytest.raises(RecipeError, match=message) as caught:
        peftctl.load_recipe(section(tmp_path, tiny_dir, **keys))
    assert len(str(caught.value).splitlines()) == 1


def test_over_adalora_the_resolved_recipe_has_no_key_that_is_not_read(tmp_path, tiny_dir):
    """A run writes its recipe down in full, and must be able to read it."""
    keys = {"over": "adalora", "adalora": BUDGET, **QV}
    result = peftctl.train(peftctl.load_recipe(section(tmp_path, tiny_dir, **keys)))
    resolved = result.run / "recipe.yaml"
    assert "\n  init:" not in resolved.read_text() and "\n  r:" not in resolved.read_text()
    assert peftctl.load_recipe(resolved).method == peftctl.load_recipe(tmp_path / "recipe.yaml").method
    card = (result.artefact / "README.md").read_text()
    assert "LoRA-Dropout over AdaLoRA" in card


def test_over_adalora_only_what_adalora_can_do_is_claimed():
    wanted = recipe(Config(over="adalora"))
    for section_, keys in (("model", {"task": "seq_cls"}), ("quantization", {"bits": 4})):
        changed = wanted.model_copy(update={section_: getattr(wanted, section_).model_copy(update=keys)})
        with pytest.raises(UsageError, match=r"lora_dropout (does not do seq_cls|can't train over a base of 4 bits)"):
            refuse_unsupported(changed, Method(changed.method))
        refuse_unsupported(changed.model_copy(update={"method": Config()}), Method(Config()))


@both
def test_an_embedding_is_refused(over):
    with pytest.raises(UsageError, match=r"method.target_modules: model.embed_tokens is an embedding"):
        method(over, target_modules=["embed_tokens"]).count(tiny_llama())

"""Change of magnitude and direction: against the paper's formulas, and the same for every form of one model."""

import math

import pytest
import torch

from peftctl.artifacts.compare import Change, compare, correlation, layer_kind, measure
from peftctl.artifacts.locate import locate
from peftctl.artifacts.merge import merge
from peftctl.artifacts.sides import side_of
from peftctl.errors import ArtifactError, UsageError
from tests.artifacts.helpers import lora_run
from tests.tiny import save_tiny, tiny_llama


def naive(after, before):
    """dM and dD as the paper writes them, in float64, one vector after the other."""
    after, before = after.double(), before.double()
    moved = [
        abs(math.sqrt(sum(x * x for x in w)) - math.sqrt(sum(x * x for x in v)))
        for w, v in zip(after, before, strict=True)
    ]
    turned = [1 - float(w @ v) / math.sqrt(float(w @ w) * float(v @ v)) for w, v in zip(after, before, strict=True)]
    return sum(moved) / len(moved), sum(turned) / len(turned)


def side(path):
    return side_of(locate(path))


def figures(changes):
    return {
        f"{c.name} {key}": getattr(c, key) for c in changes for key in ("magnitude", "direction", "length", "relative")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("compare") / "base")


def saved(folder, change):
    """Write the tiny model with something done to its weights."""
    model = tiny_llama()
    with torch.no_grad():
        change(dict(model.named_parameters()))
    return save_tiny(folder, model)


def test_it_is_the_papers_formula():
    torch.manual_seed(0)
    before = torch.randn(7, 5, dtype=torch.float64)
    after = before + 0.3 * torch.randn(7, 5, dtype=torch.float64)
    found = measure("w", after, before)
    magnitude, direction = naive(after, before)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
    assert found.direction == pytest.approx(direction, rel=1e-12)
    assert found.length == pytest.approx(float(before.norm(dim=1).mean()), rel=1e-12)
    assert found.relative == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-12)


def test_pieces_of_a_large_weight_count_like_the_whole(monkeypatch):
    torch.manual_seed(0)
    before, after = torch.randn(2, 50, 8).unbind()
    whole = measure("w", after, before)
    monkeypatch.setattr("peftctl.artifacts.compare._ROWS", 24)
    pieces = measure("w", after, before)
    assert pieces.magnitude == pytest.approx(whole.magnitude) and pieces.direction == pytest.approx(whole.direction)


def test_a_tiny_turn_is_not_lost_to_cancellation():
    angle = 1e-7
    before = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert measure("w", after, before).direction == pytest.approx(angle**2 / 2, rel=1e-6)


def test_rows_of_zeros_have_a_length_and_no_direction():
    before = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = measure("w", torch.tensor([[0.0, 2.0], [4.0, 3.0]]), before)
    assert found.magnitude == pytest.approx(1.0)
    assert found.direction == pytest.approx(1 - 24 / 25)
    assert measure("w", before, torch.zeros(2, 2)).relative is None


def test_a_planted_scale_is_all_magnitude(base, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    scaled = saved(tmp_path / "scaled", lambda p: p[name].mul_(1.5))
    (change,) = compare(side(scaled), side(base)).changes
    assert change.name == name
    assert change.magnitude == pytest.approx(0.5 * change.length, rel=1e-6) and change.magnitude > 0.1
    assert change.direction == pytest.approx(0.0, abs=1e-12)


def test_a_planted_rotation_is_all_direction(base, tmp_path):
    name = "model.layers.2.self_attn.q_proj.weight"
    angle = 0.3
    turn = torch.eye(32)
    for i in range(0, 32, 2):  # every plane turns by the angle, so every row does
        turn[i : i + 2, i : i + 2] = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )
    rotated = saved(tmp_path / "rotated", lambda p: p[name].copy_(p[name] @ turn))
    (change,) = compare(side(rotated), side(base)).changes
    assert change.name == name
    assert change.magnitude == pytest.approx(0.0, abs=1e-6)
    assert change.direction == pytest.approx(1 - math.cos(angle), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm", "layers.1.mlp.up_proj"]},
        {"target_modules": ["lm_head", "v_proj"], "use_rslora": True},
    ],
    ids=["lora", "dora", "embedding-and-whole-modules", "tied-head"],
)
def test_an_adapter_on_the_fly_is_its_merged_model(tmp_path, monkeypatch, config):
    run, _ = lora_run(tmp_path, **config)
    merge(run.path, tmp_path / "merged", dtype="float32")
    monkeypatch.setattr("peftctl.artifacts.sides.load_base", None)  # nothing may load the whole base
    monkeypatch.setattr("peftctl.models.stored.load_model", None)
    plain = side(tmp_path / "base")
    on_the_fly, merged = compare(side(run.path), plain), compare(side(tmp_path / "merged"), plain)
    assert on_the_fly.changes and figures(on_the_fly.changes) == pytest.approx(figures(merged.changes), rel=1e-5)
    assert on_the_fly.vectors == merged.vectors == (9 if "modules_to_save" in config else 0)
    assert compare(side(run.path), side(tmp_path / "merged")).changes == ()


def test_the_layers_of_an_adapter_and_no_others_change(finished):
    run, _ = finished
    found = compare(side(run.path), side(run.path.parent / "base"))
    assert len(found.changes) == 28 and found.vectors == 0
    assert list(found.kinds()) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    weight = tiny_llama().model.layers[3].mlp.down_proj.weight.detach()
    change = next(c for c in found.changes if c.name == "model.layers.3.mlp.down_proj.weight")
    assert change.shape == (32, 64)
    assert change.length == pytest.approx(float(weight.norm(dim=1).mean()), rel=1e-6)


def test_two_adapters_of_one_base_are_compared_where_either_changes_it(tmp_path):
    first, _ = lora_run(tmp_path / "a", target_modules=["q_proj"])
    second, _ = lora_run(tmp_path / "b", target_modules=["v_proj"], std=0.1)
    found = compare(side(first.path), side(second.path))
    assert list(found.kinds()) == ["q_proj", "v_proj"] and len(found.changes) == 8


def test_a_weight_stored_the_other_way_round_is_turned_first(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    before = save_tiny(tmp_path / "before", model)
    weight = model.transformer.h[0].attn.c_attn.weight  # (d_in, d_out)
    old = weight.detach().clone()
    with torch.no_grad():
        weight[:, 3] *= 2  # one output feature
    (change,) = compare(side(save_tiny(tmp_path / "after", model)), side(before)).changes
    assert change.direction == pytest.approx(0.0, abs=1e-12)
    assert change.magnitude == pytest.approx(float(old[:, 3].norm()) / 24, rel=1e-6)


def test_a_model_and_itself_do_not_differ(base):
    found = compare(side(base), side(base))
    assert found.changes == () and found.vectors == 0 and found.same == 29


def test_other_shapes_are_refused_in_one_line(base, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "intermediate_size": 48})
    wider = save_tiny(tmp_path / "wider", LlamaForCausalLM(config))
    with pytest.raises(UsageError, match=r"different models: .*gate_proj.weight is 48x32 and 64x32") as caught:
        compare(side(wider), side(base))
    assert "\n" not in str(caught.value)
    deeper = save_tiny(
        tmp_path / "deeper", LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 5}))
    )
    with pytest.raises(UsageError, match=r"9 weights are in one alone, e.g. model.layers.4"):
        compare(side(deeper), side(base))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    run, _ = lora_run(tmp_path)
    save_tiny(tmp_path / "base", tiny_llama(seed=9))
    with pytest.raises(ArtifactError, match="adapter of another base"):
        side(run.path)


def test_damaged_files_are_named(tmp_path):
    run, _ = lora_run(tmp_path)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"adapter_model.safetensors: is damaged"):
        side(run.path)
    base = tmp_path / "base" / "model.safetensors"
    base.write_bytes(base.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"model.safetensors: damaged"):
        side(tmp_path / "base")


def test_correlation_is_pearsons():
    def change(magnitude, direction):
        return Change("w", (1, 1), magnitude, direction, 1.0, 0.1)

    points = [(1.0, 2.0), (2.0, 1.0), (3.0, 5.0), (4.0, 3.0)]
    expected = torch.corrcoef(torch.tensor(points, dtype=torch.float64).T)[0, 1].item()
    assert correlation([change(*p) for p in points]) == pytest.approx(expected, rel=1e-12)
    assert correlation([change(*p) for p in points[:2]]) is None
    assert correlation([change(1.0, float(i)) for i in range(4)]) is None


def test_the_kind_of_a_layer_is_its_own_name():
    assert layer_kind("model.layers.0.self_attn.q_proj.weight") == "q_proj"
    assert layer_kind("model.layers.0.mlp.experts.gate_up_proj") == "gate_up_proj"

import itertools

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from transformers import GPT2Config, GPT2LMHeadModel

from peftctl.errors import UsageError
from peftctl.models.load import load_model
from peftctl.models.quantize import is_quantized, parameter_count, stored_bytes
from peftctl.recipe.schema import ModelSection, QuantizationSection
from tests.tiny import save_tiny, tiny_llama

NF4 = QuantizationSection(bits=4)
FP4 = QuantizationSection(bits=4, type="fp4", double_quant=False)
INT8 = QuantizationSection(bits=8)
IDS = torch.arange(5, 30)[None]

# The paper's appendix E, rounded.
TABLE = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), tiny_llama(tie=False))


def load(folder, quantization, dtype="float32"):
    section = ModelSection(name_or_path=str(folder), dtype=dtype)
    return load_model(section, device="cpu", quantization=quantization)


@pytest.mark.parametrize("quantization", [NF4, FP4, INT8], ids=["nf4", "fp4", "int8"])
def test_every_linear_layer_below_the_head_is_quantised_and_nothing_else(folder, quantization):
    model = load(folder, quantization)
    kind = bitsandbytes.nn.Linear8bitLt if quantization.bits == 8 else bitsandbytes.nn.Linear4bit
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    packed = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert linear - packed == {"lm_head"}
    assert len(packed) == 4 * 7
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.float32}
    assert is_quantized(model)
    assert not is_quantized(load(folder, QuantizationSection()))
    assert parameter_count(model) == sum(p.numel() for p in tiny_llama(tie=False).parameters())


def test_blocks_hold_only_table_values_times_their_largest(folder):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    blocks = functional.dequantize_4bit(packed, state).double().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    assert (blocks.abs() == largest).any(1).all()
    distance = ((blocks / largest)[..., None] - torch.tensor(TABLE, dtype=torch.float64)).abs().amin(-1)
    assert distance.max() < 1e-4


def test_errors_on_normal_weights_are_those_of_the_paper():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))

    def error(kind, double):
        packed, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=double)
        return float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())

    assert error("nf4", False) == pytest.approx(0.092, abs=3e-3)
    assert error("fp4", False) == pytest.approx(0.122, abs=3e-3)
    assert error("nf4", True) == pytest.approx(error("nf4", False), abs=5e-4)


@pytest.mark.parametrize("quantization", [NF4, FP4], ids=["nf4", "fp4"])
def test_an_evaluation_forward_leaves_the_packed_weights_as_they_are(folder, quantization):
    model = load(folder, quantization)
    before = {name: p.clone() for name, p in model.named_parameters()}
    states = {n: p.quant_state.as_dict(packed=False) for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    with torch.no_grad():
        first = model(IDS).logits
        assert torch.equal(model(IDS).logits, first)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, state in states.items():
        after = model.get_parameter(name).quant_state.as_dict(packed=False)
        assert after.keys() == state.keys()
        assert all(torch.equal(a, b) for a, b in zip(after.values(), state.values(), strict=True) if torch.is_tensor(a))


def test_on_a_cpu_with_bfloat16_instructions_weights_are_not_packed_anew(folder, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    layers = [m for m in load(folder, NF4).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 28


def test_a_layer_multiplies_by_the_dequantised_weight_and_passes_its_gradient_to_x(folder):
    layer = load(folder, NF4).model.layers[1].mlp.up_proj.train()
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().double() @ weight.T
    torch.testing.assert_close(layer(x).double(), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), 2 * y @ weight, atol=1e-3, rtol=1e-5)
    assert layer.weight.grad is None


def test_bytes_in_memory_count_the_scales():
    layer = bitsandbytes.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    weights = 256 * 512
    table = 16 * 4
    assert stored_bytes(layer) == weights // 2 + weights // 64 * 4 + table
    double = bitsandbytes.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    nested_table = 256 * 4
    assert stored_bytes(double) == weights // 2 + weights // 64 + weights // 64 // 256 * 4 + table + nested_table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rest_keeps_the_type_of_the_recipe(folder, dtype):
    model = load(folder, NF4, dtype)
    assert model.model.norm.weight.dtype is getattr(torch, dtype)
    assert model.model.layers[0].mlp.up_proj.compute_dtype is getattr(torch, dtype)
    chosen = load(folder, NF4.model_copy(update={"compute_dtype": "float32"}), dtype)
    assert chosen.model.layers[0].mlp.up_proj.compute_dtype is torch.float32


def test_gpt2_layers_stored_the_other_way_round_are_quantised_too(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = load(save_tiny(tmp_path, GPT2LMHeadModel(config).eval()), NF4)
    plain = load(tmp_path, None)
    with torch.no_grad():
        error = (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    assert is_quantized(model)
    assert error < 0.25


def test_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"quantization.bits: .* is a .gguf file, which has its own quantisation"):
        load(tmp_path / "model.gguf", NF4)


def test_without_bitsandbytes_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("peftctl.models.quantize.find_spec", lambda name: None)
    for quantization in (NF4, INT8):
        with pytest.raises(UsageError, match="pip install bitsandbytes"):
            load(folder, quantization)


def test_8_bit_answers_are_near_and_4_bit_ones_further(folder):
    with torch.no_grad():
        plain, *others = (load(folder, q)(IDS).logits for q in (None, INT8, NF4, FP4))
    errors = [float((other - plain).norm() / plain.norm()) for other in others]
    assert all(small < large for small, large in itertools.pairwise(errors))
    assert 0 < errors[0] < 0.15

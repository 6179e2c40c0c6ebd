"""Base weights in 4 or 8 bits by bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314), LLM.int8().

Only the linear layers below the output head are quantised; embeddings, norms and the head keep `model.dtype`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from peftctl.errors import UsageError
from peftctl.recipe.schema import QuantizationSection

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


def library_config(
    quantization: QuantizationSection, dtype: torch.dtype, keep: Sequence[str] = ()
) -> BitsAndBytesConfig:
    """Return the library's settings.

    Args:
        quantization: With `bits`.
        dtype: Of the weights that are not quantised; 4-bit ones are multiplied in it where `compute_dtype` is left out.
        keep: Modules that are not quantised, besides the head of a language model, which the library finds itself.
    """
    import torch
    from transformers import BitsAndBytesConfig

    # It tells of casts to float16 and back at every 8-bit product.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(keep) or None)
    chosen = quantization.compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type or "nf4",
        bnb_4bit_use_double_quant=quantization.double_quant is not False,
        bnb_4bit_compute_dtype=getattr(torch, chosen) if chosen else dtype,
        llm_int8_skip_modules=list(keep) or None,  # of 4 bits too, whatever its name
    )


def keep_packing(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew, in place, at the first evaluation forward on some CPUs.

    Where the CPU has bfloat16 instructions it would round their scales to bfloat16 then: the base would change under
    the adapter, and weights read back later would be wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(model: torch.nn.Module) -> bool:
    """Tell whether a loaded model, or the base of a PeftModel, has quantised weights."""
    import torch

    return any(hasattr(p, "quant_state") or p.dtype is torch.int8 for p in model.parameters())


def parameter_count(model: torch.nn.Module) -> int:
    """Return the number of parameters, whatever they are packed into: two 4-bit weights share a byte."""
    return sum(2 * p.numel() if hasattr(p, "quant_state") else p.numel() for p in model.parameters())


def stored_bytes(model: torch.nn.Module) -> int:
    """Return the bytes that a model's weights take in memory, scales and tables of quantised ones included."""
    tensors: dict[int, torch.Tensor] = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    for parameter in list(tensors.values()):
        tensors |= {id(t): t for t in _scales(parameter)}
    return sum(tensor.nbytes for tensor in tensors.values())


def refuse_without_library() -> None:
    """Raise a UsageError where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "quantization.bits: needs bitsandbytes, which is not installed; pip install bitsandbytes, or remove it"
        )


def _scales(parameter: Any) -> list[torch.Tensor]:
    """Return what stands beside a quantised weight."""
    if hasattr(parameter, "SCB"):  # int8: one scale a row
        return [parameter.SCB] if parameter.SCB is not None else []
    import torch

    state = vars(parameter).get("quant_state")
    if state is None:
        return []
    return [value for value in state.as_dict(packed=False).values() if isinstance(value, torch.Tensor)]

"""What vLLM refuses in a LoRA adapter, so that `export` can say it before somebody deploys one.

Facts: `PEFTHelper` and `LoRAConfig` at https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/ and
https://docs.vllm.ai/en/latest/api/vllm/config/lora/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# `--max-lora-rank`: its default, and the largest value it takes.
DEFAULT_RANK = 16
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def vllm_notices(config: Mapping[str, Any]) -> list[str]:
    """Return one line on what vLLM needs or refuses, none where it takes the adapter as it is.

    Args:
        config: Content of adapter_config.json.
    """
    if config.get("peft_type") != "LORA":
        return [f"vLLM serves LoRA adapters only, not {config.get('peft_type')}; --merged gives a model that it serves"]
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    refused = {
        "modules_to_save": bool(config.get("modules_to_save")),
        "DoRA": bool(config.get("use_dora")),
        "trained biases": config.get("bias", "none") != "none",
        "ranks or alphas that differ by layer": bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        "rows of new tokens": bool(config.get("trainable_token_indices")),
        f"a rank above {RANKS[-1]}": max(ranks) > RANKS[-1],
    }
    held = [name for name, found in refused.items() if found]
    if held:
        return [f"vLLM refuses adapters with {' and '.join(held)}; --merged gives a model that it serves"]
    if max(ranks) > DEFAULT_RANK:
        return [f"vLLM needs --max-lora-rank {next(r for r in RANKS if r >= max(ranks))} for this adapter"]
    return []

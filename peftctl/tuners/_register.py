"""Makes peft know our tuner types: what `get_peft_model` and `PeftModel.from_pretrained` look up by `peft_type`.

peft's own `register_peft_method` takes only names of its closed enumeration. The tables behind it are plain
dictionaries whose keys are strings, as the enumeration's members are, so ours go in beside them.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from peftctl.tuners import (
    adapter_drop,
    bottleneck,
    fastfood,
    hypercomplex,
    kron_block,
    ladder,
    prompt_slots,
    routed,
    routed_vectors,
    row_delta,
    sparse_delta,
    union,
)

OURS: dict[str, tuple[type[PeftConfig], type[BaseTuner]]] = {
    adapter_drop.TYPE: (adapter_drop.AdapterDropConfig, adapter_drop.AdapterDropModel),
    bottleneck.TYPE: (bottleneck.BottleneckConfig, bottleneck.BottleneckModel),
    fastfood.TYPE: (fastfood.FastfoodConfig, fastfood.FastfoodModel),
    hypercomplex.TYPE: (hypercomplex.HypercomplexConfig, hypercomplex.HypercomplexModel),
    kron_block.TYPE: (kron_block.KronBlockConfig, kron_block.KronBlockModel),
    ladder.TYPE: (ladder.LadderConfig, ladder.LadderModel),
    prompt_slots.TYPE: (prompt_slots.PromptSlotsConfig, prompt_slots.PromptSlotsModel),
    routed.TYPE: (routed.RoutedLoraConfig, routed.RoutedLoraModel),
    routed_vectors.TYPE: (routed_vectors.RoutedVectorsConfig, routed_vectors.RoutedVectorsModel),
    row_delta.TYPE: (row_delta.RowDeltaConfig, row_delta.RowDeltaModel),
    sparse_delta.TYPE: (sparse_delta.SparseDeltaConfig, sparse_delta.SparseDeltaModel),
    union.TYPE: (union.UnionConfig, union.UnionModel),
}
"""peft_type in adapter_config.json -> its config and its tuner."""


def register_types() -> None:
    """Add our types to peft's tables."""
    for name, (config, tuner) in OURS.items():
        PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]
        PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # type: ignore[index]
        PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix  # type: ignore[index]

"""The DeepSpeed configurations: valid for bf16 and fp16, and filled in by the library without anything left open."""

import json
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "deepspeed").glob("*.json"))


def test_all_five_are_there():
    assert [p.stem for p in CONFIGS] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_auto_values_are_filled_in(path, dtype):
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(json.loads(path.read_text()))
    args = TrainingArguments(output_dir="unused", use_cpu=True, per_device_train_batch_size=3, max_grad_norm=0.5)
    setattr(args, dtype, True)
    config.trainer_config_process(args)
    filled = config.config
    assert filled["train_micro_batch_size_per_gpu"] == 3
    assert filled["gradient_clipping"] == 0.5
    assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (dtype == "bf16", dtype == "fp16")
    assert filled["zero_optimization"]["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in filled["zero_optimization"]) == path.stem.endswith("offload")
    sized_by_the_model = {"reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}
    left = {key for key, value in filled["zero_optimization"].items() if value == "auto"}
    assert left <= sized_by_the_model

"""Time LongLoRA beside plain LoRA on the same projections, on long rows, each in a process of its own.

    python scripts/bench/long_context.py [--tokens 4096 8192] [--model small] [--steps 3] [--device cpu]

Both train the same LoRA (r 8 on q, k, v, o) on one row of random tokens a step; LongLoRA also trains the embedding and
the norms, and attends in shifted groups of a quarter of the row. `lora+whole` is LoRA with these modules too: what is
left between it and LongLoRA is the attention's. `small` is a random Llama; else a directory or an alias is loaded.
Printed are the median seconds of a step after a first one, and the peak: of the process on CPUs (resident memory, with
what it held before the first step beside it), of the device's allocator on GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # peftctl, from wherever this is run

SMALL: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "target_modules": "attention"},
    "lora+whole": {"name": "lora", "target_modules": "attention", "modules_to_save": None},
    "longlora": {"name": "longlora", "group": 0.25},
}


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(options)))
        return
    print(f"model {options.model}, 1 row a step, {options.steps} steps timed, {options.dtype}, {options.device}")
    print(
        f"{'tokens':>7} {'method':12}{'s/step':>9}{'before GiB':>12}{'peak GiB':>10}{'of lora':>9}{'peak of lora':>14}"
    )
    for tokens in options.tokens:
        plain = None
        for method in METHODS:
            found = in_process(method, tokens, options)
            plain = plain or found
            print(
                f"{tokens:7} {method:12}{found['seconds']:9.2f}{found['before'] / 2**30:12.2f}"
                f"{found['peak'] / 2**30:10.2f}{found['seconds'] / plain['seconds']:9.2f}"
                f"{found['peak'] / plain['peak']:14.2f}",
                flush=True,
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--model", default="small", help="small, or a model directory or alias, e.g. smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps that are timed, after a first one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(method: str, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", method, "--tokens", str(tokens), "--model", options.model]
    command += ["--steps", str(options.steps), "--dtype", options.dtype, "--device", options.device]
    command += ["--checkpointing"] if options.checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method} at {tokens} tokens failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train one method at one length; return seconds a step, and bytes before and at the peak."""
    import torch

    from peftctl.backends import device
    from peftctl.methods import registry
    from peftctl.methods.base import Context

    (tokens,) = options.tokens
    device.set_threads()
    base = load(options, tokens)
    keys = dict(METHODS[options.worker])
    if "modules_to_save" in keys:
        keys["modules_to_save"] = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    kind = registry.get(keys["name"])
    method = kind(kind.Config(**keys))
    recipe = recipe_of(method, options, tokens)
    torch.manual_seed(0)
    model = method.apply(base, Context(recipe)).train()
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, betas=(0.9, 0.95))
    device.reset_peak_memory()
    before = device.current_memory_bytes()
    seconds = [step(method, model, optimizer, tokens, options.device) for _ in range(options.steps + 1)][1:]
    return {"seconds": statistics.median(seconds), "before": before, "peak": device.peak_memory_bytes()}


def load(options: argparse.Namespace, tokens: int) -> Any:
    """Return the base model, with positions for the row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftctl.models.load import load_model
    from peftctl.recipe.schema import ModelSection

    if options.model != "small":
        return load_model(ModelSection(name_or_path=options.model, dtype=options.dtype), device=options.device)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=tokens))
    return model.to(options.device, getattr(torch, options.dtype)).eval()


def recipe_of(method: Any, options: argparse.Namespace, tokens: int) -> Any:
    from peftctl.recipe.schema import DataSection, ModelSection, Recipe, TrainSection

    return Recipe(
        model=ModelSection(name_or_path=options.model, dtype=options.dtype),
        method=method.config,
        data=DataSection(train="none.jsonl", max_length=tokens),
        train=TrainSection(output_dir=tempfile.gettempdir()),
    )


def step(method: Any, model: Any, optimizer: Any, tokens: int, device: str) -> float:
    """Take one step on one row of random tokens, of which the last 512 are supervised; return its seconds.

    Few are, so that the logits, which are the same for every method, do not hide what attention needs.
    """
    import torch

    from peftctl.models.supervised import supervised_forward

    row = torch.randint(4, model.config.vocab_size, (1, tokens), device=device)
    labels = row.masked_fill(torch.arange(tokens, device=device) < tokens - 512, -100)
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels}
    began = time.perf_counter()
    parts = method.loss(model, batch, lambda given: supervised_forward(model, given))
    (parts["loss"] / 512).backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

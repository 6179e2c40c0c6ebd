"""Other tools as loops of a benchmark: each is run by its own command line, on the same rows, and only watched.

A peer is `NAME=PROGRAM`, say `trl=/somewhere/bin/trl`; it may live in a virtual environment of its own. Unsloth, which
is used as a library, is named by its Python. A peer's peak memory is the largest resident size of its largest process;
its steps are told by the lines that it logs.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _loops import UNTIMED, Clock, Work, as_dicts, counted, recipe_of

STEP = re.compile(r"['\"]loss['\"]: |iter time: .* \(step\)")
"""In the line that a Trainer, or LitGPT, logs after each step."""


def run_peer(name: str, program: str, work: Work, clock: Clock, folder: Path) -> dict[str, float]:
    """Train with another tool; return what was measured.

    Args:
        name: A key of `COMMANDS`.
        program: Its executable.
        work: What to train.
        clock: That watches.
        folder: With the rows that `write_rows` has put there.

    Raises:
        SystemExit: It failed, or logged no step.
    """
    from peftctl.commands.prepare import prepare

    ready = prepare(recipe_of(work, folder, str(folder / "eval.jsonl")))
    output = folder / name
    command = COMMANDS[name](program, ready.recipe, rows_alone(folder, name), output)
    clock.began = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines, ends = [], []
    for line in process.stdout or ():
        lines.append(line)
        if STEP.search(line):
            clock.step()
            ends.append(time.time())
    if process.wait() or len(ends) <= UNTIMED:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-40:])}")
    wall = time.time() - clock.began
    clock.first = ends[0] - (ends[-1] - ends[0]) / (len(ends) - 1)  # a step is logged when it is over
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    share = (clock.steps - UNTIMED) / clock.steps  # of rows in an order that isn't known
    tokens, supervised = (count * share for count in counted(as_dicts(ready.train_rows)))
    loss = held_out(ready, TRAINED.get(name, with_adapter)(program, base_of(ready), output))
    return {"wall s": round(wall, 2), **clock.result(tokens, supervised, peak, loss)}


def rows_alone(folder: Path, name: str) -> Path:
    """Return a peer's folder with nothing but the training rows: some tools read all files beside them."""
    alone = folder / f"{name}_rows"
    alone.mkdir(exist_ok=True)
    shutil.copy(folder / "train.jsonl", alone)
    return alone


def base_of(ready: Any) -> Any:
    """Return the model that a peer has started from."""
    import torch

    from peftctl.models.load import load_model

    return load_model(ready.recipe.model, dtype=ready.recipe.model.dtype, device=torch.device("cpu"))


def held_out(ready: Any, model: Any) -> float:
    """Return the loss on held-out rows of what a peer has trained."""
    from peftctl.data.collate import Collator
    from peftctl.evaluation.loss import held_out_loss

    return float(held_out_loss(model.eval(), ready.eval_rows, Collator(ready.tokenizer), 8)["loss"])


def with_adapter(program: str, base: Any, output: Path) -> Any:
    """Return the base with the adapter that a peer has saved, read back by plain peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(output))


def model_of(recipe: Any) -> str:
    """Return the folder of a recipe's model."""
    from peftctl.models.aliases import resolve

    return str(resolve(recipe.model.name_or_path))


# -- command lines ---------------------------------------------------------------------------------------------------


def trl(program: str, recipe: Any, rows: Path, output: Path) -> list[str]:
    """Return TRL's command line for the recipe."""
    keys, train = recipe.method, recipe.train
    options = {
        "model_name_or_path": model_of(recipe), "dtype": recipe.model.dtype, "bf16": "false",
        "dataset_name": rows, "completion_only_loss": "true", "max_length": recipe.data.max_length,
        "use_peft": "true", "lora_r": keys.r, "lora_alpha": round(keys.alpha), "lora_dropout": keys.dropout,
        "lora_target_modules": keys.target_modules, "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation, "num_train_epochs": train.epochs,
        "learning_rate": train.learning_rate, "lr_scheduler_type": train.scheduler, "seed": train.seed,
        "gradient_checkpointing": "false", "logging_steps": 1, "save_strategy": "no", "output_dir": output,
    }  # fmt: skip
    return [program, "sft", *(f"--{name}={value}" for name, value in options.items())]


def llamafactory(program: str, recipe: Any, rows: Path, output: Path) -> list[str]:
    """Return LLaMA-Factory's command line, not run yet; it reads the recipe from a file beside the rows."""
    keys, train = recipe.method, recipe.train
    columns = {"prompt": "prompt", "response": "completion"}
    (rows / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "train.jsonl", "columns": columns}}))
    options = {
        "stage": "sft", "do_train": True, "model_name_or_path": model_of(recipe),
        "pure_bf16": recipe.model.dtype == "bfloat16", "dataset": "rows", "dataset_dir": str(rows),
        "template": "empty", "cutoff_len": recipe.data.max_length, "finetuning_type": "lora", "lora_rank": keys.r,
        "lora_alpha": keys.alpha, "lora_dropout": keys.dropout, "lora_target": "all",
        "per_device_train_batch_size": train.batch_size, "gradient_accumulation_steps": train.gradient_accumulation,
        "num_train_epochs": train.epochs, "learning_rate": train.learning_rate, "lr_scheduler_type": train.scheduler,
        "seed": train.seed, "disable_gradient_checkpointing": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "output_dir": str(output), "overwrite_output_dir": True,
    }  # fmt: skip
    (rows / "recipe.json").write_text(json.dumps(options))
    return [program, "train", str(rows / "recipe.json")]


def unsloth(program: str, recipe: Any, rows: Path, output: Path) -> list[str]:
    """Return the call of `_unsloth.py` by the Python that Unsloth is installed for."""
    keys, train = recipe.method, recipe.train
    options = {
        "model": model_of(recipe), "dtype": recipe.model.dtype, "max_length": recipe.data.max_length,
        "rows": str(rows / "train.jsonl"), "output": str(output), "seed": train.seed,
        "lora": {"r": keys.r, "lora_alpha": keys.alpha, "lora_dropout": keys.dropout},
        "train": {
            "per_device_train_batch_size": train.batch_size, "num_train_epochs": train.epochs,
            "gradient_accumulation_steps": train.gradient_accumulation, "learning_rate": train.learning_rate,
            "lr_scheduler_type": train.scheduler,
        },
    }  # fmt: skip
    return [program, str(Path(__file__).with_name("_unsloth.py")), json.dumps(options)]


def litgpt(program: str, recipe: Any, rows: Path, output: Path) -> list[str]:
    """Return LitGPT's command line, its copy of the model made; its learning rate falls along a cosine, always."""
    keys, train = recipe.method, recipe.train
    model = rows / "model"
    if not model.exists():
        shutil.copytree(model_of(recipe), model)
        convert = [program, "convert_to_litgpt", str(model), "--model_name", LITGPT_MODEL]
        subprocess.run([*convert, "--dtype", recipe.model.dtype], check=True, capture_output=True)
        read = map(json.loads, (rows / "train.jsonl").read_text(encoding="utf-8").splitlines())
        samples = [{"instruction": row["prompt"], "output": row["completion"]} for row in read]
        (rows / "train.json").write_text(json.dumps(samples), encoding="utf-8")
        (rows / "val.json").write_text(json.dumps(samples[:1]), encoding="utf-8")  # it wants one
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": train.learning_rate, "weight_decay": 0.0}}
    as_it_is = {"class_path": "litgpt.prompts.Default"}
    options = {
        "out_dir": output, "precision": "bf16-true" if recipe.model.dtype == "bfloat16" else "32-true",
        "lora_r": keys.r, "lora_alpha": round(keys.alpha), "lora_dropout": keys.dropout,
        **{f"lora_{part}": "true" for part in ("query", "key", "value", "projection", "mlp")},
        "data": "JSON", "data.json_path": rows, "data.mask_prompt": "true", "data.prompt_style": json.dumps(as_it_is),
        "train.global_batch_size": train.batch_size * train.gradient_accumulation,
        "train.micro_batch_size": train.batch_size, "train.epochs": round(train.epochs),
        "train.max_seq_length": recipe.data.max_length, "train.lr_warmup_steps": 1, "train.save_interval": 1_000_000,
        "eval.interval": 1_000_000, "eval.final_validation": "false", "eval.max_new_tokens": 1,
        "optimizer": json.dumps(optimizer), "seed": train.seed,
    }  # fmt: skip
    return [program, "finetune_lora", str(model), *(f"--{name}={value}" for name, value in options.items())]


def from_litgpt(program: str, base: Any, output: Path) -> Any:
    """Return the model that LitGPT has merged its LoRA into."""
    import torch

    place = output / "hub"
    subprocess.run([program, "convert_from_litgpt", str(output / "final"), str(place)], check=True, capture_output=True)
    tied = "lm_head.weight"  # with the embedding, in this model
    weights = torch.load(place / "model.pth", weights_only=True)
    base.load_state_dict({tied: base.state_dict()[tied], **weights})
    return base


COMMANDS = {"trl": trl, "llamafactory": llamafactory, "litgpt": litgpt, "unsloth": unsloth}
PROGRAMS = {"trl": "trl", "llamafactory": "llamafactory-cli", "litgpt": "litgpt"}
"""By which a peer that is installed here is found."""
TRAINED = {"litgpt": from_litgpt}
"""How to get what a peer has trained, where it is not an adapter for peft."""
LITGPT_MODEL = "SmolLM2-135M-Instruct"
"""LitGPT's name of the demo model."""


def found_peers(named: list[str]) -> list[str]:
    """Return `NAME=PROGRAM` of the peers that are named, and of those that are installed here.

    Args:
        named: `NAME=PROGRAM`.

    Raises:
        SystemExit: One is not known, or its program is not there.
    """
    for peer in named:
        name, _, program = peer.partition("=")
        if name not in COMMANDS or not shutil.which(program):
            sys.exit(f"--peer {peer}: expected NAME=PROGRAM, NAME one of {', '.join(COMMANDS)} and PROGRAM executable")
    installed = {name: shutil.which(program) for name, program in PROGRAMS.items()}
    named_already = {peer.partition("=")[0] for peer in named}
    return [*named, *(f"{name}={place}" for name, place in installed.items() if place and name not in named_already)]

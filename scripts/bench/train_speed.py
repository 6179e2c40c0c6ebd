"""Time peftctl's training loop beside a bare Trainer + peft loop on the same rows, in turns, each in its own process.

    python scripts/bench/train_speed.py [--recipe recipes/quickstart.yaml] [--row-tokens 230] [--steps 20] [--rounds 3]

Both train the same LoRA on the same encoded rows (answer-only labels) with the same batch size, dtype and optimizer
steps. The bare loop is what one writes by hand: Trainer, get_peft_model, DataCollatorForSeq2Seq, rows in random order.
Printed are the medians over the rounds: total and supervised tokens a second without padding, and the peak of the
resident memory, with peftctl's figures as ratios to the bare loop's. The held-out loss after the same
steps shows that both learned alike; the loops see the rows in different orders.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS_BEFORE_TIMING = 2
HELD_OUT_ROWS = 64


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    results: dict[str, list[dict[str, float]]] = {"bare": [], "peftctl": []}
    for round_number in range(options.rounds):
        for name, collected in results.items():
            collected.append(in_process(name, options))
            print(f"round {round_number + 1} {name}: {collected[-1]}", flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    print(f"\n{'':28}{'bare':>12}{'peftctl':>12}{'ratio':>9}")
    for key in medians["bare"]:
        bare, ours = medians["bare"][key], medians["peftctl"][key]
        print(f"{key:28}{bare:12.4g}{ours:12.4g}{ours / bare:9.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--row-tokens", type=int, default=230, help="mean tokens a row; rows vary by half of it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=["bare", "peftctl"], help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", name, "--recipe", options.recipe]
    command += ["--row-tokens", str(options.row_tokens), "--steps", str(options.steps)]
    command += ["--batch-size", str(options.batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def workload(options: argparse.Namespace):
    """Return (recipe, prepared run): the recipe's rows with earlier requests as context, to reach the row length."""
    from peftctl import load_recipe
    from peftctl.commands.prepare import prepare
    from peftctl.data.sources import read_rows

    plain = load_recipe(options.recipe)
    steps = options.steps + STEPS_BEFORE_TIMING
    folder = Path(tempfile.mkdtemp())
    rows = [row.fields for row in read_rows(plain.data.train)]
    tokenizer = prepare(plain).tokenizer
    longer = lengthen(rows, tokenizer, options.row_tokens, steps * options.batch_size)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in longer), encoding="utf-8")
    overrides = [f"data.train={data}", "train.eval_steps=null", f"train.max_steps={steps}"]
    overrides += ["train.epochs=null", f"train.output_dir={folder / 'run'}", "eval.metrics=[loss]"]
    overrides += [
        f"train.batch_size={options.batch_size}",
        "train.save_steps=100000",
        "data.max_length=2048",
        "train.logging_steps=1",
    ]
    recipe = load_recipe(options.recipe, overrides)
    ready = prepare(recipe)
    return ready.recipe, ready


def lengthen(rows: list[dict], tokenizer, mean: int, count: int) -> list[dict]:
    """Return rows whose lengths spread evenly over mean * [0.5, 1.5], by putting other requests before the last."""
    draw = random.Random(0)
    made = []
    for i in range(count):
        row = rows[i % len(rows)]
        goal, context = draw.uniform(0.5, 1.5) * mean, []
        messages = list(row["messages"])
        while len(tokenizer.apply_chat_template(messages, tokenize=False)) / 3.6 < goal:
            context.append(draw.choice(rows)["messages"][-2]["content"])
            text = "Earlier requests:\n" + "\n".join(context) + "\nNow:\n" + row["messages"][-2]["content"]
            messages = [*row["messages"][:-2], {"role": "user", "content": text}, row["messages"][-1]]
        made.append({"messages": messages})
    return made


def run_peftctl(options: argparse.Namespace) -> dict[str, float]:
    from peftctl.artifacts.rundir import RunDir
    from peftctl.backends import device
    from peftctl.console import Reporter
    from peftctl.data.collate import Collator
    from peftctl.methods.base import Context
    from peftctl.models.load import load_model
    from peftctl.training.stages import Workload, run_stages

    recipe, ready = workload(options)
    device.set_threads()
    run = RunDir(recipe.train.output_dir)
    run.prepare(fresh=False, resume=False)
    model = load_model(recipe.model, dtype=recipe.model.dtype, device=device.current_device())
    model = ready.method.apply(model, Context(recipe, ready.tokenizer))
    collate = Collator(ready.tokenizer, recipe.data.pad_to_multiple_of)
    clock = Clock(ready.train_rows)

    class Watch(Reporter):
        def step(self, step, metrics=None):
            if metrics is None:
                clock.step(step)

    device.reset_peak_memory()
    work = Workload(recipe, ready.method, ready.train_rows, [], collate, run, Watch())
    trained = run_stages(work, model, None)
    peak = device.peak_memory_bytes()
    return clock.result(trained.train_tokens, trained.supervised_tokens, peak, held_out(model, ready))


def run_bare(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from peftctl.backends import device
    from peftctl.models.load import load_model

    recipe, ready = workload(options)
    model = load_model(recipe.model, dtype=recipe.model.dtype, device=torch.device("cpu"))
    method = recipe.method
    config = LoraConfig(
        task_type="CAUSAL_LM", r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout,
        target_modules=method.target_modules,
    )  # fmt: skip
    model = get_peft_model(model, config)
    rows = [
        {"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels}
        for r in ready.train_rows
    ]
    clock = Clock(ready.train_rows)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.step(state.global_step)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=recipe.train.batch_size,
        gradient_accumulation_steps=recipe.train.gradient_accumulation, max_steps=recipe.train.max_steps,
        learning_rate=recipe.train.learning_rate, lr_scheduler_type=recipe.train.scheduler, seed=recipe.train.seed,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(ready.tokenizer), callbacks=[Watch()],
    )  # fmt: skip
    device.reset_peak_memory()
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    peak = device.peak_memory_bytes()
    return clock.result(tokens, supervised, peak, held_out(model, ready))


def held_out(model, ready) -> float:
    """Return the loss on the first held-out rows, as both loops are measured."""
    from peftctl.data.collate import Collator
    from peftctl.evaluation.loss import held_out_loss

    return held_out_loss(model, ready.eval_rows[:HELD_OUT_ROWS], Collator(ready.tokenizer, None), 8)["loss"]


class Clock:
    """Times the steps after the first ones, whose allocations and compilations are not the loop's speed."""

    def __init__(self, rows):
        self.rows = len(rows)

    def step(self, number: int) -> None:
        if number == STEPS_BEFORE_TIMING:
            self.began = time.perf_counter()
        self.last, self.ended = number, time.perf_counter()

    def result(self, tokens: int, supervised: int, peak: int, loss: float) -> dict[str, float]:
        share = (self.last - STEPS_BEFORE_TIMING) / self.last  # all rows are seen once, so steps are equal on average
        seconds = self.ended - self.began
        return {
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens * share / seconds, 1),
            "supervised_tokens_per_second": round(supervised * share / seconds, 1),
            "tokens_per_row": round(tokens / self.rows, 1),
            "supervised_share": round(supervised / tokens, 4),
            "peak_memory_gib": round(peak / 2**30, 3),
            "held_out_loss": round(loss, 4),
        }


WORKERS = {"peftctl": run_peftctl, "bare": run_bare}

if __name__ == "__main__":
    main()

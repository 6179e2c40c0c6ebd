"""What the benchmarks run: the same rows through peftctl and through the loop that one writes by hand.

A measurement is a process of its own, which prints a line of JSON: `python scripts/bench/_loops.py LOOP FOLDER WORK`.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # peftctl, from wherever this is run
UNTIMED = 2
"""First steps, whose allocations are not the loop's speed."""
SPREAD = 0.31
"""Deviation of the logarithm of a row's length: random batches of 8 are padded by 51%, as real word problems are."""
DATA = ("requests_train", "rewrite_train", "alpaca_train")
LONGEST = 8192
"""Tokens that the demo model has positions for."""


@dataclass(frozen=True)
class Work:
    """What a loop trains.

    Args:
        recipe: Of the repository.
        overrides: Of the recipe.
        row_tokens: Mean length of a row.
        spread: Deviation of the logarithm of a row's length.
        supervised: Share of a row that is trained on.
        batch_size: Rows an optimizer step.
        steps: Optimizer steps that are timed.
        held_out: Rows whose loss is measured in the end; 0 leaves it out.
        vocabulary: Of a random model of SmolLM2's shape that is trained instead; None trains the recipe's.
    """

    recipe: str = "lora"
    overrides: tuple[str, ...] = ()
    row_tokens: int = 223
    spread: float = SPREAD
    supervised: float = 0.59
    batch_size: int = 8
    steps: int = 10
    held_out: int = 64
    vocabulary: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def measured(loop: str, work: Work, folder: Path) -> dict[str, float]:
    """Run a loop in a process of its own; return what it measured.

    Args:
        loop: One of `LOOPS`, or a peer as `NAME=PROGRAM`.
        work: What it trains.
        folder: With the rows that `write_rows` has put there.

    Raises:
        SystemExit: It failed.
    """
    began = time.time()
    command = [sys.executable, __file__, loop, str(folder), json.dumps(asdict(work) | {"began": began})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | work.environment)
    if done.returncode:
        sys.exit(f"{loop} {work} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"wall s": round(time.time() - began, 2), **found}


# -- the rows --------------------------------------------------------------------------------------------------------


def write_rows(work: Work, folder: Path) -> None:
    """Write the rows, of the demo data's words, and the model where it is a random one."""
    import peftctl

    model = peftctl.load_recipe(work.recipe).model.name_or_path
    if work.vocabulary:
        save_random_model(model, work.vocabulary, folder / "model")
    draw = random.Random(0)
    words, tokenizer = word_stream(draw), tokenizer_of(model)
    for name, count in (("train", (work.steps + UNTIMED) * work.batch_size), ("eval", max(work.held_out, 1))):
        rows = (row(work, draw, words, tokenizer) for _ in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def recipe_of(work: Work, folder: Path, held_out: str = "null") -> Any:
    """Return the recipe that trains on the rows once."""
    import peftctl

    overrides = [f"data.train={folder / 'train.jsonl'}", f"data.eval={held_out}", "data.format=prompt_completion"]
    longest = min(4 * work.row_tokens, LONGEST)
    overrides += ["data.template='{prompt}'", f"data.max_length={longest}", "data.loss_on=completion"]
    overrides += [f"train.output_dir={folder / 'run'}", f"train.batch_size={work.batch_size}", "train.logging_steps=1"]
    overrides += ["train.epochs=1", "train.save_steps=1000000", "train.scheduler=constant", "train.warmup_ratio=null"]
    overrides += [f"model.name_or_path={folder / 'model'}"] if work.vocabulary else []
    return peftctl.load_recipe(work.recipe, [*overrides, *work.overrides])


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    from peftctl.models.aliases import resolve

    return AutoTokenizer.from_pretrained(resolve(model))


def word_stream(draw: random.Random) -> Iterator[str]:
    """Yield the words of the demo data for ever, its rows in random order."""
    rows = [
        " ".join(part for part in texts(json.loads(line)))
        for name in DATA
        for line in (ROOT / "recipes" / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    while True:
        yield from draw.choice(rows).split()


def texts(value: Any) -> Iterator[str]:
    """Yield the texts of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def row(work: Work, draw: random.Random, words: Iterator[str], tokenizer: Any) -> dict[str, str]:
    """Return a prompt and a completion of the lengths that are wanted."""
    length = draw.lognormvariate(-(work.spread**2) / 2, work.spread) * work.row_tokens
    completion = max(2, round(length * work.supervised))
    parts = {"prompt": max(1, round(length) - completion), "completion": completion - 1}  # its end token comes on top
    made = {}
    for name, tokens in parts.items():
        ids = tokenizer(" ".join(next(words) for _ in range(tokens))).input_ids
        made[name] = tokenizer.decode(ids[:tokens])
    return made


def save_random_model(name: str, vocabulary: int, place: Path) -> None:
    """Save a model with random weights and another vocabulary, of a known model's shape, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from peftctl.models.aliases import resolve

    config = AutoConfig.from_pretrained(resolve(name))
    config.vocab_size = max(vocabulary, len(tokenizer_of(name)))
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer_of(name).save_pretrained(place)


# -- the loops -------------------------------------------------------------------------------------------------------


class Clock:
    """Times the steps after the first ones."""

    def __init__(self, began: float):
        self.began = began
        self.first = self.second = self.last = 0.0
        self.steps = 0

    def ready(self) -> None:
        """The first step begins."""
        self.first = time.time()

    def step(self) -> None:
        """A step is done."""
        self.steps += 1
        self.last = time.time()
        if self.steps == UNTIMED:
            self.second = self.last

    def result(self, tokens: float, supervised: float, peak: int, loss: float) -> dict[str, float]:
        """Return the figures; tokens are those of the steps that were timed."""
        seconds = self.last - self.second
        return {
            "start-up": round(self.first - self.began, 2),
            "seconds a step": round(seconds / (self.steps - UNTIMED), 3),
            "tokens/s": round(tokens / seconds, 1),
            "supervised tokens/s": round(supervised / seconds, 1),
            "peak GiB": round(peak / 2**30, 3),
            "held-out loss": round(loss, 4),
        }


def counted(rows: Any) -> tuple[int, int]:
    """Return tokens and supervised tokens of rows with `input_ids` and `labels`."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    return tokens, sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)


def as_dicts(rows: Any) -> list[dict[str, Any]]:
    """Return encoded rows as a library's collator wants them."""
    return [{"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels} for r in rows]


def run_peftctl(work: Work, clock: Clock, folder: Path) -> dict[str, float]:
    """Train as `peftctl train` does, from the checks to the artefact."""
    import peftctl
    from peftctl.console import Reporter

    class Watch(Reporter):
        def begin(self, title: str, total: int, done: int = 0) -> None:
            clock.ready()

        def step(self, step: int, metrics: Any = None) -> None:
            if metrics is None:
                clock.step()

    summary = peftctl.train(recipe_of(work, folder), reporter=Watch(), fresh=True).summary
    loss = math.nan
    if work.held_out:
        overrides = [f"data.eval={folder / 'eval.jsonl'}", "eval.metrics=[loss]"]
        loss = peftctl.evaluate(str(folder / "run"), overrides).metrics["loss"]
    tokens, supervised = untimed(recipe_of(work, folder))
    tokens, supervised = summary["train_tokens"] - tokens, summary["supervised_tokens"] - supervised
    return clock.result(tokens, supervised, summary["peak_memory_bytes"], loss)


def untimed(recipe: Any) -> tuple[int, int]:
    """Return the tokens and supervised tokens of the first steps, told from the order of the rows.

    Steps hold rows of similar length, so that those of the first steps are no share of all.
    """
    from peftctl.commands.prepare import prepare
    from peftctl.data.batching import GroupedBatches

    ready = prepare(recipe)
    train = ready.recipe.train
    rows = as_dicts(ready.train_rows)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = list(GroupedBatches(lengths, train.batch_size, train.gradient_accumulation, train.seed))
    return counted([rows[i] for batch in batches[: UNTIMED * train.gradient_accumulation] for i in batch])


def run_bare(work: Work, clock: Clock, folder: Path) -> dict[str, float]:
    """Train the same LoRA with what one writes by hand: Trainer, get_peft_model, DataCollatorForSeq2Seq."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from peftctl.backends import device
    from peftctl.commands.prepare import prepare
    from peftctl.data.collate import Collator
    from peftctl.evaluation.loss import held_out_loss
    from peftctl.models.load import load_model

    ready = prepare(recipe_of(work, folder, str(folder / "eval.jsonl")))
    recipe = ready.recipe
    model = load_model(recipe.model, dtype=recipe.model.dtype, device=torch.device("cpu"))
    keys = recipe.method
    config = LoraConfig(
        task_type="CAUSAL_LM", r=keys.r, lora_alpha=keys.alpha, lora_dropout=keys.dropout,
        target_modules=keys.target_modules,
    )  # fmt: skip
    model = get_peft_model(model, config)
    pad, steps = DataCollatorForSeq2Seq(ready.tokenizer), []

    def collate(features: list[dict[str, Any]]) -> Any:
        steps.append(counted(features))
        return pad(features)

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.ready()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step()

    train = recipe.train
    arguments = TrainingArguments(
        output_dir=str(folder / "bare"), per_device_train_batch_size=train.batch_size, num_train_epochs=train.epochs,
        learning_rate=train.learning_rate, lr_scheduler_type=train.scheduler, seed=train.seed, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=as_dicts(ready.train_rows),
        data_collator=collate,
        callbacks=[Watch()],
    )
    device.reset_peak_memory()
    trainer.train()
    peak = device.peak_memory_bytes()
    loss = math.nan
    if work.held_out:
        loss = float(held_out_loss(model, ready.eval_rows, Collator(ready.tokenizer), 8)["loss"])
    tokens, supervised = (sum(count) for count in zip(*steps[UNTIMED:], strict=True))
    return clock.result(tokens, supervised, peak, loss)


LOOPS = {"peftctl": run_peftctl, "bare": run_bare}


def main() -> None:
    """Run one loop on one piece of work."""
    loop, folder, text = sys.argv[1:]
    content = json.loads(text)
    clock = Clock(content.pop("began"))
    work = Work(**{**content, "overrides": tuple(content["overrides"])})
    if loop in LOOPS:
        run = LOOPS[loop]
    else:
        from _peers import run_peer

        name, _, program = loop.partition("=")
        run = partial(run_peer, name, program)
    print(json.dumps(run(work, clock, Path(folder))))


if __name__ == "__main__":
    main()

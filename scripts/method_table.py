"""Train every method's recipe on the demo model for the same number of tokens, and write README's table of results.

    python scripts/method_table.py [NAME ...] [--jobs 2] [--tokens 12000] [--threads 1]
    python scripts/method_table.py --write

Of each method: four short runs on a grid of learning rates (a third, one, three and ten times the recipe's), then three
seeds at the best of them, or at the next best where they differ by more than they are better than the base. Measured
are the held-out loss on 200 rows, teacher-forced, and exact match (or accuracy) of 64 answers, before and after; the
share that trains, and the size of the result. `dtype: auto` gives the base the type that the machine multiplies fast,
bfloat16 or float32; the row says which. What a step of each costs is what `bench/cost.py method` measures.

A row is kept in scripts/method_table/ with a hash of the recipe, its data and the method's code, so an interrupted
table goes on, and only what has changed is run again. `--write` puts the rows that are there into README.md.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "scripts" / "method_table"
RUNS = ROOT / "runs" / "method_table"
README = ROOT / "README.md"
BEGIN, END = "<!-- method table: begin -->", "<!-- method table: end -->"
GRID = (1 / 3, 1.0, 3.0, 10.0)
BATCH_SIZE = 4
EARLIER = {
    "adapter_fusion": (
        "method.adapters", "pfeiffer", 3e-3, [("requests", "messages"), ("rewrite", "prompt_completion")]
    ),
    "intrinsic_prompt_tuning": (
        "method.prompts", "prompt_tuning", 9e-2, [("rewrite", "prompt_completion"), ("alpaca", "alpaca")]
    ),
}  # fmt: skip
"""Method -> key that names finished runs, their method, its learning rate, and of each (demo data, format)."""
EARLIER_STEPS = 40
EVAL_ROWS, GRID_EVAL_ROWS, ANSWERS = 200, 32, 64


def main() -> None:
    options = parse()
    if options.worker:
        print(json.dumps(measure(options.worker, options.tokens)))
        return
    from peftctl.methods import registry

    names = options.names or list(registry.names())
    if not options.write:
        missing = [name for name in names if not up_to_date(name, options)]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda name: run_worker(name, options), missing))
    rows = {name: read(name) for name in names if (ROWS / f"{name}.json").is_file()}
    table = render(rows)
    print(table)
    if options.write:
        write(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods; left out, all")
    parser.add_argument("--tokens", type=int, default=12_000, help="training tokens of a run, padding excluded")
    parser.add_argument("--jobs", type=int, default=2, help="methods that are measured at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--write", action="store_true", help="run nothing; put the rows that are there into README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(name: str, options: argparse.Namespace) -> None:
    """Measure one method in a process of its own, and keep its row."""
    digest = digest_of(name, options)  # of the code as it is before the run
    began = time.monotonic()
    command = [sys.executable, __file__, "--worker", name, "--tokens", str(options.tokens)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return
    row = {"made_of": digest, **json.loads(done.stdout.splitlines()[-1])}
    ROWS.mkdir(exist_ok=True)
    (ROWS / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
    print(f"{name}: {(time.monotonic() - began) / 60:.1f} min {row}", flush=True)


# -- what a row depends on -------------------------------------------------------------------------------------------


def read(name: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((ROWS / f"{name}.json").read_text())
    return row


def up_to_date(name: str, options: argparse.Namespace) -> bool:
    return (ROWS / f"{name}.json").is_file() and read(name)["made_of"] == digest_of(name, options)


def digest_of(name: str, options: argparse.Namespace) -> str:
    from peftctl.methods._matrix import code_of

    digest = hashlib.sha256(f"{options.tokens} {options.threads} {GRID} {BATCH_SIZE}".encode())
    recipe = ROOT / "recipes" / f"{name}.yaml"
    digest.update(settings(recipe).encode())
    for file in [*data_files(recipe), *sorted(modules_of(ROOT / "peftctl" / "methods" / f"{name}.py"))]:
        digest.update(code_of(file) if file.suffix == ".py" else file.read_bytes())
    return digest.hexdigest()[:16]


def settings(recipe: Path) -> str:
    """Return a recipe without its comments, and without the learning rate: a row has its own, from the grid."""
    lines = (line.rstrip() for line in recipe.read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if not line.lstrip().startswith(("#", "learning_rate:")))


def data_files(recipe: Path) -> list[Path]:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return [
        ROOT / line.split(": ")[1] for line in lines if line.strip().startswith(("train: recipes", "eval: recipes"))
    ]


def modules_of(file: Path, seen: frozenset[Path] = frozenset()) -> set[Path]:
    """Return a method's file and those of methods/ and tuners/ that it imports, at any depth, but for the interface."""
    found = {file}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if not node.module.startswith(("peftctl.methods", "peftctl.tuners")):
            continue
        candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in candidates:
            path = ROOT / f"{module.replace('.', '/')}.py"
            if path.is_file() and path not in seen | found and path.name != "base.py":
                found |= modules_of(path, seen | found)
    return found


# -- one method ------------------------------------------------------------------------------------------------------


def measure(name: str, tokens: int) -> dict[str, Any]:
    """Return the row of one method: a grid of learning rates, three seeds, and what they came to."""
    import peftctl

    recipe = peftctl.load_recipe(ROOT / "recipes" / f"{name}.yaml", builds_on(name))
    metric = "exact_match" if recipe.model.task in ("causal_lm", "seq2seq_lm") else "accuracy"
    steps = max(4, round(tokens / BATCH_SIZE / mean_tokens(recipe)))
    base = base_figures(recipe, metric)
    if "train.learning_rate" in unread(name):  # trains nothing
        result, figures = trained(name, recipe, 0, None, None, ["loss", metric], EVAL_ROWS)
        return row(recipe, base, None, [figures["loss"]], figures[metric], result, metric)
    rates = [recipe.train.learning_rate * factor for factor in GRID]
    grid = {}
    for rate in rates:
        _, figures = trained(name, recipe, 0, rate, max(2, steps // 4), ["loss"], GRID_EVAL_ROWS)
        grid[rate] = figures["loss"]
    for best in sorted(grid, key=grid.__getitem__):
        first, figures = trained(name, recipe, 0, best, steps, ["loss", metric], EVAL_ROWS)
        losses = [figures["loss"]]
        losses += [trained(name, recipe, seed, best, steps, ["loss"], EVAL_ROWS)[1]["loss"] for seed in (1, 2)]
        if max(losses) - min(losses) < base["loss"] - statistics.fmean(losses):
            break
    return row(recipe, base, best, losses, figures[metric], first, metric) | {"grid": grid}


def trained(
    name: str, recipe: Any, seed: int, rate: float | None, steps: int | None, metrics: list[str], rows: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Train a recipe and measure the result; return (summary.json, figures)."""
    run = fitted(name, seed, rate, steps)
    return run, evaluated(str(RUNS / name), recipe, metrics, rows)


def fitted(name: str, seed: int, rate: float | None, steps: int | None) -> dict[str, Any]:
    """Train a recipe; return its summary.json, with the base's type."""
    import peftctl

    overrides = [f"train.output_dir={RUNS / name}", "data.eval=null", *builds_on(name)]
    if rate is not None:
        overrides += [f"train.learning_rate={rate}", f"train.max_steps={steps}", f"train.batch_size={BATCH_SIZE}"]
        overrides += [f"train.seed={seed}", "train.gradient_accumulation=1"]
    recipe = peftctl.load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    summary = dict(peftctl.train(recipe, fresh=True).summary)
    return summary | {"dtype": peftctl.load_recipe(RUNS / name / "recipe.yaml").model.dtype}


def builds_on(name: str) -> list[str]:
    """Train the runs that a recipe combines, where they are missing."""
    import peftctl

    if name not in EARLIER:
        return []
    key, method, rate, sources = EARLIER[name]
    runs = []
    for number, form in enumerate(sources):
        runs.append(RUNS / f"{name}-earlier" / str(number))
        if (runs[-1] / "summary.json").is_file():
            continue
        overrides = [f"train.output_dir={runs[-1]}", "data.eval=null", f"train.learning_rate={rate}"]
        overrides += [f"train.max_steps={EARLIER_STEPS}", f"train.batch_size={BATCH_SIZE}"]
        source = [f"data.train=recipes/data/{form[0]}_train.jsonl", f"data.format={form[1]}"]
        recipe = peftctl.load_recipe(ROOT / "recipes" / f"{method}.yaml", [*overrides, *source])
        peftctl.train(recipe, fresh=True)
    return [f"{key}=[{', '.join(map(str, runs))}]"]


def evaluated(target: str, recipe: Any, metrics: list[str], rows: int) -> dict[str, float]:
    """Measure a run, or the base alone, on the first held-out rows of a recipe."""
    import peftctl

    some = RUNS / f"{Path(recipe.data.eval).stem}-{rows}.jsonl"
    some.parent.mkdir(parents=True, exist_ok=True)
    lines = Path(recipe.data.eval).read_text(encoding="utf-8").splitlines(keepends=True)
    some.write_text("".join(lines[:rows]), encoding="utf-8")
    overrides = [f"data.eval={some}", f"eval.metrics=[{', '.join(metrics)}]", f"eval.rows={ANSWERS}"]
    overrides += ["eval.max_new_tokens=64", "eval.batch_size=16"]
    source = str(ROOT / "recipes" / f"{recipe.method.name}.yaml")
    return dict(peftctl.evaluate(target, overrides, recipe=source).metrics)


def base_figures(recipe: Any, metric: str) -> dict[str, float]:
    """Measure the base once for all methods; a classifier without its head knows no more than chance."""
    if metric == "accuracy":
        from peftctl.commands.prepare import prepare

        classes = len(prepare(recipe).recipe.data.labels or ())
        return {"loss": math.log(classes), "accuracy": 1 / classes}
    file = RUNS / f"base-{hashlib.sha256(Path(recipe.data.eval).read_bytes()).hexdigest()[:12]}.json"
    if not file.is_file():
        figures = evaluated(recipe.model.name_or_path, recipe, ["loss", metric], EVAL_ROWS)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(figures))
        aside.replace(file)
    return json.loads(file.read_text())


def mean_tokens(recipe: Any) -> float:
    """Return the mean length of a training row."""
    from peftctl.commands.prepare import prepare

    rows = prepare(recipe).train_rows
    return statistics.fmean(row.tokens for row in rows)


def unread(name: str) -> frozenset[str]:
    from peftctl.methods import registry

    method = registry.get(name)
    return frozenset({"train.learning_rate"} if {"train", "train.learning_rate"} & method.unread else ())


def row(
    recipe: Any, base: dict[str, float], rate: float | None, losses: list[float], after: float, run: dict, metric: str
) -> dict[str, Any]:
    return {
        "model": recipe.model.name_or_path,
        "dtype": run["dtype"],
        "metric": metric,
        "learning_rate": rate,
        "loss_before": base.get("loss"),
        "losses": losses,
        "metric_before": base.get(metric),
        "metric_after": after,
        "trainable": run["trainable_parameters"],
        "share": run["trainable_parameters"] / run["total_parameters"],
        "steps": run["steps"],
        "tokens": run["train_tokens"],
        "adapter_bytes": run["adapter_bytes"],
    }


# -- the table -------------------------------------------------------------------------------------------------------


def render(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown, best held-out loss first; classifiers below the language models."""
    head = "| method | loss after (spread of 3 seeds) | {} | learning rate | trains | base | result |\n"
    head += "|---|---|---|---|---|---|---|\n"
    text = ""
    for metric, title in (("exact_match", "exact match"), ("accuracy", "accuracy")):
        chosen = {name: row for name, row in rows.items() if row["metric"] == metric}
        if not chosen:
            continue
        ordered = sorted(chosen.items(), key=lambda item: statistics.fmean(item[1]["losses"]))
        text += "\n" + head.format(title) + base_line(next(iter(chosen.values())))
        text += "".join(line(name, row) for name, row in ordered)
    return text.lstrip("\n")


def base_line(row: dict[str, Any]) -> str:
    name = "base" if row["metric"] == "exact_match" else "chance"
    return f"| ({name}) | {row['loss_before']:.3f} | {row['metric_before']:.1%} | | | | |\n"


def line(name: str, row: dict[str, Any]) -> str:
    losses = row["losses"]
    spread = f" ({max(losses) - min(losses):.3f})" if len(losses) > 1 else ""
    rate = "–" if row["learning_rate"] is None else f"{row['learning_rate']:.1e}"
    cells = [
        f"`{name}`",
        f"{statistics.fmean(losses):.3f}{spread}",
        f"{row['metric_after']:.1%}",
        rate,
        f"{row['share']:.3%}",
        row["dtype"],
        size(row["adapter_bytes"]),
    ]
    return f"| {' | '.join(cells)} |\n"


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def write(table: str) -> None:
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

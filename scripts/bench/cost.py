"""Measure how the cost of a step grows along one axis, with peftctl and with the bare loop; write a table and a plot.

    python scripts/bench/cost.py rows|supervised|vocabulary|rank [--steps 4] [--alone] [--out FOLDER]
    python scripts/bench/cost.py method [NAME ...]
    python scripts/bench/cost.py drop

Axes: length of rows (all alike, at the same tokens a step), supervised share of a row, vocabulary (random weights of
SmolLM2's shape), rank of LoRA, method (every shipped recipe of a language model on the demo model, without the bare
loop), and adapters dropped by AdapterDrop. Each point is a process of its own. `--out` gets AXIS.md and, where
matplotlib is installed, AXIS.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from _loops import Work, measured, write_rows

COLUMNS = ("seconds a step", "tokens/s", "peak GiB")
TOKENS = 2048
"""Of a step along the axis of row lengths."""
NEEDS_MORE = frozenset({"adapter_fusion", "intrinsic_prompt_tuning", "hard_prompt", "mtlora", "peft"})
"""Methods whose recipes need finished runs or several sources, that train nothing, or that stand for others."""


def main() -> None:
    options = parse()
    plain = Work(steps=options.steps, held_out=0)
    loops = ("peftctl",) if options.alone or options.axis in ("method", "drop") else ("bare", "peftctl")
    rows = []
    for label, work in points(options.axis, plain, options.names):
        with tempfile.TemporaryDirectory() as folder:
            write_rows(work, Path(folder))
            try:
                found = {loop: measured(loop, work, Path(folder)) for loop in loops}
            except SystemExit as failed:  # the other points are worth their time all the same
                print(f"{label}: {failed}", file=sys.stderr, flush=True)
                continue
        rows.append((label, found))
        print(line(label, found), flush=True)
    text = table(options.axis, rows, loops)
    print(f"\n{text}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.axis}.md").write_text(text, encoding="utf-8")
        plot(options.axis, rows, loops, options.out / f"{options.axis}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", choices=["rows", "supervised", "vocabulary", "rank", "method", "drop"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods; left out, all")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are timed at a point")
    parser.add_argument("--alone", action="store_true", help="without the bare loop")
    parser.add_argument("--out", type=Path, help="folder for the table and the plot")
    return parser.parse_args()


def points(axis: str, plain: Work, names: list[str]) -> Iterator[tuple[str, Work]]:
    """Yield the points of an axis."""
    if axis == "rows":
        for tokens in (128, 256, 512, 1024, 2048, 4096):
            yield str(tokens), replace(plain, row_tokens=tokens, spread=0.0, batch_size=max(1, TOKENS // tokens))
    elif axis == "supervised":
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            yield f"{share:.0%}", replace(plain, supervised=share)
    elif axis == "vocabulary":
        for size in (49_152, 98_304, 196_608):
            yield str(size), replace(plain, vocabulary=size)
    elif axis == "rank":
        for rank in (4, 8, 16, 64, 256):
            yield str(rank), replace(plain, overrides=(f"method.r={rank}", f"method.alpha={2 * rank}"))
    elif axis == "drop":
        for drop in (0, 10, 20, 29):
            overrides = ("method.mode=fixed", f"method.drop={drop}")
            yield str(drop), replace(plain, recipe="adapter_drop", overrides=overrides)
    else:
        for name in names or language_methods():
            yield name, replace(plain, recipe=name)


def language_methods() -> list[str]:
    """Return the methods whose shipped recipe trains a language model on a single file of rows."""
    import peftctl
    from peftctl.methods import registry

    chosen = [name for name in registry.names() if name not in NEEDS_MORE]
    return [name for name in chosen if peftctl.load_recipe(name).model.task == "causal_lm"]


def line(label: str, found: dict[str, dict[str, float]]) -> str:
    cells = [f"{one[key]:.4g}" for one in found.values() for key in COLUMNS]
    if "bare" in found:
        cells.append(f"{found['peftctl']['tokens/s'] / found['bare']['tokens/s']:.2f}")
        cells.append(f"{found['peftctl']['peak GiB'] / found['bare']['peak GiB']:.2f}")
    return f"| {label} | {' | '.join(cells)} |"


def table(axis: str, rows: list, loops: tuple[str, ...]) -> str:
    """Return the points as Markdown."""
    heads = [f"{loop}: {key}" for loop in loops for key in COLUMNS]
    heads += ["speed ratio", "memory ratio"] if "bare" in loops else []
    lines = [f"| {axis} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*lines, *(line(label, found) for label, found in rows)]) + "\n"


def plot(axis: str, rows: list, loops: tuple[str, ...], file: Path) -> None:
    """Draw speed and memory along the axis."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [label for label, _ in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(max(8, 0.5 * len(rows)), 4))
    for part, key in zip(axes, ("tokens/s", "peak GiB"), strict=True):
        for loop in loops:
            part.plot(labels, [found[loop][key] for _, found in rows], "o-", label=loop)
        part.set(xlabel=axis, ylabel=key, ylim=(0, None))
        part.tick_params(axis="x", rotation=90 if axis == "method" else 0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()

"""Train the same LoRA on the same rows with peftctl, a bare Trainer + peft loop and other tools, in turns, and compare.

    python scripts/bench/train_speed.py [--recipe lora] [--row-tokens 223] [--supervised 0.59] [--steps 10] [--rounds 3]
        [--peer trl=PROGRAM] [--peer litgpt=PROGRAM] [--peer unsloth=PYTHON] [--peer llamafactory=PROGRAM]

Each turn is a process of its own. The bare loop is what one writes by hand: Trainer, get_peft_model,
DataCollatorForSeq2Seq, rows in random order. Peers that are installed here take part with their own command lines,
others where `--peer` names their program. All have the same rows, types, batch size and number of steps. Printed
are medians over the rounds with the lowest and the highest: wall time of the process, start-up (to the first step),
tokens a second without padding, peak memory, the share of a matrix product's speed (MFU, at 4 FLOP a parameter and
token: two forward, two for the gradient of the activations), and the loss on held-out rows. The loops see the rows in
different orders.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from _loops import LOOPS, Work, measured, recipe_of, write_rows
from _peers import found_peers

FLOP = 4
"""A parameter and token, in a step of LoRA."""


def main() -> None:
    options = parse()
    work = Work(
        recipe=options.recipe, overrides=tuple(options.overrides), row_tokens=options.row_tokens,
        supervised=options.supervised, batch_size=options.batch_size, steps=options.steps,
    )  # fmt: skip
    results: dict[str, list[dict[str, float]]] = {loop: [] for loop in (*LOOPS, *found_peers(options.peer))}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_rows(work, place)
        for round_number in range(options.rounds):
            for loop, collected in results.items():
                collected.append(measured(loop, work, place))
                print(f"round {round_number + 1} {loop}: {collected[-1]}", flush=True)
        dtype, speed, parameters = machine(recipe_of(work, place))
    print(f"\nmatrix product: {speed / 1e9:.0f} GFLOP/s in {dtype}")
    for runs in results.values():
        for run in runs:
            run["MFU %"] = 100 * FLOP * parameters * run["tokens/s"] / speed
    show(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for both loops")
    parser.add_argument("--recipe", default="lora")
    parser.add_argument(
        "--row-tokens", type=int, default=Work.row_tokens, help="mean; random batches are padded by half"
    )
    parser.add_argument("--supervised", type=float, default=Work.supervised, help="share of a row that is trained on")
    parser.add_argument("--batch-size", type=int, default=Work.batch_size)
    parser.add_argument("--steps", type=int, default=Work.steps, help="optimizer steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PROGRAM", help="another tool's executable")
    return parser.parse_args()


def machine(recipe) -> tuple[str, float, int]:
    """Return the base's type, the FLOP/s of a product of 2048 x 2048 matrices in it, and the base's parameters."""
    import torch

    from peftctl.backends import device
    from peftctl.commands.prepare import prepare
    from peftctl.models.load import meta_model

    device.set_threads()
    ready = prepare(recipe)
    dtype = device.dtype_of(ready.recipe.model.dtype)
    a, b = (torch.randn(2048, 2048, device=device.current_device()).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in meta_model(ready.recipe.model).parameters())
    return ready.recipe.model.dtype, 2 * 2048**3 / min(times), parameters


def show(results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, spreads and ratios to the bare loop."""
    names = {loop: loop.partition("=")[0] for loop in results}
    print(f"{'':24}" + "".join(f"{name:>34}" for name in names.values()))
    for key in results["bare"][0]:
        middle = {loop: statistics.median(run[key] for run in runs) for loop, runs in results.items()}
        cells = ""
        for loop, runs in results.items():
            values = [run[key] for run in runs]
            ratio = "" if loop == "bare" else f" x {middle[loop] / middle['bare']:.3f}"
            cells += f"{f'{middle[loop]:.4g} ({min(values):.4g} to {max(values):.4g}){ratio}':>34}"
        print(f"{key:24}{cells}")


if __name__ == "__main__":
    main()

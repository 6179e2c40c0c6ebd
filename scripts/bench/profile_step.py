"""Say where the time of training steps goes, with peftctl or with the bare loop, by kind of operation.

    python scripts/bench/profile_step.py [bare|peftctl ...] [KEY=VALUE ...] [--steps 4]

The time is that of the operations themselves, on the cores; what Python takes between them stands as the rest of the
steps' wall time. Measuring slows the steps down by some percent.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _loops import LOOPS, UNTIMED, Clock, Work, recipe_of, write_rows

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "mkldnn_matmul"),
    "attention": ("attention", "_softmax"),
    "copies and casts": ("copy_", "_to_copy", "clone", "contiguous", "cat", "stack", "fill_", "zero_", "empty"),
    "elementwise": (
        "mul", "add", "sub", "div", "neg", "silu", "pow", "rsqrt", "mean", "sum", "exp", "where", "bernoulli", "gelu",
        "sigmoid", "scatter_add", "logsumexp", "reciprocal",
    ),
    "optimizer": ("_fused_adam", "_foreach", "linalg_vector_norm"),
    "indexing": ("index", "gather", "embedding", "nonzero", "slice", "scatter"),
}  # fmt: skip
"""Kind -> beginnings of the operations' names behind `aten::`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="LOOP|KEY=VALUE", help="loops, and overrides of the recipe")
    parser.add_argument("--steps", type=int, default=4, help="steps that are profiled")
    parser.add_argument("--operations", type=int, default=12, help="operations that are listed one by one")
    options = parser.parse_args()
    loops = [word for word in options.words if word in LOOPS] or list(LOOPS)
    work = Work(steps=options.steps, overrides=tuple(word for word in options.words if "=" in word))
    for loop in loops:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(work, Path(folder))
            recipe_of(work, Path(folder))
            show(loop, profiled(loop, work, Path(folder)), options)


class ProfiledClock(Clock):
    """Profiles the steps that are timed."""

    def __init__(self, steps: int):
        from torch.profiler import ProfilerActivity, profile

        super().__init__(0.0)
        self.until = steps + UNTIMED
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def step(self) -> None:
        """A step is done."""
        super().step()
        if self.steps == UNTIMED:
            self.profile.start()
        if self.steps == self.until:
            self.profile.stop()


def profiled(loop: str, work: Work, folder: Path) -> ProfiledClock:
    from peftctl.backends import device

    device.set_threads()
    clock = ProfiledClock(work.steps)
    LOOPS[loop](work, clock, folder)
    return clock


def show(loop: str, clock: ProfiledClock, options: argparse.Namespace) -> None:
    """Print seconds a step by kind, and the operations that take longest."""
    events: list[Any] = [e for e in clock.profile.key_averages() if e.self_cpu_time_total > 0]
    seconds = {event.key: event.self_cpu_time_total / 1e6 / options.steps for event in events}
    wall = (clock.last - clock.second) / options.steps
    kinds: dict[str, float] = {}
    for name, spent in seconds.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    kinds["between operations"] = max(wall - sum(kinds.values()), 0.0)
    print(f"\n{loop}: {wall:.3f} s a step")
    for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {kind:20}{spent:8.3f} s {spent / wall:6.1%}")
    calls = {event.key: event.count / options.steps for event in events}
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[: options.operations]:
        print(f"    {name:48}{spent:8.3f} s {calls[name]:8.0f} calls")


def kind_of(name: str) -> str:
    short = name.removeprefix("aten::")
    for kind, beginnings in KINDS.items():
        if short.startswith(beginnings) or (kind == "attention" and "attention" in short):
            return kind
    return "other"


if __name__ == "__main__":
    main()

"""What a run writes about itself: a line of metrics.jsonl at every log step, and the loss curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """Appends one JSON object a log step; a half-written last line after a kill is cut by the run directory."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, metrics: Mapping[str, object]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")


def loss_curve(metrics: Path, png: Path) -> bool:
    """Draw training and held-out loss over optimizer steps; False where matplotlib is missing or nothing was logged."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    series = {
        key: [(r["step"], r[key]) for r in rows if isinstance(r.get(key), float)] for key in ("loss", "eval_loss")
    }
    if not series["loss"]:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (key, points), style in zip(series.items(), ("-", "o--"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "))
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per supervised token", yscale="log")
    # Plain numbers: powers of ten take three times as long to draw, and within one decade there are none to read off.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    return True

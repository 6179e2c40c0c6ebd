"""What peftctl prints: errors, tables, and progress as a bar on a terminal or as plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

# Share of an update that rounding may take before the user is told.
LOST_NOTICE = 0.5
# Characters a line of a table that does not go to a terminal: other programs read it.
PIPED_WIDTH = 10_000

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str) -> None:
    """Print an error."""
    err.print(f"[bold red]error:[/] {escape(message)}")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; columns that hold only figures are aligned on the right."""
    if title:
        out.print(title, style="bold", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for i, column in enumerate(columns):
        figures = all(row[i].removeprefix("-")[:1].isdigit() or row[i] in ("", "nan") for row in rows)
        table.add_column(column, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # In a pipe no line is folded.
    console = out if out.is_terminal else Console(file=out.file, highlight=False, width=PIPED_WIDTH)
    console.print(table)


def show_tables(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]], notes: Sequence[str]) -> None:
    """Print tables, each a (title, columns, rows), and lines below them."""
    for table in tables:
        show_table(*table)
    for line in notes:
        out.print(line, markup=False)


def coloured(pieces: Sequence[tuple[str, bool]]) -> Text:
    """Return a row's text with the trained-on pieces in green; in a pipe they stand between ⟦ and ⟧."""
    text = Text()
    for piece, trained in pieces:
        if trained and not out.is_terminal:
            text.append(f"⟦{piece}⟧")
        else:
            text.append(piece, style="bold green" if trained else "dim")
    return text


def figure(value: object) -> str:
    """Return a number as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Receives what a run has to say; this one is silent."""

    def notice(self, text: str) -> None:
        """One line that the user should see once."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A stretch of `total` steps begins, `done` of them finished in an earlier process."""

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """`step` steps are finished; metrics come at log steps."""

    def end(self) -> None:
        """The stretch is over."""


class ConsoleReporter(Reporter):
    """Shows a run: a bar on a terminal, a line at each log step in a pipe."""

    def notice(self, text: str) -> None:
        """Print one line."""
        out.print(escape(text))

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start the bar or the lines of a stage."""
        self.title, self.total, self.first, self.began = title, total, done, time.monotonic()
        self.latest = ""
        if out.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[latest]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=out, transient=False)
            self.task = self.bar.add_task(title, total=total, completed=done, latest="")
            self.bar.start()

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Move the bar, or print a line at log steps."""
        if metrics:
            self.latest = _line(metrics)
        if out.is_terminal:
            self.bar.update(self.task, completed=step, latest=self.latest)
        elif metrics:
            left = (time.monotonic() - self.began) / max(step - self.first, 1) * (self.total - step)
            out.print(f"{self.title} {step}/{self.total}  {self.latest}  left {duration(left)}", markup=False)

    def end(self) -> None:
        """Stop the bar."""
        if out.is_terminal:
            self.bar.stop()


def _line(metrics: Mapping[str, float]) -> str:
    names = {"loss": "loss", "eval_loss": "held-out loss", "learning_rate": "lr", "tokens_per_second": "tokens/s"}
    return "  ".join(f"{label} {figure(metrics[key])}" for key, label in names.items() if key in metrics)


def show_summary(result: Any) -> None:
    """Show what a `commands.train.TrainResult` says."""
    summary = result.summary
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if after:
        rows = [[name, figure(before.get(name, "")), figure(value)] for name, value in after.items()]
        show_table("held-out rows", ["metric", "before", "after"], rows)
    if summary["steps"]:
        out.print(
            f"{summary['steps']} steps, {summary['train_tokens']:,} tokens, "
            f"{summary['supervised_tokens']:,} of them trained on, "
            f"in {duration(summary['train_seconds'])}: {summary['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {_memory(summary['peak_memory_bytes'], summary.get('predicted_memory_bytes'))}"
        )
    out.print(f"result: {result.artefact}", markup=False)


def _memory(measured: int, predicted: int | None) -> str:
    """Return a measured peak beside the predicted one, and the prediction's error."""
    text = f"{measured / 2**30:.2f} GiB"
    if predicted is None:
        return text
    return f"{text} (predicted {predicted / 2**30:.2f} GiB, {predicted / measured - 1:+.0%})"


def show_merge(result: Mapping[str, Any]) -> None:
    """Show the figures of the parity gate."""
    rows = [
        ["largest change of a logit", figure(result["max_delta"])],
        ["mean KL(unmerged || merged)", figure(result["kl"])],
        ["same first choice", f"{result['top1_agreement']:.2%} of {result['positions']:,} positions"],
    ]
    if result["layers"]:
        rows.append([f"share of the update lost in {result['dtype']}", f"{result['lost']:.2%}"])
    if result["drift"]:
        drift = result["drift"]
        agreed = f"mean KL {figure(drift['kl'])}, same first choice {drift['top1_agreement']:.2%}"
        rows.append(["drift from the quantised run", agreed])
    # Whole modules and biases that have trained stand in the place of the base's: nothing is folded.
    what = f"merged {result['layers']} layers into" if result["layers"] else "what was trained stands in"
    show_table(f"{what} {result['output']}", ["", ""], rows)
    if result["lost"] > LOST_NOTICE:
        out.print(
            f"notice: {result['dtype']} rounds away {result['lost']:.0%} of the update; --dtype float32 keeps it",
            markup=False,
        )


def show_check(report: Any, *, with_recipe: bool) -> None:
    """Show a `commands.check.CheckReport`."""
    if with_recipe:
        out.print(report.recipe_yaml, markup=False, end="")
    for title, rows in report.tables():
        show_table(title, ["", ""], rows)
    for i, pieces in enumerate(report.previews):
        out.print(f"row {i + 1} (marked: trained on)", style="bold")
        out.print(coloured(pieces))
    for line in report.notices:
        out.print(f"notice: {line}", markup=False)
    if report.verdict:
        fail("\n".join(report.verdict))


def show_evaluation(result: Any) -> None:
    """Show a `commands.evaluate.Evaluation`."""
    columns = ["metric", *(["base"] if result.base else []), "tuned" if result.base else result.target]
    rows = [
        [name, *([figure(result.base[name])] if result.base else []), figure(value)]
        for name, value in result.metrics.items()
    ]
    show_table("", columns, rows)
    if result.file:
        out.print(f"written to {result.file}", markup=False)


def show_tasks(result: Any) -> None:
    """Show a `commands.tasks.TaskEvaluation`."""
    columns = ["task", "metric", *(["base"] if result.base else []), "tuned" if result.base else result.target]
    rows = [
        [task, name, *([figure(result.base[task][name])] if result.base else []), figure(value)]
        for task, metrics in result.tasks.items()
        for name, value in metrics.items()
    ]
    show_table("", columns, rows)
    if result.file:
        out.print(f"written to {result.file}", markup=False)


def show_export(result: Mapping[str, Any]) -> None:
    """Show what `commands.export` wrote."""
    for line in result["notices"]:
        out.print(f"notice: {line}", markup=False)
    template = f", template {result['template']}" if result["template"] else ""
    out.print(f"written to {result['output']} ({result['content']}{template})", markup=False)
    if result["pushed"]:
        out.print(f"uploaded to {result['pushed']}", markup=False)


def show_methods(cards: Sequence[Mapping[str, Any]]) -> None:
    """Show one line for each method's card."""
    columns = ["method", "category", "trains", "count", "merges", "4-bit", "checkpointing", "tasks", "paper"]
    rows = [
        [
            card["name"],
            card["category"],
            card["trains"],
            "?" if card["recipe"]["trainable"] is None else figure(card["recipe"]["trainable"]),
            _yes(card["mergeable"]),
            _yes("4bit" in card["supports"]),
            _yes("gradient_checkpointing" in card["supports"]),
            ", ".join(card["tasks"]),
            card["paper"],
        ]
        for card in cards
    ]
    show_table("", columns, rows)
    models = " or ".join(sorted({card["recipe"]["model"] for card in cards}))
    out.print(f"count: what trains with the method's own recipe, on {models}; ?: see its card", markup=False)


def show_matrix(content: Mapping[str, Any]) -> None:
    """Show what holds of every method, and below it why what does not."""
    engines, methods = content["engines"], content["methods"]
    words = {None: "–", "": "yes"}
    rows = [
        [name, storage, *(words.get(cells.get(f"{storage}/{engine}"), "no") for engine in engines)]
        for name, cells in methods.items()
        for storage in content["storages"]
        if any(cell.startswith(f"{storage}/") for cell in cells)
    ]
    show_table("", ["method", "base", *engines], rows)
    for name, cells in methods.items():
        for cell, why in cells.items():
            if why:
                out.print(f"{name} {cell}: {why}", markup=False)
    named = ", ".join(f"{key}: {text}" for key, text in engines.items())
    out.print(f"{named}; –: not tried; two processes on tiny models, against one", markup=False)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def show_method(card: Mapping[str, Any]) -> None:
    """Show one method's card and the keys of its section."""
    counted = card["recipe"]["trainable"]
    shipped = {f"on {card['recipe']['model']}": f"{counted:,} parameters"} if counted is not None else {}
    facts = {key: value for key, value in card.items() if key not in ("title", "keys", "recipe")} | shipped
    facts = {key: value for key, value in facts.items() if value not in ("", [], {})}
    plain = {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in facts.items()}
    show_table(card["title"], ["", ""], [[key, value] for key, value in plain.items()])
    keys = [[key, str(entry["default"]), entry["description"] or ""] for key, entry in card["keys"].items()]
    show_table("keys of its method: section", ["key", "default", "meaning"], keys)

"""The command line: parse, call one function, show what it returns. Imports no torch.

Exit codes: 0 done, 1 the run failed, 2 the recipe, the data or the arguments are wrong.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftctl import __version__, console
from peftctl.errors import PeftctlError, UsageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
recipes_app = typer.Typer(help="List, show and copy the recipes that come with peftctl; print their schema.")
app.add_typer(recipes_app, name="recipes")

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change the recipe, e.g. train.learning_rate=1e-4; null unsets."),
]
Target = Annotated[
    str, typer.Argument(metavar="TARGET", help="Run directory, adapter directory, model directory, hub id or alias.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; known errors are one message without a traceback."""
    quiet_libraries()
    debug = bool(os.environ.get("PEFTCTL_DEBUG"))
    try:
        app(args=arguments, prog_name="peftctl")
    except SystemExit as end:  # typer has shown its own errors
        return int(end.code or 0)
    except KeyboardInterrupt:
        console.fail("stopped")
        return 1
    except (PeftctlError, OSError, MemoryError) as error:
        if debug:
            raise
        console.fail(str(error) or type(error).__name__)
        return error.exit_code if isinstance(error, PeftctlError) else 1
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        console.fail(
            "out of device memory; lower train.batch_size and raise train.gradient_accumulation instead, "
            "lower data.max_length, or set train.gradient_checkpointing=true; `peftctl check` plans memory"
        )
        return 1
    return 0


def main() -> None:
    """Run and exit."""
    sys.exit(run())


def quiet_libraries() -> None:
    """Silence what users can't act on, and switch telemetry off."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("PEFTCTL_DEBUG"):
        warnings.filterwarnings("ignore")


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # launchers put it here
) -> None:
    """Fine-tune language models from YAML recipes."""


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run in train.output_dir first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says."""
    from peftctl.commands.recipes import load_recipe

    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other")
    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        from peftctl.commands import check as checking

        report = checking.check(loaded, preview_rows=0)
        if not _emit(report.to_dict(), as_json):
            console.show_check(report, with_recipe=True)
        return
    from peftctl.commands.train import train as start

    result = start(loaded, resume=resume, fresh=fresh, reporter=console.ConsoleReporter())
    if not _emit(dict(result.summary), as_json):
        console.show_summary(result)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show with trained tokens marked.")] = 3,
    device: Annotated[str | None, typer.Option(help="Plan memory for this device: cpu or cuda.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of that device, e.g. 24GB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, its data and its memory before anything is trained."""
    from peftctl.commands import check as checking
    from peftctl.commands.recipes import load_recipe

    report = checking.check(load_recipe(recipe, overrides or ()), preview_rows=rows, device=device, memory=memory)
    if not _emit(report.to_dict(), as_json):
        console.show_check(report, with_recipe=False)
    if report.fits is False:
        raise typer.Exit(2)


@app.command("eval")
def evaluate(
    target: Target,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Take data and metrics from here.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Measure the base model beside it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run, an adapter, a merged or a plain model on held-out rows."""
    from peftctl.commands import evaluate as evaluating

    result = evaluating.evaluate(target, overrides or (), recipe=recipe, with_base=base)
    content = {"target": target, "metrics": dict(result.metrics), "base": result.base, "samples": list(result.samples)}
    if _emit(content, as_json):
        return
    columns = ["metric", *(["base"] if result.base else []), "tuned" if result.base else target]
    rows = [
        [name, *([console.figure(result.base[name])] if result.base else []), console.figure(value)]
        for name, value in result.metrics.items()
    ]
    console.show_table("", columns, rows)
    if result.file:
        console.out.print(f"written to {result.file}", markup=False)


@app.command()
def merge(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Run or adapter directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out, the base's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, and prove that the answers stay the same."""
    from peftctl.commands import merge as merging

    if len(targets) > 1:
        raise UsageError("merging several adapters is not in this version; give one TARGET")
    result = merging.merge(targets[0], output, dtype=dtype)
    if not _emit(result, as_json):
        console.show_merge(result)


@app.command()
def export(
    target: Target,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the files go.")],
    format: Annotated[str, typer.Option("--format", help="hf (ollama, gguf and vllm are not in this version).")] = "hf",
) -> None:
    """Copy an artefact, checked, to where it is to be used."""
    from peftctl.artifacts.export import export as write

    console.out.print(f"written to {write(target, format, output)}", markup=False)


@app.command()
def chat(
    target: Target,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.")] = 0.0,
) -> None:
    """Talk to a run, an adapter or a model. /reset forgets the conversation, /quit leaves."""
    from peftctl.commands import chat as chatting

    session = chatting.open_session(target, system=system, max_new_tokens=max_new_tokens, temperature=temperature)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if prompt is not None:
        for piece in session.stream(prompt):
            write(piece)
        write("\n")
        return
    chatting.repl(session, read=_read_line, write=write)


@app.command()
def model(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="Hub id, directory, .gguf file or alias.")],
    targets: Annotated[str | None, typer.Option(help="Show what this target_modules value selects.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's modules, shapes and counts without loading its weights."""
    from peftctl.commands import model as modelling

    report = modelling.describe(name, targets)
    if _emit(report, as_json):
        return
    rows = [
        [m["name"], m["type"], m["shape"], console.figure(m["parameters"]), m["selected"]] for m in report["modules"]
    ]
    console.show_table(
        f"{report['architecture']}: {report['parameters']:,} parameters",
        ["module", "type", "shape", "parameters", ""],
        rows,
    )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.")] = None, as_json: AsJson = False
) -> None:
    """List the methods, or explain one."""
    from peftctl.commands import methods as listing

    if name is None:
        cards = listing.describe_all()
        rows = [[c["name"], c["category"], c["trains"], "yes" if c["mergeable"] else "no", c["paper"]] for c in cards]
        if not _emit(cards, as_json):
            console.show_table("", ["method", "category", "trains", "merges", "paper"], rows)
        return
    card = listing.describe(name)
    if _emit(card, as_json):
        return
    keys = card.pop("keys")
    console.show_table(card.pop("title"), ["", ""], [[k, _plain(v)] for k, v in card.items() if v not in ("", [], {})])
    console.show_table(
        "keys of its method: section", ["key", "default", "meaning"],
        [[k, str(v["default"]), v["description"] or ""] for k, v in keys.items()],
    )  # fmt: skip


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    from peftctl.commands import recipes

    console.show_table("", ["recipe", "what it is"], [[r.name, r.title] for r in recipes.shipped()])


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    from peftctl.commands import recipes

    typer.echo(recipes.find(name).path.read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(name: str, path: Path) -> None:
    """Copy a shipped recipe, to change it."""
    from peftctl.commands import recipes

    console.out.print(f"written to {recipes.copy(name, path)}", markup=False)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from peftctl.commands import recipes

    typer.echo(json.dumps(recipes.schema(), indent=2))


def _emit(content: Any, as_json: bool) -> bool:
    """Print JSON if asked for; return whether it was."""
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str))
    return as_json


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None

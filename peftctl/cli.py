"""The command line: parse, call one function, show what it returns. Imports no torch.

Exit codes: 0 done, 1 the run failed, 2 the recipe, the data or the arguments are wrong.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftctl import __version__, console
from peftctl.backends import processes
from peftctl.commands.completion import method_names, recipe_names
from peftctl.errors import PeftctlError, UsageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
recipes_app = typer.Typer(help="List, show and copy the recipes that come with peftctl; print their schema.")
app.add_typer(recipes_app, name="recipes")

OUT_OF_MEMORY = (
    "out of device memory; lower train.tokens_per_pass (through an engine train.batch_size, and raise "
    "train.gradient_accumulation instead), lower data.max_length, or set train.gradient_checkpointing=true; "
    "`peftctl check` plans memory"
)

RecipePath = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=recipe_names),
]
ShippedName = Annotated[str, typer.Argument(autocompletion=recipe_names)]
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
        if not end.code:
            processes.stop()
        return int(end.code or 0)
    except KeyboardInterrupt:
        return _failed("stopped", 1)
    except (PeftctlError, OSError, MemoryError) as error:
        if debug:
            raise
        code = error.exit_code if isinstance(error, PeftctlError) else 1
        return _failed(str(error) or type(error).__name__, code)
    except RuntimeError as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            return _failed(OUT_OF_MEMORY, 1)
        processes.explain_lost_peer()  # a collective operation fails where another process has ended
        raise
    return 0


def _failed(message: str, exit_code: int) -> int:
    """Show an error, once for all processes of a run; return its exit code."""
    if processes.end_in_failure(message, exit_code):
        console.fail(message)
    return exit_code


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
        # On CPUs with bfloat16 instructions it asks for a kernel from the hub, and says that it has not got it.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
    processes_planned: Annotated[
        int | None, typer.Option("--processes", min=1, help="With --dry-run: plan for so many; else one a GPU.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says; through torchrun, deepspeed or accelerate launch in several processes."""
    from peftctl.commands.recipes import load_recipe, placed

    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other")
    loaded = load_recipe(recipe, overrides or ())
    with placed(recipe, overrides or ()):
        if dry_run:
            from peftctl.backends.device import gpu_count
            from peftctl.commands import check as checking
            from peftctl.commands.launch import launch_command

            count = processes_planned or max(gpu_count(), 1)
            report = checking.check(loaded, preview_rows=0, processes=count)
            deepspeed, gpus = loaded.backend.name == "deepspeed", gpu_count() > 0
            launch = launch_command(recipe, overrides or (), deepspeed=deepspeed, processes=count, gpus=gpus)
            if not _emit({**report.to_dict(), "launch": launch}, as_json):
                console.show_check(report, with_recipe=True)
                console.out.print(f"start it with: {launch}", markup=False)
            return
        if processes_planned is not None:
            raise UsageError("--processes plans; to train in several processes, start them with a launcher (--dry-run)")
        from peftctl.commands.train import train as start

        result = start(loaded, resume=resume, fresh=fresh, reporter=console.ConsoleReporter())
        if processes.is_first() and not _emit(dict(result.summary), as_json):
            console.show_summary(result)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Rows to show with trained tokens marked.")] = 3,
    device: Annotated[str | None, typer.Option(help="Plan memory for this device: cpu or cuda.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of that device, e.g. 24GB.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Plan for so many processes training together.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check a recipe, its data and its memory before anything is trained."""
    from peftctl.commands import check as checking
    from peftctl.commands.recipes import load_recipe, placed

    loaded = load_recipe(recipe, overrides or ())
    with placed(recipe, overrides or ()):
        report = checking.check(loaded, preview_rows=rows, device=device, memory=memory, processes=processes)
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
    tasks: Annotated[str | None, typer.Option(help="Benchmarks of lm-eval, or task files, with commas.")] = None,
    ensemble: Annotated[
        int | None, typer.Option(min=1, help="Of lora_dropout: mean probabilities of so many modules, e.g. 4.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a run, an adapter, a merged or a plain model on held-out rows, or on benchmarks."""
    if tasks is not None:
        if ensemble is not None:
            raise UsageError("--ensemble measures held-out rows, not --tasks; leave one of them out")
        from peftctl.commands.tasks import evaluate_tasks

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        measured = evaluate_tasks(target, names, overrides or (), recipe=recipe, with_base=base)
        if not _emit({"target": target, "tasks": measured.tasks, "base": measured.base}, as_json):
            console.show_tasks(measured)
        return
    from peftctl.commands import evaluate as evaluating

    result = evaluating.evaluate(target, overrides or (), recipe=recipe, with_base=base, ensemble=ensemble)
    content = {"target": target, "metrics": dict(result.metrics), "base": result.base, "samples": list(result.samples)}
    if not _emit(content, as_json):
        console.show_evaluation(result)


@app.command()
def merge(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Run or adapter directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out, the base's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter, or several of one base in order, into the base, and prove that the answers stay the same."""
    from peftctl.commands import merge as merging

    result = merging.merge(targets, output, dtype=dtype)
    if not _emit(result, as_json):
        console.show_merge(result)


@app.command()
def export(
    target: Target,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the files go.")],
    format: Annotated[str, typer.Option("--format", help="hf or ollama.")] = "hf",
    merged: Annotated[bool | None, typer.Option(help="Fold an adapter into its base; ollama does by default.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that --push makes is public.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an artefact, checked, as other programs load it."""
    from peftctl.commands import export as exporting

    if public and push is None:
        raise UsageError("--public has an effect with --push OWNER/NAME only")
    result = exporting.export(target, output, format=format, merged=merged, repository=push, private=not public)
    if not _emit(result, as_json):
        console.show_export(result)


@app.command()
def chat(
    targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help="A run, adapter or model, or adapters.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.")] = 0.0,
) -> None:
    """Talk to a run, an adapter or a model. /use NAME switches between adapters, /reset forgets, /quit leaves."""
    from peftctl.commands import chat as chatting

    session = chatting.open_session(targets, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    if prompt is not None:
        chatting.answer_once(session, prompt, _write)
    else:
        chatting.repl(session, read=_read_line, write=_write)


@app.command()
def model(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Model, recipe, run or adapter.")],
    overrides: Overrides = None,
    targets: Annotated[str | None, typer.Option(help="Mark what this target_modules value selects.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="r to count LoRA parameters for.")] = 8,
    against: Annotated[str | None, typer.Option(help="Show how weights moved from this to TARGET.")] = None,
    nearest: Annotated[int, typer.Option(min=1, help="Vocabulary tokens to show for each of a soft prompt.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show a model's tree, what a recipe or an adapter trains, a soft prompt's nearest tokens, or what moved."""
    from peftctl.commands import model as modelling

    report = modelling.inspect(target, overrides or (), targets=targets, rank=rank, against=against, nearest=nearest)
    if not _emit(report.content, as_json):
        console.show_tables(report.tables, report.notes)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one.", autocompletion=method_names)] = None,
    matrix: Annotated[bool, typer.Option("--matrix", help="Show which hold through DDP and ZeRO, by trial.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the methods, or explain one."""
    from peftctl.commands import methods as listing

    if matrix:
        if name is not None:
            raise UsageError("--matrix shows all methods; leave the name out")
        shown = listing.describe_matrix()
        if not _emit(shown, as_json):
            console.show_matrix(shown)
        return
    content = listing.describe_all() if name is None else listing.describe(name)
    if not _emit(content, as_json):
        console.show_methods(content) if isinstance(content, list) else console.show_method(content)


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from peftctl.commands import recipes

    found = recipes.shipped()
    if not _emit([{"name": r.name, "title": r.title, "model": r.model, "path": str(r.path)} for r in found], as_json):
        console.show_table("", ["recipe", "what it is", "model"], [[r.name, r.title, r.model] for r in found])


@recipes_app.command("show")
def recipes_show(name: ShippedName) -> None:
    """Print a shipped recipe."""
    from peftctl.commands import recipes

    typer.echo(recipes.find(name).path.read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(name: ShippedName, path: Path) -> None:
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None

"""Where the paths of a recipe lead: the working directory, then the recipe's own folder, then the package's data."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftctl.errors import Problem, RecipeError, UsageError

EXTENSIONS = ("json", "jsonl", "csv", "parquet", "arrow", "txt")

# What a data set folder written by `datasets` holds besides rows.
_NOT_ROWS = {"dataset_info.json", "state.json", "dataset_dict.json"}
_OTHER_FILES = {"tsv", "gz", "zip", "xz", "zst", "yaml", "yml", "md", "xml", "xlsx", "html", "pdf", "py", "pkl", "pt"}
_HUB_PARTS = re.compile(r"[\w.%\[\]:-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_OF_A_RUN = ("recipe.yaml", "adapter_config.json", "peftctl.json")
"""One of these lies in the folder of every run, and of every adapter."""
_LOOKED_UP = "paths start at the working directory, the recipe's folder or the package's data"


class Unresolved(UsageError):
    """A path leads nowhere; the loader adds the place of the key.

    Args:
        message: What was expected and what was found.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str):
        self.message, self.hint = message, hint
        super().__init__(f"{message}; {hint}")


def package_root() -> Path:
    """Return the folder of the installed package."""
    return Path(__file__).resolve().parents[1]


def data_root() -> Path:
    """Return the folder that holds `recipes/` and `configs/`: the wheel's data, or the root of a checkout."""
    bundled = package_root() / "_data"
    return bundled if bundled.is_dir() else package_root().parent


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in (data_root() / "recipes").glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe: a local file, else a shipped recipe (`lora`, `lora.yaml`, `recipes/lora.yaml`).

    Raises:
        RecipeError: There is none; the message suggests files and shipped recipes with a similar name.
    """
    given = str(name_or_path)
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        return Path(path)
    parts = Path(path).parts
    if parts and parts[:-1] in ((), ("recipes",)):
        shipped = data_root() / "recipes" / f"{parts[-1].removesuffix('.yaml')}.yaml"
        if os.path.isfile(shipped):
            return shipped
    if os.path.isdir(path):
        inside = "recipe.yaml" if os.path.isfile(os.path.join(path, "recipe.yaml")) else "RECIPE.yaml"
        problem = Problem(given, "expected a YAML file, got a directory", f"give {os.path.join(given, inside)}")
    elif os.path.exists(path):
        problem = Problem(given, "expected a YAML file, got a device or pipe", "give a file")
    else:
        problem = Problem(given, "no such recipe", _near_recipes(path))
    raise RecipeError([problem])


def resolve_data(value: str, recipe_dir: Path) -> list[str] | str:
    """Resolve one entry of `data.train` or `data.eval`.

    Args:
        value: A file, a glob, a directory, or a hub id.
        recipe_dir: The folder of the recipe.

    Returns:
        Absolute paths of the files, sorted, or the hub id.

    Raises:
        Unresolved: There is no such file, or none of a kind that can be read.
    """
    text = os.path.expanduser(value.strip())
    if not text:
        raise Unresolved("expected a file, a glob, a directory or a hub id, got an empty text", "give one")
    bases = _bases(recipe_dir)
    for path in (_join(base, text) for base in bases):
        if os.path.isfile(path):
            return [_supported(path, value)]
        if os.path.isdir(path):
            return _files_in(path, value)
    if any(character in text for character in "*?["):
        return _matches(text, value, bases)
    name, _, parts = text.partition(":")  # `owner/name:split` and `owner/name:config:split`
    if _HUB_ID.fullmatch(name) and _HUB_PARTS.fullmatch(parts) and not _names_a_file(name):
        return text
    extension = _extension(text)
    if extension and extension not in EXTENSIONS and not _near_sibling(text, bases):
        raise Unresolved(f"no such file: '{value}'", f"files that can be read end in {', '.join(EXTENSIONS)}")
    raise Unresolved(f"no such file: '{value}'", _near_sibling(text, bases) or _LOOKED_UP)


def resolve_model(value: str, recipe_dir: Path) -> str:
    """Resolve `model.name_or_path`: a local directory or .gguf file becomes absolute, a name stays as it is.

    Raises:
        Unresolved: A path leads nowhere, or to something that is no model.
    """
    text = os.path.expanduser(value.strip())
    if not text:
        raise Unresolved("expected a model's name or path, got an empty text", "give one")
    bases = _bases(recipe_dir)[:2]
    for path in (_join(base, text) for base in bases):
        if os.path.isdir(path) or (os.path.isfile(path) and _extension(path) == "gguf"):
            return path
        if os.path.isfile(path):
            raise Unresolved(f"expected a directory or a .gguf file, got the file '{value}'", "give its directory")
    if text.startswith(".") or _extension(text) == "gguf" or not _HUB_ID.fullmatch(text):
        near = _near_sibling(text, bases)
        raise Unresolved(
            f"no such model: '{value}'", near or "give a directory, a .gguf file or a hub id like org/name"
        )
    return text


def resolve_adapter(value: str, recipe_dir: Path) -> str:
    """Resolve an entry of `model.adapters`, or `method.init_from`: a local run or adapter directory becomes absolute.

    Raises:
        Unresolved: There is no such directory, and the text is no hub id.
    """
    text = os.path.expanduser(value.strip())
    bases = _bases(recipe_dir)[:2]
    for path in (_join(base, text) for base in bases if text):
        if os.path.isdir(path):
            return path
    if not _HUB_ID.fullmatch(text) or os.path.isdir(os.path.dirname(_join(bases[0], text))):
        near = _near_sibling(text, bases) if text else ""
        raise Unresolved(f"no such run or adapter: '{value}'", near or "give a directory or a hub id like org/name")
    return text


def resolve_runs(value: str | Sequence[str], recipe_dir: Path) -> list[str]:
    """Resolve a key of `method:` that names finished runs: a folder of runs stands for all in it, by name.

    What leads nowhere stays as it is: recipes may name runs that are yet to be trained; whoever reads one tells.
    """
    found: list[str] = []
    for text in [value] if isinstance(value, str) else value:
        places = [_join(base, os.path.expanduser(text.strip())) for base in _bases(recipe_dir)[:2]]
        path = next((place for place in places if os.path.isdir(place)), text)
        if path is text or any(os.path.exists(os.path.join(path, name)) for name in _OF_A_RUN):
            found.append(path)
        else:
            inside = (os.path.join(path, name) for name in sorted(_names(path)) if not name.startswith("."))
            found += [folder for folder in inside if os.path.isdir(folder)] or [path]
    return found


def resolve_config(value: str, recipe_dir: Path) -> str:
    """Resolve `backend.config` to an absolute path.

    Raises:
        Unresolved: There is no such file.
    """
    bases = _bases(recipe_dir)
    for path in (_join(base, os.path.expanduser(value.strip())) for base in bases):
        if os.path.isfile(path):
            return path
    raise Unresolved(f"no such file: '{value}'", _near_sibling(value, bases) or _LOOKED_UP)


def check_output_dir(value: str) -> None:
    """Check that a run directory can be made there.

    Raises:
        Unresolved: The path, or a part of it, is a file.
    """
    if not value.strip():
        raise Unresolved("expected a directory, got an empty text", "give one like runs/NAME")
    path = Path(os.path.expanduser(value))
    for part in (path, *path.parents):
        if os.path.exists(part):
            if not os.path.isdir(part):
                raise Unresolved(f"expected a directory, but '{part}' is a file", "choose another directory")
            return


def _bases(recipe_dir: Path) -> list[str]:
    return [os.getcwd(), os.path.abspath(recipe_dir), str(data_root())]


def _join(base: str, path: str) -> str:
    return os.path.abspath(os.path.join(base, path))


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _supported(path: str, value: str) -> str:
    extension = _extension(path)
    if extension not in EXTENSIONS:
        got = f"'.{extension}'" if extension else "none"
        raise Unresolved(
            f"expected an extension among {', '.join(EXTENSIONS)}, got {got}: '{value}'", "convert the file"
        )
    return path


def _files_in(folder: str, value: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Unresolved(f"'{value}' can't be read ({error.strerror})", "check its permissions") from error
    files = [os.path.join(folder, name) for name in names if not name.startswith(".") and name not in _NOT_ROWS]
    found = [path for path in files if os.path.isfile(path) and _extension(path) in EXTENSIONS]
    if not found:
        raise Unresolved(f"no file to read in the directory '{value}'", f"it needs one of {', '.join(EXTENSIONS)}")
    return found


def _matches(pattern: str, value: str, bases: list[str]) -> list[str]:
    for base in bases:
        hits = (_join(base, hit) for hit in glob.iglob(pattern, root_dir=base, recursive=True))
        found = sorted(path for path in set(hits) if os.path.isfile(path) and _extension(path) in EXTENSIONS)
        if found:
            return found
    raise Unresolved(f"no {', '.join(EXTENSIONS)} file matches '{value}'", _LOOKED_UP)


def _names_a_file(text: str) -> bool:
    """Tell a misspelt file name (`rows.jsnol`, `rows.csv.gz`) from a hub id (`org/name-2.0`)."""
    extension = _extension(text)
    near = difflib.get_close_matches(extension, EXTENSIONS, n=1, cutoff=0.6)
    return extension in EXTENSIONS or extension in _OTHER_FILES or bool(near)


def _near_sibling(text: str, bases: list[str]) -> str:
    """Return `did you mean ...?` for the most similar name in the same folder, or nothing."""
    folder, name = os.path.split(text.rstrip("/"))
    for base in bases:
        near = difflib.get_close_matches(name, _names(_join(base, folder)), n=1, cutoff=0.6)
        if near:
            return f"did you mean '{os.path.join(folder, near[0])}'?"
    return ""


def _names(folder: str) -> Iterator[str]:
    try:
        yield from os.listdir(folder)
    except (OSError, ValueError):
        return


def _near_recipes(path: str) -> str:
    folder, name = os.path.split(path)
    local = [entry for entry in _names(folder or ".") if entry.endswith((".yaml", ".yml"))]
    near = difflib.get_close_matches(name, local, n=2, cutoff=0.5)
    found = [os.path.join(folder, entry) for entry in near]
    found += difflib.get_close_matches(os.path.splitext(name)[0], shipped_names(), n=2, cutoff=0.6)
    if found:
        return "did you mean " + " or ".join(f"'{entry}'" for entry in dict.fromkeys(found)) + "?"
    return "give a YAML file, or a shipped recipe's name (`peftctl recipes list`)"

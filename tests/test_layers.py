"""The shape of the code: imports go down the layers, and what must stay light imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "peftctl"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"training"},
    {"evaluation"},
    {"artifacts"},
    {"methods"},
    {"tuners"},
    {"models"},
    {"data"},
    {"backends"},
    {"recipe"},
    {"errors", "console"},
]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
SIBLINGS = {"models", "data", "backends"}  # these never import each other


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Return the peftctl modules that a file imports: relatively, in functions, through `from peftctl import x`."""
    package = ["peftctl", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            found += [f"{origin}.{alias.name}" for alias in node.names] if origin == "peftctl" else [origin or ""]
    return [name for name in found if name.split(".")[0] == "peftctl" and name != "peftctl"]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = layer_of(path)
    for name in imports_of(path):
        there = name.split(".")[1]
        if there in ("__version__", here):
            continue
        assert there in RANK, f"{name}: an unknown layer"
        assert RANK[there] > RANK[here], f"{path.name} imports {name}, which is above {here}"
        assert not (here in SIBLINGS and there in SIBLINGS), f"{path.name} imports {name}: siblings"


def test_every_file_has_a_layer():
    assert {layer_of(p) for p in FILES} <= RANK.keys()


def test_a_relative_import_is_seen(tmp_path, monkeypatch):
    """The checker itself: a relative import upwards must not slip through."""
    fake = tmp_path / "peftctl" / "recipe" / "x.py"
    fake.parent.mkdir(parents=True)
    fake.write_text("from ..commands import train\nfrom peftctl import cli\nimport peftctl.data.encode\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "peftctl")
    assert imports_of(fake) == ["peftctl.commands", "peftctl.cli", "peftctl.data.encode"]


def modules_after(statement: str) -> set[str]:
    """Return the top-level packages in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "numpy"}


@pytest.mark.parametrize(
    "statement",
    [
        "import peftctl.cli",
        "import peftctl",
        "from peftctl.methods import registry; registry.schemas()",
        "import peftctl.recipe.loader, peftctl.recipe.write, peftctl.recipe.jsonschema",
        "from peftctl.commands.recipes import load_recipe; load_recipe('recipes/lora.yaml')",
    ],
)
def test_these_import_nothing_heavy(statement):
    assert not modules_after(statement) & HEAVY

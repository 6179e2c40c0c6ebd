"""`KEY=VALUE` overrides: a dotted path into the recipe, and a value with the scalar rules of the recipe itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftctl.errors import RecipeError
from peftctl.recipe import tree
from peftctl.recipe.nodes import BROKEN, Entry, Finding, Node, Path, Place, Scalar, Table, drop, find, put

# Two keys that answer one question: both in the recipe is an error; one on the command line displaces the file's other.
RIVALS = (
    (("data", "train"), ("data", "sources")),
    (("data", "eval"), ("data", "eval_fraction")),
    (("train", "epochs"), ("train", "max_steps")),
    (("train", "warmup_ratio"), ("train", "warmup_steps")),
)


def apply(root: Table, overrides: Sequence[str]) -> tuple[Table, dict[Path, Place], list[Finding]]:
    """Set the overrides in the tree; the last one of a key wins.

    Args:
        root: The recipe's tree.
        overrides: `KEY=VALUE`. A null, or no VALUE, unsets.

    Returns:
        The new tree, the keys that were unset (one that stood nowhere before is in the tree as None, so that a
        misspelt one is noticed), and what is wrong with single overrides.
    """
    given: dict[tuple[str, ...], Node] = {}
    findings: list[Finding] = []
    for index, override in enumerate(overrides):
        read = _read(override, index, findings)
        if read:
            given.pop(read[0], None)
            given[read[0]] = read[1]
    unset: dict[Path, Place] = {}
    for path, node in given.items():
        if _is_null(node):
            unset[path] = node.place
            if find(root, path) is not None:
                root = drop(root, path)
                continue
        try:
            root = put(root, path, Entry(node.place, node))
        except KeyError as error:
            blocked = ".".join(error.args[0])
            findings.append(Finding(node.place, f"{blocked} is a value, not a section", f"set {blocked} itself"))
    return _displace(root, {path for path in given if path not in unset}), unset, findings


def _read(override: str, index: int, findings: list[Finding]) -> tuple[tuple[str, ...], Node] | None:
    key, equals, value = override.partition("=")
    key = key.strip()
    place = Place.on_command_line(key if equals and key else override, index)
    path = tuple(key.split("."))
    if not equals or not all(path) or key.startswith("-"):
        message = f"expected KEY=VALUE with a dotted KEY, got '{override}'"
        findings.append(Finding(place, message, "write it like train.learning_rate=1e-4"))
        return None
    return path, _value(value.strip(), place, findings)


def _value(text: str, place: Place, findings: list[Finding]) -> Node:
    """Return the value; only what begins like a list, a mapping or a quoted text is YAML: `Q: {q}` is a text."""
    if not text.startswith(("[", "{", "'", '"')):
        return tree.scalar(text, place, quoted=False, raw=text, findings=findings)
    try:
        node, problems = tree.parse(text, place=place)
    except RecipeError as error:
        whole = tree.scalar(text, place, quoted=True, raw=None, findings=findings)
        if whole.value is BROKEN:
            return whole
        return Scalar(BROKEN, place, raw=whole.value, reason=error.problems[0].message)
    findings += problems
    return replace(node, raw=text) if node else Scalar(None, place)


def _is_null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _displace(root: Table, given: set[tuple[str, ...]]) -> Table:
    for one, other in RIVALS:
        for mine, rival in ((one, other), (other, one)):
            if mine in given and rival not in given:
                root = drop(root, rival)
    return root

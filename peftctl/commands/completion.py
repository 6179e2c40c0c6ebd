"""What the shell completes: names of shipped recipes and of methods. Imports no torch."""

from __future__ import annotations


def recipe_names(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin so; where none does, the shell goes on with files."""
    from peftctl.recipe.paths import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """Return the methods that begin so."""
    from peftctl.methods import registry

    return [name for name in registry.names() if name.startswith(incomplete)]

"""`peftctl methods`: what there is, and what one method does. Imports no torch."""

from __future__ import annotations

from typing import Any

from peftctl.methods import registry


def describe_all() -> list[dict[str, Any]]:
    """Return every method's card as plain data, by category and name."""
    found = [describe(name) for name in registry.names()]
    return sorted(found, key=lambda card: (card["category"], card["name"]))


def describe(name: str) -> dict[str, Any]:
    """Return one method's card and the keys of its `method:` section.

    Raises:
        UsageError: There is no such method.
    """
    method = registry.get(name)
    card = method.card
    keys = {
        key: {"default": field.default, "description": field.description}
        for key, field in method.Config.model_fields.items()
        if key != "name"
    }
    return {
        "name": name,
        "title": card.title,
        "category": card.category,
        "paper": card.paper,
        "summary": card.summary,
        "trains": card.trains,
        "count": card.count,
        "mergeable": card.mergeable,
        "merge_note": card.merge_note,
        "identity_at_init": card.identity_at_init,
        "identity_note": card.identity_note,
        "needs": card.needs,
        "tasks": list(card.tasks),
        "supports": sorted(card.supports),
        "keys": keys,
        "implies": dict(method.defaults),
    }

"""`peftctl export`: write an artefact for other programs, and push it to the hub where that is asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftctl.artifacts.export import export as write
from peftctl.artifacts.hub import check_push, push
from peftctl.backends import device as devices
from peftctl.commands.merge import held_out


def export(
    target: str,
    output: Path,
    *,
    format: str = "hf",
    merged: bool | None = None,
    repository: str | None = None,
    private: bool = True,
) -> dict[str, Any]:
    """Write a target into a folder; return what was written, with the address where it was pushed.

    Args:
        target: Run, adapter or model directory, or the hub id of an adapter.
        output: Directory to write.
        format: `hf` or `ollama`.
        merged: Fold an adapter into its base; left out, for Ollama only.
        repository: OWNER/NAME on the hub to upload the folder to; nothing is uploaded without it.
        private: Of a repository that is made.
    """
    devices.start_process()
    if repository is not None:
        check_push(repository)
    folds = merged or (merged is None and format == "ollama")
    done = write(target, format, output, merged=merged, rows=held_out(target) if folds else None, repository=repository)
    address = None if repository is None else push(done.output, repository, private=private)
    return {**asdict(done), "output": str(done.output), "notices": list(done.notices), "pushed": address}

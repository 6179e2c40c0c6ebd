"""A run directory: where everything of a run lies, who may write there, and what can be taken back."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftctl.artifacts.staging import clear_leftovers, discard, explained, is_leftover, remove, staged
from peftctl.errors import UsageError

__all__ = ["RunDir", "staged"]

# All that a run writes, and so all that --fresh removes; the recipe goes last, because it makes the directory a run.
OWN_NAMES = (
    "adapter", "model", "parts", "base", "checkpoints", "tensorboard", "wandb",
    "environment.json", "metrics.jsonl", "summary.json", "eval.json", "loss.png", "recipe.yaml",
)  # fmt: skip
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunDir:
    """The paths of a run and the operations on them.

    Args:
        path: The run directory; need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.eval = self.path / "eval.json"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.parts = self.path / "parts"
        self.base = self.path / "base"
        self.checkpoints = self.path / "checkpoints"

    # -- who may write -------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Tell whether a run was started here."""
        return self.recipe.is_file()

    def check(self, *, fresh: bool, resume: bool) -> None:
        """Refuse what `prepare` would refuse, without changing anything.

        Raises:
            UsageError: The path can't be a run directory, or holds a run and neither flag says what to do with it.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UsageError(f"train.output_dir: {self.path} is not a directory; choose another")
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"train.output_dir: {self.path} can't be written: no write access to {existing}")
        if self.holds_run():
            if not (fresh or resume):
                raise UsageError(
                    f"{self.path}: holds a run already; go on with --resume, delete it with --fresh, "
                    "or choose another train.output_dir"
                )
            return
        foreign = self._foreign()
        if foreign:
            raise UsageError(
                f"{self.path}: holds something that is not a run ('{foreign[0]}'), which is never deleted; "
                "choose another train.output_dir"
            )

    def prepare(self, *, fresh: bool, resume: bool) -> None:
        """Make the directory ready for a new run, or for going on; hold the lock while calling.

        Args:
            fresh: Remove the run that is here. Files that are not of a run stay.
            resume: Keep the run that is here.

        Raises:
            UsageError: As `check`.
        """
        self.check(fresh=fresh, resume=resume)
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                if folder.is_dir():
                    clear_leftovers(folder)
            if fresh:
                for name in OWN_NAMES:
                    remove(self.path / name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing here; the system drops the lock when this process ends, however it ends.

        Raises:
            UsageError: Another process holds the lock; it is named.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = self._acquire()
        try:
            yield
        finally:
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(handle)

    def _acquire(self) -> int:
        place = self.path / _LOCK
        while True:
            handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 32).decode() or "unknown"
                os.close(handle)
                raise UsageError(
                    f"{self.path}: process {owner} is writing here; wait for it, or choose another train.output_dir"
                ) from None
            if _is_file(place, handle):
                os.truncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
            os.close(handle)  # its owner deleted it between our open and our lock

    def _foreign(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(e.name for e in self.path.iterdir() if e.name != _LOCK and not is_leftover(e.name))

    # -- files ---------------------------------------------------------------------------------------------------

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file whole or not at all."""
        with staged(path) as aside:
            aside.write_text(text, encoding="utf-8")

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after an optimizer step, and a last line that a kill cut in half."""
        if not self.metrics.is_file():
            return
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
        self.write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the most steps."""
        found = self.complete_checkpoints()
        return found[-1] if found else None

    def drop_checkpoints(self, kept: Collection[str]) -> None:
        """Delete the complete checkpoints that are not named."""
        with explained(self.checkpoints):
            for folder in self.complete_checkpoints():
                if folder.name not in kept:
                    discard(folder)

    def complete_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints by their steps; the Trainer's state is what is written last."""
        if not self.checkpoints.is_dir():
            return []
        steps = {p: found for p in self.checkpoints.iterdir() if (found := _CHECKPOINT.fullmatch(p.name))}
        return sorted((p for p in steps if (p / "trainer_state.json").is_file()), key=lambda p: int(steps[p][1]))


def _is_file(place: Path, handle: int) -> bool:
    """Tell whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.stat(place), os.fstat(handle))
    except FileNotFoundError:
        return False


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None

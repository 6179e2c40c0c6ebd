"""Files and directories that appear whole or not at all: written aside, flushed to disk, then renamed into place.

For NAME the writing happens in `.NAME.tmp-<pid>`; an old directory stands aside as `.NAME.old-<pid>` while the new one
is renamed. A kill leaves one of the two behind, which `clear_leftovers` removes or puts back.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peftctl.backends.pids import running
from peftctl.errors import RunError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}
# safetensors and torch.save report a failed write without an errno, the latter without a reason.
_FULL_TEXT = re.compile(
    rf"No space left on device|os error ({errno.ENOSPC}|{errno.EDQUOT})\b"
    r"|PytorchStreamWriter failed|inline_container\S* \. unexpected pos|iostream error"
)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path that does not exist yet, beside `path`; what is written there replaces `path` on success.

    Args:
        path: A file or a directory, which may exist.

    Raises:
        RunError: The disk is full, or the place refuses to be written. As after any other exception, what was at `path`
            is still there and nothing else is.
    """
    pid = os.getpid()
    aside = path.with_name(f".{path.name}.tmp-{pid}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(path.parent, path.name)
        try:
            yield aside
            _flush(aside)
            _swap(aside, path, path.with_name(f".{path.name}.old-{pid}"))
        finally:
            remove(aside)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a full disk and a refused write under `path` into a RunError of one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in _FULL or _FULL_TEXT.search(str(error)):
            raise RunError(f"disk full while writing {path}; free some space and run again") from error
        if code in _REFUSED:
            raise RunError(f"{path}: can't be written: {os.strerror(code)}") from error
        raise


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left aside in a folder, and put back what they had only moved.

    Args:
        folder: Where to look; not below it.
        name: Only leftovers of this file or directory; None for all.
    """
    for entry in list(folder.iterdir()):
        found = _LEFTOVER.fullmatch(entry.name)
        if not found or name not in (None, found["name"]) or _alive(int(found["pid"])):
            continue
        place = folder / found["name"]
        if found["kind"] == "old" and not os.path.lexists(place):
            entry.rename(place)
        else:
            remove(entry)


def is_leftover(name: str) -> bool:
    """Tell whether a file name is one that a killed process left aside."""
    return _LEFTOVER.fullmatch(name) is not None


def discard(path: Path) -> None:
    """Delete a directory so that a kill never leaves half of it under its name."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.rename(aside)
    remove(aside)


def remove(path: Path) -> None:
    """Delete a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _swap(aside: Path, path: Path, old: Path) -> None:
    """Rename `aside` to `path`; a directory in the way stands at `old` meanwhile, since rename can't replace it."""
    replaced = path.is_dir() and not path.is_symlink()
    if replaced:
        path.rename(old)
    try:
        aside.replace(path)
    except BaseException:
        if replaced:
            old.rename(path)
        raise
    _sync(path.parent)
    if replaced:
        remove(old)


def _flush(path: Path) -> None:
    """Make a tree durable before its name is: otherwise a power cut can leave a name with empty files."""
    for entry in path.rglob("*") if path.is_dir() else ():
        _sync(entry)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(pid: int) -> bool:
    return pid != os.getpid() and running(pid)  # an earlier process of the same number: this one has nothing aside

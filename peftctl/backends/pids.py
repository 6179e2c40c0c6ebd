"""Whether another process of this machine runs."""

from __future__ import annotations

import os
from pathlib import Path


def running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:  # a system without /proc, or it has ended just now
        return not Path("/proc/self").exists()

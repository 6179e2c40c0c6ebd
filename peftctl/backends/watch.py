"""Notices that a process of the run has ended, and ends the others with one message that names it.

Without it they would sit in a collective operation until that times out. Every process puts a beat into the store
that the launcher's rendezvous gave them, and looks at the beats of the others. On the same machine it also looks
whether they still exist, which tells at once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from peftctl import console
from peftctl.backends.pids import running

INTERVAL = 2.0
"""Seconds between two looks."""
SILENCE = 45.0
"""Seconds without a beat after which a process on another machine counts as dead."""
_GRACE = 2.0
"""Seconds that the main thread gets to fail by itself with a better message."""
_HEARD = 10.0
"""Seconds to wait until another process has taken over the message of one that fails."""


class Watch(threading.Thread):
    """Watches the processes of a run from a thread of its own.

    Args:
        store: The key-value store of the rendezvous.
        rank: Of this process.
        size: Of the world.
    """

    def __init__(self, store: Any, rank: int, size: int):
        super().__init__(name="peftctl-watch", daemon=True)
        self.store = store.clone()  # its own connection: the main thread may block in the other
        self.rank = rank
        self.others = [r for r in range(size) if r != rank]
        self.host = f"{socket.gethostname()} {_pid_namespace()}".strip()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.failing = False
        self.seen: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        """Look again and again until something has ended or `stop` is called."""
        beat = 0
        while not self.ended.wait(INTERVAL if beat else 0):
            beat += 1
            try:
                self._beat(beat)
                self._look()
            except (RuntimeError, OSError, ValueError):  # the store itself is gone, with the process that kept it
                if not self.ended.is_set():
                    self._end("rank 0, where the processes meet, can't be reached any more: it has ended", 1)

    def stop(self) -> None:
        """Watch no longer."""
        self.ended.set()
        self.join(INTERVAL + 1)

    def leave(self) -> None:
        """Watch no longer, and tell the others that this process ends because it is done."""
        self.ended.set()
        try:
            self.store.set(f"left/{self.rank}", "1")
        except (RuntimeError, OSError):
            return  # the process that kept the store has ended, done as well

    def end_in_failure(self, message: str, exit_code: int) -> bool:
        """Tell the others why this process ends; return whether it should print that itself."""
        with self.lock:
            self.failing = True
        try:
            self.store.set(f"failed/{self.rank}", json.dumps([message, exit_code]))
            if self.rank == 0:
                return True
            until = time.monotonic() + _HEARD
            while time.monotonic() < until:
                if self.store.check([f"heard/{self.rank}"]) or self.store.check(["failed/0"]):
                    return False
                time.sleep(0.1)
        except (RuntimeError, OSError, ValueError):
            pass
        return True

    def explain(self, *, certain: bool) -> None:
        """Give the thread time to find out who has ended; it ends this process.

        Args:
            certain: One has ended for certain, maybe on another machine; else return soon.
        """
        self.join((SILENCE if certain else 0) + 2 * INTERVAL + _GRACE)

    # -- one look ------------------------------------------------------------------------------------------------

    def _beat(self, beat: int) -> None:
        self.store.set(f"beat/{self.rank}", json.dumps([self.host, os.getpid(), beat]))

    def _look(self) -> None:
        for other in self.others:
            if self.store.check([f"failed/{other}"]):
                self._heard(other)
        for other in self.others:
            if self.store.check([f"beat/{other}"]) and (how := self._gone(other)):
                if self.store.check([f"failed/{other}"]):  # it has said why just before
                    self._heard(other)
                elif not self.store.check([f"left/{other}"]):
                    self._end(how, 1)

    def _heard(self, other: int) -> None:
        message, exit_code = json.loads(self.store.get(f"failed/{other}"))
        if self.rank == min(r for r in (self.rank, *self.others) if r != other):
            self.store.set(f"heard/{other}", "1")
        self._end(message if other == 0 else f"rank {other}: {message}", exit_code, said=other == 0)

    def _gone(self, other: int) -> str | None:
        """Return how another process has ended; None while it lives."""
        text = self.store.get(f"beat/{other}").decode()
        host, pid, _ = json.loads(text)
        named = f"rank {other} (process {pid} on {host.split()[0]})"
        if host == self.host and not running(pid):
            return f"{named} has ended without a message: killed by a signal, by lack of memory, or by a crash"
        now = time.monotonic()
        before, since = self.seen.get(other, ("", now))
        if text != before:
            self.seen[other] = (text, now)
        elif now - since > SILENCE:
            return f"{named} has given no sign for {SILENCE:.0f} seconds: it hangs, or its machine can't be reached"
        return None

    def _end(self, message: str, exit_code: int, *, said: bool = False) -> None:
        """End this process; the lowest rank that is left prints the reason, unless its owner has."""
        time.sleep(_GRACE)
        with self.lock:
            if self.failing or self.ended.is_set():
                return
            lowest = self.rank == 0 or not any(self._lives(r) for r in self.others if r < self.rank)
            if lowest and not said:
                hint = "all processes end; go on from the last checkpoint with --resume" if exit_code == 1 else ""
                console.fail("; ".join(filter(None, (message, hint))))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)

    def _lives(self, other: int) -> bool:
        try:
            return self.store.check([f"beat/{other}"]) and self._gone(other) is None
        except (RuntimeError, OSError, ValueError):
            return other != 0


def _pid_namespace() -> str:
    """Return what tells apart containers of one host name; empty where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""

"""The processes that train together: which one this is, and what they agree on.

A launcher (deepspeed, accelerate, torchrun) starts them and names them by WORLD_SIZE, RANK and LOCAL_RANK. Without one
there is a single process, and nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from peftctl.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from peftctl.backends.watch import Watch

TIMEOUT = timedelta(hours=2)
"""Of a collective operation: one process may evaluate while the others wait. `Watch` notices dead ones much earlier."""
_HEAD_START = 5.0
"""Seconds that the process which prints an error has before another one that has met it too ends."""
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_watch: Watch | None = None


def size() -> int:
    """Return how many processes the launcher says it has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return which of them this is, from 0."""
    return int(os.environ.get("RANK") or 0) if size() > 1 else 0


def local_rank() -> int:
    """Return which of the processes on this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK") or rank())


def is_first() -> bool:
    """Tell whether this is the process that writes and prints."""
    return rank() == 0


def start(*, alone: bool = False) -> None:
    """Join the other processes, once; from then on the death of one ends all (see `Watch`).

    Args:
        alone: A single process needs a group too: the engine asks for one.

    Raises:
        UsageError: The launcher's variables are incomplete or ask for an engine of its own, or there are more
            processes than GPUs.
    """
    global _watch
    _refuse_foreign_engine()
    if size() == 1 and alone:
        _join_nobody()
    if size() == 1 or _watch is not None:
        return
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size()}, but {', '.join(missing)} is not set: start the processes through torchrun, "
            "deepspeed or accelerate launch, or unset WORLD_SIZE to train in one process"
        )
    import torch
    from torch import distributed

    from peftctl.backends.watch import Watch

    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"process {local_rank()} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many processes as GPUs"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"  # counts and objects travel without a GPU
    store, own_rank, count = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    distributed.init_process_group(backend, store=store, rank=own_rank, world_size=count, timeout=TIMEOUT)
    _watch = Watch(store, own_rank, count)
    _watch.start()
    atexit.register(_leave)
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        signal.signal(signal.SIGTERM, _terminated)


@cache  # later the libraries set these themselves
def _refuse_foreign_engine() -> None:
    """Raise where `accelerate launch` was told to divide the model in a way that the recipe does not know of."""
    for name, variable in {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}.items():
        if os.environ.get(variable, "").lower() == "true":
            raise UsageError(
                f"accelerate launch was told to use {name}, by --use_{name} or its configuration file; the recipe "
                f"decides about that: leave it out there and set backend.name: {name}"
            )


def _leave() -> None:
    """At the end of a script that has called `peftctl.train`: others may have more to do."""
    if _watch is not None and not hasattr(sys, "last_value"):  # set where an exception has ended it
        _watch.leave()


def _terminated(number: int, _frame: object) -> None:
    """End, but let the watch speak first: a launcher sends this to all others as soon as one has died."""
    if _watch is not None:
        _watch.explain(certain=False)
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def _join_nobody() -> None:
    """Say what a launcher would of a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        os.environ.setdefault(name, value)


def stop() -> None:
    """Part from the others, all at the same time."""
    global _watch
    if _watch is None:
        return
    from torch import distributed

    _watch.stop()
    distributed.barrier()
    distributed.destroy_process_group()
    _watch = None


def end_in_failure(message: str, exit_code: int) -> bool:
    """Tell the others that this process can't go on; return whether it should print the reason itself."""
    if _watch is None:  # before they have met, the first of each machine speaks
        if size() == 1 or local_rank() == 0:
            return True
        time.sleep(_HEAD_START)  # launchers end the others as soon as one has ended
        return False
    return _watch.end_in_failure(message, exit_code)


def explain_lost_peer() -> None:
    """Wait until it is known which process left a collective operation half done, and end; return where none did."""
    if _watch is not None:
        _watch.explain(certain=True)


def wait() -> None:
    """Wait for all others to come here."""
    if size() > 1:
        from torch import distributed

        distributed.barrier()


def from_first(value: Any) -> Any:
    """Return what the first process passed."""
    if size() == 1:
        return value
    from torch import distributed

    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def gathered(value: Any) -> list[Any]:
    """Return what every process passed, by rank, in the first process; elsewhere nothing."""
    if size() == 1:
        return [value]
    from torch import distributed

    held: list[Any] | None = [None] * size() if is_first() else None
    distributed.gather_object(value, held)
    return held or []


def summed(values: Sequence[float]) -> list[float]:
    """Return the sums of the values over all processes, the same in each."""
    if size() == 1:
        return list(values)
    import torch
    from torch import distributed

    held = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(held)
    return held.tolist()


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Let the first process do something before the others do it too, e.g. fill a cache that they read."""
    if not is_first():
        wait()
    yield
    if is_first():
        wait()

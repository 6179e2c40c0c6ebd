"""Examples are encoded by several processes, where there are enough of them."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from peftctl.data.choices import encode_with_choices
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.data.problems import Problems
from peftctl.errors import DataError, Problem

if TYPE_CHECKING:
    from peftctl.data.pairs import RowEncoder

Part = TypeVar("Part")
Result = TypeVar("Result")

LEAST_EXAMPLES = 4000
"""Of a process: fewer take less time than what starting one costs."""
PART = 1000
"""Examples that a process takes at a time."""
_WAITING = 2
"""Parts a process that are under way or done: more would fill the memory where reading is faster than encoding."""
_PARALLELISM = "TOKENIZERS_PARALLELISM"

_work: Callable[[Any], Any] | None = None
"""What a process that forks off finds in its memory."""


def encode_each(examples: Sequence[Example], encoder: RowEncoder, workers: int = 1) -> list[list[EncodedRow]]:
    """Return the rows of each example.

    Args:
        examples: Of one format.
        encoder: Of that format.
        workers: Processes to use at most.

    Raises:
        DataError: Examples are wrong; up to ten problems are named, the others counted.
    """
    problems = Problems()
    groups: list[list[EncodedRow]] = []
    firsts = range(0, len(examples), PART)
    count = min(workers, len(examples) // LEAST_EXAMPLES)
    for encoded, found in mapped(lambda first: encode(examples[first : first + PART], encoder), firsts, count):
        groups += encoded
        problems.extend(found)
    problems.raise_if_any()
    return groups


def encode(examples: Sequence[Example], encoder: RowEncoder) -> tuple[list[list[EncodedRow]], list[Problem]]:
    """Return the rows of each example that is right, and what is wrong with the others."""
    groups: list[list[EncodedRow]] = []
    problems: list[Problem] = []
    for example in examples:
        try:
            groups.append(encode_with_choices(encoder, example))
        except DataError as error:
            problems.extend(error.problems)
    return groups, problems


def mapped(work: Callable[[Part], Result], parts: Iterable[Part], count: int) -> Iterator[Result]:
    """Yield what some work makes of each part, in their order.

    Args:
        work: Any function: processes fork off with it in their memory.
        parts: Are sent to the processes, and taken only when there is room for them.
        count: Processes; below 2, and where none can fork off, the work is done here.
    """
    if count < 2 or sys.platform != "linux":
        yield from map(work, parts)
        return
    waiting: deque[tuple[Part, Future[Result] | None]] = deque()
    with _processes(work, count) as pool:
        for part in parts:
            waiting.append((part, _submitted(pool, part)))
            if len(waiting) > _WAITING * count:
                yield _result(*waiting.popleft(), work)
        while waiting:
            yield _result(*waiting.popleft(), work)


@contextmanager
def _processes(work: Callable[[Any], Any], count: int) -> Iterator[ProcessPoolExecutor]:
    global _work
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"  # of the tokenizer's own threads, which do not outlive a fork
    _work = work
    try:
        # Ctrl-C is for the process that started them, which lets them end.
        with ProcessPoolExecutor(count, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        _work = None
        os.environ.pop(_PARALLELISM)
        if before is not None:
            os.environ[_PARALLELISM] = before


def _submitted(pool: ProcessPoolExecutor, part: Any) -> Future[Any] | None:
    with warnings.catch_warnings():
        # These processes run none of the libraries whose threads the warning is about.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        try:
            return pool.submit(_call, part)
        except BrokenProcessPool:
            return None


def _result(part: Part, future: Future[Result] | None, work: Callable[[Part], Result]) -> Result:
    try:
        return work(part) if future is None else future.result()
    except BrokenProcessPool:  # the system has ended a process, most likely for its memory
        return work(part)


def _call(part: Any) -> Any:
    assert _work is not None
    return _work(part)

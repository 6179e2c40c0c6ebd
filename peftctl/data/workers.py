"""Examples are encoded by several processes, where there are enough of them."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

from peftctl.data.choices import encode_with_choices
from peftctl.data.encode import EncodedRow
from peftctl.data.formats import Example
from peftctl.data.problems import Problems
from peftctl.errors import DataError, Problem

if TYPE_CHECKING:
    from peftctl.data.pairs import RowEncoder

LEAST_EXAMPLES = 4000
"""Of a process: fewer take less time than what starting one costs."""
_PART = 1000
_PARALLELISM = "TOKENIZERS_PARALLELISM"

_Encoded = tuple[list[list[EncodedRow]], list[Problem]]
_work: tuple[Sequence[Example], RowEncoder] | None = None
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
    count = min(workers, len(examples) // LEAST_EXAMPLES) if sys.platform == "linux" else 1
    encoded = _by_processes(examples, encoder, count) if count > 1 else [_encode(examples, encoder)]
    problems = Problems()
    for _, found in encoded:
        problems.extend(found)
    problems.raise_if_any()
    return [rows for groups, _ in encoded for rows in groups]


def _by_processes(examples: Sequence[Example], encoder: RowEncoder, count: int) -> list[_Encoded]:
    global _work
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"  # of the tokenizer's own threads, which do not outlive a fork
    _work = (examples, encoder)
    try:
        with warnings.catch_warnings():
            # These processes run none of the libraries whose threads the warning is about.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            # Ctrl-C is for the process that started them, which lets them end.
            ignore = (signal.SIGINT, signal.SIG_IGN)
            with ProcessPoolExecutor(count, get_context("fork"), signal.signal, ignore) as pool:
                return list(pool.map(_encode_part, range(0, len(examples), _PART)))
    except BrokenProcessPool:  # the system has ended one, most likely for its memory
        return [_encode(examples, encoder)]
    finally:
        _work = None
        os.environ.pop(_PARALLELISM)
        if before is not None:
            os.environ[_PARALLELISM] = before


def _encode_part(first: int) -> _Encoded:
    assert _work is not None
    examples, encoder = _work
    return _encode(examples[first : first + _PART], encoder)


def _encode(examples: Sequence[Example], encoder: RowEncoder) -> _Encoded:
    groups: list[list[EncodedRow]] = []
    problems: list[Problem] = []
    for example in examples:
        try:
            groups.append(encode_with_choices(encoder, example))
        except DataError as error:
            problems.extend(error.problems)
    return groups, problems

"""Fixtures shared by all tests. Nothing here reaches a network."""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


FIRST = "tests/training/test_two_processes.py"
"""One long file, which would be left to one of two workers at the end."""


def pytest_collection_modifyitems(items):
    """Begin with the longest file."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


def pytest_collection_finish():
    """Spare garbage collections what the imports made: every Trainer begins with one, and there are hundreds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A tiny Llama with a ChatML tokenizer on disk; tests must not write into it."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")

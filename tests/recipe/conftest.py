import pytest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two data files."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "held.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path

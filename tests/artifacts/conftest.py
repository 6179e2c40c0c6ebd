import pytest

from tests.artifacts.helpers import lora_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(run directory with a LoRA adapter in float32, its logits on ROWS); tests must not write into it."""
    return lora_run(tmp_path_factory.mktemp("finished"))

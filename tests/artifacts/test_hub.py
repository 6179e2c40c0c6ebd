"""Uploading: what is sent, only on request, and errors in one line."""

import re

import pytest
from huggingface_hub import close_session, constants

from peftctl.artifacts.hub import check_push, push
from peftctl.errors import RunError, UsageError
from tests.artifacts.hub_server import hub_server
from tests.test_layers import PACKAGE


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_written_here")
        close_session()
        yield served
    close_session()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# a model\n")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(50)))
    return tmp_path


def test_a_folder_is_sent_whole_to_a_private_repository(hub, folder):
    check_push("me/model")
    address = push(folder, "me/model")
    assert address == f"{hub.address}/me/model"
    assert [made["visibility"] for made in hub.created] == ["private"]
    assert hub.created[0]["name"] == "model" and hub.created[0]["organization"] == "me"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == {"Bearer hf_written_here"}


def test_public_on_request(hub, folder):
    push(folder, "me/model", private=False)
    assert hub.created[0]["visibility"] == "public"


def test_a_refusal_of_the_hub_is_one_line_that_says_where_the_files_are(hub, folder):
    hub.refuse = 403
    with pytest.raises(RunError) as refused:
        push(folder, "me/model")
    message = str(refused.value)
    assert "You may not write here" in message and str(folder) in message and "\n" not in message
    assert not hub.files


def test_no_network_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="can't be reached") as refused:
        push(folder, "me/model")
    assert "\n" not in str(refused.value)


def test_what_can_not_be_pushed_is_refused_before_any_work(hub, monkeypatch, tmp_path):
    for name in ("model", "me/model/x", "me/mo del", "me/--x"):
        with pytest.raises(UsageError, match="expected OWNER/NAME"):
            check_push(name)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="no access token; log in with `hf auth login`"):
        check_push("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        check_push("me/model")
    assert not hub.created


def test_nothing_else_in_the_package_uploads():
    sends = re.compile(r"\b(upload_f\w+|create_repo|create_commit|push_to_hub|HfApi)\b")
    found = [path.name for path in PACKAGE.rglob("*.py") if sends.search(path.read_text(encoding="utf-8"))]
    assert found == ["hub.py"]

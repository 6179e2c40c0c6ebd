"""Upload a folder to the Hugging Face hub: the only place in peftctl that sends anything anywhere."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from peftctl.errors import RunError, UsageError


def check_push(name: str) -> None:
    """Refuse, before any work is done, what `push` could not do.

    Raises:
        UsageError: The name is none of a repository, there is no token, or the network is switched off.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push: expected OWNER/NAME, got '{name}' ({str(error).splitlines()[0]})") from error
    if name.count("/") != 1:
        raise UsageError(f"--push: expected OWNER/NAME, got '{name}'")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push: HF_HUB_OFFLINE is set; unset it to reach the hub")
    if get_token() is None:
        raise UsageError("--push: no access token; log in with `hf auth login`, or set HF_TOKEN to one that may write")


def push(folder: Path, name: str, *, private: bool = True) -> str:
    """Upload a folder into a model repository, which is made where there is none.

    Args:
        folder: What to upload, whole.
        name: OWNER/NAME.
        private: Of a repository that is made; one that exists stays as it is.

    Returns:
        Its address.

    Raises:
        RunError: The hub can't be reached, or refuses. The folder stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with peftctl")
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise RunError(f"--push {name}: the hub refuses: {reason}; the files are in {folder}") from error
    except (HTTPError, OSError) as error:  # the client's own errors of the network are no OSError
        raise RunError(f"--push {name}: the hub can't be reached ({error}); the files are in {folder}") from error
    return str(address)

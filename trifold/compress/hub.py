"""Finished checkpoints on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trifold.compress.files import reason
from trifold.core.errors import InputError, ResourceError

_NEVER = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"]  # pickles, which run code when they are read


def check_hub(repo: str) -> None:
    """Find out before any work whether one can push. Raises InputError for a name that is none, or without a login;
    ResourceError if the hub cannot be reached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo!r}: no name of a repository ({reason(error)})") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it, or push later with `hf upload`")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise InputError(f"--push-to-hub {repo}: not logged in; run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # of every layer below
        if isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", None) in (401, 403):
            raise InputError(f"--push-to-hub {repo}: the hub refuses the token; run `hf auth login` again") from error
        raise ResourceError(f"--push-to-hub {repo}: the hub does not answer ({reason(error)}); try again") from error


def push(place: Path, repo: str, message: str) -> str:
    """Upload a finished folder, or a single file, as one commit; the repository is made if there is none. Returns where
    it is. Raises ResourceError, after which `place` is still whole."""
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        url = str(api.create_repo(repo, exist_ok=True))
        if place.is_dir():
            api.upload_folder(repo_id=repo, folder_path=place, commit_message=message, ignore_patterns=_NEVER)
        else:
            api.upload_file(repo_id=repo, path_or_fileobj=place, path_in_repo=place.name, commit_message=message)
    except Exception as error:  # of every layer below
        raise ResourceError(
            f"{repo}: the hub did not take it ({reason(error)}); {place} is whole: hf upload {repo} {place}"
        ) from error
    return url

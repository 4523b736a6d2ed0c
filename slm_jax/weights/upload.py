"""An exported folder to Hugging Face's hub."""

import re
from pathlib import Path

from slm_jax.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_hub_name(name: str) -> None:
    """Refuse what cannot be the name of a repository; cheap, for before long work."""
    if not _NAME.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name or name.endswith((".", "-", ".git")):
        raise InputError(f"push is {name!r:.120}; expected OWNER/NAME, such as ada/stories, on huggingface.co")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload the files of a folder to a repository, which is made if it does not exist, and return its address.

    ``private`` holds for a new repository; one that exists stays as it is, and files of the same names are replaced in
    one commit.

    Raises:
        InputError: no login, no right to write, or no connection.
    """
    from huggingface_hub import HfApi, constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from slm_jax")
    except Exception as error:  # the library's exception types change between versions
        cause = " ".join(str(error).split())[:200]
        remedy = "log in with: hf auth login, or set HF_TOKEN to a token that may write"
        raise InputError(f"{name}: the upload failed ({cause}); {remedy}; {folder} is complete") from None
    return f"{constants.ENDPOINT}/{name}"

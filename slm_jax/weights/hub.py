"""OpenAI's four GPT-2 models by name: found on this machine, or downloaded once from Hugging Face."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable, sha256, user_path

FILE = "model.safetensors"


class Pin(NamedTuple):
    """What a name stands for: a commit of the repository and, where known, the file's SHA-256."""

    revision: str
    sha256: str | None = None


# Without a SHA-256 here, the one that the server has for this commit is checked.
PINS = {
    "gpt2": Pin(
        "607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
    ),
    "gpt2-medium": Pin("6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": Pin("32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": Pin(
        "15ea56dee5df4983c59b2538573817e1667135e2", "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"
    ),
}


def find_weights(source: str | Path) -> Path:
    """Return the file or folder of weights for a path or a name such as ``gpt2-medium``.

    A path of that name comes first, then ``$SLM_JAX_DATA/<name>/``, then Hugging Face's cache, then a download.
    """
    name = "gpt2" if str(source) == "gpt2-small" else str(source)
    path = user_path(source)
    if path.exists() or name not in PINS:
        return path
    data = os.environ.get("SLM_JAX_DATA")
    if data and (Path(data).expanduser() / name).is_dir():
        return Path(data).expanduser() / name
    from huggingface_hub import try_to_load_from_cache

    pin = PINS[name]
    for repository in (f"openai-community/{name}", name):  # the second is its former name
        cached = try_to_load_from_cache(repository, FILE, revision=pin.revision)
        if isinstance(cached, str):
            break
    else:
        cached = _download(name, pin)
    file = Path(cached)
    expected = pin.sha256 or file.resolve().name  # the cache names a file by the SHA-256 that the server reports
    # The names are no digests in a cache of copies, on a system without symbolic links.
    if re.fullmatch(r"[0-9a-f]{64}", expected) and (digest := sha256(file)) != expected:
        raise InputError(f"{file}: SHA-256 is {digest}, expected {expected}; delete {file.resolve()} and try again")
    return file


def _download(name: str, pin: Pin) -> str:
    import requests
    from huggingface_hub import constants, hf_hub_download

    repository = f"openai-community/{name}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        check_reachable(constants.ENDPOINT, 2)
        # The library would retry for minutes if a server accepts connections and doesn't answer (a captive portal).
        requests.head(f"{constants.ENDPOINT}/{repository}/resolve/{pin.revision}/{FILE}", timeout=2)
        return hf_hub_download(repository, FILE, revision=pin.revision)
    except Exception as error:  # the libraries' exception types change between versions
        cause = " ".join(str(error).split())[:200]
        failed = f"the download from {constants.ENDPOINT}/{repository} failed ({cause})"
        raise MissingInputError(f"{name}: not in $SLM_JAX_DATA/{name} or Hugging Face's cache, and {failed}") from None

"""OpenAI's four GPT-2 models by name: found on this machine, or downloaded once from Hugging Face."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable, sha256, user_path

FILE = "model.safetensors"


class Pin(NamedTuple):
    """What is downloaded under a name: the repository's commit and, where known, the file's SHA-256."""

    revision: str
    sha256: str | None = None


# Without a SHA-256 here, that which the server has for this commit is checked.
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


def find_by_name(name: str) -> Path:
    """Return the weights of ``gpt2``, ``gpt2-medium``, ``gpt2-large`` or ``gpt2-xl``.

    Looked for in ``$SLM_JAX_DATA/<name>/``, then in Hugging Face's cache, else downloaded.

    Raises:
        MissingInputError: not on this machine, and not to be downloaded.
        InputError: a file whose SHA-256 is not the expected one.
    """
    data = os.environ.get("SLM_JAX_DATA")
    if data and (Path(data).expanduser() / name).is_dir():
        return Path(data).expanduser() / name
    from huggingface_hub import try_to_load_from_cache

    pin = PINS[name]
    for repository in (f"openai-community/{name}", name):  # the second is how it was called before
        cached = try_to_load_from_cache(repository, FILE, revision=pin.revision)
        if isinstance(cached, str):
            return _verified(Path(cached), pin)
    return _verified(_download(name, pin), pin)


def _download(name: str, pin: Pin) -> Path:
    import requests
    from huggingface_hub import constants, hf_hub_download

    repository = f"openai-community/{name}"
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        check_reachable(constants.ENDPOINT, 2)
        # One that takes connections and does not answer (a captive portal) would be tried for minutes.
        requests.head(f"{constants.ENDPOINT}/{repository}/resolve/{pin.revision}/{FILE}", timeout=2)
        return Path(hf_hub_download(repository, FILE, revision=pin.revision))
    except Exception as error:  # of the download's own libraries, which change with its version
        cause = " ".join(str(error).split())[:200]
        raise MissingInputError(
            f"{name}: not in $SLM_JAX_DATA/{name}, not in Hugging Face's cache, and cannot be downloaded from "
            f"{constants.ENDPOINT}/{repository} ({cause}); connect once, or put {FILE} and config.json in "
            f"$SLM_JAX_DATA/{name}"
        ) from None


def _verified(file: Path, pin: Pin) -> Path:
    expected = pin.sha256 or file.resolve().name  # the cache names a file by the SHA-256 that the server has for it
    if not re.fullmatch(r"[0-9a-f]{64}", expected):  # a cache of copies, on a system without symbolic links
        return file
    digest = sha256(file)
    if digest != expected:
        raise InputError(
            f"{file}: its SHA-256 is {digest}; expected {expected}: delete {file.resolve()} and load it again"
        )
    return file


_ALIASES = {"gpt2-small": "gpt2"}


def find_weights(source: str | Path) -> Path:
    """Return the file or folder of weights that a path or a name stands for, downloading it if need be."""
    name = _ALIASES.get(str(source), str(source))
    path = user_path(source)
    return path if path.exists() or name not in PINS else find_by_name(name)

"""Pretrained models by name: found on this machine, or downloaded once from Hugging Face."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import check_reachable, sha256, user_path
from slm_jax.weights.tensor_files import INDEX, shard_names

FILE = "model.safetensors"
_BESIDE = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


class Pin(NamedTuple):
    """What a name stands for: a commit of a repository and, where known, the SHA-256 of its weights."""

    repository: str
    revision: str
    sha256: str | None = None
    file: str = FILE  # the weights, or the index of their shards
    beside: tuple[str, ...] = _BESIDE
    gated: bool = False  # whether its licence must be accepted first


def _gpt2(name: str, revision: str, digest: str | None = None) -> Pin:
    return Pin(f"openai-community/{name}", revision, digest, beside=())  # the reader knows what these files lack


# Without a SHA-256 here, the one that the server has for this commit is checked.
PINS = {
    "gpt2": _gpt2(
        "gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": _gpt2("gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": _gpt2("gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": _gpt2(
        "gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
    "smollm2-135m": Pin(
        "HuggingFaceTB/SmolLM2-135M",
        "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
        "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1",
    ),
    "smollm2-135m-instruct": Pin(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    ),
    "smollm2-360m": Pin("HuggingFaceTB/SmolLM2-360M", "f8027fd0eaeea54caa13c31d31b9fdc459c38b49"),
    "smollm2-360m-instruct": Pin("HuggingFaceTB/SmolLM2-360M-Instruct", "a10cc1512eabd3dde888204e902eca88bddb4951"),
    "smollm2-1.7b": Pin("HuggingFaceTB/SmolLM2-1.7B", "effd688a12921b4cc83e3312b6feb579f70f9c71"),
    "smollm2-1.7b-instruct": Pin("HuggingFaceTB/SmolLM2-1.7B-Instruct", "31b70e2e869a7173562077fd711b654946d38674"),
    "tinyllama-1.1b": Pin(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "59f6f375b26bde864a6ca194a9a3044570490064"
    ),
    "tinyllama-1.1b-chat": Pin(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "fe8a4ea1ffedaf415f4da2f062534de366a451e6",
        "6e6001da2106d4757498752a021df6c2bdc332c650aae4bae6b0c004dcf14933",
    ),
    "llama3.2-1b": Pin("meta-llama/Llama-3.2-1B", "4e20de362430cd3b72f300e6b0f18e50e7166e08", gated=True),
    "llama3.2-1b-instruct": Pin(
        "meta-llama/Llama-3.2-1B-Instruct", "9213176726f574b556790deb65791e0c5aa438b6", gated=True
    ),
    "llama3.2-3b": Pin("meta-llama/Llama-3.2-3B", "13afe5124825b4f3751f836b40dafda64c1ed062", file=INDEX, gated=True),
    "llama3.2-3b-instruct": Pin(
        "meta-llama/Llama-3.2-3B-Instruct", "0cb88a4f764b7a12671c53f0838cd831a0843b95", file=INDEX, gated=True
    ),
    "qwen3-0.6b": Pin(
        "Qwen/Qwen3-0.6B",
        "c1899de289a04d12100db370d81485cdf75e47ca",
        "f47f71177f32bcd101b7573ec9171e6a57f4f4d31148d38e382306f42996874b",
    ),
    "qwen3-1.7b": Pin("Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", file=INDEX),
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
    pin = PINS[name]
    file = _get(name, pin, pin.file)
    for weights in shard_names(file) if pin.file == INDEX else (pin.file,):
        _check(_get(name, pin, weights), pin.sha256)
    for beside in pin.beside:
        _get(name, pin, beside)
    return file


def _get(name: str, pin: Pin, file: str) -> Path:
    """Return a file of the pinned commit, from the cache or downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for repository in (pin.repository, name):  # GPT-2's repositories formerly had these names
        cached = try_to_load_from_cache(repository, file, revision=pin.revision)
        if isinstance(cached, str):
            return Path(cached)
    return Path(_download(name, pin, file))


def _check(file: Path, known: str | None) -> None:
    expected = known or file.resolve().name  # the cache names a file by the SHA-256 that the server reports
    # The names are no digests in a cache of copies, on a system without symbolic links.
    if re.fullmatch(r"[0-9a-f]{64}", expected) and (digest := sha256(file)) != expected:
        raise InputError(f"{file}: SHA-256 is {digest}, expected {expected}; delete {file.resolve()} and try again")


def _download(name: str, pin: Pin, file: str) -> str:
    import requests
    from huggingface_hub import constants, hf_hub_download

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        check_reachable(constants.ENDPOINT, 2)
        # The library would retry for minutes if a server accepts connections and doesn't answer (a captive portal).
        requests.head(f"{constants.ENDPOINT}/{pin.repository}/resolve/{pin.revision}/{file}", timeout=2)
        return hf_hub_download(pin.repository, file, revision=pin.revision)
    except Exception as error:  # the libraries' exception types change between versions
        cause = " ".join(str(error).split())[:200]
        failed = f"the download of {file} from {constants.ENDPOINT}/{pin.repository} failed ({cause})"
        if pin.gated:
            failed += "; its licence must be accepted there, and HF_TOKEN be set"
        raise MissingInputError(f"{name}: not in $SLM_JAX_DATA/{name} or Hugging Face's cache, and {failed}") from None

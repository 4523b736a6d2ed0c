"""Look at this machine as training will find it: versions, devices, memory, caches, network."""

import dataclasses
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

from slm_jax.data.named import NAMED_FILES
from slm_jax.files import check_reachable
from slm_jax.nn.target import target_of
from slm_jax.tokenizer import GPT2Tokenizer
from slm_jax.training import hardware
from slm_jax.training.loggers import PACKAGES
from slm_jax.training.progress import format_bytes
from slm_jax.weights.hub import PINS

NETWORK_SECONDS = 3.0
SMALL_DISK = 2e9  # bytes; a checkpoint of GPT-2 small with its optimizer takes 1.5 GB
SMALL_MEMORY = 2e9

HOSTS = {
    "huggingface.co": "GPT-2's weights",
    "openaipublic.blob.core.windows.net": "GPT-2's tokenizer",
    "raw.githubusercontent.com": "the named texts",
    "storage.googleapis.com": "TensorFlow Datasets",
}
EXTRAS = {
    "torch": ("torch", "reads .pt, .pth and .bin weights"),
    **{extra: (package, f"logging.{extra}") for extra, package in PACKAGES.items()},
}
SETTINGS = ("JAX_", "XLA_", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "NPROC")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        level: ``problem``: something will not work; ``note``: worth knowing; ``ok``.
        name: of the check.
        text: what is so, and for a problem what to do about it; one line.
    """

    level: Literal["ok", "note", "problem"]
    name: str
    text: str


def examine_machine() -> Iterator[Finding]:
    """Yield what each check of this machine finds, in less than ten seconds; writes nothing that stays but caches."""
    checks: dict[str, Callable[[], list[Finding]]] = {
        "packages": check_packages,
        "extras": check_extras,
        "devices": check_devices,
        "computation": check_computation,
        "dtype": check_dtype,
        "threads": check_threads,
        "memory": check_memory,
        "disk": check_disk,
        "caches": check_caches,
        "settings": check_settings,
        "network": check_network,
    }
    for name, check in checks.items():
        yield from guarded(name, check)


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what a check finds; that it cannot be done at all is a finding, too."""
    try:
        return check()
    except Exception as error:  # of any kind: a broken machine is what this is for
        return [Finding("problem", name, f"the check itself failed: {type(error).__name__}: {one_line(error)}")]


def one_line(error: object, limit: int = 300) -> str:
    """Return a message without line breaks, cut where it is very long."""
    return " ".join(str(error).split())[:limit]


# --- Software ---


def check_packages() -> list[Finding]:
    """Compare the installed versions with what slm-jax asks for."""
    python = f"Python {platform.python_version()}"
    try:
        requirements = [Requirement(text) for text in metadata.requires("slm-jax") or []]
    except metadata.PackageNotFoundError:
        text = f"{python}; slm-jax is not installed, so versions were not compared: pip install -e . does both"
        return [Finding("note", "packages", text)]
    found = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found += _problems_with(requirement)
    shown = ("slm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = [f"{name} {version}" for name in shown if (version := _version(name))]
    return [Finding("ok", "packages", ", ".join([python, *versions])), *found]


def _problems_with(requirement: Requirement) -> list[Finding]:
    version = _version(requirement.name)
    if version is None:
        text = f"{requirement.name} is missing; pip install -e . brings it"
    elif not requirement.specifier.contains(version, prereleases=True):
        text = f"{requirement.name} is {version}; expected {requirement.specifier}: pip install '{requirement}'"
    else:
        return []
    return [Finding("problem", "packages", text)]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_extras() -> list[Finding]:
    """Say which of the optional packages are there."""
    there = [f"{package} {_version(package) or ''}".strip() for package, _ in EXTRAS.values() if _is_there(package)]
    lacking = [
        f"{package} ({use}): pip install -e '.[{extra}]'"
        for extra, (package, use) in EXTRAS.items()
        if not _is_there(package)
    ]
    parts = [", ".join(there) or "none installed", *(["if you need it: " + "; ".join(lacking)] if lacking else [])]
    return [Finding("ok", "extras", "; ".join(parts))]


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# --- Devices ---


class Nvidia(NamedTuple):
    """The NVIDIA GPUs of a machine, by name, and the driver's version, such as 580.82; empty where it is unknown."""

    names: tuple[str, ...]
    driver: str


def check_devices() -> list[Finding]:
    """Say which devices JAX computes on, and which of the machine's it does not see."""
    if error := start_error():
        asked = os.environ.get("JAX_PLATFORMS")
        cause = f"; JAX_PLATFORMS is {asked}: unset it, or install what it needs" if asked else ""
        remedy = "" if asked else "; set JAX_PLATFORMS=cpu to go on without, or mend what the message names"
        told = Finding("problem", "devices", f"JAX cannot start its devices ({error}){cause}{remedy}")
        return [told, *_unseen("cpu")]
    devices = jax.devices()
    return [Finding("ok", "devices", _describe(devices)), *_unseen(devices[0].platform)]


def start_error() -> str | None:
    """Return why JAX cannot start its devices; None if it can."""
    try:
        jax.devices()
    except Exception as error:  # of several kinds, an AssertionError without a word among them
        return one_line(error) or type(error).__name__
    return None


def _unseen(platform: str) -> list[Finding]:
    """Report what the machine has while JAX computes on ``platform``."""
    return [finding for finding in (_unseen_gpus(platform), _unseen_tpu(platform)) if finding]


def _describe(devices: list[jax.Device]) -> str:
    """Say how many devices of what kind there are, and what memory each offers."""
    kinds = [device.device_kind for device in devices]
    memory = {device.device_kind: hardware.device_memory(device) for device in jax.local_devices()}
    parts = []
    for kind in dict.fromkeys(kinds):
        n_bytes = memory.get(kind)
        each = f" with {format_bytes(n_bytes)} each" if n_bytes and devices[0].platform != "cpu" else ""
        parts.append(f"{kinds.count(kind)} × {kind}{each}")
    return ", ".join(parts)


def _unseen_gpus(platform: str) -> Finding | None:
    """Report NVIDIA GPUs that are in the machine while JAX computes on something else."""
    gpus = find_nvidia()
    if platform != "cpu" or gpus is None:
        return None
    what = f"{', '.join(gpus.names) or 'an NVIDIA GPU'} is in this machine"
    hidden = _hidden_by("cuda", "gpu")
    if hidden:
        return Finding("note", "devices", f"{what} and not used, as {hidden}; unset that to use it")
    major = int(gpus.driver.partition(".")[0] or 0)
    if 0 < major < 525:
        remedy = f"its driver {gpus.driver} is too old: install 525 or later, then pip install -e '.[cuda12]'"
    else:
        extra = "cuda12" if 0 < major < 580 else "cuda13"
        driver = f" (driver {gpus.driver})" if gpus.driver else ""
        remedy = f"JAX does not see it{driver}: pip install -U -e '.[{extra}]', then start anew"
    return Finding("problem", "devices", f"{what}, but {remedy}")


def find_nvidia() -> Nvidia | None:
    """Ask ``nvidia-smi``, or else the kernel, which NVIDIA GPUs the machine has; None: it has none."""
    names, drivers = [], []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=3, check=True).stdout.splitlines()
        for line in lines:
            name, _, driver = line.partition(", ")
            names.append(name.strip())
            drivers.append(driver.strip())
    except (OSError, subprocess.SubprocessError):  # containers often have the GPU without the program
        pass
    if names or any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl")):
        return Nvidia(tuple(names), drivers[0] if drivers else _kernel_driver())
    return None


def _kernel_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    version = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return version[1] if version else ""


def _unseen_tpu(platform: str) -> Finding | None:
    """Report a TPU that is attached while JAX computes on something else."""
    signs = [name for name in ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR") if os.environ.get(name)]
    signs += [device for device in ("/dev/accel0",) if Path(device).exists()]
    if platform == "tpu" or not signs:
        return None
    hidden = _hidden_by("tpu")
    if hidden:
        return Finding("note", "devices", f"there is a TPU ({signs[0]}), not used, as {hidden}; unset that to use it")
    text = (
        f"there is a TPU ({signs[0]}) that JAX does not see: pip install -U -e '.[tpu]', end other processes that hold "
        "it, and start anew"
    )
    return Finding("problem", "devices", text)


def _hidden_by(*names: str) -> str | None:
    """Return the setting that keeps JAX from a platform that has these names, if there is one."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if chosen and not set(names) & set(chosen.lower().split(",")):
        return f"JAX_PLATFORMS is {chosen}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "cuda" in names and visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return None


def check_computation() -> list[Finding]:
    """Multiply matrices of whole numbers on each device, which every precision must get exactly right."""
    if start_error():
        return []
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-2, 3, (256, 256)).astype(np.float32) for _ in range(2))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for device in jax.local_devices():
        began = time.perf_counter()
        try:
            result = np.asarray(multiply(jax.device_put(a, device), jax.device_put(b, device)))
        except jax.errors.JaxRuntimeError as error:
            text = f"{device} cannot compute: {one_line(error)}; end other programs that use it, or restart the machine"
            return [Finding("problem", "computation", text)]
        seconds.append(time.perf_counter() - began)
        if (result != a @ b).any():
            text = f"{device} multiplies wrongly; take another one, and have this one examined"
            return [Finding("problem", "computation", text)]
    text = f"a product of matrices is right on {len(seconds)} device{'s' * (len(seconds) > 1)} ({max(seconds):.2f} s)"
    return [Finding("ok", "computation", text)]


def check_dtype() -> list[Finding]:
    """Say what to compute in."""
    if start_error():
        return []
    device = jax.devices()[0]
    capability = target_of(device).capability
    dtype = hardware.best_dtype(device)
    if dtype == "bfloat16":
        why = "this device has it in hardware"
    elif capability is not None:
        why = f"compute capability {capability} only emulates bfloat16"
    else:
        why = "bfloat16 would not be faster here"
    return [Finding("ok", "dtype", f"model.dtype auto is {dtype}: {why}")]


# --- The machine ---


def check_threads() -> list[Finding]:
    """Say how many cores there are; pretend devices need more threads than XLA takes by itself."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    text = f"{usable} CPU core{'s' * (usable > 1)}" + (f" of {there}" if usable < there else "")
    found = [Finding("ok", "threads", text)]
    pretended = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if pretended and int(pretended[1]) > 1:
        needed = 2 * int(pretended[1])
        n_threads = os.environ.get("NPROC", "")
        if not (n_threads.isdecimal() and int(n_threads) >= needed):
            text = (
                f"XLA_FLAGS asks for {pretended[1]} pretend devices and NPROC is {n_threads or 'not set'}: they may "
                f"hang; set NPROC={needed}"
            )
            found.append(Finding("problem", "threads", text))
    return found


def check_memory() -> list[Finding]:
    """Say how much memory programs can still get."""
    free = hardware.machine_memory()
    if free is None:
        return [Finding("note", "memory", "how much is free cannot be told on this system")]
    if free < SMALL_MEMORY:
        text = f"{format_bytes(free)} free: enough for small models only; end other programs for larger ones"
        return [Finding("note", "memory", text)]
    return [Finding("ok", "memory", f"{format_bytes(free)} free")]


def check_disk() -> list[Finding]:
    """Say how much room there is for runs, below the current folder, and whether they can be written."""
    folder = Path("runs").resolve()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"{folder}: cannot write there ({error.strerror}); start elsewhere, or name a place with --runs_dir"
        return [Finding("problem", "disk", text)]
    text = f"{format_bytes(free)} free for runs in {folder}"
    if free < SMALL_DISK:
        advice = "a checkpoint of GPT-2 small takes 1.5 GB, of the tiny recipe 16 MB; free some, or use --runs_dir"
        return [Finding("note", "disk", f"{text}: {advice}")]
    return [Finding("ok", "disk", text)]


def check_caches() -> list[Finding]:
    """Say what is kept between starts: compiled programs, and downloads."""
    return [_compile_cache(), _tokenizer_files(), _named_texts(), _hugging_face()]


def _compile_cache() -> Finding:
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)  # as the command has set it
    if folder is None:
        text = "compiled programs are not kept, so every start compiles anew; set JAX_COMPILATION_CACHE_DIR"
        return Finding("note", "cache", text)
    size = folder_size(Path(folder))
    if Path(folder).is_dir() and not os.access(folder, os.W_OK):
        text = f"{folder}: compiled programs cannot be written there; set JAX_COMPILATION_CACHE_DIR to another folder"
        return Finding("note", "cache", text)
    return Finding("ok", "cache", f"compiled programs: {format_bytes(size)} in {folder}; may be deleted at any time")


def _tokenizer_files() -> Finding:
    lacking = GPT2Tokenizer().lacking()
    if not lacking:
        return Finding("ok", "cache", "GPT-2's tokenizer files are on this machine")
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        return Finding("note", "cache", f"TIKTOKEN_CACHE_DIR: {'; '.join(lacking)}; downloaded at first use")
    text = "GPT-2's tokenizer is downloaded at first use; set TIKTOKEN_CACHE_DIR to a folder that keeps it"
    return Finding("note", "cache", text)


def _named_texts() -> Finding:
    folder = os.environ.get("SLM_JAX_DATA")
    if not folder:
        return Finding("ok", "cache", "SLM_JAX_DATA is not set: named texts are downloaded at first use, and kept")
    path = Path(folder).expanduser()
    if not path.is_dir():
        text = f"SLM_JAX_DATA is {folder}: no such folder; make it, or unset SLM_JAX_DATA"
        return Finding("problem", "cache", text)
    there = [name for name, entry in NAMED_FILES.items() if (path / entry.file).is_file()]
    return Finding("ok", "cache", f"SLM_JAX_DATA has {', '.join(there) or 'none of the named texts'}")


def _hugging_face() -> Finding:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    repositories = {name: (f"models--openai-community--{name}", f"models--{name}") for name in PINS}
    there = [name for name, places in repositories.items() if any((folder / place).is_dir() for place in places)]
    text = f"Hugging Face's, {folder}: {', '.join(there) or 'no GPT-2 weights yet'}"
    if constants.HF_HUB_OFFLINE:
        return Finding("note", "cache", f"{text}; HF_HUB_OFFLINE is set, so nothing is downloaded from there")
    return Finding("ok", "cache", text)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; one that disappears meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).lstat().st_size
            except OSError:
                continue
    return total


def check_settings() -> list[Finding]:
    """List the environment variables that change how JAX computes."""
    values = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    return [Finding("ok", "settings", "  ".join(values))] if values else []


def check_network() -> list[Finding]:
    """Try the servers that something may be downloaded from, all at once."""
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        errors = dict(zip(HOSTS, pool.map(_reach, HOSTS), strict=True))
    lacking = [f"{host} ({what})" for host, what in HOSTS.items() if errors[host]]
    if not lacking:
        return [Finding("ok", "network", f"reached {', '.join(HOSTS)}")]
    reasons = dict.fromkeys(error for error in errors.values() if error)
    text = (
        f"cannot reach {', '.join(lacking)}: {'; '.join(reasons)}; builtin: sources, your own files and what was "
        "downloaded before work without"
    )
    return [Finding("note", "network", text)]


def _reach(host: str) -> str | None:
    """Return why a host cannot be reached; None if it can."""
    try:
        check_reachable(f"https://{host}", NETWORK_SECONDS)
    except OSError as error:
        return one_line(error, 80)
    return None

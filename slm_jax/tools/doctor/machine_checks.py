"""Checks of this machine as training will find it: versions, devices, memory, caches, network."""

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

from slm_jax.data.named import NAMED_FILES
from slm_jax.files import check_reachable
from slm_jax.nn.target import target_of
from slm_jax.tokenizer import GPT2Tokenizer
from slm_jax.training import hardware
from slm_jax.training.progress import format_bytes
from slm_jax.weights.hub import PINS

Level = Literal["ok", "note", "problem"]
Found = Iterator[tuple[Level, str]]  # a level and one line: what was found, and for a problem what to do

SMALL = 2e9  # bytes; a checkpoint of GPT-2 small with its optimizer takes 1.5 GB

HOSTS = {
    "huggingface.co": "pretrained models",
    "openaipublic.blob.core.windows.net": "GPT-2's tokenizer",
    "raw.githubusercontent.com": "the named texts",
    "storage.googleapis.com": "TensorFlow Datasets",
}
SETTINGS = ("JAX_", "XLA_", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES", "NPROC")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found: whether something will not work, is worth knowing, or is ok; and a line about it."""

    level: Level
    name: str
    text: str


def perform(checks: Iterable[Callable[..., Found]], *subject: object) -> Iterator[Finding]:
    """Perform the checks ``check_NAME`` of a subject; one that fails itself is a problem, too."""
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            for level, text in check(*subject):
                yield Finding(level, name, text)
        except Exception as error:  # any: a broken machine is what the doctor is for
            yield Finding("problem", name, f"the check itself failed: {type(error).__name__}: {one_line(error)}")


def one_line(error: object, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; files that disappear meanwhile are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(root, name).lstat().st_size
    return total


def examine_machine() -> Iterator[Finding]:
    """Yield what each check of this machine finds, in less than ten seconds; writes only to caches."""
    computing = (check_packages, check_devices, check_computation, check_threads)
    return perform((*computing, check_memory, check_disk, check_cache, check_settings, check_network))


# --- Software ---


def check_packages() -> Found:
    try:
        requirements = [Requirement(text) for text in metadata.requires("slm-jax") or []]
    except metadata.PackageNotFoundError:
        yield "note", f"Python {platform.python_version()}; slm-jax is not installed, so versions were not compared"
        return
    shown = ("slm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions = [f"{name} {version}" for name in shown if (version := _version(name))]
    yield "ok", ", ".join([f"Python {platform.python_version()}", *versions])
    yield from unmet(each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""}))


def unmet(requirements: Iterable[Requirement]) -> Found:
    for requirement in requirements:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"is {version}; expected {requirement.specifier}" if version else "is missing"
            yield "problem", f"{requirement.name} {found}: pip install '{requirement}'"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- Devices ---


def check_devices() -> Found:
    if error := start_error():
        asked = os.environ.get("JAX_PLATFORMS")
        remedy = f"JAX_PLATFORMS is {asked}: unset it, or install what it needs" if asked else "try JAX_PLATFORMS=cpu"
        yield "problem", f"JAX cannot start its devices ({error}); {remedy}"
    else:
        kinds = [device.device_kind for device in jax.devices()]
        text = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
        memory = hardware.device_memory() if jax.default_backend() != "cpu" else None
        yield "ok", text + (f" with {format_bytes(memory)} each" if memory else "")
        capability, dtype = target_of(jax.devices()[0]).capability, hardware.best_dtype(jax.devices()[0])
        why = "this device has it in hardware"
        if dtype != "bfloat16":
            emulated = f"compute capability {capability} only emulates bfloat16"
            why = "bfloat16 would not be faster here" if capability is None else emulated
        yield "ok", f"model.dtype auto is {dtype}: {why}"
    if error or jax.default_backend() == "cpu":
        yield from unseen_accelerators()


def start_error() -> str | None:
    try:
        jax.devices()
    except Exception as error:  # of several kinds, an AssertionError without a message among them
        return one_line(error) or type(error).__name__
    return None


def unseen_accelerators() -> Found:
    """Report GPUs and TPUs of the machine while JAX computes on the CPU: a problem, unless a setting hides them."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    unseen = []
    if (gpu := find_nvidia()) is not None:
        major = int(gpu[1].partition(".")[0] or 0)
        if 0 < major < 525:
            remedy = f"its driver {gpu[1]} is too old: install 525 or later, then the extra cuda12"
        else:
            remedy = f"pip install -U -e '.[{'cuda12' if 0 < major < 580 else 'cuda13'}]', then restart"
        hidden = f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible.strip() in ("", "-1") else ""
        unseen.append((gpu[0], {"cuda", "gpu"}, hidden, remedy))
    signs = [name for name in ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR") if os.environ.get(name)]
    signs += ["/dev/accel0"] * Path("/dev/accel0").exists()
    if signs:
        remedy = "pip install -U -e '.[tpu]', end other processes that use it, and restart"
        unseen.append((f"the TPU ({signs[0]})", {"tpu"}, "", remedy))
    for what, platforms, hidden, remedy in unseen:
        if chosen and not platforms & set(chosen.lower().split(",")):
            hidden = f"JAX_PLATFORMS is {chosen}"
        if hidden:
            yield "note", f"{what} is not used, as {hidden}; unset that to use it"
        else:
            yield "problem", f"JAX does not see {what}: {remedy}"


def find_nvidia() -> tuple[str, str] | None:
    """Return the names of the machine's NVIDIA GPUs and their driver, unknown without ``nvidia-smi``; None: no GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(query, capture_output=True, text=True, timeout=3, check=True).stdout.splitlines()
        if gpus := [line.rpartition(", ") for line in lines]:
            return ", ".join(name for name, _, _ in gpus), gpus[0][2]
    return ("an NVIDIA GPU", "") if Path("/dev/nvidiactl").exists() else None


def check_computation() -> Found:
    """Multiply matrices of whole numbers on each device; every precision must give the exact product."""
    if start_error():
        return
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-2, 3, (256, 256)).astype(np.float32) for _ in range(2))
    multiply = jax.jit(jnp.matmul)
    began = time.perf_counter()
    for device in jax.local_devices():
        try:
            result = np.asarray(multiply(jax.device_put(a, device), jax.device_put(b, device)))
        except jax.errors.JaxRuntimeError as error:
            remedy = "end other programs that use it, or restart the machine"
            yield "problem", f"{device} cannot compute: {one_line(error)}; {remedy}"
            return
        if (result != a @ b).any():
            yield "problem", f"{device} multiplies wrongly; use another one, and have this one examined"
            return
    seconds = time.perf_counter() - began
    yield "ok", f"matrix products are exact on {jax.local_device_count()} device(s) ({seconds:.2f} s)"


# --- The machine ---


def check_threads() -> Found:
    """Count cores; pretend devices need more threads than XLA starts by itself."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "ok", f"{usable} of {os.cpu_count()} CPU cores"
    pretended = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    needed, n_threads = 2 * int(pretended[1]) if pretended else 0, os.environ.get("NPROC", "")
    if needed > 2 and not (n_threads.isdecimal() and int(n_threads) >= needed):
        what = f"XLA_FLAGS asks for {needed // 2} pretend devices and NPROC is {n_threads or 'not set'}"
        yield "problem", f"{what}: they may hang; set NPROC={needed}"


def check_memory() -> Found:
    free = hardware.machine_memory()
    if free is None:
        yield "note", "the free memory is unknown on this system"
    elif free < SMALL:
        yield "note", f"{format_bytes(free)} free: enough for small models only; end other programs for larger ones"
    else:
        yield "ok", f"{format_bytes(free)} free"


def check_disk() -> Found:
    folder = Path("runs").resolve()
    folder = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        yield "problem", f"{folder}: cannot write there ({error.strerror}); choose another folder with --runs_dir"
        return
    text = f"{format_bytes(free)} free for runs in {folder}"
    if free < SMALL:
        yield "note", f"{text}; a checkpoint of GPT-2 small takes 1.5 GB: free some, or use --runs_dir"
    else:
        yield "ok", text


def check_cache() -> Found:
    from huggingface_hub import constants

    programs = getattr(jax.config, "jax_compilation_cache_dir", None)
    if programs is None:
        yield "note", "compiled programs are not kept, so every start compiles again; set JAX_COMPILATION_CACHE_DIR"
    elif Path(programs).is_dir() and not os.access(programs, os.W_OK):
        yield "note", f"{programs}: not writable for compiled programs; set JAX_COMPILATION_CACHE_DIR to another folder"
    else:
        size = format_bytes(folder_size(Path(programs)))
        yield "ok", f"compiled programs: {size} in {programs}; may be deleted at any time"

    lacking = GPT2Tokenizer().lacking()
    if not lacking:
        yield "ok", "GPT-2's tokenizer files are on this machine"
    elif "TIKTOKEN_CACHE_DIR" in os.environ:
        yield "note", f"TIKTOKEN_CACHE_DIR: {'; '.join(lacking)}; downloaded at first use"
    else:
        yield "note", "GPT-2's tokenizer is downloaded at first use; set TIKTOKEN_CACHE_DIR to a folder that keeps it"

    named = os.environ.get("SLM_JAX_DATA")
    if not named:
        yield "ok", "SLM_JAX_DATA is not set: named texts are downloaded at first use, and kept"
    elif not (folder := Path(named).expanduser()).is_dir():
        yield "problem", f"SLM_JAX_DATA is {named}: no such folder; create it, or unset SLM_JAX_DATA"
    else:
        there = [name for name, entry in NAMED_FILES.items() if (folder / entry.file).is_file()]
        yield "ok", f"SLM_JAX_DATA has {', '.join(there) or 'none of the named texts'}"

    hub = Path(constants.HF_HUB_CACHE)
    # GPT-2's repositories formerly had no owner.
    folders = {n: [f"models--{repo.replace('/', '--')}" for repo in (pin.repository, n)] for n, pin in PINS.items()}
    weights = [n for n, names in folders.items() if any((hub / name).is_dir() for name in names)]
    text = f"Hugging Face's, {hub}: {', '.join(weights) or 'no pretrained models yet'}"
    if constants.HF_HUB_OFFLINE:
        yield "note", f"{text}; HF_HUB_OFFLINE is set, so nothing is downloaded from there"
    else:
        yield "ok", text


def check_settings() -> Found:
    values = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    if values:
        yield "ok", one_line("  ".join(values), 2_000)


def check_network() -> Found:
    with ThreadPoolExecutor(len(HOSTS)) as pool:
        errors = dict(zip(HOSTS, pool.map(_connection_error, HOSTS), strict=True))
    lacking = [f"{host} ({what})" for host, what in HOSTS.items() if errors[host]]
    if not lacking:
        yield "ok", f"reached {', '.join(HOSTS)}"
        return
    reasons = "; ".join(dict.fromkeys(error for error in errors.values() if error))
    offline = "builtin: sources, your own files and earlier downloads work offline"
    yield "note", f"cannot reach {', '.join(lacking)}: {reasons}; {offline}"


def _connection_error(host: str) -> str | None:
    try:
        check_reachable(f"https://{host}", seconds=3)
    except OSError as error:
        return one_line(error, 80)
    return None

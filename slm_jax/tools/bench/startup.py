"""The time of imports, and of training until its first step, in fresh processes."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

from slm_jax.config import dump_config, to_dict
from slm_jax.errors import InputError
from slm_jax.files import cache_folder
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.instruments import Timing, failed, output_of, start_python
from slm_jax.tools.bench.result import Result

_IMPORTS = """
import json, time
began = time.perf_counter()
import jax, flax
theirs = time.perf_counter()
import slm_jax
ours = time.perf_counter()
slm_jax.GPTModel, slm_jax.load_gpt2
print(json.dumps([theirs - began, ours - theirs, time.perf_counter() - ours]))
"""
NAMES = (
    "import_jax_flax_seconds",
    "import_slm_jax_seconds",
    "first_use_slm_jax_seconds",
    "first_step_empty_cache_seconds",
    "first_step_warm_cache_seconds",
)
_POLL = 0.01  # seconds between two looks at a run's log
_TOO_LONG = 3600.0


def measure_startup(config: RunConfig, repeats: int) -> Result:
    """Measure imports, and ``slm-jax train`` of a recipe to its first step with an empty and a warm compile cache.

    It uses a compile cache of its own. A named text that is not on this machine is downloaded at each start.
    """
    output_of(["-c", _IMPORTS])  # fills the file system's cache
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            starts = [_seconds_to_first_step(config, Path(folder), run) for run in ("cold", "warm")]
        rows.append([*json.loads(output_of(["-c", _IMPORTS])), *starts])
    figures = {name: Timing(seconds) for name, seconds in zip(NAMES, zip(*rows, strict=True), strict=True)}
    note = "First step: from the start of the process to the line of step 1 in metrics.jsonl."
    return Result("startup", to_dict(config), figures, (note,))


def _seconds_to_first_step(config: RunConfig, folder: Path, run: str) -> float:
    """Start a run in a folder, with the compile cache there, and stop it after its first step."""
    config = dataclasses.replace(
        config,
        run=run,
        runs_dir=str(folder),
        resume="never",
        train=dataclasses.replace(config.train, log_every=1),
        checkpoint=dataclasses.replace(config.checkpoint, mirror=None),
    )
    recipe = folder / f"{run}.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    environ = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with contextlib.suppress(OSError):  # no home
        environ.setdefault("SLM_JAX_DATA", str(cache_folder() / "data"))
    began = time.perf_counter()
    process = start_python(["-m", "slm_jax", "train", "--config", str(recipe)], environ)
    try:
        log = folder / run / "metrics.jsonl"
        while not (log.is_file() and '"train"' in log.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise failed(process.returncode, process.communicate()[1])
            if time.perf_counter() - began > _TOO_LONG:
                raise InputError(f"no first step within {_TOO_LONG:.0f} s; choose a smaller recipe with --config")
            time.sleep(_POLL)
        return time.perf_counter() - began
    finally:
        process.terminate()
        process.communicate()

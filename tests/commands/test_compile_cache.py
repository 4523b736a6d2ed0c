"""What must hold of the cache of compiled programs: it is used by default, and never a hindrance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import jax
from slm_jax.commands import use_compile_cache
use_compile_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
print(jax.jit(lambda x: 2 * x + 1)(20), len(hits))
"""


def run(**environment: Path | str) -> str:
    """Compile a small program in a process of its own; return its value and the number of cache hits."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    env = {**kept, "JAX_PLATFORMS": "cpu", **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=True)
    assert "cache" not in done.stderr  # JAX warns of one that cannot be read or written
    return done.stdout.strip()


def test_small_programs_are_kept_in_the_users_cache_folder_and_unfinished_ones_replaced(tmp_path):
    assert run(XDG_CACHE_HOME=tmp_path) == "41 0"
    assert run(XDG_CACHE_HOME=tmp_path) == "41 1"
    folder = tmp_path / "slm_jax" / "xla"
    for time_of_use in folder.glob("*-atime"):
        time_of_use.unlink()
    for program in folder.glob("*-cache"):  # as a kill may leave it
        program.write_bytes(program.read_bytes()[:100])
        os.utime(program, (0, 0))
    assert run(XDG_CACHE_HOME=tmp_path) == "41 0"
    assert run(XDG_CACHE_HOME=tmp_path) == "41 1"


def test_a_damaged_program_is_compiled_again_once(tmp_path):
    assert run(XDG_CACHE_HOME=tmp_path) == "41 0"
    for damage in (lambda old: old[:-1], lambda old: b"", lambda old: old[:300] + b"?" + old[301:]):
        for program in (tmp_path / "slm_jax" / "xla").glob("*-cache"):
            program.write_bytes(damage(program.read_bytes()))
        assert run(XDG_CACHE_HOME=tmp_path) == "41 0"
    assert run(XDG_CACHE_HOME=tmp_path) == "41 1"


def test_the_folder_of_jax_s_own_variable_is_used(tmp_path):
    other = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "a", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(XDG_CACHE_HOME=tmp_path / "b", **other) == "41 0"
    assert run(XDG_CACHE_HOME=tmp_path / "b", **other) == "41 1"
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(os.name != "posix", reason="a folder that cannot be written is made differently there")
def test_a_home_that_cannot_be_written_is_no_hindrance(tmp_path):
    (tmp_path / "file").touch()
    assert run(XDG_CACHE_HOME=tmp_path / "file") == "41 0"

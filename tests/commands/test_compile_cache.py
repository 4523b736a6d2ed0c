"""What must hold of the cache of compiled programs: it is used without being asked for, and never in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging
import jax
from slm_jax.commands import use_compile_cache
use_compile_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
print(jax.jit(lambda x: 2 * x + 1)(20), len(hits))
"""


def run(**environment: str) -> str:
    """Compile a small program in a process of its own; return its value and how often the cache had a program."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    env = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=True)
    assert "cache" not in done.stderr  # JAX warns of one that cannot be read or written
    return done.stdout.strip()


def test_small_programs_are_kept_in_the_users_cache_folder(tmp_path: Path) -> None:
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "41 0"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "41 1"
    assert list((tmp_path / "slm_jax" / "xla").glob("*-cache"))


def test_a_program_that_was_cut_short_by_a_kill_is_in_nobodys_way(tmp_path: Path) -> None:
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "41 0"
    folder = tmp_path / "slm_jax" / "xla"
    for time_of_use in folder.glob("*-atime"):
        time_of_use.unlink()
    for program in folder.glob("*-cache"):
        program.write_bytes(program.read_bytes()[:100])
        os.utime(program, (0, 0))
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "41 0"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "41 1"


def test_another_place_that_jax_was_told_of_is_used(tmp_path: Path) -> None:
    elsewhere = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "a"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert run(XDG_CACHE_HOME=str(tmp_path / "b"), **elsewhere) == "41 0"
    assert run(XDG_CACHE_HOME=str(tmp_path / "b"), **elsewhere) == "41 1"
    assert not (tmp_path / "b").exists()


@pytest.mark.skipif(os.name != "posix", reason="a folder that cannot be written is made differently there")
def test_a_home_that_cannot_be_written_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(XDG_CACHE_HOME=str(tmp_path / "file")) == "41 0"

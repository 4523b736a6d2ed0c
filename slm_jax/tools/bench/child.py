"""Fresh processes, for what a process that has computed already cannot tell."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_jax.errors import InputError


def start_python(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> "subprocess.Popen[str]":
    """Start this Python with this slm_jax, its output piped."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, *args],
        env={**environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output_of(args: Sequence[str]) -> str:
    """Run this Python to its end and return what it prints.

    Raises:
        InputError: it is killed, or says that a user can mend it.
        RuntimeError: it fails otherwise.
    """
    process = start_python(args)
    printed, said = process.communicate()
    if process.returncode:
        raise failed(process.returncode, said)
    return printed


def failed(status: int, said: str) -> Exception:
    """Return what to raise for a process that ended with a status: one that is no user's mistake is shown whole."""
    if status == 1:
        return RuntimeError(f"a process to measure in failed:\n{said}")
    reason = (said.strip().splitlines() or ["it was killed; out of memory?"])[-1]
    return InputError(f"a process to measure in ended with status {status}: {reason}")

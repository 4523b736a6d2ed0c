"""Fresh processes, to measure imports, starts and memory."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_jax.errors import InputError


def start_python(args: Sequence[str], environ: Mapping[str, str] = os.environ) -> "subprocess.Popen[str]":
    """Start this Python with this slm_jax, its output piped."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, *args],
        env={**environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output_of(args: Sequence[str]) -> str:
    """Run this Python to its end and return what it prints; an InputError if it is killed or reports one."""
    process = start_python(args)
    printed, errors = process.communicate()
    if process.returncode:
        raise failed(process.returncode, errors)
    return printed


def failed(status: int, errors: str) -> Exception:
    """Return the exception for a process that ended with a status; errors that are no user's mistake are kept whole."""
    if status == 1:
        return RuntimeError(f"a process to measure in failed:\n{errors}")
    reason = (errors.strip().splitlines() or ["it was killed; out of memory?"])[-1]
    return InputError(f"a process to measure in ended with status {status}: {reason}")

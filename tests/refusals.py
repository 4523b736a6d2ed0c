"""What must hold of every refusal: one line, not too long, that says what is wrong; and what a folder holds."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slm_jax import cli
from slm_jax.errors import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(pattern: str, error: type[InputError] = InputError) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Expect an error whose one-line message matches a pattern."""
    with pytest.raises(error, match=pattern) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be longer than 100,000 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def fails(args: list[object], capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """The command ends with 2 and one line on stderr that has all of ``parts``; return what is on stdout."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    for part in parts:
        assert part in line
    return shown.out

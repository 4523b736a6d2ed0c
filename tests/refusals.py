"""What must hold of every refusal: one line, not too long, that says what is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slm_jax import cli
from slm_jax.errors import InputError


@contextmanager
def refused(pattern: str, error: type[InputError] = InputError) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Expect an error whose one-line message matches a pattern."""
    with pytest.raises(error, match=pattern) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def fails(args: list[object], capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """The command ends with 2 and one line on stderr that has all of ``parts``."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in parts:
        assert part in line

"""What must hold of every refusal: one line, not too long, that says what is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slm_jax.errors import InputError


@contextmanager
def refused(pattern: str, error: type[InputError] = InputError) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Expect an error whose one-line message matches a pattern."""
    with pytest.raises(error, match=pattern) as caught:
        yield caught
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900

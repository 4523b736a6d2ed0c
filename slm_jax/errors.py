"""What slm_jax raises on a user's mistake: one line that says what is wrong, where, and what is expected.

The commands print it and exit with status 2. Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value, a text or a file's content that the user can correct."""


class MissingInputError(InputError, FileNotFoundError):
    """A file, folder, run or download that does not exist."""

    def __str__(self) -> str:  # OSError would format the arguments as an errno
        return str(self.args[0]) if self.args else ""


@contextmanager
def located(where: object) -> Iterator[None]:
    """Put ``where`` in front of the messages of InputErrors, but not of a MissingInputError, which names its file."""
    try:
        yield
    except MissingInputError:
        raise
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

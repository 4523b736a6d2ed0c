"""What slm_jax raises on a user's mistake: one line that says what is wrong, where, and what is expected.

The commands print it and exit with status 2. Any other exception is a bug and keeps its traceback.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What a terminal obeys; not a line break or a tab.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Return a text with its control characters, but not line breaks and tabs, as Python writes them: ``\x1b``."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def for_terminal(text: str) -> str:
    """Return a text from a model or a file as it may be written to stdout: `printable` if that is a terminal."""
    return printable(text) if sys.stdout.isatty() else text


class InputError(ValueError):
    """A value, a text or a file's content that the user can correct; its message is one line for a terminal."""

    def __str__(self) -> str:  # the OSError that a MissingInputError also is would format the arguments as an errno
        return printable(str(self.args[0]) if self.args else "").replace("\n", " ")


class SaveError(InputError):
    """A checkpoint that cannot be saved, as on a full disk; threads of the library that tried may never end."""


class MissingInputError(InputError, FileNotFoundError):
    """A file, folder, run or download that does not exist."""


@contextmanager
def located(where: object) -> Iterator[None]:
    """Put ``where`` in front of the messages of InputErrors, but not of a MissingInputError, which names its file."""
    try:
        yield
    except MissingInputError:
        raise
    except InputError as error:
        raise InputError(f"{where}: {error}") from None

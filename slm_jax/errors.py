"""What slm_jax raises on a user's mistake.

Each message is one line that says what was wrong, where, what was expected and what to do about it.
The commands print it and exit with status 2; anything else that escapes is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """A value, a text or a file's content that the user can mend."""


class MissingInputError(InputError, FileNotFoundError):
    """A file, folder, run or download that is not there."""

    def __str__(self) -> str:  # OSError would format the arguments as an errno
        return str(self.args[0]) if self.args else ""

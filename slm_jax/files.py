"""Small files and new folders: read strictly, written whole or not at all."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_jax.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that is one JSON object; a key that is there twice is refused.

    Raises:
        InputError: not such a file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); download or export it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected one JSON object; download or export it again")
    return content


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: who reads it sees the old one or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside the target that becomes the target when all went well, and else disappears."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target}: exists and is not an empty folder; choose a new folder or move this one away")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except InputError:  # a MissingInputError is an OSError, too
        raise
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written: {error.strerror or error}; free space there or choose another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)

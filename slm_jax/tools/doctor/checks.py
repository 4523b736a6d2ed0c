"""What the doctor's checks have in common."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

Level = Literal["ok", "note", "problem"]
Found = Iterator[tuple[Level, str]]  # a level and one line: what was found, and for a problem what to do
Check = Callable[[], Found]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found: whether something will not work, is worth knowing, or is ok; and a line about it."""

    level: Level
    name: str
    text: str


def perform(checks: Mapping[str, Check]) -> Iterator[Finding]:
    """Perform checks by name; a check that fails itself is a problem, too."""
    for name, check in checks.items():
        try:
            for level, text in check():
                yield Finding(level, name, text)
        except Exception as error:  # any: a broken machine is what the doctor is for
            yield Finding("problem", name, f"the check itself failed: {type(error).__name__}: {one_line(error)}")


def one_line(error: object, limit: int = 300) -> str:
    """Return a message without line breaks, truncated to ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; files that disappear meanwhile are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(root, name).lstat().st_size
    return total

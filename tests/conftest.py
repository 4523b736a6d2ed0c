"""What every test shares: the small model, and where the real texts are."""

import os
from pathlib import Path

import pytest

# Compiling dominates the tests' time; programs compiled once are kept between runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture
def named_data() -> Path:
    """The folder of the named texts; a test that needs it is skipped where it is absent."""
    folder = os.environ.get("SLM_JAX_DATA")
    if not folder or not (Path(folder) / "tinyshakespeare.txt").is_file():
        pytest.skip("SLM_JAX_DATA does not point at the named texts")
    return Path(folder)

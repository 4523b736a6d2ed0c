"""What every test shares: the small model, and where the real texts are."""

import os
from pathlib import Path

import pytest

# Compiling dominates the tests' time: XLA's CPU compiler optimises less and emits its loops without MLIR here, which
# takes a fifth of the time, and programs are kept between runs and shared by all workers.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "saw", "that", "other", "who", "was", "not", "at"]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with enough order to learn from: 4,000 words in a fixed pseudo-random sequence."""
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    state, words = 1, []
    for _ in range(4000):
        state = (state * 1103515245 + 12345) % 2**31
        words.append(WORDS[(state >> 16) % len(WORDS)])
    path.write_text(" ".join(words) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def named_data() -> Path:
    """The folder of the named texts; a test that needs it is skipped where it is absent."""
    folder = os.environ.get("SLM_JAX_DATA")
    if not folder or not (Path(folder) / "tinyshakespeare.txt").is_file():
        pytest.skip("SLM_JAX_DATA does not point at the named texts")
    return Path(folder)

"""What every test shares: the small model, and where the real texts are."""

import gc
import os
from pathlib import Path

import jaxtyping
import pytest

# Compiling dominates the tests' time: XLA's CPU compiler optimises less, emits its loops without MLIR and does not
# split programs here, which takes a fifth of the time, and programs are kept between runs and shared by all workers.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# Every annotated shape and dtype is checked while quick tests run; the other packages have none.
SHAPED = ("attention", "data", "evaluation", "generation", "model", "nn", "tools.report.pictures", "training")
check_function = jaxtyping.jaxtyped


def check_shapes(*, typechecker):
    """Check a function as jaxtyping does, but not one inside another that names no shape.

    Those are made anew in each call of the other, and so would be the checks, which takes longer than such a call.
    """

    def decorate(function):
        inner = "<locals>" in getattr(function, "__qualname__", "")
        hints = getattr(function, "__annotations__", {}).values()
        if inner and not any(isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray) for hint in hints):
            return function
        return check_function(function, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = check_shapes
jaxtyping.install_import_hook(
    [f"slm_jax.{name}" for name in SHAPED], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

gc.set_threshold(200_000, 20, 1000)  # each traced program leaves many objects; collecting them took 4% of the time


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check no shapes in slow tests, which run whole commands: it takes a tenth of their time."""
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("slow") is not None)


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

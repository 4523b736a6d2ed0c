"""Every notebook is built from its source, and executing it gives the committed outputs."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
import build

SOURCES = build.sources()
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read_built(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def test_every_notebook_is_built_from_its_source():
    assert {path.stem for path in build.HERE.glob("*.ipynb")} == {path.stem for path in SOURCES}
    for source in SOURCES:
        built = read_built(source)
        assert build.cells(built) == build.cells(build.assemble(source)), source.stem
        outputs = [output for cell in built.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs), source.stem
        assert not [output for output in outputs if output.get("name") == "stderr"], source.stem


@pytest.fixture(scope="module")
def kernel():
    """One kernel for several notebooks: starting, and compiling the same small operations, takes 5 s for each."""
    manager = KernelManager()
    yield manager
    if manager.has_kernel:
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@each_source
def test_executing_gives_the_committed_outputs(source, kernel):
    shared = None if "XLA_FLAGS" in source.read_text() else kernel  # those count before JAX starts
    assert build.differences(read_built(source), build.execute(build.assemble(source), shared)) == []


SMALL = """\
# %% [markdown]
# See [the model](../slm_jax/model.py) and [another](01_tokenization.py).
#
# <details><summary>Solution</summary>
#
# ```python
# assert x == 1
# ```
#
# </details>

# %%
x = 1
print("loss", 1.5, "tokens", 2_000)

# %% tags=["varies"]
print("seconds", x)

# %% tags=["sampled"]
print("Once upon")
"""


@pytest.fixture
def small(tmp_path):
    """A small notebook with the outputs that executing it gives."""
    source = tmp_path / "00_small.py"
    source.write_text(SMALL)
    notebook = build.assemble(source)
    for cell, text in zip(notebook.cells[3:], ("loss 1.5 tokens 2000\n", "seconds 1\n", "Once upon\n"), strict=True):
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    return notebook


def test_colab_finds_the_repository(small):
    badge, install, text = (cell.source for cell in small.cells[:3])
    assert f"{build.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/00_small.ipynb" in badge
    assert f'REPOSITORY = "{build.REPOSITORY}"' in install
    assert "git clone -q --depth 1 {REPOSITORY} " in install
    assert f"({build.REPOSITORY}/blob/main/slm_jax/model.py)" in text
    assert f"({build.REPOSITORY}/blob/main/notebooks/01_tokenization.ipynb)" in text


@pytest.mark.parametrize(
    ("cell", "printed", "differs"),
    [
        (3, "loss 1.5 tokens 2000", False),
        (3, "loss 1.51 tokens 2,000", False),
        (3, "loss 1.6 tokens 2000", False),  # within the last printed digit
        (3, "loss 1.7 tokens 2000", True),
        (3, "loss 1.5 tokens 2001", True),
        (3, "loss nan tokens 2000", True),
        (3, "loss 1.5 words 2000", True),
        (3, "loss 1.5", True),
        (4, "seconds 77", False),
        (4, "minutes 77", True),
        (5, "a time", False),
    ],
)
def test_stale_outputs_are_found(small, cell, printed, differs):
    other = nbformat.from_dict(small)
    other.cells[cell].outputs[0].text = printed + "\n"
    assert bool(build.differences(small, other)) == differs


def test_missing_outputs_and_changed_cells_are_found(small):
    other = nbformat.from_dict(small)
    other.cells[3].outputs = []
    assert "cell 3" in build.differences(small, other)[0]
    other.cells[3].source += "  # changed"
    assert "build.py" in build.differences(small, other)[0]


def test_outputs_are_kept_only_with_the_same_code(small):
    other = nbformat.from_dict(small)
    other.cells[3].outputs, other.cells[2].source = [], "Other text"
    build.keep_outputs(small, other)
    assert other.cells[3].outputs == small.cells[3].outputs
    other.cells[3].source = "x = 3"
    with pytest.raises(ValueError, match="code has changed"):
        build.keep_outputs(small, other)


@pytest.mark.slow
def test_solutions_are_executed(small):
    assert build.differences(small, build.execute(small)) == []
    small.cells[2].source = small.cells[2].source.replace("x == 1", "x == 2")
    with pytest.raises(CellExecutionError, match="assert x == 2"):
        build.execute(small)

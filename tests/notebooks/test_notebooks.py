"""Each notebook runs, its outputs are those of its text, and it has what a reader was promised."""

import base64
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
import build

SOURCES = build.sources()


def test_all_steps_are_there():
    stems = [path.stem for path in SOURCES]
    numbers = [stem.split("_")[0] for stem in stems]
    assert numbers == [*(f"{n:02}" for n in range(1, 11)), "11a", "11b", "attention", "quickstart"]
    assert {"attention_explorer", "quickstart_colab"} <= set(stems)
    assert {path.stem for path in build.HERE.glob("*.ipynb")} == set(stems)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_has_what_was_promised(source):
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    text = source.read_text()
    links = re.findall(r"\]\((\.\./[^)#]+|\w+\.py)", text)
    for link in links:
        assert (source.parent / link).exists(), link
    assert any(link.startswith("../slm_jax/") for link in links), "no link to the library"
    outputs = [output for cell in built.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures, "no picture"
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") and len(picture) > 2_000 for picture in pictures)
    assert not [output for output in outputs if output.get("name") == "stderr"], "warnings in the outputs"
    assert "assert " in text
    assert 2 <= len(build.solutions(built)) <= 4
    assert source.with_suffix(".ipynb").stat().st_size < 1_500_000


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_was_built_from_its_text(source):
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert build.cells(built) == build.cells(build.assemble(source))


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_it_runs_and_its_outputs_are_fresh(source):
    built = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert build.differences(built, build.execute(build.assemble(source))) == []


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    source = tmp_path_factory.mktemp("notebook") / "00_small.py"
    source.write_text(SMALL)
    return build.execute(build.assemble(source))


def test_links_become_addresses_and_colab_can_open_it(small):
    badge, install, text = (cell.source for cell in small.cells[:3])
    assert f"{build.REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/00_small.ipynb" in badge
    assert f"git clone -q --depth 1 {build.REPOSITORY} /content/slm_jax" in install
    assert f"({build.REPOSITORY}/blob/main/slm_jax/model.py)" in text
    assert f"({build.REPOSITORY}/blob/main/notebooks/01_tokenization.ipynb)" in text


@pytest.mark.parametrize(
    ("cell", "printed", "seen"),
    [
        (3, "loss 1.5 tokens 2000", False),
        (3, "loss 1.51 tokens 2,000", False),
        (3, "loss 1.6 tokens 2000", False),  # the last digit that is printed
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
def test_a_stale_output_is_seen(small, cell, printed, seen):
    other = nbformat.from_dict(small)
    other.cells[cell].outputs[0].text = printed + "\n"
    assert bool(build.differences(small, other)) == seen


def test_a_missing_picture_and_a_changed_cell_are_seen(small):
    other = nbformat.from_dict(small)
    other.cells[3].outputs = []
    assert "showed" in build.differences(small, other)[0]
    other.cells[3].source += "  # changed"
    assert build.differences(small, other) == ["the cells are not those of the text: python notebooks/build.py"]


def test_outputs_are_kept_only_with_the_same_code(small):
    other = nbformat.from_dict(small)
    other.cells[3].outputs, other.cells[2].source = [], "Other text"
    build.keep_outputs(small, other)
    assert other.cells[3].outputs == small.cells[3].outputs
    other.cells[3].source = "x = 3"
    with pytest.raises(ValueError, match="the code has changed"):
        build.keep_outputs(small, other)


def test_a_wrong_solution_fails(small, tmp_path):
    source = tmp_path / "00_small.py"
    source.write_text(SMALL.replace("x == 1", "x == 2"))
    with pytest.raises(CellExecutionError, match="assert x == 2"):
        build.execute(build.assemble(source))

"""Build the notebooks: execute each NAME.py (jupytext's percent format, the file to edit) into NAME.ipynb with outputs.

    python notebooks/build.py                     # all notebooks; prints the seconds of each
    python notebooks/build.py 04_causal_attention # only this one
    python notebooks/build.py --text              # update text and links only; keep the outputs

This script adds the Colab badge and the cell that installs slm_jax, and turns links to files of this repository into
addresses, all from the repository's address in pyproject.toml. Each notebook is executed in its own folder, with a copy
of ``data/``. The code of the folded solutions (``<details>``) is executed after the last cell; its output is dropped.

The tests execute each notebook again and compare: `assemble`, `execute`, `differences`.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
REPOSITORY = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
CELL_SECONDS = 600  # timeout of one cell, generous for slow machines
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")

XLA_FLAGS = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

AS_NEW = """\
%cd -q {folder}
%reset -f
__import__("numpy").set_printoptions(precision=8, suppress=False)"""
BADGE = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](\
https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}.ipynb)"""
INSTALL = """\
import sys
from importlib.metadata import version

REPOSITORY = "{repository}"  # if not reachable: the Git address or folder of your copy of slm_jax
if "google.colab" in sys.modules:  # elsewhere slm_jax is installed already
    jax_before = version("jax")
    !test -d /content/slm_jax || git clone -q --depth 1 {{REPOSITORY}} /content/slm_jax
    !pip install -q /content/slm_jax
    %cd /content/slm_jax/notebooks
    assert version("jax") == jax_before  # otherwise: disconnect and delete the runtime, and run again"""


def sources() -> list[Path]:
    """Return the sources of all notebooks, in reading order."""
    return sorted(HERE.glob("*_*.py"))


def assemble(source: Path) -> NotebookNode:
    """Return the notebook of a source, not executed, with badge, install cell, addresses and stable cell ids."""
    notebook = jupytext.read(source, fmt="py:percent")
    path = REPOSITORY.removeprefix("https://github.com/")
    head = [
        nbformat.v4.new_markdown_cell(BADGE.format(path=path, name=source.stem)),
        nbformat.v4.new_code_cell(INSTALL.format(repository=REPOSITORY)),
    ]
    cells = [*head, *notebook.cells]
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index}"
        cell["metadata"] = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "markdown":
            cell["source"] = re.sub(r"\]\(\.\./([^)]+)\)", rf"]({REPOSITORY}/blob/main/\1)", cell.source)
            cell["source"] = re.sub(r"\]\((\w+)\.py\)", rf"]({REPOSITORY}/blob/main/notebooks/\1.ipynb)", cell.source)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def execute(notebook: NotebookNode, kernel: KernelManager | None = None) -> NotebookNode:
    """Run all cells, then all solutions, in a new folder; return the notebook with the cells' outputs.

    Args:
        notebook: what `assemble` returned.
        kernel: runs the cells after forgetting all variables, and stays alive; None: a new one.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell or a solution failed; the message has the cell and the traceback.
    """
    whole = nbformat.from_dict(notebook)
    whole.cells = [*notebook.cells, *(nbformat.v4.new_code_cell(code) for code in solutions(notebook))]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE / "data", Path(folder) / "data")
        # Start with an empty compile cache; compile faster than by default.
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "XLA_FLAGS": XLA_FLAGS}
        if kernel:
            whole.cells.insert(0, nbformat.v4.new_code_cell(AS_NEW.format(folder=folder)))
        NotebookClient(
            whole,
            km=kernel,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute(env=environment)
    first = 1 if kernel else 0
    whole.cells = whole.cells[first : first + len(notebook.cells)]
    whole.metadata = notebook.metadata
    return whole


def solutions(notebook: NotebookNode) -> list[str]:
    """Return the code of a notebook's folded solutions."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    folded = [block for text in texts for block in re.findall(r"<details>.*?</details>", text, re.S)]
    return [code for block in folded for code in re.findall(r"```python\n(.*?)```", block, re.S)]


def differences(old: NotebookNode, new: NotebookNode) -> list[str]:
    """Describe where two notebooks differ: in their cells or in the cells' outputs.

    Integers must be equal and fractions agree to 2%, because losses vary a little between machines. Cells tagged
    ``varies`` (times, long trainings) are compared by words only, cells tagged ``sampled`` (generated text) by the
    kinds of their outputs. Pictures need only be present.
    """
    if cells(old) != cells(new):
        return ["the cells differ from the source: run python notebooks/build.py"]
    found = []
    for index, (one, other) in enumerate(zip(old.cells, new.cells, strict=True)):
        kinds = [[_kind(output) for output in cell.get("outputs", [])] for cell in (one, other)]
        texts = ["".join(_text(output) for output in cell.get("outputs", [])) for cell in (one, other)]
        if kinds[0] != kinds[1]:
            found.append(f"cell {index} had outputs {kinds[0]}, now {kinds[1]}")
        elif "sampled" not in (tags := other.metadata.get("tags", [])) and not _same(
            *texts, numbers="varies" not in tags
        ):
            found.append(f"cell {index} printed {texts[0]!r}, now {texts[1]!r}")
    return found


def cells(notebook: NotebookNode) -> list[tuple[str, str, list[str]]]:
    """Return kind, source and tags of all cells."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


def _kind(output: NotebookNode) -> str:
    return ", ".join(sorted(output.get("data", {output.get("name", output.output_type): ""})))


def _text(output: NotebookNode) -> str:
    return str(output.get("text", output.get("data", {}).get("text/plain", "")))


def _same(one: str, other: str, numbers: bool) -> bool:
    """Return whether two texts agree up to small changes of numbers (without ``numbers``: any change)."""
    if NUMBER.sub("0", one).split() != NUMBER.sub("0", other).split():
        return False
    return not numbers or all(map(_close, NUMBER.findall(one), NUMBER.findall(other)))


def _close(one: str, other: str) -> bool:
    """Return whether two numbers are equal, or fractions that agree to 2%, one last digit, or 1e-5."""
    a, b = (float(number.replace(",", "")) for number in (one, other))
    if not {".", "e"} & set(one + other):
        return a == b
    last_digit = 1.01 * 10.0 ** -len(one.partition("e")[0].partition(".")[2]) if "e" not in one else 0.0
    return abs(a - b) <= max(0.02 * max(abs(a), abs(b)), last_digit, 1e-5)


def keep_outputs(old: NotebookNode, new: NotebookNode) -> None:
    """Copy the outputs of an older build of a notebook.

    Raises:
        ValueError: the code, apart from the install cell, has changed.
    """
    before, after = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (old, new))
    if [cell.source for cell in before[1:]] != [cell.source for cell in after[1:]]:
        raise ValueError("the code has changed since the notebook was built; run without --text")
    for cell, executed in zip(after, before, strict=True):
        cell.outputs, cell.execution_count = executed.outputs, executed.execution_count


def main() -> None:
    """Build the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="without .py; default: all")
    parser.add_argument("--text", action="store_true", help="do not execute: update the text, keep the outputs")
    options = parser.parse_args()
    chosen = [path for path in sources() if not options.names or path.stem in options.names]
    if missing := set(options.names) - {path.stem for path in chosen}:
        parser.error(f"no such notebook: {', '.join(sorted(missing))}; expected {', '.join(p.stem for p in sources())}")
    for source in chosen:
        built, began = assemble(source), time.monotonic()
        target = source.with_suffix(".ipynb")
        if options.text:
            try:
                keep_outputs(nbformat.read(target, as_version=4), built)
            except (FileNotFoundError, ValueError) as error:
                parser.error(f"{target.name}: {error}")
        else:
            built = execute(built)
        nbformat.write(built, target)
        print(
            f"{target.name:<32} {time.monotonic() - began:6.1f} s  {target.stat().st_size / 1000:8.0f} kB", flush=True
        )


if __name__ == "__main__":
    main()

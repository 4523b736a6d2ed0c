"""Golden files: what other programs computed, read with our model of their weights."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from slm_jax.runs import load_gpt2


def read_golden(name, folder, head=None):
    """Return our configuration and parameters, their tensors by kind (what is before the first slash), and figures.

    ``head`` is a tensor that our GPT-2 does not have.
    """
    trees = {}
    with safe_open(Path(__file__).parent / "goldens" / f"{name}.safetensors", "numpy") as file:
        figures = json.loads(file.metadata()["golden"])
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, _, rest = key.partition("/")
            trees.setdefault(kind, {})[rest] = file.get_tensor(key)
    (folder / "config.json").write_text(json.dumps(figures["config"]))
    state = {name: value for name, value in trees["state"].items() if name != head}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return *load_gpt2(folder), trees, figures


def read_tensors(name):
    """Return another program's files, as bytes by name, and the tensors that it wrote into them."""
    with safe_open(Path(__file__).parent / "goldens" / f"{name}.safetensors", "numpy") as file:
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    files = {key.removeprefix("file/"): value for key, value in content.items() if key.startswith("file/")}
    return files, {key: value for key, value in content.items() if not key.startswith("file/")}

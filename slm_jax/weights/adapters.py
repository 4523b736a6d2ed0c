"""LoRA adapters: save them to a file of their own and load them; :mod:`slm_jax.nn.lora` applies and merges them."""

from pathlib import Path

from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.nn.axes import ADAPTER
from slm_jax.nn.lora import TARGETS, TRAINED, add_adapters, find_targets, init_adapters, merge_adapters, split_adapters
from slm_jax.weights.trees import Params, read_tree, write_tree

__all__ = [
    "add_adapters",
    "find_targets",
    "init_adapters",
    "load_adapters",
    "merge_adapters",
    "save_adapters",
    "split_adapters",
]


def save_adapters(file: str | Path, params: Params) -> Path:
    """Write the adapters of a params tree, and nothing else of it, as safetensors with a SHA-256 each.

    Raises:
        InputError: a tree without adapters.
    """
    adapters = split_adapters(params)[1]
    if not adapters:
        raise InputError("params has no adapters; expected those of a model trained with trainable: lora")
    return write_tree(Path(file), adapters)


def load_adapters(file: str | Path) -> Params:
    """Read what :func:`save_adapters` wrote; :func:`add_adapters` puts it into a params tree.

    Raises:
        InputError: no such file, or one that is damaged or holds no adapters.
    """
    adapters = read_tree(Path(file))
    flat = flatten_dict(adapters, sep="/")
    places = {path.rpartition("/")[0] for path in flat}
    known = {place + ADAPTER for place in TARGETS.values()}
    needed = {f"{place}/{name}" for place in places for name in (*TRAINED, "lora_scale")}
    if not flat or not places <= known or not needed <= flat.keys():
        raise InputError(f"{file}: holds no adapters of slm_jax; expected a file that save_adapters wrote")
    return adapters

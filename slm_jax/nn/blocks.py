"""Forms of the params tree: the blocks in one stack, in segments or apart; and trees of parts merged into one."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from slm_jax.errors import InputError
from slm_jax.nn.axes import STACK, Params


def segment_lengths(params: Mapping[str, Any]) -> dict[str, int]:
    """Return the name and the number of blocks of each segment in a params tree, first to last."""
    names = sorted((n for n in params if n.startswith(STACK)), key=lambda n: int(n.partition("_")[2] or 0))
    return {name: jax.tree.leaves(params[name])[0].shape[0] for name in names}


def split_blocks(params: Params, *cuts: int) -> Params:
    """Cut the stack of blocks into consecutive segments, ``blocks_0``, ``blocks_1`` …, after ``cuts`` blocks each.

    The model runs any such form. Freezing everything but ``blocks_1`` and what follows it saves the backward pass
    through ``blocks_0``: pass the two parts as separate trees and differentiate one of them.

    Raises:
        InputError: cuts that are not ascending, or not between the first block and the last.
    """
    length = segment_lengths(params)[STACK]
    bounds = [0, *cuts, length]
    for cut, end in itertools.pairwise(bounds):
        if not cut < end:
            raise InputError(f"cannot cut {length} blocks after {list(cuts)}; expected ascending, 1 to {length - 1}")
    segments = {
        f"{STACK}_{i}": jax.tree.map(lambda leaf, start=start, end=end: leaf[start:end], params[STACK])
        for i, (start, end) in enumerate(itertools.pairwise(bounds))
    }
    return {**{name: value for name, value in params.items() if name != STACK}, **segments}


def unstack_blocks(params: Params) -> Params:
    """Give each block arrays of its own: the fastest form for generation, which would slice the stack for every token.

    The result has ``blocks_0``, ``blocks_1`` … for ``blocks``; each leaf in them keeps a first axis, of 1.
    """
    if STACK not in params and set(segment_lengths(params).values()) == {1}:
        return params
    return _unstack(join_blocks(params))


@jax.jit
def _unstack(params: Params) -> Params:
    return split_blocks(params, *range(1, segment_lengths(params)[STACK]))


def join_blocks(params: Params) -> Params:
    """Undo :func:`split_blocks`: one stack ``blocks`` again; a tree that has it is returned as it is."""
    if STACK in params:
        return params
    names = list(segment_lengths(params))
    rest = {name: value for name, value in params.items() if name not in names}
    stack = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(params[name] for name in names))
    return {**rest, STACK: stack}


def merge_params(*trees: Params) -> Params:
    """Merge disjoint trees into one."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat.update(flatten_dict(tree, sep="/"))
    return unflatten_dict(flat, sep="/")

"""Capture a model's intermediate results, and ablate parts of it, without changing the model.

Flax lets a function see every call of a submodule (``flax.linen.intercept_methods``): :func:`capture` sows the wanted
inputs and outputs of those calls, :func:`ablate` replaces them. Each block runs unstacked, so that its
path contains its index. Both are pure functions: ``jax.jit``, ``jax.grad`` and ``jax.vmap`` work.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, GPTModel, Params, axis_sizes
from slm_jax.nn.axes import ADAPTER, FIRST_POINT, INPUT_POINTS, LAST_POINTS, POINTS, STACK
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.nn.dense import DenseParams

# A block's submodules that are watched by their input: the point's name, the axis of its units, the argument's index.
_INPUTS = {
    matrix + suffix: (point, axis, index)
    for point, (matrix, axis) in INPUT_POINTS.items()
    for suffix, index in (("", 0), (ADAPTER, 1))
}

_OPTIONS = ("positions", "segment_ids", "lengths")


def capture(
    model: GPTModel,
    params: Params,
    tokens: Int[Array, "batch seq"],
    names: str | Sequence[str],
    *,
    ablate: str | Sequence[str] = (),
    **options: Any,
) -> tuple[Float[Array, "batch ..."], dict[str, Array]]:
    """Run a model without dropout, and return its logits and its intermediate results.

    ========================  ================================================================  ======================
    name                      what                                                              shape
    ========================  ================================================================  ======================
    ``embeddings``            what enters the first block                                       (batch, seq, emb)
    ``blocks/3``              the residual stream after block 3 (the first is block 0)          (batch, seq, emb)
    ``blocks/3/norm1``        what attention reads; ``norm2``: what the feed-forward reads      (batch, seq, emb)
    ``blocks/3/attn``         what attention adds to the stream                                 (batch, seq, emb)
    ``blocks/3/attn/heads``   each head's output, before ``out_proj``                           (batch, seq, heads, dim)
    ``blocks/3/attn/weights`` how much each query (third axis) takes of each key                (batch, heads, seq, seq)
    ``blocks/3/attn/q``       queries; ``k``: keys, ``v``: values; before QK norm and RoPE      (batch, seq, heads, dim)
    ``blocks/3/ff``           what the feed-forward adds to the stream                          (batch, seq, emb)
    ``blocks/3/ff/hidden``    its neurons, after GELU or SwiGLU                                 (batch, seq, hidden)
    ``final_norm``            what the head reads                                               (batch, seq, emb)
    ``logits``                the logits                                                        (batch, seq, vocab)
    ========================  ================================================================  ======================

    Args:
        model: a :class:`GPTModel`, or a ``GPTClassifier`` (with ``lengths=``).
        params: its parameters, the blocks stacked or not.
        tokens: int32 (batch, seq).
        names: one or several of the table; ``*`` stands for any text between two slashes: ``blocks/*/attn/weights``.
        ablate: parts to remove, as for :func:`ablate`.
        **options: arrays that the model takes: ``positions``, ``segment_ids``, a classifier's ``lengths``.

    Returns:
        (logits, seen): ``seen`` has an array for each name, in the order of the model and in the dtype that it computes
        in. If weights are captured, attention is computed explicitly, whatever ``cfg.attention`` is.

    Raises:
        InputError: a name that the model does not have; another option.
    """
    blocks = [f"{STACK}/{i}{part}" for i in range(model.cfg.n_layers) for part in POINTS]
    points = [FIRST_POINT, *blocks, *LAST_POINTS]  # in the order of the model
    found, kept = _find(names, points, model.cfg), _masks(ablate, model.cfg)
    wanted = tuple(name for name in points if name in found)
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(f"capture and ablate take no {unknown[0]}; expected {', '.join(_OPTIONS)}")
    logits, seen = _run(model, unstack_blocks(params), tokens, kept, options, wanted=wanted)
    seen[LAST_POINTS[-1]] = logits
    return logits, {name: seen[name] for name in wanted}


def ablate(
    model: GPTModel, params: Params, tokens: Int[Array, "batch seq"], names: str | Sequence[str], **options: Any
) -> Float[Array, "batch ..."]:
    """Run a model without dropout and without some of its parts, and return its logits.

    ============================  ==============================================================
    name                          effect
    ============================  ==============================================================
    ``blocks/3``                  is skipped: the residual stream bypasses it
    ``blocks/3/attn``             attention adds nothing to the stream
    ``blocks/3/attn/heads/5``     this head's output is 0 before ``out_proj``
    ``blocks/3/ff``               the feed-forward adds nothing to the stream
    ``blocks/3/ff/hidden/17``     this neuron is 0 after GELU
    ============================  ==============================================================

    Names, ``*`` and the other arguments as for :func:`capture`.
    """
    return capture(model, params, tokens, (), ablate=names, **options)[0]


@functools.partial(jax.jit, static_argnames=("model", "wanted"))
def _run(
    model: GPTModel,
    params: Params,
    tokens: Array,
    kept: dict[str, Array],
    options: dict[str, Any],
    *,
    wanted: tuple[str, ...],
) -> tuple[Array, dict[str, Array]]:
    if any(name.endswith("/weights") for name in wanted):
        model = model.clone(cfg=dataclasses.replace(model.cfg, attention="explicit"))
    watcher = _Watcher(model.cfg, frozenset(wanted), kept)
    with nn.intercept_methods(watcher):
        logits, state = model.apply({"params": params}, tokens, mutable=["intermediates"], **options)
    sown = flatten_dict(state.get("intermediates", {}))
    # What was sown in a block has the first axis of its stack of one.
    return logits, {
        path[-1]: value[0][0] if path[0].startswith(f"{STACK}_") else value[0] for path, value in sown.items()
    }


@dataclasses.dataclass(frozen=True)
class _Watcher:
    """Intercepts the calls of submodules: sows captured values and zeroes ablated parts."""

    cfg: GPTConfig
    wanted: frozenset[str]
    kept: dict[str, Array]

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        """Do one call, ``call(*args, **kwargs)``, of the module and method that Flax's ``context`` names."""
        module = context.module
        if context.method_name != "__call__" or not module.path or isinstance(module, DenseParams):
            return call(*args, **kwargs)
        stack, *rest = module.path
        if stack.startswith(f"{STACK}_"):
            block, part = stack.replace("_", "/"), "".join(f"/{name}" for name in rest)
            if part in _INPUTS:
                return call(*self._watch_input(module, block, part, args), **kwargs)
            return self._watch_output(module, block, part, args, functools.partial(call, *args, **kwargs))
        output = call(*args, **kwargs)
        self._sow(module, FIRST_POINT if stack == "drop" else stack, output)
        return output

    def _watch_input(self, module: nn.Module, block: str, part: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments for a submodule whose input has units: the heads, or the neurons."""
        point, axis, index = _INPUTS[part]
        name, x = block + point, args[index]
        if name in self.kept:
            units = x.reshape(*x.shape[:2], axis_sizes(self.cfg)[axis], -1)
            x = jnp.where(self.kept[name][:, None], units, 0).reshape(x.shape)
        if index == 0:
            self._sow(module, name, x)
        return (*args[:index], x, *args[index + 1 :])

    def _watch_output(
        self, module: nn.Module, block: str, part: str, args: tuple[Any, ...], call: Callable[..., Any]
    ) -> Any:
        """Call a submodule of a block, or the block itself, and return its output."""
        name = block + part.removesuffix(ADAPTER)  # the query is what its adapter, if there is one, made of it
        if f"{name}/weights" in self.wanted:
            output, weights = call(return_weights=True)
            self._sow(module, f"{name}/weights", weights)
        else:
            output = call()
        if part == "":
            stream, cache = output
            stream = jnp.where(self.kept[name], stream, args[0]) if name in self.kept else stream
            self._sow(module, name, stream)
            return stream, cache
        if name in self.kept:
            output = jnp.where(self.kept[name], output, 0)
        self._sow(module, name, output)
        return output

    def _sow(self, module: nn.Module, name: str, value: Array) -> None:
        if name in self.wanted:
            module.sow("intermediates", name, value)


def _find(patterns: str | Sequence[str], names: list[str], cfg: GPTConfig) -> set[str]:
    found: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        regex = re.compile(re.escape(pattern).replace(r"\*", "[^/]*"))
        matches = {name for name in names if regex.fullmatch(name)}
        if not matches:
            model = f"model of {cfg.n_layers} layers with {cfg.n_heads} heads each"
            raise InputError(f"{pattern!r} is nowhere in this {model}; expected a name such as {', '.join(names[1:4])}")
        found |= matches
    return found


def _masks(patterns: str | Sequence[str], cfg: GPTConfig) -> dict[str, np.ndarray]:
    """Return for each part whether it is kept, for heads and neurons one flag each; nothing if nothing is ablated.

    They are arguments of the compiled program, which is therefore the same whichever head is ablated.
    """
    if patterns == ():
        return {}
    units = {"": [""], "/attn": [""], "/ff": [""]}
    units |= {point: [f"/{i}" for i in range(axis_sizes(cfg)[axis])] for point, (_, axis) in INPUT_POINTS.items()}
    parts = {f"{STACK}/{i}{part}": names for i in range(cfg.n_layers) for part, names in units.items()}
    removed = _find(patterns, [part + name for part, names in parts.items() for name in names], cfg)
    return {part: np.array([part + name not in removed for name in names]) for part, names in parts.items()}

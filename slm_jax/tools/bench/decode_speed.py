"""The speed of generation: the prompt in one pass, then token after token, and the time to read the weights."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, Params, axis_sizes
from slm_jax.nn.axes import Axes, map_axes
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.tools.bench.ceilings import Ceilings
from slm_jax.tools.bench.result import Result, bound_rows
from slm_jax.tools.bench.timing import Clock, Timing
from slm_jax.training.hardware import forward_flops


def bench_generate(
    cfg: GPTConfig,
    params: Params,
    ceilings: Ceilings,
    *,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    warmup: int,
    repeats: int,
) -> Result:
    """Measure greedy generation from random prompts, for each number of prompts at a time.

    ``new_tokens`` is at least 2, as the first comes with the prompt; ``warmup`` at least 1, which compiles.
    """
    if prompt_tokens + new_tokens > cfg.context_length:
        raise InputError(
            f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens} are more than the model's context of "
            f"{cfg.context_length}; lower one of them"
        )
    params = unstack_blocks(params)
    cases: list[dict[str, Any]] = []
    rows: dict[str, str] = {}
    series: dict[str, tuple[float, ...]] = {}
    bars: dict[str, float] = {}
    limits: dict[str, float] = {}
    for batch_size in batch_sizes:
        prefill, decode = time_generation(
            cfg, params, batch_size, prompt_tokens, new_tokens, warmup=warmup, repeats=repeats
        )
        seen = prompt_tokens + new_tokens / 2  # on average
        n_bytes = bytes_per_step(cfg, params, batch_size * seen)
        bounds = ceilings.bounds(forward_flops(cfg, batch_size, seen, batch_size), n_bytes)
        prompt_flops = forward_flops(cfg, batch_size * prompt_tokens, prompt_tokens / 2, batch_size)
        share = bounds["memory"] / decode.median if "memory" in bounds else None
        case = {
            "batch_size": batch_size,
            "prefill_seconds": prefill.to_dict(),
            "prefill_tokens_per_second": batch_size * prompt_tokens / prefill.median,
            "prefill_bounds_seconds": ceilings.bounds(prompt_flops, bytes_per_step(cfg, params, 0)),
            "decode_step_seconds": decode.to_dict(),
            "decode_tokens_per_second": batch_size / decode.median,
            "decode_bounds_seconds": bounds,
            "bytes_per_step": n_bytes,
            "bandwidth_share": share,
        }
        cases.append(case)
        name, token = f"batch {batch_size}", f"a token, batch {batch_size}"
        rows |= {
            f"{name}: prompt of {prompt_tokens}": f"{prefill}, {case['prefill_tokens_per_second']:,.0f} tokens/s",
            f"{name}: each token after": f"{decode}, {case['decode_tokens_per_second']:,.1f} tokens/s",
            **bound_rows(bounds, ceilings, f"{name}: "),
            f"{name}: read a token": f"{n_bytes / 1e6:,.0f} MB"
            + ("" if share is None else f", {share:.0%} of the bandwidth"),
        }
        series[token], bars[token] = decode.milliseconds, 1e3 * decode.median
        limits |= {f"least by {kind}, batch {batch_size}": 1e3 * bound for kind, bound in bounds.items()}
    bandwidth = f"{ceilings.bandwidth / 1e9:,.4g} GB/s" if ceilings.bandwidth else "unknown"
    in_cache = any((case["bandwidth_share"] or 0) > 1 for case in cases)
    return Result(
        what="generate",
        config={**dataclasses.asdict(cfg), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
        figures={"cases": cases, "ceilings": dataclasses.asdict(ceilings)},
        rows={**rows, "bandwidth of the memory": f"{bandwidth} ({ceilings.source})"},
        unit="ms",
        bars=bars,
        series=series,
        limits=limits,
        notes=("A share above 100%: the weights fit into the processor's caches.",) if in_cache else (),
    )


def time_generation(
    cfg: GPTConfig,
    params: Params,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    warmup: int,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> tuple[Timing, Timing]:
    """Return the time to the first new token of all rows, and that of each further one.

    Each repeat generates one token, and then all of them; the median time of the first is subtracted from the latter.
    """
    model, n_ids = GPTModel(cfg), cfg.unpadded_vocab_size or cfg.vocab_size
    prompts = np.random.default_rng(0).integers(n_ids, size=(batch_size, prompt_tokens), dtype=np.int32)

    def seconds(n: int) -> float:
        began = clock()
        np.asarray(generate(model, params, prompts, max_new_tokens=n, temperature=0.0))
        return clock() - began

    for _ in range(warmup):
        seconds(1), seconds(new_tokens)
    pairs = [(seconds(1), seconds(new_tokens)) for _ in range(repeats)]
    prefill = Timing(tuple(first for first, _ in pairs))
    return prefill, Timing(tuple((whole - prefill.median) / (new_tokens - 1) for _, whole in pairs))


def bytes_per_step(cfg: GPTConfig, params: Params, cached_tokens: float) -> float:
    """Return the bytes that one step over all rows reads: the weights that are multiplied, and the filled cache."""

    def n_bytes(axes: Axes | None, leaf: jax.Array) -> int:
        looked_up = axes is not None and axes.is_table and not (cfg.tie_weights and "vocab" in axes.inputs)
        return 0 if looked_up else leaf.nbytes

    sizes = axis_sizes(cfg)
    cached = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * jnp.dtype(cfg.dtype).itemsize
    return sum(jax.tree.leaves(map_axes(n_bytes, params))) + cached * cached_tokens

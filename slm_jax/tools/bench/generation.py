"""The speed of generation: the prompt in one pass, then token after token, and the time to read the weights."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, Params, axis_sizes, get_gpt_config, init_params
from slm_jax.nn.axes import Axes, map_axes
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.runs import load_model
from slm_jax.tasks.config import RunConfig
from slm_jax.tools.bench.instruments import Clock, Peak, Timing, find_ceilings
from slm_jax.tools.bench.result import Result
from slm_jax.training.config import ModelConfig
from slm_jax.training.hardware import forward_flops, run_dtype


def measure_generation(
    *,
    run: str | None,
    model: ModelConfig,
    batch_sizes: str,
    prompt_tokens: int,
    new_tokens: int,
    warmup: int,
    repeats: int,
    peak: Peak = None,
) -> Result:
    """Measure greedy generation from random prompts; ``run`` None: with random weights of the shape ``model``."""
    if run is None:
        cfg, params = _random_model(model)
    else:
        loaded = load_model(run)
        cfg, params = loaded.model_config, loaded.params
    if prompt_tokens + new_tokens > cfg.context_length:
        raise InputError(
            f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens} are more than the model's context of "
            f"{cfg.context_length}; lower one of them"
        )
    ceilings = find_ceilings(cfg.dtype, None, peak)
    params = unstack_blocks(params)
    cases: list[dict[str, Any]] = []
    for batch_size in map(int, batch_sizes.split(",")):
        prefill, decode = time_generation(
            cfg, params, batch_size, prompt_tokens, new_tokens, warmup=warmup, repeats=repeats
        )
        seen = prompt_tokens + new_tokens / 2  # on average
        n_bytes = bytes_per_step(cfg, params, batch_size * seen)
        bounds = ceilings.bounds(forward_flops(cfg, batch_size, seen, batch_size), n_bytes)
        prompt_flops = forward_flops(cfg, batch_size * prompt_tokens, prompt_tokens / 2, batch_size)
        cases.append(
            {
                "batch_size": batch_size,
                "prefill_seconds": prefill,
                "prefill_tokens_per_second": batch_size * prompt_tokens / prefill.median,
                "prefill_bounds_seconds": ceilings.bounds(prompt_flops, bytes_per_step(cfg, params, 0)),
                "decode_step_seconds": decode,
                "decode_tokens_per_second": batch_size / decode.median,
                "decode_bounds_seconds": bounds,
                "bytes_per_step": n_bytes,
                "bandwidth_share": bounds["memory"] / decode.median if "memory" in bounds else None,
            }
        )
    in_cache = any((case["bandwidth_share"] or 0) > 1 for case in cases)
    return Result(
        what="generate",
        config={**dataclasses.asdict(cfg), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
        figures={"cases": cases, "ceilings": ceilings},
        notes=("A share above 100%: the weights fit into the processor's caches.",) if in_cache else (),
    )


def _random_model(section: ModelConfig) -> tuple[GPTConfig, Params]:
    """Make a model with random weights; its dtype is that of its weights, too."""
    config = RunConfig(model=section)
    dtype = run_dtype(config)
    cfg = config.gpt_config(section.vocab_size or get_gpt_config(section.preset).vocab_size, dtype)
    cfg = dataclasses.replace(cfg, param_dtype=section.param_dtype or dtype)
    return cfg, jax.jit(functools.partial(init_params, cfg))(jax.random.key(0))


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
    """Return the time to the first new token of all rows, and that of each further one."""
    model, n_ids = GPTModel(cfg), cfg.unpadded_vocab_size or cfg.vocab_size
    prompts = np.random.default_rng(0).integers(n_ids, size=(batch_size, prompt_tokens), dtype=np.int32)

    def seconds(n: int) -> float:
        began = clock()
        np.asarray(generate(model, params, prompts, max_new_tokens=n, temperature=0.0))
        return clock() - began

    for _ in range(warmup):
        seconds(1), seconds(new_tokens)
    # The median time of the first token is subtracted from that of all.
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

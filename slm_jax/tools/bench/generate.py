"""How fast a model generates: the prompt in one pass, then token after token, beside the reading of the weights."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTConfig, GPTModel, Params, forward_flops
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.tools.bench.ceilings import Ceilings
from slm_jax.tools.bench.measure import Clock, Timing
from slm_jax.tools.bench.result import Result, bound_rows


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

    Args:
        cfg: the model.
        params: its parameters.
        ceilings: of one device, which generates alone.
        batch_sizes: how many prompts at a time.
        prompt_tokens: tokens of each.
        new_tokens: tokens to add; at least 2, as the first comes with the prompt.
        warmup: generations that do not count, one at least, which compiles.
        repeats: generations that do.

    Raises:
        InputError: more tokens than the model's context.
    """
    if prompt_tokens + new_tokens > cfg.context_length:
        raise InputError(
            f"prompt_tokens {prompt_tokens} and new_tokens {new_tokens} are more than the model's context of "
            f"{cfg.context_length}; lower one of them, so that every token comes from the cache"
        )
    params = unstack_blocks(params)
    cases: list[dict[str, Any]] = []
    rows: dict[str, str] = {}
    for batch_size in batch_sizes:
        prefill, decode = time_generation(
            cfg, params, batch_size, prompt_tokens, new_tokens, warmup=warmup, repeats=repeats
        )
        seen = prompt_tokens + new_tokens / 2  # on average
        n_bytes = bytes_per_step(cfg, params, batch_size * seen)
        bounds = ceilings.bounds(forward_flops(cfg, batch_size, seen, batch_size), n_bytes)
        of_prompt = forward_flops(cfg, batch_size * prompt_tokens, prompt_tokens / 2, batch_size)
        case = {
            "batch_size": batch_size,
            "prefill_seconds": prefill.to_dict(),
            "prefill_tokens_per_second": batch_size * prompt_tokens / prefill.median,
            "prefill_bounds_seconds": ceilings.bounds(of_prompt, bytes_per_step(cfg, params, 0)),
            "decode_step_seconds": decode.to_dict(),
            "decode_tokens_per_second": batch_size / decode.median,
            "decode_bounds_seconds": bounds,
            "bytes_per_step": n_bytes,
            "bandwidth_share": bounds["memory"] / decode.median if "memory" in bounds else None,
        }
        cases.append(case)
        name = f"batch {batch_size}"
        rows |= {
            f"{name}: prompt of {prompt_tokens}": f"{prefill}, {case['prefill_tokens_per_second']:,.0f} tokens/s",
            f"{name}: each token after": f"{decode}, {case['decode_tokens_per_second']:,.1f} tokens/s",
            **bound_rows(bounds, ceilings, f"{name}: "),
            f"{name}: read a token": _bytes_read(case),
        }
    limit = f"{(ceilings.bandwidth or 0) / 1e9:,.4g} GB/s" if ceilings.bandwidth else "not known"
    return Result(
        what="generate",
        config={**dataclasses.asdict(cfg), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens},
        figures={"cases": cases, "ceilings": dataclasses.asdict(ceilings)},
        rows={**rows, "bandwidth of the memory": f"{limit} ({ceilings.source})"},
        unit="ms",
        series={
            f"a token, batch {case['batch_size']}": tuple(1e3 * s for s in case["decode_step_seconds"]["repeats"])
            for case in cases
        },
        bars={f"a token, batch {case['batch_size']}": 1e3 * case["decode_step_seconds"]["median"] for case in cases},
        limits={
            f"least by {name}, batch {case['batch_size']}": 1e3 * bound
            for case in cases
            for name, bound in case["decode_bounds_seconds"].items()
        },
        notes=("A share above 100%: the weights fit into the processor's caches.",)
        if any((case["bandwidth_share"] or 0) > 1 for case in cases)
        else (),
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

    Each repeat generates one token, and then all of them: what the median of the first takes is not the further ones'.
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
    """Return what one step over all rows must read: the weights but for embeddings looked up, and the filled cache."""
    looked_up = ["pos_emb"] if cfg.tie_weights else ["pos_emb", "tok_emb"]
    weights = sum(leaf.nbytes for name in params if name not in looked_up for leaf in jax.tree.leaves(params[name]))
    return weights + 2 * cfg.n_layers * cfg.emb_dim * jnp.dtype(cfg.dtype).itemsize * cached_tokens


def _bytes_read(case: dict[str, Any]) -> str:
    share = case["bandwidth_share"]
    return f"{case['bytes_per_step'] / 1e6:,.0f} MB" + ("" if share is None else f", {share:.0%} of the bandwidth")

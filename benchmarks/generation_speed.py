"""Measure generation with GPT-2 small, ours against Hugging Face's on the same machine in the same run.

    python benchmarks/generation_speed.py
    python benchmarks/generation_speed.py --device gpu --dtype bfloat16

Both get the same weights (random ones of GPT-2 small, or --weights) and decode greedily with a cache: a prompt of 64
tokens and 128 new ones, one row and eight; and the first token of 512. After a warm-up of both, rounds alternate
between the two, so that what else the machine does hits both. The tokens must be equal, or in bfloat16 are only
compared. Without PyTorch and transformers only ours is measured.

Tokens a second count the new tokens of all rows, over the time from the prompt on the host to the last token there.
A token cannot come faster than the weights and the filled part of the cache are read: the share of the measured read
bandwidth says how near that is.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import GPTConfig, GPTModel, generate, get_gpt_config
from slm_jax.errors import InputError
from slm_jax.model import axis_sizes, init_params
from slm_jax.nn.blocks import unstack_blocks
from slm_jax.runs import load_gpt2
from slm_jax.weights.writer import save_gpt2

Generate = Callable[[np.ndarray, int], np.ndarray]  # (prompts, number of new tokens) -> the new tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of prompts, and how many tokens to add to each."""

    name: str
    batch: int
    prompt: int
    new: int


CASES = (Case("batch 1", 1, 64, 128), Case("batch 8", 8, 64, 128), Case("prefill of 512", 1, 512, 1))


def our_generate(cfg: GPTConfig, params: Any) -> Generate:
    """Return slm_jax's generation."""
    model, unstacked = GPTModel(cfg), unstack_blocks(params)

    def run(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = generate(model, unstacked, prompts, max_new_tokens=new, temperature=0.0)
        return np.asarray(ids)[:, prompts.shape[1] :]

    return run


def their_generate(folder: Path, dtype: str, device: str) -> Generate:
    """Return transformers' generation, as its documentation has it."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = "cuda" if device == "gpu" else "cpu"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(where).eval()

    def run(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.tensor(prompts, device=where)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), use_cache=True, do_sample=False, max_new_tokens=new,
                min_new_tokens=new, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[:, prompts.shape[1] :].cpu().numpy()

    return run


def measure(case: Case, contestants: dict[str, Generate], vocab: int, rounds: int) -> dict[str, Any]:
    """Time a case; the contestants take turns."""
    prompts = np.random.default_rng(0).integers(vocab, size=(case.batch, case.prompt), dtype=np.int32)
    tokens = {name: run(prompts, case.new) for name, run in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run(prompts, case.new)
            seconds[name].append(time.perf_counter() - began)
    result: dict[str, Any] = {**dataclasses.asdict(case), "seconds": seconds}
    for name, times in seconds.items():
        result[name] = statistics.median(times)
    if len(tokens) == 2:
        ours, theirs = tokens.values()
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        result |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        result["equal_tokens"] = float((ours == theirs).mean())
    return result


def read_bandwidth(seconds: float = 2.0) -> float:
    """Return the bytes a second at which the device sums an array larger than its caches, at best."""
    array = jnp.ones((256 << 20) // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def bytes_per_step(cfg: GPTConfig, params: Any, case: Case) -> float:
    """Return what one step over all rows must read: the weights but for the embeddings looked up, and the cache."""
    looked_up = ["pos_emb"] if cfg.tie_weights else ["pos_emb", "tok_emb"]
    weights = sum(leaf.nbytes for name in params if name not in looked_up for leaf in jax.tree.leaves(params[name]))
    tokens = case.prompt + case.new / 2  # on the average
    sizes = axis_sizes(cfg)
    per_token = 2 * sizes["layers"] * sizes["kv_heads"] * sizes["head_dim"] * jnp.dtype(cfg.dtype).itemsize
    return weights + per_token * tokens * case.batch


def report(result: dict[str, Any]) -> None:
    """Print one case."""
    tokens = result["batch"] * result["new"]
    for name in result["seconds"]:
        speed = f"{tokens / result[name]:7.1f} tokens/s" if result["new"] > 1 else f"{result[name]:7.3f} s"
        print(f"{result['name']:15} {name:12} {speed}")
    if "ratio" in result:
        low, high = result["ratio_range"]
        print(
            f"{result['name']:15} ours is {result['ratio']:.2f} times as fast ({low:.2f} to {high:.2f}); "
            f"{result['equal_tokens']:.1%} of the tokens are equal"
        )
    if "bandwidth_share" in result:
        print(
            f"{result['name']:15} ours reads {result['bytes_per_step'] / 1e6:.0f} MB a step, and so "
            f"{result['bandwidth_share']:.0%} of the bandwidth"
        )


def run(options: argparse.Namespace) -> int:
    """Measure all cases; the exit status is 1 if float32 tokens differ."""
    jax.config.update("jax_default_device", jax.devices(options.device)[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "gpt2"
        if options.weights is None:
            cfg = get_gpt_config("gpt2-small")
            params = init_params(cfg, jax.random.key(0))
        else:
            cfg, params = load_gpt2(options.weights)
        save_gpt2(cfg, params, folder)
        cfg, params = load_gpt2(folder, dtype=options.dtype, param_dtype=options.dtype)
        contestants = {"slm_jax": our_generate(cfg, params)}
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            contestants["transformers"] = their_generate(folder, options.dtype, options.device)
        else:
            print("torch and transformers are not installed: only slm_jax is measured")
    bandwidth = read_bandwidth()
    print(f"{options.device}, {options.dtype}; an array is read at {bandwidth / 1e9:.1f} GB/s", flush=True)
    results = []
    for case in CASES:
        result = measure(case, contestants, cfg.vocab_size, options.rounds)
        if case.new > 1:
            result["bytes_per_step"] = bytes_per_step(cfg, params, case)
            result["bandwidth_share"] = result["bytes_per_step"] * case.new / result["slm_jax"] / bandwidth
        report(result)
        results.append(result)
    if options.json:
        figures = {"device": options.device, "dtype": options.dtype, "bytes_per_second": bandwidth, "cases": results}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    differs = options.dtype == "float32" and any(result.get("equal_tokens", 1) < 1 for result in results)
    return 1 if differs else 0


def main() -> int:
    """Parse the arguments, measure, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a name or path that load_gpt2 takes; default: random ones of GPT-2 small")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and activations"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default=jax.default_backend(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of both, after the warm-up; default: %(default)s")
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; expected at least 1")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: {options.json.parent} is not a folder; make it first")
    try:
        return run(options)
    except InputError as error:
        print(f"generation_speed: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())

"""Step time and memory of each way to fine-tune: everything, the head, the last block or blocks, adapters.

    python benchmarks/finetune_modes.py --preset gpt2-small --batch-size 8 --length 128

A classifier of two classes with random weights, its optimizer step compiled once for each mode; modes take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.model import GPTClassifier, Params, get_gpt_config
from slm_jax.tasks.classification import make_loss_fn
from slm_jax.tasks.config import FinetuneConfig
from slm_jax.training.config import LoRAConfig, OptimizerConfig
from slm_jax.training.hardware import best_dtype
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.progress import count_leaves
from slm_jax.training.step import Batch, TrainState, make_train_step
from slm_jax.training.trainable import split_params

MODES = ("all", "head", "last_block", "last_n_blocks", "lora")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cfg = get_gpt_config(args.preset, dtype=best_dtype())
    model = GPTClassifier(cfg, n_classes=2)
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.integers(cfg.vocab_size, size=(args.batch_size, args.length)).astype(np.int32),
        "lengths": np.full(args.batch_size, args.length, np.int32),
        "labels": rng.integers(2, size=args.batch_size).astype(np.int32),
        "weights": np.ones(args.batch_size, np.float32),
    }
    params = jax.jit(lambda key: model.init(key, batch["inputs"], batch["lengths"])["params"])(jax.random.key(0))
    steps = {mode: make_step(mode, model, params, batch, args.rank) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.repeats):
        for mode, (step, *_) in steps.items():
            began = time.perf_counter()
            step()
            seconds[mode].append(time.perf_counter() - began)
    device, n_tokens = jax.devices()[0].device_kind, args.batch_size * args.length
    print(f"{args.preset}, {args.batch_size} x {args.length}, {cfg.dtype}, {device}; median of {args.repeats} (range)")
    print(f"{'mode':<14}{'trained':>12}  {'ms a step':<22}{'tokens/s':>9}  {'state + temporary, MB':>22}")
    for mode, (_, n_trained, n_bytes) in steps.items():
        times = [1e3 * value for value in seconds[mode]]
        median = statistics.median(times)
        spread = f"{median:,.0f} ({min(times):,.0f}-{max(times):,.0f})"
        print(f"{mode:<14}{n_trained:>12,}  {spread:<22}{n_tokens / median * 1e3:>9,.0f}  {n_bytes / 1e6:>22,.0f}")


def make_step(
    mode: Any, model: GPTClassifier, params: Params, batch: Batch, rank: int
) -> tuple[Callable[[], None], int, int]:
    """Compile a mode's step; return it as a function of nothing, its trained parameters, and the bytes it takes."""
    config = FinetuneConfig(trainable=mode, lora=LoRAConfig(rank=rank))
    trainable, frozen = split_params(params, config, jax.random.key(1))
    frozen = jax.tree.map(jnp.asarray, frozen)
    optimizer = make_optimizer(OptimizerConfig())
    train_step = make_train_step(make_loss_fn(model), optimizer, lambda step: 1e-4)
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), jax.random.key(2))
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    n_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    holder = [state]

    def step() -> None:
        holder[0], metrics = compiled(holder[0], frozen, batch)
        jax.block_until_ready(metrics)

    step()
    return step, count_leaves(trainable), n_bytes


if __name__ == "__main__":
    main()

"""From GPT-2 to Llama in five single keys: the validation loss and the time of a step of each rung.

    python benchmarks/ladder.py                 # loss: three seeds each, about 35 minutes on 2 cores
    python benchmarks/ladder.py --times         # time of a step: all rungs in turns, on an idle machine

Each rung adds one key to the rung before it, with ``hidden_dim`` chosen so that the number of parameters stays the same
within 1%. The recipe is ``shakespeare_char`` (0.8 million parameters, 2,000 steps of 12 × 64 characters).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from slm_jax.cli import main as slm_jax
from slm_jax.model import GPTModel, count_params, get_gpt_config, init_params
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.hardware import flops_per_token
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.step import TrainState, make_train_step

GPT2 = {"n_layers": 4, "n_heads": 4, "emb_dim": 128, "context_length": 64}
RUNGS: list[tuple[str, dict[str, Any]]] = [
    ("GPT-2", {"bias": True, "qkv_bias": True}),
    ("`bias: false`", {"bias": False, "hidden_dim": 518}),
    ("`norm: rmsnorm`", {"norm": "rmsnorm"}),
    ("`positions: rope`", {"positions": "rope", "hidden_dim": 526}),
    ("`mlp: swiglu`", {"mlp": "swiglu", "hidden_dim": 350}),
    ("`n_kv_heads: 2`", {"n_kv_heads": 2, "hidden_dim": 393}),
]
VOCAB = 66  # characters of Shakespeare, and the end of a text


def shapes() -> dict[str, dict[str, Any]]:
    """The model's keys of every rung."""
    found, keys = {}, dict(GPT2)
    for name, changes in RUNGS:
        keys = keys | changes
        found[name] = keys
    return found


def train(name: str, keys: dict[str, Any], seed: int) -> float:
    """The validation loss after the last step."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            **{f"model.{key}": str(value).lower() for key, value in keys.items()},
            "seed": seed, "run": "rung", "runs_dir": folder, "train.eval_every": 2_000, "checkpoint.every": 2_000,
            "sample.every": 0,
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        assert slm_jax(["train", "--config", "shakespeare_char", *words]) == 0, name
        lines = (Path(folder) / "rung" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["split"] == "val"][-1]


def measure_times(rounds: int = 12, steps: int = 25) -> dict[str, float]:
    """The median seconds of a training step of every rung; they take turns."""
    rng, optimizer = np.random.default_rng(0), OptimizerConfig(learning_rate=2e-3)
    tokens = rng.integers(VOCAB, size=(12, 65)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((12, 64), np.float32)}
    programs, states, seconds = {}, {}, {name: [] for name, _ in RUNGS}
    for name, keys in shapes().items():
        cfg = get_gpt_config("tiny", vocab_size=VOCAB, **keys)
        adam = make_optimizer(optimizer)
        step = make_train_step(make_loss_fn(GPTModel(cfg)), adam, make_schedule(optimizer, 2_000), 1)
        params = init_params(cfg, jax.random.key(0))
        states[name] = TrainState(np.int32(0), params, adam.init(params), jax.random.key(1))
        programs[name] = jax.jit(step, donate_argnums=0).lower(states[name], {}, batch).compile()
    for _ in range(rounds):
        for name, program in programs.items():
            began = perf_counter()
            for _ in range(steps):
                states[name], metrics = program(states[name], {}, batch)
            jax.block_until_ready(metrics)
            seconds[name].append((perf_counter() - began) / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Train every rung, or measure the time of its step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", action="store_true", help="measure the time of a step instead of training")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.times:
        for name, seconds in measure_times().items():
            print(f"| {name} | {1e3 * seconds:.1f} ms |")
        return
    losses: dict[str, list[float]] = {name: [] for name, _ in RUNGS}
    for seed in range(options.seeds):
        for name, keys in shapes().items():
            losses[name].append(train(name, keys, seed))
            print(f"seed {seed}: {name}: {losses[name][-1]:.4f}", flush=True)
    print("| rung | parameters | MFLOPs per token | validation loss | by seed |\n|---|---|---|---|---|")
    for name, keys in shapes().items():
        cfg = get_gpt_config("tiny", vocab_size=VOCAB, **keys)
        by_seed = ", ".join(f"{loss:.3f}" for loss in losses[name])
        sizes = f"{count_params(cfg):,} | {flops_per_token(cfg) / 1e6:.2f}"
        print(f"| {name} | {sizes} | {statistics.mean(losses[name]):.3f} | {by_seed} |")


if __name__ == "__main__":
    main()

"""Decays forked from one stable run, against runs that were planned for their length from the start.

    python benchmarks/wsd_fork.py

One run at a constant rate; from two of its checkpoints a new run each that only decays, with and without the state of
the base's optimizer; and for both lengths a single cosine run. Printed are the validation losses in nats a token.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

from slm_jax import cli

DECAY = 160
FORKS = (480, 640)  # steps of the stable run
OPTIONS = {
    "tokenizer.vocab_size": 1024,
    "model.n_layers": 2,
    "model.emb_dim": 64,
    "model.n_heads": 2,
    "model.context_length": 64,
    "train.eval_every": DECAY,
    "checkpoint.every": DECAY,
    "checkpoint.keep": 10,
    "sample.every": 0,
}


def train(folder: Path, name: str, **more: object) -> float:
    """Run to the end; return the last validation loss."""
    options = {**OPTIONS, "runs_dir": folder, "run": name, **{k.replace("__", "."): v for k, v in more.items()}}
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))])
    if status:
        raise SystemExit(f"{name} ended with {status}")
    return float(json.loads((folder / name / "summary.json").read_text())["validation_loss"])


def main() -> int:
    """Train all of them and print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder, "stable", train__steps=FORKS[-1], optimizer__schedule="constant")
        decay = {
            "optimizer__schedule": "wsd",
            "optimizer__warmup_steps": 0,
            "optimizer__decay_steps": DECAY,
            "train__steps": DECAY,
            "seed": 1,  # other windows of the text than the base's first steps
        }
        rows = [json.loads(line) for line in (folder / "stable" / "metrics.jsonl").read_text().splitlines()]
        stable = {row["step"]: row["loss"] for row in rows if row["split"] == "val"}
        print("| steps in all | stable at the fork | decay, state kept | decay, new state | one cosine run as long |")
        print("|---|---|---|---|---|")
        for step in FORKS:
            base = f"{folder / 'stable'}@{step}"
            kept, new = (
                train(folder, f"decay-{step}-{keeps}", base=base, base_optimizer=keeps, **decay)
                for keeps in ("true", "false")
            )
            cosine = train(folder, f"cosine-{step}", train__steps=step + DECAY)
            print(f"| {step} + {DECAY} | {stable[step]:.4f} | {kept:.4f} | {new:.4f} | {cosine:.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

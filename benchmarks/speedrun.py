"""Measure the time to a validation loss on Shakespeare's characters, ours against nanoGPT's recipe for a CPU.

    python benchmarks/speedrun.py
    python benchmarks/speedrun.py --nanogpt ../nanoGPT --interpreter ../torch/bin/python --output speedrun.json

Whole processes, from their start, in turns on the same machine: for each seed nanoGPT, our recipe with an empty compile
cache, and again with the one that it left. Ours counts until its process has ended; its loss is that of the whole
validation split, after the last step. nanoGPT runs its train.py with the arguments that its README gives for a CPU, and
counts until it prints a validation loss of at most --loss: its own estimate over 20 random batches, every 250 steps,
so luck helps it. Where it never does, the whole of its 2,000 steps counts, which is less than it would need. Its
train.py has a fixed seed: each run takes a copy with another one. Its data are made here of the same characters.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slm_jax.data.named import named_file
from slm_jax.errors import InputError, MissingInputError
from slm_jax.files import cache_folder

REPOSITORY = Path(__file__).parent.parent
RECIPE = REPOSITORY / "configs" / "shakespeare_speedrun.yaml"
NANOGPT_OPTIONS = (
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
ESTIMATE = re.compile(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)")


@dataclasses.dataclass(frozen=True)
class Result:
    """One process.

    Attributes:
        who: ours with an empty cache, ours with a warm one, or nanoGPT.
        seed: of the run.
        seconds: from the start of the process.
        step: steps done by then.
        loss: on what validates, after that step.
    """

    who: str
    seed: int
    seconds: float
    step: int
    loss: float


def run_ours(who: str, recipe: Path, seed: int, folder: Path, cache: Path) -> Result:
    """Run our recipe to its end."""
    name = who.replace(" ", "-")
    options = {"seed": seed, "runs_dir": folder, "run": name}
    pairs = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(recipe), *pairs]
    environ = with_own_cache(cache)
    began = time.monotonic()
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    if done.returncode:
        raise InputError(f"{recipe} ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "val"][-1]
    return Result(who, seed, seconds, last["step"], last["loss"])


def with_own_cache(cache: Path) -> dict[str, str]:
    """Return the environment of a process that keeps its caches in a folder, but finds the named texts."""
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    # With a folder set by this, JAX would keep only what takes a second to compile; users' caches have all programs.
    environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    with contextlib.suppress(OSError):  # a user without a home has no texts there
        environ.setdefault("SLM_JAX_DATA", str(cache_folder() / "data"))
    return environ


def copy_nanogpt(source: Path, folder: Path, seed: int) -> None:
    """Copy nanoGPT's code, with ``seed`` in place of its own, and make its data."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".git", "out*", "*.bin", "*.ipynb"))
    code = (folder / "train.py").read_text()
    (folder / "train.py").write_text(code.replace("manual_seed(1337 ", f"manual_seed({seed} "))
    text = named_file("tinyshakespeare").read_text(encoding="utf-8")
    letters = sorted(set(text))
    ids = np.array([letters.index(letter) for letter in text], np.uint16)
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters)}))


def run_nanogpt(source: Path, interpreter: str, seed: int, folder: Path, target: float) -> Result:
    """Run nanoGPT's recipe until it says that the loss is reached, or to its end."""
    copy_nanogpt(source, folder, seed)
    command = [interpreter, "-u", "train.py", "config/train_shakespeare_char.py", *NANOGPT_OPTIONS]
    with (folder / "errors.txt").open("w+") as errors:
        began = time.monotonic()
        try:
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
        except OSError as error:
            raise InputError(
                f"--interpreter {interpreter}: {error.strerror}; expected a Python that has torch"
            ) from None
        step, loss = None, float("inf")
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if match := ESTIMATE.match(line):
                    step, loss = int(match[1]), float(match[2])
                    if loss <= target:
                        break
            seconds = time.monotonic() - began
            reached = loss <= target
            if reached:
                process.kill()
        if step is None or (process.returncode and not reached):
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no output"])[-1]
            raise InputError(f"{source / 'train.py'} ended with {process.returncode}: {last}")
    return Result("nanoGPT", seed, seconds, step, loss)


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail after minutes, and find the interpreter, which runs in another folder."""
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: one is given twice; expected each once")
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise MissingInputError(f"--output {args.output}: expected a file in a folder that is there; make it first")
    if not args.nanogpt:
        return
    if not (args.nanogpt / "train.py").is_file():
        raise MissingInputError(f"{args.nanogpt}: has no train.py; expected a checkout of nanoGPT after --nanogpt")
    python = shutil.which(args.interpreter)
    if python is None:
        raise MissingInputError(f"--interpreter {args.interpreter}: cannot be run; expected a Python that has torch")
    args.interpreter = str(Path(python).absolute())  # a link that is followed would leave its virtual environment


def measure(args: argparse.Namespace, folder: Path) -> list[Result]:
    """Run everything, in turns, and print each result as it comes."""
    results: list[Result] = []
    for seed in args.seeds:
        here = folder / str(seed)
        here.mkdir()
        if args.nanogpt:
            results.append(run_nanogpt(args.nanogpt, args.interpreter, seed, here / "nanogpt", args.loss))
            tell(results[-1])
        for who in ("slm_jax, empty cache", "slm_jax, warm cache"):
            results.append(run_ours(who, args.recipe, seed, here, here / "cache"))
            tell(results[-1])
    return results


def tell(result: Result) -> None:
    """Print one result."""
    print(
        f"seed {result.seed}  {result.who:20}  {result.seconds:6.1f} s  loss {result.loss:.4f} after "
        f"{result.step:,} steps",
        flush=True,
    )


def summarize(results: Sequence[Result], target: float) -> list[str]:
    """Return the medians, the ratios of each seed to nanoGPT, and who did not reach the loss."""
    times: dict[str, list[float]] = {}
    for result in results:
        times.setdefault(result.who, []).append(result.seconds)
    lines = []
    for who, seconds in times.items():
        line = f"{who}: median {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        if who != "nanoGPT" and "nanoGPT" in times:
            ratios = [own / theirs for own, theirs in zip(seconds, times["nanoGPT"], strict=True)]
            line += f", {statistics.median(ratios):.2f} of nanoGPT's ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(line)
    lines += [f"{r.who}, seed {r.seed}: did not reach {target}" for r in results if r.loss > target]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON file; 1 if ours does not reach the loss."""
    parser = argparse.ArgumentParser(description="The time to a validation loss on Shakespeare's characters.")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what of ours runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--loss", type=float, default=1.88, help="to be reached (default: %(default)s)")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT (default: ours alone)")
    parser.add_argument("--interpreter", default=sys.executable, help="the Python for nanoGPT (default: this one)")
    parser.add_argument("--output", type=Path, help="a JSON file for all results (default: none)")
    args = parser.parse_args(argv)
    try:
        check(args)
        with tempfile.TemporaryDirectory() as folder:
            results = measure(args, Path(folder))
    except InputError as error:
        print(f"speedrun: {error}", file=sys.stderr)
        return 2
    print("\n".join(summarize(results, args.loss)))
    if args.output:
        rows = [dataclasses.asdict(result) for result in results]
        args.output.write_text(json.dumps({"loss": args.loss, "results": rows}, indent=1) + "\n")
    return int(any(result.loss > args.loss for result in results if result.who != "nanoGPT"))


if __name__ == "__main__":
    sys.exit(main())

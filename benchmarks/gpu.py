"""Measure everything that there is to measure on a machine with one GPU, each part within ten minutes.

    python benchmarks/gpu.py --nanogpt ../nanoGPT
    python benchmarks/gpu.py --parts sweep,train --nanogpt ../nanoGPT --interpreter nanogpt=../torch/bin/python
    python benchmarks/gpu.py --dry-run

Every measurement is a process of its own (peers.py, step_profile.py, slm-jax bench), so that one which crashes or runs
out of memory loses nothing else, and a part that has used its time leaves out what is not begun. The raw JSON of each,
what it printed and summary.md, with the figures beside their bars, are in results/DEVICE-DATE/. Parts that ran before
into the same --folder are read from there: the batch and the remat that paid best come from sweep.

    sweep       GPT-2 small, 1,024 tokens, bfloat16: batches and remat, as long as more pays
    peer-sweep  the same of nanoGPT with torch.compile
    train       the best batch, in turns with each peer; the next smaller after running out of memory; peak memory
    xl          GPT-2 XL's shape with remat
    decode      generation, a batch of 1 and of 64, in turns with transformers
    profile     where the time of a step goes
    compile     to the first step with an empty and with a warm compile cache
    reader      the data reader, and its share of a step
    flags       sets of XLA flags beside none

--dry-run does all of it with tiny shapes on the CPU; its figures mean nothing.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import re
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu_results import best, figures_of, has_figures, read, write_summary
from peers import check_places

from slm_jax.tokenizer import CharTokenizer

HERE = Path(__file__).parent
PART_SECONDS = 570.0
PAYS = 1.02  # a larger batch pays if it brings more tokens a second by this factor
PEERS = ("nanogpt", "transformers", "book", "nanodo")
ALWAYS_BIASED = ("transformers", "book")
# Each against none; a flag that this XLA does not know ends its own process only.
FLAGS = {
    "none": "",
    "latency-hiding-scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
    "exhaustive-tiling": "--xla_gpu_exhaustive_tiling_search=true",
    "cudnn-layer-norm": "--xla_gpu_enable_cudnn_layer_norm=true",
    "no-command-buffers": "--xla_gpu_enable_command_buffer=",
    "none-again": "",  # how far the machine itself drifts
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes to measure.

    Attributes:
        common, small, xl: options of peers.py: for all measurements, of the two shapes.
        batches: of sweep and peer-sweep, by remat, ascending.
        xl_batches: the same of xl.
        decode: options of generation.
        decode_batches: rows at a time.
        rounds: options of what is measured in turns.
        tokens: of the file for the reader.
        flags: which of FLAGS.
    """

    common: tuple[str, ...]
    small: tuple[str, ...]
    xl: tuple[str, ...]
    batches: dict[str, tuple[int, ...]]
    xl_batches: dict[str, tuple[int, ...]]
    decode: tuple[str, ...]
    decode_batches: tuple[int, ...]
    rounds: tuple[str, ...]
    tokens: int
    flags: tuple[str, ...]


FULL = Plan(
    common=("--device", "gpu", "--dtype", "bfloat16"),
    small=("--shape", "gpt2-small"),
    xl=("--shape", "gpt2-xl"),
    batches={"none": (16, 32, 64, 128), "dots": (64, 128, 256), "full": (128, 256)},
    xl_batches={"dots": (8, 16), "full": (8, 16, 32)},
    decode=("--shape", "gpt2-small"),
    decode_batches=(1, 64),
    rounds=("--rounds", "7"),
    tokens=500_000_000,
    flags=tuple(FLAGS),
)
_TINY = ("--layers", "1", "--heads", "2", "--width", "16", "--vocab", "65", "--context", "16")
DRY = Plan(
    common=("--device", "cpu"),
    small=_TINY,
    xl=_TINY,
    batches={"none": (1,)},
    xl_batches={"full": (1,)},
    decode=(*_TINY, "--prompt", "4", "--new", "4"),
    decode_batches=(1,),
    rounds=("--rounds", "2", "--steps", "2"),
    tokens=100_000,
    flags=("none",),
)


class Session:
    """The measurements of one call, and what was measured into its folder before.

    Args:
        folder: of results.
        plan: the sizes.
        peers: contestants beside slm_jax.
        peer_options: options of peers.py that say where they are.
        cache: a folder for compiled programs, which parts share.
    """

    def __init__(self, folder: Path, plan: Plan, peers: list[str], peer_options: list[str], cache: Path):
        self.folder, self.plan, self.peers = folder, plan, peers
        self._peer_options, self.cache = peer_options, cache
        self.deadline = 0.0
        self.results: list[dict[str, Any]] = []  # of the part that runs

    def compare(self, name: str, *options: object, **environment: str) -> dict[str, Any]:
        """Run peers.py; return its figures, empty where it has none."""
        command = [HERE / "peers.py", *self.plan.common, *options, *self._peer_options, "--output"]
        return self.run(name, command, **environment)

    def run(self, name: str, command: list[Any], **environment: str) -> dict[str, Any]:
        """Run Python with a command, to whose end the file for its JSON is added; return that, and keep it."""
        result = self._run(name, command, environment)
        self.results.append(result)
        return result

    def _run(self, name: str, command: list[Any], environment: dict[str, str]) -> dict[str, Any]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            print(f"{name}: left out, the part's time is used", flush=True)
            return {}
        output = self.folder / f"{name}.json"
        output.unlink(missing_ok=True)
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, command), str(output)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ, "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                 **environment},
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=left)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the contestants that it has started
            said, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            said += f"\nended after {left:.0f} s"
        (self.folder / f"{name}.log").write_text(said)
        lines = said.strip().splitlines() or ["nothing was said"]
        print(f"{name} ({time.monotonic() - began:.0f} s): {lines[-1]}", flush=True)
        return read(self.folder, name)

    def best_batch(self) -> tuple[int, str]:
        """Return the batch and the remat that paid best."""
        work, _ = best(self.folder, "sweep", "slm_jax")
        remat, batches = next(iter(self.plan.batches.items()))
        return work.get("batch", batches[0]), work.get("remat", remat)


def sweep(session: Session) -> None:
    """Measure slm_jax at larger and larger batches."""
    for remat, batches in session.plan.batches.items():
        climb(session, f"sweep-{remat}", "slm_jax", batches, (*session.plan.small, "--remat", remat))


def peer_sweep(session: Session) -> None:
    """Measure nanoGPT at larger and larger batches."""
    if "nanogpt" in session.peers:
        climb(session, "peer-sweep", "nanogpt", session.plan.batches["none"], session.plan.small)


def xl(session: Session) -> None:
    """Measure GPT-2 XL's shape at larger and larger batches."""
    for remat, batches in session.plan.xl_batches.items():
        climb(session, f"xl-{remat}", "slm_jax", batches, (*session.plan.xl, "--remat", remat))


def climb(session: Session, name: str, contestant: str, batches: tuple[int, ...], options: tuple[str, ...]) -> None:
    """Measure one contestant alone, until a larger batch no longer fits or pays."""
    highest = 0.0
    for batch in batches:
        result = session.compare(
            f"{name}-{batch}", *options, "--rounds", 3, "--batch", batch, "--contestants", contestant
        )
        rate = figures_of(result, contestant).get("tokens_per_second", 0.0)
        if rate < PAYS * highest or not rate:
            return
        highest = rate


def train(session: Session) -> None:
    """Measure against each peer in turns; where memory ends, at the next smaller batch."""
    largest, remat = session.best_batch()
    for peer in session.peers:
        batch = largest
        while batch:
            result = session.compare(
                f"train-{peer}", *session.plan.small, *session.plan.rounds, "--batch", batch, "--remat", remat,
                "--bias" if peer in ALWAYS_BIASED else "--no-bias", "--contestants", f"slm_jax,{peer}",
            )  # fmt: skip
            if not any("out of memory" in reason for reason in result.get("skipped", {}).values()):
                break
            batch //= 2


def decode(session: Session) -> None:
    """Measure generation, against transformers where it is a peer."""
    contestants = ",".join(["slm_jax", *(peer for peer in session.peers if peer == "transformers")])
    for batch in session.plan.decode_batches:
        session.compare(
            f"decode-{batch}", "--work", "generate", *session.plan.decode, *session.plan.rounds, "--bias",
            "--batch", batch, "--contestants", contestants,
        )  # fmt: skip


def profile(session: Session) -> None:
    """Profile the best batch."""
    batch, remat = session.best_batch()
    options = [*session.plan.common, *session.plan.small, "--batch", batch, "--remat", remat]
    session.run("profile", [HERE / "step_profile.py", *options, "--output"])


def compile_times(session: Session) -> None:
    """Measure the time to the first step twice with a compile cache of its own."""
    batch, remat = session.best_batch()
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            session.compare(
                f"compile-{name}", *session.plan.small, "--rounds", 1, "--steps", 1, "--batch", batch,
                "--remat", remat, "--contestants", "slm_jax",
                JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            )  # fmt: skip


def reader(session: Session) -> None:
    """Measure the batches from a file of random tokens beside the best step."""
    work, figures = best(session.folder, "sweep", "slm_jax")
    share = ["--step_ms", 1000 * figures["median"]] if figures else []
    tokenizer = CharTokenizer().build_vocab(string.ascii_letters)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "train.bin"
        np.random.default_rng(0).integers(tokenizer.vocab_size, size=session.plan.tokens, dtype=np.uint16).tofile(file)
        session.run(
            "reader",
            ["-m", "slm_jax", "bench", "data", "--data.source", f"tokens:{file}",
             "--tokenizer.path", tokenizer.save(Path(name)), "--model.context_length", work.get("context", 16),
             "--train.batch_size", work.get("batch", 1), *share, "--out"],
        )  # fmt: skip


def flags(session: Session) -> None:
    """Measure the best batch under each set of XLA flags."""
    batch, remat = session.best_batch()
    given = os.environ.get("XLA_FLAGS", "")
    for name in session.plan.flags:
        session.compare(
            f"flags-{name}", *session.plan.small, *session.plan.rounds, "--batch", batch, "--remat", remat,
            "--contestants", "slm_jax", XLA_FLAGS=f"{given} {FLAGS[name]}".strip(),
        )  # fmt: skip


PARTS: dict[str, Callable[[Session], None]] = {
    "sweep": sweep, "peer-sweep": peer_sweep, "train": train, "xl": xl, "decode": decode, "profile": profile,
    "compile": compile_times, "reader": reader, "flags": flags,
}  # fmt: skip


def find_device(dry_run: bool) -> str:
    """Return the name of the GPU that JAX computes on; in a dry run none is needed.

    Raises:
        SystemExit: there is none.
    """
    if dry_run:
        return "dry-run"
    question = "import jax; print(jax.devices('cuda')[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    if done.returncode:
        print(
            "gpu: JAX finds no NVIDIA GPU here; install it with pip install 'jax[cuda12]', or try --dry-run",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return done.stdout.strip()


def read_options() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="in this order; default: %(default)s")
    parser.add_argument("--peers", help="of nanogpt, transformers, book, nanodo, or none; default: transformers, and "
                        "those whose folder is given")  # fmt: skip
    for name in ("nanogpt", "book", "nanodo"):
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help="see peers.py")
    parser.add_argument("--interpreter", action="append", default=[], metavar="NAME=PYTHON", help="see peers.py")
    parser.add_argument("--folder", type=Path, help="of the results; default: results/DEVICE-DATE beside this file")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    given = [name for name in PEERS if name == "transformers" or getattr(options, name)]
    options.peers = given if options.peers is None else options.peers.split(",") if options.peers != "none" else []
    options.parts = options.parts.split(",")
    for kind, chosen, known in (("parts", options.parts, tuple(PARTS)), ("peers", options.peers, PEERS)):
        for name in chosen:
            if name not in known:
                parser.error(f"--{kind}: there is no {name!r}; expected some of {', '.join(known)}")
    check_places(parser, options)
    return options


def main() -> int:
    """Measure the parts that are asked for; 1 if one of them gave no figures."""
    options = read_options()
    device = re.sub(r"\W+", "-", find_device(options.dry_run)).lower()
    folder = options.folder or HERE / "results" / f"{device}-{datetime.date.today()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu: --folder {folder} cannot be made ({error.strerror}); name another", file=sys.stderr)
        return 2
    places = [f"--{name}={value}" for name in ("nanogpt", "book", "nanodo") if (value := getattr(options, name))]
    places += [f"--interpreter={pair}" for pair in map("=".join, options.interpreter.items())]
    failed = []
    with tempfile.TemporaryDirectory() as cache:
        session = Session(folder, DRY if options.dry_run else FULL, options.peers, places, Path(cache))
        for part in options.parts:
            print(f"== {part}", flush=True)
            session.deadline, session.results = time.monotonic() + PART_SECONDS, []
            PARTS[part](session)
            # A part that is of peers only has nothing to do without them, which is no failure.
            if session.results and not any(map(has_figures, session.results)):
                failed.append(part)
            file = write_summary(folder)
    print(file.read_text())
    print(f"in {folder}")
    if failed:
        print(f"gpu: no figures of {', '.join(failed)}; the reasons are in {folder}/*.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

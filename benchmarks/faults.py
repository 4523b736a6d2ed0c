"""Break runs in every way that we know, as subprocesses, and compare each with one that was never broken.

    python benchmarks/faults.py --seed 1 --minutes 45   # everything, the soak last; takes hours
    python benchmarks/faults.py damage --write          # a part, its figure into benchmarks/RELIABILITY.md
    python benchmarks/faults.py kills cache --trials 20 # some parts, as many trials of each
    python benchmarks/faults.py soak --minutes 45       # one long run with a fault at least each minute

The parts: ``kills``, SIGKILL at random moments, up to three in a row, of each task and LoRA; ``signals``, SIGTERM and
SIGINT; ``cache``, flipped bits in the cache of compiled programs; ``environment``, variables meant for other programs;
``operations`` and ``damage``, a kill at each file operation and damage to each file (``faults_checkpoints.py``);
``files``, changed files for each reader (``faults_files.py``); ``soak``.

Equal means, bit for bit: all parameters, the optimizer's state, the dropout key, the data state, every logged number
but the times, and the samples. Exit status 0 only if everything holds.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from outcomes import differences, outcome

from slm_jax.data.builtin import python_docs
from slm_jax.training.manifest import saved_steps

SMALL = {
    "tokenizer.vocab_size": 300, "model.n_layers": 2, "model.emb_dim": 32, "model.context_length": 256,
}  # fmt: skip
COMMON = {
    "model.unroll": "false", "model.drop_rate": 0.1, "train.batch_size": 4, "train.eval_every": 20,
    "train.eval_batch_size": 64, "train.log_every": 1, "checkpoint.every": 15, "sample.every": 20,
    "sample.max_new_tokens": 8, "optimizer.warmup_steps": 10, "optimizer.learning_rate": 1e-3,
}  # fmt: skip
ANSWERS = {
    "task": "instruction", "base": "{folder}/base", "data.source": "jsonl:{folder}/sums.jsonl",
    "instruction.responses": 2, "instruction.template": "chatml",
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "pretraining": {**SMALL, "train.accumulate": 2, "data.source": "text:{folder}/text.txt"},
    "classification": {"task": "classification", "base": "{folder}/base", "data.source": "jsonl:{folder}/labels.jsonl"},
    "instruction": {**ANSWERS, "trainable": "all"},
    "lora": {**ANSWERS, "trainable": "lora"},
}
ENVIRONMENT = (
    "JAX_ENABLE_X64=1", "JAX_DISABLE_JIT=1", "JAX_NUMPY_DTYPE_PROMOTION=strict", "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_PLATFORMS=bogus", "JAX_PLATFORMS=cuda", "JAX_COORDINATOR_ADDRESS=localhost:1", "JAX_TRACEBACK_FILTERING=bogus",
    "MPLBACKEND=bogus", "MPLBACKEND=module://matplotlib_inline.backend_inline", "MATPLOTLIBRC={folder}/matplotlibrc",
    "JAX_COMPILATION_CACHE_DIR=/proc/none", "XDG_CACHE_HOME=/proc/none", "HOME=/nowhere", "LC_ALL=C", "COLUMNS=1",
)  # fmt: skip
PAGE = Path(__file__).with_name("RELIABILITY.md")
Outcome = Iterator[tuple[str, str | None]]  # of each trial: what was done, and what is wrong (None: nothing)


class Place:
    """A folder with a text, a base to fine-tune, and an unbroken run of each variant that was asked for."""

    def __init__(self, folder: Path, seed: int, trials: int, minutes: float):
        self.folder, self.seed, self.trials, self.minutes = folder, seed, trials, minutes
        self.chance = random.Random(seed)
        self.environ = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        self.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        self._unbroken: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}
        (folder / "text.txt").write_text("\n".join(python_docs())[:60_000], encoding="utf-8")
        sums = ({"instruction": f"Add one to {i}.", "output": f"{i + 1}."} for i in range(200))
        (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
        labels = ({"text": f"{i} is {'even' if i % 2 else 'odd'}", "label": str(i % 3)} for i in range(200))
        (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
        (folder / "matplotlibrc").write_text("text.usetex: true\n")

    def start(self, variant: str, name: str, steps: int, **environ: str) -> subprocess.Popen[str]:
        """Start or resume a run; of a variant that has a base, make that first."""
        if "base" in VARIANTS[variant] and not (self.folder / "base").is_dir():
            assert self.run("pretraining", "base", 4)[0] == 0
        fields = {**COMMON, **VARIANTS[variant], "runs_dir": "{folder}", "run": name, "train.steps": steps}
        words = [word for key, value in fields.items() for word in (f"--{key}", str(value).format(folder=self.folder))]
        command = [sys.executable, "-m", "slm_jax", "train" if variant == "pretraining" else "finetune", *words]
        pipe, env = subprocess.PIPE, {**self.environ, **environ}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, env=env)

    def run(self, variant: str, name: str, steps: int, **environ: str) -> tuple[int, str]:
        """Run to the end; return the exit status and what was printed to stderr."""
        process = self.start(variant, name, steps, **environ)
        errors = process.communicate()[1]
        return process.returncode, errors

    def unbroken(self, variant: str, steps: int) -> tuple[dict[str, Any], float]:
        """Return the outcome of a run without faults, and the seconds that it takes once its programs are cached."""
        if (variant, steps) not in self._unbroken:
            for name in ("warm-up", "unbroken"):
                began = time.monotonic()
                status, errors = self.run(variant, f"{variant}-{name}", steps)
                assert status == 0, errors
                seconds = time.monotonic() - began
            self._unbroken[variant, steps] = outcome(self.folder / f"{variant}-unbroken"), seconds
        return self._unbroken[variant, steps]

    def compare(self, variant: str, name: str, steps: int) -> str | None:
        """Finish a run; return in what it differs from the unbroken one."""
        status, errors = self.run(variant, name, steps)
        if status:
            return f"exit status {status}: {errors[-300:]}"
        found = differences(self.unbroken(variant, steps)[0], outcome(self.folder / name))
        return ", ".join(found[:5]) or None


def kills(place: Place, steps: int = 60) -> Outcome:
    """Kill each variant at random moments, up to three times in a row."""
    for trial in range(place.trials):
        variant, n_kills = [*VARIANTS][trial % len(VARIANTS)], place.chance.randint(1, 3)
        seconds, name, moments = place.unbroken(variant, steps)[1], f"killed-{trial}", []
        for _ in range(n_kills):
            process = place.start(variant, name, steps)
            moments.append(place.chance.uniform(0.1, 1.0) * seconds)
            end(process, moments[-1], signal.SIGKILL)
        yield f"{variant} killed after {', '.join(f'{s:.1f}' for s in moments)} s", place.compare(variant, name, steps)


def signals(place: Place, steps: int = 60) -> Outcome:
    """Ask a run to stop."""
    for trial in range(place.trials):
        signum, name = (signal.SIGTERM, signal.SIGINT)[trial % 2], f"stopped-{trial}"
        process = place.start("pretraining", name, steps)
        status = end(process, place.chance.uniform(0.3, 0.9) * place.unbroken("pretraining", steps)[1], signum)
        wrong = None if status in (0, 128 + signum, -signum) else f"exit status {status}"
        yield f"{signum.name}: {status}", wrong or place.compare("pretraining", name, steps)


def end(process: subprocess.Popen[str], after: float, signum: signal.Signals) -> int:
    """Send a signal after so many seconds, unless the process has ended; return the exit status."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signum)
    process.communicate()
    return process.returncode


def cache(place: Place, steps: int = 20) -> Outcome:
    """Flip a bit in each compiled program."""
    place.unbroken("pretraining", steps)
    for trial in range(place.trials):
        programs = sorted((place.folder / "cache/slm_jax/xla").glob("*-cache"))
        for program in programs:
            flip(program, place.chance)
        yield f"{len(programs)} programs with a flipped bit", place.compare("pretraining", f"cached-{trial}", steps)


def flip(path: Path, chance: random.Random) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def environment(place: Place, steps: int = 20) -> Outcome:
    """Set a variable: the run is the same, or there is one line."""
    for trial, variable in enumerate(ENVIRONMENT):
        key, value = variable.format(folder=place.folder).split("=")
        status, errors = place.run("pretraining", f"environment-{trial}", steps, **{key: value})
        lines = errors.splitlines()
        if status == 0:
            found = differences(place.unbroken("pretraining", steps)[0], outcome(place.folder / f"environment-{trial}"))
            yield f"{variable}: trained", ", ".join(found[:5]) or None
        else:
            one_line = status == 2 and len(lines) == 1 and lines[0].startswith("slm-jax train: ")
            yield f"{variable}: {lines[-1][:80]}", None if one_line else f"exit status {status}, {len(lines)} lines"


def soak(place: Place) -> Outcome:
    """Train for so many minutes with a fault at least each minute: a kill, a signal, damage to the last checkpoint."""
    per_step = place.unbroken("pretraining", 400)[1] / 400
    steps = round(place.minutes * 60 / per_step)
    process, resident = place.start("pretraining", "whole", steps), []
    while process.poll() is None:
        resident.append(memory(process.pid))
        time.sleep(5)
    assert process.returncode == 0
    a_tenth = max(1, len(resident) // 10)  # the first tenth starts and compiles; the process may end within the last
    early, late = (statistics.median(resident[i * a_tenth : (i + 1) * a_tenth]) for i in (1, 8))
    expected = outcome(place.folder / "whole")
    n_faults, done = 0, False
    while not done:
        process = place.start("pretraining", "soak", steps)
        signum = place.chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        done = end(process, place.chance.uniform(10, 55), signum) == 0
        checkpoints = place.folder / "soak" / "checkpoints"
        saved = saved_steps(checkpoints)
        if not done and len(saved) > 1 and place.chance.random() < 0.3:
            arrays = (checkpoints / str(saved[-1]) / "params").rglob("d/*")
            flip(max(arrays, key=lambda path: path.stat().st_size), place.chance)
        n_faults += not done
    found = differences(expected, outcome(place.folder / "soak"))
    what = f"{steps} steps, {n_faults} faults; memory of the unbroken run {early:.0f} to {late:.0f} MB"
    yield what, ", ".join(found[:5]) or None


def memory(pid: int) -> float:
    """Return a process's resident megabytes; 0 where they are not known, and of one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def elsewhere(place: Place, program: str, *words: str) -> str:
    """Run a program beside this one; return how many of its trials ended as they must, which begins its last line."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *words, "--seed", str(place.seed)]
    done = subprocess.run(command, env=place.environ, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    found = re.match(r"\d+/\d+", (done.stdout.splitlines() or [""])[-1])
    return found[0] if found else "0/1"


def write(figures: dict[str, str]) -> None:
    """Put figures into the table of RELIABILITY.md."""
    text = PAGE.read_text()
    for part, figure in figures.items():
        text = re.sub(rf"^(\| {part} \|).*?\|", rf"\1 {figure} |", text, flags=re.M)
    PAGE.write_text(text)


PARTS: dict[str, Callable[[Place], Outcome]] = {
    part.__name__: part for part in (kills, signals, cache, environment, soak)
}
ELSEWHERE = {
    "operations": ("faults_checkpoints.py", "kills"),
    "damage": ("faults_checkpoints.py", "damage"),
    "files": ("faults_files.py",),
}


def main() -> int:
    """Run the parts; print each trial, and the figures at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *ELSEWHERE, *PARTS], default=[], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=20, help="of each part; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=45, help="of the soak; default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"put the figures into {PAGE.name}")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        place = Place(Path(name), options.seed, options.trials, options.minutes)
        for part in options.parts or [*ELSEWHERE, *PARTS]:
            if part in ELSEWHERE:
                figures[part] = elsewhere(place, *ELSEWHERE[part])
                continue
            results = []
            for what, wrong in PARTS[part](place):
                print(f"{part}: {what}: {'NOT ' + wrong if wrong else 'as it must be'}", flush=True)
                results.append(wrong is None)
            figures[part] = f"{sum(results)}/{len(results)}"
    if options.write:
        write(figures)
    print(", ".join(f"{part} {figure}" for part, figure in figures.items()))
    return 0 if all(len(set(figure.split("/"))) == 1 for figure in figures.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

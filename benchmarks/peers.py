"""Measure the same work in slm_jax and in what a person would take instead, in turns on the same machine.

    python benchmarks/peers.py --shape nanogpt-cpu --nanogpt ../nanoGPT
    python benchmarks/peers.py --shape gpt2-small-cpu --nanogpt ../nanoGPT --interpreter nanogpt=../torch/bin/python
    python benchmarks/peers.py --work generate --bias --contestants slm_jax,transformers
    python benchmarks/peers.py --device gpu --dtype bfloat16 --batch 32 --nanogpt ../nanoGPT --output train.json

The peers are nanoGPT (its folder), Hugging Face's transformers, the code of the book Build a Large Language Model (From
Scratch) and nanodo (its folder); none of their code is here. What is absent, or cannot do the work, is skipped with a
line that says so. Each contestant is a process of its own that builds the model once (peer_worker.py); then rounds
alternate, ours, peer, ours, peer, so that what else the machine does hits all of them. The ratio is taken within a
round: above 1 slm_jax is faster. All have the same shape, batch, dtype and CPU threads, and the same random tokens;
nanoGPT's vocabulary is rounded up to its own 50,304. Between turns is a pause in which threads of the last one stop
waiting for work; what CPU time a contestant took while it was not its turn is in the JSON, and above 2% is reported.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peer_worker import CONTESTANTS, SkippedError, Work

PAUSE = 0.3  # seconds; OpenMP's threads spin up to 0.2 after their last work
ROUND = 2.0  # seconds that a round of the first contestant takes, about, where --steps does not say
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"layers": 12, "heads": 12, "width": 768, "vocab": 50_257, "context": 1024, "batch": 4},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "vocab": 50_257, "context": 1024, "batch": 4},
    "gpt2-small-cpu": {"layers": 12, "heads": 12, "width": 768, "vocab": 50_257, "context": 256, "batch": 2},
    "nanogpt-cpu": {"layers": 4, "heads": 4, "width": 128, "vocab": 65, "context": 64, "batch": 12},
}
PICTURES = (".png", ".svg", ".pdf")
REPOSITORY = Path(__file__).parent.parent


class Contestant:
    """A contestant's process.

    Attributes:
        facts: what it said of itself.
        seconds: of a step, in each round so far.
        idle_cpu: CPU seconds that it took while others had their turns.
        idle: how long that was.

    Raises:
        SkippedError: it cannot do the work, or failed; the message says why. Its process has then ended.
    """

    def __init__(self, work: Work, python: str, environment: dict[str, str]):
        self.seconds: list[float] = []
        self.idle_cpu = self.idle = 0.0
        self._left: tuple[float, float] | None = None  # its CPU time and the time of day when its last turn ended
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        worker = Path(__file__).with_name("peer_worker.py")
        try:
            self._process = subprocess.Popen(
                [python, str(worker), json.dumps(dataclasses.asdict(work))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        except OSError as error:
            raise SkippedError(f"{python} cannot be run ({error.strerror}); give another by --interpreter") from None
        self.facts = self._answer()

    def turn(self, steps: int) -> float:
        """Run so many steps; return the seconds of one."""
        began = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and how is asked next
            print(steps, file=self._process.stdin, flush=True)
        answer = self._answer()
        cpu_before, cpu_after = answer.pop("cpu")
        if self._left is not None:
            self.idle_cpu += cpu_before - self._left[0]
            self.idle += began - self._left[1]
        self._left = cpu_after, time.perf_counter()
        self.facts |= {"loss": answer["loss"], "peak_bytes": answer["peak_bytes"]}
        return answer["seconds"] / steps

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
            answer = json.loads(line) if line else {"failed": f"its process ended with status {self._process.wait()}"}
            if "failed" in answer:
                self._errors.seek(0)
                said = self._errors.read().decode(errors="replace").strip().splitlines()
                print(*said[-3:], sep="\n", file=sys.stderr)
                raise SkippedError(f"failed: {answer['failed']}")
            if "skipped" in answer:
                raise SkippedError(answer["skipped"])
            return answer
        except BaseException:
            self.close()
            raise


def measure(works: list[Work], options: argparse.Namespace) -> dict[str, Any]:
    """Start the contestants, let them take turns, and return all figures."""
    where = machine()
    if where["load_before"] > 0.5:
        print(f"the machine is not idle (load {where['load_before']:.1f}): expect figures that scatter", flush=True)
    running: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}

    def skip(name: str, reason: str) -> None:
        skipped[name] = reason
        print(f"{name:13} skipped: {reason}", flush=True)

    # On a GPU, JAX would take three quarters of the memory at its start.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if len(works) > 1 else {}
    try:
        for work in works:
            try:
                running[work.name] = Contestant(work, options.interpreter.get(work.name, sys.executable), environment)
            except SkippedError as error:
                skip(work.name, str(error))
        step_seconds = next((contestant.facts["step_seconds"] for contestant in running.values()), ROUND)
        steps = options.steps or max(1, round(ROUND / step_seconds))
        for number in range(-1, options.rounds):  # the first warms up
            for name, contestant in list(running.items()):
                try:
                    seconds = contestant.turn(steps)
                except SkippedError as error:
                    skip(name, str(error))
                    del running[name]
                    continue
                if number >= 0:
                    contestant.seconds.append(seconds)
                time.sleep(PAUSE if len(running) > 1 else 0)
    finally:
        for contestant in running.values():
            contestant.close()
    return {
        "work": {key: value for key, value in dataclasses.asdict(works[0]).items() if key not in ("name", "source")},
        "machine": where,
        "rounds": options.rounds,
        "steps_a_round": steps,
        "contestants": summarize(works[0], running),
        "skipped": skipped,
    }


def summarize(work: Work, running: dict[str, Contestant]) -> dict[str, dict[str, Any]]:
    """Return what there is to say of each contestant, in medians over rounds."""
    tokens = work.batch * (work.context if work.kind == "train" else work.new)
    ours = running.get("slm_jax")
    summaries = {}
    for name, contestant in running.items():
        median = statistics.median(contestant.seconds)
        summary = contestant.facts | {
            "seconds": contestant.seconds,
            "median": median,
            "tokens_per_second": tokens / median,
            "idle_cpu_share": contestant.idle_cpu / contestant.idle if contestant.idle else 0.0,
        }
        if ours is not None and name != "slm_jax":
            ratios = [theirs / mine for theirs, mine in zip(contestant.seconds, ours.seconds, strict=True)]
            summary |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        if ours is not None and work.kind == "train":
            summary["flops_per_second"] = summary["tokens_per_second"] * ours.facts["flops_per_token"]
            if peak := ours.facts["peak_flops"]:
                summary["mfu"] = summary["flops_per_second"] / peak
        summaries[name] = summary
    return summaries


def machine() -> dict[str, Any]:
    """Return what the figures depend on and the contestants cannot know."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    load = os.getloadavg()[0]
    return {"cpu": model, "cpus": os.cpu_count(), "system": platform.system(), "load_before": load}


def report(result: dict[str, Any]) -> None:
    """Print a line for each contestant, and warnings."""
    for name, figures in result["contestants"].items():
        low, high = min(figures["seconds"]) * 1000, max(figures["seconds"]) * 1000
        line = (
            f"{name:13} {figures['median'] * 1000:8.1f} ms ({low:.1f} to {high:.1f}) "
            f"{figures['tokens_per_second']:10,.0f} tokens/s"
        )
        if "mfu" in figures:
            line += f"  MFU {figures['mfu']:.1%}"
        line += f"  peak {figures['peak_bytes'] / 1e9:.2f} GB  first step {figures['first_step_seconds']:.1f} s"
        if "ratio" in figures:
            low, high = figures["ratio_range"]
            line += f"  ours is {figures['ratio']:.2f} times as fast ({low:.2f} to {high:.2f})"
        print(line)
        if figures["idle_cpu_share"] > 0.02 and len(result["contestants"]) > 1:
            share = figures["idle_cpu_share"]
            print(f"{name:13} took {share:.0%} of a CPU while it was not its turn: the others were slowed down")


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the time of each round and the medians."""
    from matplotlib.figure import Figure

    figures = result["contestants"]
    figure = Figure(figsize=(7, 1 + 0.5 * len(figures)), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, values) in enumerate(figures.items()):
        axes.barh(row, values["median"] * 1000, color="tab:blue" if name == "slm_jax" else "lightgray")
        axes.plot([value * 1000 for value in values["seconds"]], [row] * len(values["seconds"]), "k.", markersize=4)
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    work = result["work"]
    axes.set_xlabel("ms a step" if work["kind"] == "train" else f"ms for {work['new']} tokens")
    axes.set_title(f"{work['kind']}: {work['layers']} layers, width {work['width']}, batch {work['batch']}, "
                   f"context {work['context']}, {work['dtype']}")  # fmt: skip
    figure.savefig(file)


def work_parser() -> argparse.ArgumentParser:
    """Return a parser to inherit from, of what is to be done, and where to write the figures."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--work", choices=("train", "generate"), default="train", help="default: %(default)s")
    add("--shape", choices=tuple(SHAPES), default="gpt2-small", help="default: %(default)s")
    for name in ("layers", "heads", "width", "vocab", "context", "batch"):
        add(f"--{name}", type=int, help="default: the shape's; a batch of generation is 1")
    add("--bias", action=argparse.BooleanOptionalAction, default=False, help="biases in projections and norms")
    add("--prompt", type=int, default=64, help="generation: tokens of a prompt; default: %(default)s")
    add("--new", type=int, default=128, help="generation: tokens to add; default: %(default)s")
    add("--exact-gelu", action="store_true", help="slm_jax: GELU with the error function, as nanoGPT has it")
    add("--remat", choices=("none", "dots", "full"), default="none", help="slm_jax: default: %(default)s")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, help="CPU threads of each contestant; default: all")
    add("--output", type=Path, metavar="FILE.json", help="write all figures to it")
    return parser


def read_options() -> argparse.Namespace:
    """Parse and check the command line; a mistake ends the program with status 2."""
    parser = argparse.ArgumentParser(
        parents=[work_parser()], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile for PyTorch's; default: on a GPU")
    add("--contestants", default=",".join(CONTESTANTS), help="in the order of their turns; default: %(default)s")
    for name, what in (("nanogpt", "model.py"), ("book", "llms_from_scratch"), ("nanodo", "nanodo")):
        add(f"--{name}", type=Path, metavar="FOLDER", help=f"that {what} is in")
    add("--interpreter", action="append", default=[], metavar="NAME=PYTHON", help="that has a contestant's library")
    add("--rounds", type=int, default=5, help="after one that warms up; default: %(default)s")
    add("--steps", type=int, help=f"steps a round; default: as many as the first does in {ROUND:g} s")
    add("--picture", type=Path, metavar="FILE.png", help="draw the rounds' times")
    options = parser.parse_args()
    check_work(parser, options)
    check_comparison(parser, options)
    return options


def check_work(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program at the first mistake in options of `work_parser`; fill in the shape's."""
    for name, value in SHAPES[options.shape].items():
        if getattr(options, name) is None:
            setattr(options, name, 1 if name == "batch" and options.work == "generate" else value)
    check_positive(
        parser, options, ("layers", "heads", "width", "vocab", "context", "batch", "prompt", "new", "threads")
    )
    if options.width % options.heads:
        parser.error(f"--width is {options.width}, which --heads {options.heads} does not divide")
    if options.work == "generate" and options.prompt + options.new > options.context:
        parser.error(f"--prompt {options.prompt} and --new {options.new} are more than --context {options.context}")
    check_file(parser, options, "output")


def check_comparison(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program at the first mistake in the other options; resolve what was given."""
    check_positive(parser, options, ("rounds", "steps"))
    options.contestants = options.contestants.split(",")
    names = ", ".join(CONTESTANTS)
    for name in options.contestants:
        if name not in CONTESTANTS:
            parser.error(f"--contestants: there is no {name!r}; expected some of {names}")
        if options.contestants.count(name) > 1:
            parser.error(f"--contestants: {name} is given twice; expected each once")
    check_places(parser, options)
    check_file(parser, options, "picture")
    if options.picture is not None and options.picture.suffix not in PICTURES:
        parser.error(f"--picture: {options.picture} has no known format; expected one of {', '.join(PICTURES)}")


def check_places(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program where the contestants' folders or interpreters are mistaken; make a dict of the latter."""
    names = ", ".join(CONTESTANTS)
    pairs = [pair.partition("=") for pair in options.interpreter]
    for name, _, python in pairs:
        if name not in CONTESTANTS or not python:
            parser.error(f"--interpreter is {name}={python}; expected NAME=PYTHON with a name of {names}")
    options.interpreter = {name: python for name, _, python in pairs}
    for name in ("nanogpt", "book", "nanodo"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: {folder} is not a folder")


def check_positive(parser: argparse.ArgumentParser, options: argparse.Namespace, names: tuple[str, ...]) -> None:
    """End the program where a number is not positive."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; expected at least 1")


def check_file(parser: argparse.ArgumentParser, options: argparse.Namespace, name: str) -> None:
    """End the program where what is to be written is a folder, or is in one that is not there."""
    file = getattr(options, name)
    if file is not None and file.is_dir():
        parser.error(f"--{name}: {file} is a folder; expected a file")
    if file is not None and not file.parent.is_dir():
        parser.error(f"--{name}: {file.parent} is not a folder; make it first")


def make_work(name: str, options: argparse.Namespace) -> Work:
    """Return what a contestant is to do."""
    source = getattr(options, name, None)
    if name == "book" and source is not None and (source / "pkg" / "llms_from_scratch").is_dir():
        source = source / "pkg"  # the book's repository
    compiled = options.device == "gpu" if options.compile is None else options.compile
    values: dict[str, Any] = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Work)}
    return Work(**values | {
        "name": name, "kind": options.work, "compile": compiled, "source": source and str(source.resolve()),
    })  # fmt: skip


def main() -> int:
    """Measure and report; the exit status is 1 if slm_jax was to run and did not."""
    options = read_options()
    result = measure([make_work(name, options) for name in options.contestants], options)
    report(result)
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    if options.picture and result["contestants"]:
        draw(result, options.picture)
    return 1 if "slm_jax" in result["skipped"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

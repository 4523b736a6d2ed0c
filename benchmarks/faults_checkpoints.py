"""Faults of a run's folder: what a kill at each file operation leaves, and each kind of damage to each file.

    python benchmarks/faults_checkpoints.py kills
    python benchmarks/faults_checkpoints.py damage

A tiny run with a mirror is trained in this process. ``kills`` copies both before each file operation of Python in them,
from the first to the last: what a kill there would leave. Each copy is resumed, a third from the mirror alone, and must
end bitwise equal to the unbroken run.
``damage`` flips bits in, cuts, empties, zeroes or deletes each file of a run with frozen weights: a resume must notice,
or end as if nothing had been damaged.
"""

import argparse
import contextlib
import io
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from outcomes import differences, outcome

from slm_jax import cli
from slm_jax.errors import InputError
from slm_jax.tasks.config import parse_args
from slm_jax.training.resume import find_start

STEPS, EVERY = 12, 3
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def options(folder: Path, place: Path, *more: str) -> list[str]:
    """Return the options of the run, in ``runs/run`` of a place, and of its mirror there, in ``drive/run``."""
    words = (
        f"--data.source text:{folder / 'text.txt'} --runs_dir {place / 'runs'} --run run --tokenizer.kind char "
        f"--checkpoint.mirror {place / 'drive'} "
        "--model.n_layers 1 --model.emb_dim 8 --model.n_heads 2 --model.context_length 8 --model.drop_rate 0.1 "
        f"--train.batch_size 2 --train.steps {STEPS} --train.eval_every {EVERY} --train.log_every 1 "
        f"--checkpoint.every {EVERY} --sample.every 6 --sample.max_new_tokens 5 --optimizer.warmup_steps 2"
    )
    return [*words.split(), *more]


def train(*args: str) -> tuple[int, str]:
    """Run ``slm-jax train``; return its exit status and all that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = cli.main(["train", *args])
    return status, printed.getvalue()


class Snapshots:
    """Copies a folder before each operation of Python that writes in it; an audit hook stays for good."""

    def __init__(self, folder: Path, copies: Path):
        self._folder, self._copies, self._lock = str(folder), copies, threading.RLock()
        self._busy = False
        self.operations: list[str] = []
        self.active = True
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.active or event not in WRITES or not str(args[0]).startswith(self._folder):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & 3):  # only reads
            return
        with self._lock:
            if self._busy:
                return
            self._busy = True
            try:
                copy = self._copies / str(len(self.operations))
                # Another thread may remove a file meanwhile, as it could before a kill.
                with contextlib.suppress(shutil.Error, OSError):
                    shutil.copytree(self._folder, copy)
                self.operations.append(f"{event} {str(args[0]).removeprefix(self._folder)}")
            finally:
                self._busy = False


def kills(folder: Path, every: int) -> bool:
    """Resume what a kill at each operation would leave; print and return whether all end equal."""
    place = folder / "unbroken"
    (place / "drive").mkdir(parents=True)
    shots = Snapshots(place, folder / "copies")
    assert train(*options(folder, place))[0] == 0
    shots.active = False
    expected = outcome(place / "runs" / "run")
    equal, tried = 0, 0
    for number, i in enumerate(range(0, len(shots.operations), every)):
        copy = folder / "copies" / str(i)
        (copy / "drive").mkdir(parents=True, exist_ok=True)
        if number % 3 == 0:  # on a new machine
            shutil.rmtree(copy / "runs", ignore_errors=True)
        status, printed = train(*options(folder, copy))
        found = [f"status {status}: {printed[-300:]}"]
        if not status:
            found = differences(expected, outcome(copy / "runs" / "run"))
        tried, equal = tried + 1, equal + (not found)
        if found:
            print(f"before {shots.operations[i]}: {found[:5]}", flush=True)
        shutil.rmtree(copy)
    print(f"{equal}/{tried} kills, at every {every}. of {len(shots.operations)} file operations, end bitwise equal")
    return equal == tried


def damages(content: bytes, flips: int, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Give each kind of damage to a file: its name, and what the file has then (None: nothing, it is gone)."""
    for _ in range(flips):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield "flip", bytes(flipped)
    others = {"empty": b"", "half": content[: len(content) // 2], "less one": content[:-1], "deleted": None}
    for kind, changed in {**others, "zeros": bytes(len(content))}.items():
        if changed != content:
            yield kind, changed


def damage(folder: Path, flips: int, chance: random.Random) -> bool:
    """Damage each file of a run with frozen weights; print and return whether all damage is noticed or made good.

    Damage to checkpoints and logs must be noticed before the first step. The other files are in the checkpoints, too:
    a resumed run must be refused, or end as the one that was never damaged.
    """
    base_run = train(*options(folder, folder))
    assert base_run[0] == 0, base_run[1]
    base = ("--base", str(folder / "runs" / "run"), "--trainable", "last_block", "--checkpoint.mirror", "null")
    part = options(folder, folder / "part", *base)
    longer = [*part, "--train.steps", str(2 * STEPS)]
    status, printed = train(*part)
    assert status == 0, printed
    config, run, kept = parse_args(longer), folder / "part" / "runs" / "run", folder / "kept"
    shutil.copytree(run, kept)
    assert train(*longer)[0] == 0
    expected = outcome(run)
    shutil.rmtree(run)
    kept.rename(run)
    logs = {run / "metrics.jsonl", run / "samples.md"}
    files = [
        path for path in sorted(run.rglob("*")) if path.suffix != ".png" and path.is_file() and path.stat().st_size
    ]
    assert run / "frozen.safetensors" in files, files
    intact = find_start(config)
    assert not intact.notes, intact.notes

    def notices() -> bool:
        try:
            return bool(find_start(config).notes)
        except InputError:
            return True

    def is_refused_or_equal() -> bool:
        shutil.copytree(run, kept)
        status, printed = train(*longer)
        equal = status == 0 and not differences(expected, outcome(run))
        shutil.rmtree(run)
        kept.rename(run)
        return equal or (status == 2 and len(printed.strip().splitlines()) == 1)

    well, tried = Counter[str](), Counter[str]()
    for path in files:
        if path.name in (".lock", "summary.json"):  # written anew
            continue
        looked_at = path in logs or run / "checkpoints" in path.parents
        content = path.read_bytes()
        for kind, changed in damages(content, flips, chance):
            path.unlink() if changed is None else path.write_bytes(changed)
            tried[kind] += 1
            good = notices() if looked_at else is_refused_or_equal()
            well[kind] += good
            if not good:
                print(f"{kind} of {path.relative_to(run)} is not noticed", flush=True)
            path.write_bytes(content)
    for kind in tried:
        print(f"{kind}: {well[kind]}/{tried[kind]}")
    print(f"{well.total()}/{tried.total()} in {len(files)} files noticed before the first step, or made good")
    return well == tried


def main() -> int:
    """Run one of the two; exit with 0 only if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "damage"))
    parser.add_argument("--every", type=int, default=1, help="kill only at every so manieth operation")
    parser.add_argument("--flips", type=int, default=8, help="in each file")
    parser.add_argument("--seed", type=int, default=0, help="of the flips")
    given = parser.parse_args()
    parts: dict[str, Callable[[Path], bool]] = {
        "kills": lambda folder: kills(folder, given.every),
        "damage": lambda folder: damage(folder, given.flips, random.Random(given.seed)),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("a bad cafe\n" * 40, encoding="utf-8")
        return 0 if parts[given.what](folder) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure what `slm-jax prepare` promises for large texts: near duplicates, restart after a kill, processes, Beam.

    python benchmarks/corpus.py near             # 6,200 exact and 6,269 near copies among other documents
    python benchmarks/corpus.py kill             # 100 MB, killed at half and run again
    python benchmarks/corpus.py processes        # 100 MB, two processes against one
    python benchmarks/corpus.py beam             # 100 MB, Apache Beam's direct runner against one machine

Each prints JSON. Commands run in processes of their own; seconds are of whole processes, and beside them those that
these computed, which say more on a machine with other work.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from slm_jax.data.builtin import python_docs
from slm_jax.data.token_file import open_token_file

N_ORIGINALS, N_EXACT, N_NEAR = 12_000, 6_200, 6_269
PASSAGE_WORDS = 40, 400
THRESHOLD = 0.7


def passages(random: random.Random) -> list[list[str]]:
    """Return passages of the source of Python's standard library that don't overlap, each a list of words."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    random.shuffle(files)
    found: list[list[str]] = []
    for file in files:
        words, at = file.read_text(encoding="utf-8", errors="ignore").split(), 0
        while at < len(words) - PASSAGE_WORDS[1] and len(found) < N_ORIGINALS:
            n_words = random.randint(*PASSAGE_WORDS)
            found.append(words[at : at + n_words])
            at += n_words
    return found


def near_copy(words: list[str], random: random.Random) -> list[str]:
    """Return a copy with up to 3% of the words changed, removed or added, some in other case, and a new line around."""
    copy = list(words)
    for _ in range(random.randint(1, max(1, len(copy) * 3 // 100))):
        at = random.randrange(len(copy))
        copy[at : at + 1] = random.choice([[], ["altered"], [copy[at], "inserted"]])
    return [word.upper() if random.random() < 0.01 else word for word in copy]


def near(folder: Path) -> dict[str, Any]:
    """Remove exact and near copies from a corpus in which we know them."""
    generator = random.Random(0)
    originals = passages(generator)
    exact = [generator.choice(originals) for _ in range(N_EXACT)]
    near = [near_copy(generator.choice(originals), generator) for _ in range(N_NEAR)]
    lines = [json.dumps({"text": " ".join(words)}) for words in (*originals, *exact, *near)]  # copies come later
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    seconds = prepare(folder, "a.bin", "--near-duplicates", str(THRESHOLD), source="jsonl")
    opened = open_token_file(folder / "a.bin")
    assert opened.tokenizer is not None
    kept = Counter(opened.tokenizer.decode(opened.tokens[:]).split("<|endoftext|>"))
    similarity = {" ".join(words): found for words, found in zip(originals, similarities(originals), strict=True)}
    left_out = [found for text, found in similarity.items() if text not in kept]
    n_rest = sum(found < THRESHOLD for found in similarity.values())
    n_exact = sum(n - 1 for text, n in kept.items() if text in similarity)
    n_near = sum(n for text, n in kept.items() if text not in similarity)
    return {
        "documents": len(lines),
        "copies_left_out": {
            "exact": 1 - n_exact / N_EXACT,
            "near": 1 - n_near / N_NEAR,
            "both": 1 - (n_exact + n_near) / (N_EXACT + N_NEAR),
        },
        "originals": len(similarity),
        "originals_left_out": len(left_out),
        "originals_left_out_by_similarity": Counter(f"{int(found * 20 + 1e-9) / 20:.2f}" for found in sorted(left_out)),
        "rest": n_rest,  # originals that are not similar to an earlier one
        "rest_left_out": sum(found < THRESHOLD for found in left_out) / n_rest,
        "counts": json.loads((folder / "a.bin.json").read_text())["counts"],
        "seconds": seconds,
    }


def similarities(documents: list[list[str]]) -> list[float]:
    """Return the Jaccard similarity of each document and the earlier one that is most similar, by counting."""
    sizes: list[int] = []
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)  # the documents with a run of four words
    found = []
    for i, document in enumerate(documents):
        words = re.findall(r"[^\W_]+", " ".join(document).lower())
        shingles = {tuple(words[at : at + 4]) for at in range(max(1, len(words) - 3))}
        shared = Counter(j for shingle in shingles for j in where[shingle])
        found.append(max((n / (len(shingles) + sizes[j] - n) for j, n in shared.items()), default=0.0))
        sizes.append(len(shingles))
        for shingle in shingles:
            where[shingle].append(i)
    return found


def prepare(folder: Path, out: str, *options: str, source: str = "text") -> dict[str, float]:
    """Run the command; return its seconds, and those that its processes computed."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command(folder, out, *options, source=source), stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.monotonic() - start, 1), "cpu": round(cpu, 1)}


def command(folder: Path, out: str, *options: str, source: str = "text") -> list[str]:
    """Return the command that prepares the folder's files."""
    pattern = f"{source}:{folder}/*.{'jsonl' if source == 'jsonl' else 'txt'}"
    return [sys.executable, "-m", "slm_jax", "prepare", "--source", pattern, "--out", str(folder / out), *options]


def make_text(folder: Path, n_bytes: int) -> None:
    """Write ten text files of documents that have no runs of words in common: words of the built-in text, at random."""
    words, generator = " ".join(python_docs()).split(), random.Random(0)
    for i in range(10):
        with (folder / f"{i}.txt").open("w", encoding="utf-8") as file:
            written = 0
            while written < n_bytes // 10:
                document = " ".join(generator.choices(words, k=generator.randint(50, 1000)))
                written += file.write(f"{document}<|endoftext|>")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a token file's ids, as recorded."""
    return str(json.loads(Path(f"{path}.json").read_text())["sha256"])


def kill(folder: Path, n_bytes: int, processes: str) -> dict[str, Any]:
    """Kill the command when half of the parts are done, and run it again."""
    make_text(folder, n_bytes)
    options = ["--near-duplicates", "0.7", "--processes", processes]
    unbroken = prepare(folder, "a.bin", *options)
    n_parts = -(-n_bytes // (1 << 22))
    start = time.monotonic()
    process = subprocess.Popen(command(folder, "b.bin", *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("b.bin.parts/*.npz"))) < n_parts // 2 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    killed = round(time.monotonic() - start, 2)
    time.sleep(1)
    again = prepare(folder, "b.bin", *options)
    return {
        "seconds_unbroken": unbroken,
        "killed_after": killed,
        "parts_then": n_parts // 2,
        "parts": n_parts,
        "seconds_again": again,
        "share": {clock: round(again[clock] / unbroken[clock], 3) for clock in again},
        "same_sha256": sha256(folder / "a.bin") == sha256(folder / "b.bin"),
    }


def processes(folder: Path, n_bytes: int) -> dict[str, Any]:
    """Compare one process with two."""
    make_text(folder, n_bytes)
    options = ["--near-duplicates", "0.7"]
    seconds = {n: prepare(folder, f"{n}.bin", *options, "--processes", n) for n in ("1", "2")}
    same = (folder / "1.bin").read_bytes() == (folder / "2.bin").read_bytes()
    return {"seconds": seconds, "same_file": same, "tokens": (folder / "1.bin").stat().st_size // 2}


def beam(folder: Path, n_bytes: int) -> dict[str, Any]:
    """Compare Apache Beam's direct runner with one machine."""
    make_text(folder, n_bytes)
    options = ["--near-duplicates", "0.7", "--shard-tokens", "10000000"]
    alone = prepare(folder, "alone.bin", *options)
    beam_ = prepare(folder, "beam.bin", *options, "--runner", "direct")
    abouts = [json.loads((folder / f"{name}.bin.json").read_text()) for name in ("alone", "beam")]
    kept = []
    for name in ("alone", "beam"):
        opened = open_token_file(folder / f"{name}.bin")
        assert opened.tokenizer is not None
        kept.append(sorted(opened.tokenizer.decode(opened.tokens[:]).split("<|endoftext|>")))
    return {
        "tokens": abouts[0]["tokens"],
        "same_documents": kept[0] == kept[1],
        "same_counts": all(abouts[0][name] == abouts[1][name] for name in ("tokens", "documents", "counts")),
        "seconds": {"alone": alone, "beam": beam_},
        "tokens_per_second": {
            clock: {
                "alone": round(abouts[0]["tokens"] / alone[clock]),
                "beam": round(abouts[1]["tokens"] / beam_[clock]),
            }
            for clock in alone
        },
    }


def main() -> None:
    """Make the text, measure, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["near", "kill", "processes", "beam"])
    parser.add_argument("--megabytes", type=float, default=100, help="of text")
    parser.add_argument("--processes", default="1", help="of the command that is killed")
    args = parser.parse_args()
    n_bytes = int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "near":
            figures = near(folder)
        elif args.what == "kill":
            figures = kill(folder, n_bytes, args.processes)
        else:
            figures = {"processes": processes, "beam": beam}[args.what](folder, n_bytes)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

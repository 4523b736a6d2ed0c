"""Measure ``slm-jax prepare`` on a large text: tokens a second and peak memory, in a process of its own.

    python benchmarks/prepare.py --gigabytes 1 --tokenizer gpt2

The text is `builtin:python-docs` again and again with a running number before each line, so that no two documents are
equal, in ten files of equal length: six plain, two ``.gz``, two ``.zst``; the first is one document of its own.
Prints JSON: tokens, tokens a second, seconds (of the whole command), and the peak of its resident memory in bytes.
"""

import argparse
import gzip
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from slm_jax.data.builtin import python_docs
from slm_jax.tokenizer import END_OF_TEXT

SUFFIXES = [".txt"] * 6 + [".gz"] * 2 + [".zst"] * 2


def documents() -> Iterator[str]:
    """Yield documents without end, all different."""
    numbers = itertools.count()
    for document in itertools.cycle(python_docs()):
        yield "\n".join(f"{next(numbers)} {line}" for line in document.split("\n"))


def create(path: Path) -> Any:
    """Open a file to be written, compressed as its name says."""
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=1)
    if path.suffix == ".zst":
        return pa.CompressedOutputStream(str(path), "zstd")
    return path.open("wb")


def write_text(file: BinaryIO, source: Iterator[str], n_bytes: int, between: str) -> int:
    """Write at least so many bytes; return how many."""
    written = 0
    while written < n_bytes:
        data = f"{next(source)}{between}".encode()
        file.write(data)
        written += len(data)
    return written


def make_files(folder: Path, n_bytes: int) -> int:
    """Write the files; return the bytes of text in them."""
    source = documents()
    written = 0
    for i, suffix in enumerate(SUFFIXES):
        with create(folder / f"{i}{suffix}") as file:
            written += write_text(file, source, n_bytes // len(SUFFIXES), f"\n{END_OF_TEXT}" if i else "\n")
    return written


def measure(folder: Path, tokenizer: list[str]) -> dict[str, Any]:
    """Prepare the files; return the figures."""
    out = folder / "tokens.bin"
    command = [sys.executable, "-m", "slm_jax", "prepare", "--source", f"text:{folder}/*", "--out", str(out)]
    start = time.monotonic()
    subprocess.run([*command, "--tokenizer", *tokenizer], stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    about = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    return {
        "tokens": about["tokens"],
        "documents": about["documents"],
        "counts": about["counts"],
        "tokens_per_second": round(about["tokens"] / seconds),
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
    }


def main() -> None:
    """Make the text, prepare it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of text")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or bpe: trained on the start of the text")
    parser.add_argument("--folder", help="where the files are made, and deleted; default: the system's for such")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        n_bytes = make_files(Path(name), int(args.gigabytes * 1e9))
        figures = measure(Path(name), [args.tokenizer])
    print(json.dumps({"text_bytes": n_bytes, "tokenizer": args.tokenizer, **figures}, indent=2))


if __name__ == "__main__":
    main()

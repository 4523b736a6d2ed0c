"""Tell spam from ham with a tiny GPT: the book's comparison (its chapter 6), on two ways to split and three seeds.

    python benchmarks/spam.py
    python benchmarks/spam.py --new

The recipe is configs/classify_spam.yaml. Once with equal messages in the same split and the classes' shares kept, and
once as the book splits, which lets messages of the test set occur in training. ``--new`` trains models of the same
shape and tokenizer from random parameters instead, which says what pretraining is worth.

Each line has the test accuracy of the checkpoint of the lowest validation loss. Seconds are those of fine-tuning with
compiling and evaluating; the base, trained first where it is missing, is not in them. A run that is in the folder
already is not made again. benchmarks/bag_of_words.py has the figure to beat.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from slm_jax.commands import finetune
from slm_jax.commands import train as train_command
from slm_jax.errors import InputError
from slm_jax.tasks.config import FinetuneConfig, RunConfig, parse_args

RECIPE = Path(__file__).parent.parent / "configs" / "classify_spam.yaml"
SEEDS = (0, 1, 2)
PROTOCOLS = {
    "grouped": [],
    "book": ["--classification.split", "random", "--classification.group_duplicates", "false"],
}


def main(arguments: list[str] | None = None) -> int:
    """Print the test accuracy of each protocol and seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs_dir", default="runs", help="the folder of the runs (default: runs)")
    parser.add_argument("--new", action="store_true", help="train new models instead of fine-tuning runs_dir/tiny")
    options = parser.parse_args(arguments)
    base = str(Path(options.runs_dir) / "tiny")
    if not Path(base).exists() and train_command.run(RunConfig(run="tiny", runs_dir=options.runs_dir)):
        return 1
    start = ["--base", "null", "--tokenizer.path", base] if options.new else ["--base", base]
    try:
        for name, protocol in PROTOCOLS.items():
            folder = Path(options.runs_dir) / "spam" / f"{name}-{'new' if options.new else 'tuned'}"
            figures = [train(folder / str(seed), seed, [*start, *protocol]) for seed in SEEDS]
            each = ", ".join(f"{accuracy:.2%}" for accuracy, _ in figures)
            print(
                f"{name}: test accuracy {each} (seeds {', '.join(map(str, SEEDS))}), "
                f"mean {statistics.mean(accuracy for accuracy, _ in figures):.2%}; "
                f"{', '.join(f'{seconds:.0f}' for _, seconds in figures)} s"
            )
    except InputError as error:
        print(f"spam: {error}", file=sys.stderr)
        return 2
    return 0


def train(folder: Path, seed: int, overrides: list[str]) -> tuple[float, float]:
    """Train one classifier; return its test accuracy and the seconds that it took."""
    place = ["--runs_dir", str(folder.parent), "--run", folder.name, "--seed", str(seed)]
    config = parse_args(["--config", str(RECIPE), *place, *overrides], FinetuneConfig)
    if finetune.run(config):
        raise InputError(f"{folder}: did not end; run this again to resume")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary["after"]["test"]["accuracy"], summary["seconds"]


if __name__ == "__main__":
    raise SystemExit(main())

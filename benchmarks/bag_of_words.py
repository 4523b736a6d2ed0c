"""Classify texts by which words are in them: logistic regression on word counts, the figure that a GPT has to beat.

    python benchmarks/bag_of_words.py
    python benchmarks/bag_of_words.py --source tsv:reviews.tsv

The splits are those that ``slm-jax finetune`` makes of the same source with the same seed: classes balanced by leaving
texts out, 70% training, 10% validation (not used here), 20% test. Once with equal texts in the same split and the
classes' shares kept, and once as the book splits, which lets texts of the test set occur in training.

Words are scikit-learn's (two or more letters or digits, lower case), its regularisation the default, nothing tuned.
Needs scikit-learn, which slm_jax itself does not.
"""

import argparse
import statistics
import sys

from slm_jax.data.config import ClassificationConfig, DataConfig
from slm_jax.data.labelled import LabelledSplits, load_labelled
from slm_jax.errors import InputError

SEEDS = (0, 1, 2)
PROTOCOLS = {
    "grouped, stratified": ClassificationConfig(balance="downsample"),
    "the book's": ClassificationConfig(balance="downsample", split="random", group_duplicates=False),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the test accuracy of each protocol and seed; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="named:sms-spam", help="labelled texts (default: named:sms-spam)")
    options = parser.parse_args(arguments)
    try:
        for name, protocol in PROTOCOLS.items():
            data = DataConfig(source=options.source)
            shares = [test_accuracy(load_labelled(data, protocol, seed)) for seed in SEEDS]
            each = ", ".join(f"{share:.2%}" for share in shares)
            print(
                f"{name}: test accuracy {each} (seeds {', '.join(map(str, SEEDS))}), mean {statistics.mean(shares):.2%}"
            )
    except InputError as error:
        print(f"bag_of_words: {error}", file=sys.stderr)
        return 2
    return 0


def test_accuracy(splits: LabelledSplits) -> float:
    """Train on the training texts; return the share of the test texts that get their own class."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError("scikit-learn is not installed; install it with: pip install scikit-learn") from None
    words = CountVectorizer()
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(splits.train.texts), splits.train.labels)
    return float(model.score(words.transform(splits.test.texts), splits.test.labels))


if __name__ == "__main__":
    raise SystemExit(main())

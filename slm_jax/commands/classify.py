"""``slm-jax classify``: predict classes of texts."""

import dataclasses
import json
import sys
from typing import Literal

from slm_jax.commands import set_up
from slm_jax.config import Positive, Words
from slm_jax.errors import InputError, for_terminal
from slm_jax.files import user_path


@dataclasses.dataclass(frozen=True)
class Options:
    """Print a line per text: its class, the probability of the class and the text, separated by tabs.

    Words that belong to no option are texts, and so are all words after --. Without texts or a file, the lines of the
    standard input are the texts.

    Attributes:
        run: folder of a run that was fine-tuned for classification, such as runs/classify_builtin, or
            runs/classify_builtin@80 for one of its checkpoints.
        text: a text; may be given several times, and without --text.
        file: UTF-8 file with a text per line; blank lines are skipped.
        format: text, or json: one object per line, with the probabilities of all classes.
        batch_size: texts per batch.
        weights: int8 stores the matrices in 8 bits; null: as they are.
    """

    run: str
    text: Words = ()
    file: str | None = None
    format: Literal["text", "json"] = "text"
    batch_size: Positive = 32
    weights: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if self.text and self.file is not None:
            raise InputError("text and file are given; expected only one")


def run(options: Options) -> int:
    from slm_jax.tasks.classification import load_classifier

    set_up()
    texts = options.text or _lines(options.file)
    classifier = load_classifier(options.run, weights=options.weights)
    predictions = classifier(texts, options.batch_size)
    if n_truncated := sum(prediction.truncated for prediction in predictions):
        print(
            f"warning: {n_truncated:,} of {len(texts):,} texts are longer than {classifier.max_length} tokens and were "
            "truncated on the right",
            file=sys.stderr,
        )
    for text, prediction in zip(texts, predictions, strict=True):
        if options.format == "json":
            print(json.dumps({"text": text, **dataclasses.asdict(prediction)}))
        else:
            print(for_terminal(f"{prediction.label}\t{prediction.probability:.4f}\t{' '.join(text.split())}"))
    return 0


def _lines(file: str | None) -> list[str]:
    """Return the lines of a file or of the standard input; warn of blank ones, which are skipped."""
    from slm_jax.data.file_sources import read_text

    if file is None and sys.stdin.isatty():
        raise InputError('no text; expected texts, such as slm-jax classify --run RUN "a text", --file or a pipe')
    lines = (sys.stdin.read() if file is None else read_text(user_path(file))).split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{file or 'standard input'}: no text; expected one per line")
    if n_blank := len(lines) - len(texts):
        print(f"{file or 'standard input'}: skipped {n_blank:,} blank of {len(lines):,} lines", file=sys.stderr)
    return texts

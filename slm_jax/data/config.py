"""Configuration of the data: tokenizer, source, splits and windows, and how rows become examples."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge

from slm_jax.config import Execution, Fraction, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids.

    Attributes:
        kind: bpe (trained on the training text), char, simple (the book's words), or gpt2.
        vocab_size: how many tokens a trained bpe has; the other kinds follow from the text.
        path: a saved tokenizer file, folder or run to use instead of training one.
    """

    kind: Literal["bpe", "char", "simple", "gpt2"] = "bpe"
    vocab_size: Positive = 4_096
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut.

    Attributes:
        source: text: builtin:python-docs, text:GLOB, named:NAME, jsonl:GLOB, parquet:GLOB, tfds:NAME,
            tokens:FILE.bin (slm-jax prepare writes them); labelled texts: builtin:prose-or-code, csv:FILE, tsv:FILE,
            jsonl:FILE, tfds:NAME, named:sms-spam; instructions: builtin:docstrings (their default), json:FILE,
            jsonl:FILE, tfds:NAME, named:instruction-data.
        validation_source: a second source to validate on; default: a part of the first.
        validation_fraction: how much of the source validates when there is no second one, 0 to 1.
        test_source: fine-tuning: a third source, to test on at the end; default: a part of the first.
        test_fraction: fine-tuning: how much of the source tests when there is no test_source, 0 to 1.
        sampling: text: stride takes windows at fixed distances, every one once an epoch; random takes random offsets.
        stride: text: tokens from one window to the next; default: the context length, so that windows do not overlap.
        shuffle: whether stride windows, or packed rows, come in a new random order each epoch.
        packing: text: whether rows are filled with documents, each seeing only itself, instead of windows over the
            whole text; sampling and stride then mean nothing.
        text_column: text: the column of the texts in jsonl:, parquet: and tfds: sources; null: text, or in tfds:,
            where there is none, the only feature that is text.
    """

    source: str = "builtin:python-docs"
    validation_source: str | None = None
    validation_fraction: Fraction = 0.1
    test_source: str | None = None
    test_fraction: Fraction = 0.2
    sampling: Literal["random", "stride"] = "random"
    stride: Positive | None = None
    shuffle: bool = True
    packing: bool = False
    text_column: str | None = None


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """Labelled texts, and the head that tells their classes.

    Attributes:
        text_column: the column or field of the text; null: text, or what a named or TFDS source calls it.
        label_column: the column or field of the label; null: label.
        columns: names of the columns of a csv: or tsv: file without a header line.
        balance: downsample keeps as many texts of each class as of the rarest; class_weights weighs the loss.
        split: how one source is split: stratified keeps the shares of the classes, random does not.
        group_duplicates: whether equal texts stay in one split.
        pooling: what the head sees of a text: its last token, the mean over its tokens, or its first token.
        pad_to: batch pads to the longest text of a batch, rounded up to a power of two; longest to the longest
            training text.
        max_length: tokens after which a text is cut off; null: the model's context.
    """

    text_column: str | None = None
    label_column: str | None = None
    columns: tuple[str, ...] = ()
    balance: Literal["none", "downsample", "class_weights"] = "none"
    split: Literal["stratified", "random"] = "stratified"
    group_duplicates: bool = True
    pooling: Literal["last", "mean", "first"] = "last"
    pad_to: Literal["batch", "longest"] = "batch"
    max_length: Positive | None = None


@dataclasses.dataclass(frozen=True)
class InstructionConfig:
    """Instructions with their responses, and how they become tokens.

    Attributes:
        template: alpaca, phi3, chatml, or a JSON file with one of your own.
        split: how one source is split: random, or in file_order: training, test, validation.
        mask_prompt: whether only responses are learned, not the instructions.
        packing: whether several short examples share a row, each seeing only itself.
        too_long: what happens to an example longer than max_length: drop it, or truncate its prompt from the front.
        max_length: tokens of an example; null: the model's context.
        responses: how many test instructions are answered before and after training; null: all.
    """

    template: str = "alpaca"
    split: Literal["random", "file_order"] = "random"
    mask_prompt: bool = True
    packing: bool = False
    too_long: Literal["drop", "truncate"] = "drop"
    max_length: Annotated[int, Ge(2)] | None = None
    responses: Execution[NotNegative | None] = None

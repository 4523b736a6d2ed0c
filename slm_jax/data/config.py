"""Configuration of the data: tokenizer, source, splits and windows, and how rows become examples."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from slm_jax.config import AboveZero, Execution, Fraction, NotNegative, Positive


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids.

    Attributes:
        kind: bpe (trained on the training text), char, simple (the book's words), or gpt2.
        vocab_size: tokens of a trained bpe; the text decides for the other kinds.
        path: tokenizer to use instead: file or folder of a saved one, a run, or a pretrained model's (tokenizer.json,
            tokenizer.model, GGUF, llama2.c's).
    """

    kind: Literal["bpe", "char", "simple", "gpt2"] = "bpe"
    vocab_size: Positive = 4_096
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data, its splits and its windows.

    Attributes:
        source: plain text: builtin:python-docs, text:GLOB, named:NAME, tokens:FILE.bin (written by slm-jax prepare);
            rows of texts, labelled texts or instructions: jsonl:GLOB, json:GLOB, csv:GLOB, tsv:GLOB, parquet:GLOB,
            tfds:NAME[/CONFIG][:SPLIT]; labelled texts: builtin:prose-or-code, named:sms-spam; instructions:
            builtin:docstrings, named:instruction-data; preferences: builtin:docstring-preferences,
            named:instruction-preference.
        validation_source: second source, for validation; null: a part of the first.
        validation_fraction: share of the source held out for validation, without a validation_source.
        test_source: fine-tuning: third source, for the test at the end; null: a part of the first.
        test_fraction: fine-tuning: share of the source held out for the test, without a test_source.
        sampling: text: stride takes windows at fixed distances, each once an epoch; random takes random offsets.
        stride: text: tokens from one window to the next; null: the context length, so that windows do not overlap.
        shuffle: whether stride windows and packed rows come in a new random order each epoch.
        packing: text: whether rows are packed with whole documents, each seeing only itself, instead of cut as
            windows; sampling and stride then have no effect.
        text_column: text: column of the texts in sources of rows; null: text, or in tfds: the usual name or the only
            text feature.
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
    """Labelled texts, and the head that predicts their classes.

    Attributes:
        text_column: column or field of the text; null: text, or the name in a named or TFDS source.
        label_column: column or field of the label; null: label.
        columns: names of the columns of a csv: or tsv: file without a header line.
        balance: downsample keeps as many texts of each class as of the rarest; class_weights weights the loss.
        split: how one source is split: stratified keeps the class proportions, random does not.
        group_duplicates: whether equal texts stay in one split.
        pooling: input of the head: hidden state of the last token, mean over the tokens, or first token.
        pad_to: batch pads to the longest text of the batch, rounded up to a power of two; longest pads to the longest
            training text.
        max_length: tokens after which a text is truncated; null: the model's context length.
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
    """Instructions with responses, and how they become tokens.

    Attributes:
        template: alpaca, phi3, chatml, or a JSON file with your own; null: the base's, or alpaca if it has none.
        split: how one source is split: random, or file_order (training, test, validation).
        mask_prompt: whether the loss covers only the responses.
        packing: whether short examples share a row, each seeing only itself.
        too_long: whether an example longer than max_length is dropped, or its prompt truncated on the left.
        max_length: largest number of tokens of an example; null: the model's context length.
        empty: whether an entry with an empty instruction or response is dropped and counted, or refused.
        responses: number of test instructions answered before and after training; null: all.
    """

    template: str | None = None
    split: Literal["random", "file_order"] = "random"
    mask_prompt: bool = True
    packing: bool = False
    too_long: Literal["drop", "truncate"] = "drop"
    max_length: Annotated[int, Ge(2)] | None = None
    empty: Execution[Literal["drop", "refuse"]] = "drop"  # the data are identified by their SHA-256
    responses: Execution[NotNegative | None] = None


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Pairs of a chosen and a rejected response, and the loss that learns from them.

    Attributes:
        loss: dpo (Rafailov et al. 2023), ipo (Azar et al. 2023) or simpo (Meng et al. 2024, needs no reference).
        beta: how strongly the model is held to the reference: rewards are beta times the log-ratio to it.
        label_smoothing: dpo and simpo: assumed share of pairs that are the wrong way round.
        gamma: simpo: by how much the chosen reward shall exceed the rejected one.
        sft_weight: weight of the chosen response's loss per token, which is added.
        template: alpaca, phi3, chatml, or a JSON file with your own; null: the base's, or alpaca if it has none.
        split: how one source is split: random, or file_order (training, test, validation).
        too_long: whether a pair longer than max_length is dropped, or its prompt truncated on the left.
        max_length: largest number of tokens of a prompt with a response; null: the model's context length.
        empty: whether a pair with an empty text, or with equal responses, is dropped and counted, or refused.
        responses: number of test prompts answered before and after training; null: all.
    """

    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    beta: AboveZero = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    gamma: Annotated[float, Ge(0)] = 0.5
    sft_weight: Annotated[float, Ge(0)] = 0.0
    template: str | None = None
    split: Literal["random", "file_order"] = "random"
    too_long: Literal["drop", "truncate"] = "drop"
    max_length: Annotated[int, Ge(2)] | None = None
    empty: Execution[Literal["drop", "refuse"]] = "drop"  # the data are identified by their SHA-256
    responses: Execution[NotNegative | None] = None

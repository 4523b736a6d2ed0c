"""``slm-jax evaluate``: measure a model, or the responses that one gave."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from slm_jax.commands import load, set_up, template_of
from slm_jax.config import Fraction, Positive, parse
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, user_path, write_file

if TYPE_CHECKING:
    from slm_jax.evaluation.responses import Response


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure a model on a text, LAMBADA and HellaSwag, or responses to instructions; the figures are printed as JSON.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or GPT-2 weights: a file,
            a folder or a name such as gpt2; null: only responses are measured.
        tokenizer: gpt2, or a saved one: its file or folder, or a run's folder; null: the run's own, or GPT-2's.
        n_heads: attention heads, where weights do not say how many.
        source: a text to measure the loss on: builtin:python-docs, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME,
            named:NAME or tokens:FILE.bin.
        text_column: the column of the texts in jsonl:, parquet: and tfds: sources; null: text, or in tfds:, where
            there is none, the only feature that is text.
        split: which part of the source, split as pretraining splits it: all, train or validation.
        validation_fraction: how much of the source is its validation split, 0 to 1.
        context_length: tokens of a window; null: the model's.
        stride: tokens from one window to the next, from 1 (slow, each token has the most to look back on) to the
            context length; null: the context length.
        lambada: jsonl:FILE with a text in each line, or tfds:lambada.
        hellaswag: jsonl:FILE in the form of the original files, or tfds:hellaswag.
        responses: a JSON list of entries with output and model_response, such as a run's responses.json: how near they
            are to each other; with a run also how likely that finds the outputs.
        limit: only so many examples of LAMBADA and HellaSwag; null: all.
        batch_size: sequences computed at a time.
        dtype: what to compute in; only float32 gives the same figures on every machine.
        out: a file for the JSON; null: it is printed.
    """

    run: str | None = None
    tokenizer: str | None = None
    n_heads: Positive | None = None
    source: str | None = None
    text_column: str | None = None
    split: Literal["all", "train", "validation"] = "all"
    validation_fraction: Fraction = 0.1
    context_length: Positive | None = None
    stride: Positive | None = None
    lambada: str | None = None
    hellaswag: str | None = None
    responses: str | None = None
    limit: Positive | None = None
    batch_size: Positive = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    out: str | None = None

    def __post_init__(self) -> None:
        needs_run = any(source is not None for source in (self.source, self.lambada, self.hellaswag))
        if not needs_run and self.responses is None:
            raise InputError("nothing to measure; expected --source, --lambada, --hellaswag or --responses")
        if self.text_column is not None and self.source is None:
            raise InputError(f"text_column is {self.text_column!r}, but there is no --source; add one or leave it out")
        if needs_run and self.run is None:
            raise InputError("no model to measure; expected --run, such as runs/tiny (only --responses goes without)")


def main(args: Sequence[str]) -> int:
    """Read the options and run; see ``slm-jax evaluate --help``."""
    return run(parse(Options, args, "slm-jax evaluate"))


def run(options: Options) -> int:
    """Measure, and print or write the figures; return 0."""
    from slm_jax.evaluation.responses import read_responses, score_responses
    from slm_jax.evaluation.results import to_dict

    _check_sources(options)
    responses = None if options.responses is None else read_responses(user_path(options.responses))
    out = None if options.out is None else check_new_file(options.out, "out", "figures.json")
    figures = {} if options.run is None else _measure(options, options.run, responses)
    if responses is not None:
        figures["responses"] = {"source": options.responses, **to_dict(score_responses(responses))}
    text = json.dumps(figures, indent=2)
    if out is None:
        print(text)
    else:
        write_file(out, text + "\n")
        print(f"{options.out} written", file=sys.stderr)
    return 0


def _measure(options: Options, source: str, responses: "list[Response] | None") -> dict[str, Any]:
    """Return all figures of a model."""
    import jax
    from rich.console import Console
    from rich.progress import track

    from slm_jax.evaluation.responses import reference_loss
    from slm_jax.evaluation.results import to_dict
    from slm_jax.model import GPTModel

    set_up()
    loaded = load(source, options.tokenizer, options.n_heads)
    figures: dict[str, Any] = {"run": str(loaded.folder), "step": loaded.step, "dtype": options.dtype}
    model = GPTModel(dataclasses.replace(loaded.model_config, dtype=options.dtype))
    measurements = _measurements(options)
    if responses is not None:
        measurements["references"] = partial(
            reference_loss, template=template_of(loaded), entries=responses, batch_size=options.batch_size
        )
    console = Console(stderr=True)
    # Accelerators multiply float32 with fewer bits unless told not to.
    with jax.default_matmul_precision("highest" if options.dtype == "float32" else "default"):
        for name, measure in measurements.items():
            show = partial(track, description=name, console=console, transient=True, disable=not console.is_terminal)
            figures[name] = to_dict(measure(model, loaded.params, loaded.tokenizer, track=show))
    return figures


def _check_sources(options: Options) -> None:
    """Find a mistake in the last source before the first is measured."""
    from slm_jax.data.sources import check_text_column, parse_source
    from slm_jax.evaluation.benchmarks import read_examples

    if options.source is not None:
        parse_source(options.source)
        check_text_column(options.text_column, [options.source])
    for name in ("lambada", "hellaswag"):
        if getattr(options, name) is not None:
            read_examples(getattr(options, name), name, options.limit)


def _measurements(options: Options) -> dict[str, Any]:
    """Return what is to be measured by name, as functions of model, params and tokenizer."""
    from slm_jax.evaluation.benchmarks import hellaswag, lambada
    from slm_jax.evaluation.text import evaluate_source

    chosen: dict[str, Any] = {}
    if options.source is not None:
        chosen["text"] = partial(
            evaluate_source,
            source=options.source,
            text_column=options.text_column,
            split=options.split,
            validation_fraction=options.validation_fraction,
            context_length=options.context_length,
            stride=options.stride,
            batch_size=options.batch_size,
        )
    for name, function, source in (("lambada", lambada, options.lambada), ("hellaswag", hellaswag, options.hellaswag)):
        if source is not None:
            chosen[name] = partial(function, source=source, batch_size=options.batch_size, limit=options.limit)
    return chosen

"""``slm-jax evaluate``: measure a model, or responses to instructions."""

import dataclasses
import json
import math
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from slm_jax.commands import LoadOptions, ModelMesh, load, set_up
from slm_jax.config import Fraction, Positive
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, user_path, write_file

if TYPE_CHECKING:
    from slm_jax.evaluation.responses import Response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(LoadOptions):
    """Measure a model on a text, LAMBADA and HellaSwag, or responses to instructions; the figures are printed as JSON.

    Attributes:
        run: a run's folder such as runs/tiny, or runs/tiny@800 for one of its checkpoints; or pretrained weights: a
            file, a folder or a name such as gpt2; null: only responses are measured.
        source: text to measure the loss on: builtin:python-docs, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME,
            named:NAME or tokens:FILE.bin.
        text_column: column of the texts in jsonl:, parquet: and tfds: sources; null: text, or in tfds: the only text
            feature.
        split: which part of the source, split as in pretraining: all, train or validation.
        validation_fraction: share of the source that is its validation split, between 0 and 1.
        context_length: tokens of a window; null: the model's.
        stride: tokens between the starts of windows, from 1 (slow; each token has the most context) to the context
            length; null: the context length.
        lambada: jsonl:FILE with a text in each line, or tfds:lambada.
        hellaswag: jsonl:FILE with the fields of the original files, or tfds:hellaswag.
        responses: JSON list of entries with output and model_response, such as a run's responses.json: how well they
            agree; with a run also the loss of the outputs.
        limit: number of examples of LAMBADA and HellaSwag; null: all.
        batch_size: sequences per batch.
        dtype: dtype of the computation; only float32 gives the same figures on every machine.
        out: file for the JSON; null: it is printed.
        mesh: devices that share the model.
        weights: int8 stores the matrices in 8 bits; null: as they are.
    """

    run: str | None = None
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
    mesh: ModelMesh = dataclasses.field(default_factory=ModelMesh)
    weights: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        needs_run = any(source is not None for source in (self.source, self.lambada, self.hellaswag))
        if not needs_run and self.responses is None:
            raise InputError("nothing to measure; expected --source, --lambada, --hellaswag or --responses")
        if self.text_column is not None and self.source is None:
            raise InputError(f"text_column is {self.text_column!r}, but there is no --source")
        if needs_run and self.run is None:
            raise InputError("no model to measure; expected --run, such as runs/tiny")


def run(options: Options) -> int:
    from slm_jax.data.sources import check_text_column, parse_source
    from slm_jax.evaluation.benchmarks import read_examples
    from slm_jax.evaluation.responses import read_responses, score_responses

    # Check everything before the first is measured.
    if options.source is not None:
        check_text_column(options.text_column, [parse_source(options.source)])
    for name in ("lambada", "hellaswag"):
        if getattr(options, name) is not None:
            read_examples(getattr(options, name), name, options.limit)
    responses = None if options.responses is None else read_responses(user_path(options.responses))
    out = None if options.out is None else check_new_file(options.out, "out", "figures.json")
    figures = {} if options.run is None else _measure(options, options.run, responses)
    if responses is not None:
        figures["responses"] = {"source": options.responses, **score_responses(responses)}
    text = json.dumps(figures, indent=2)
    if out is None:
        print(text)
    else:
        write_file(out, text + "\n")
        print(f"{options.out} written", file=sys.stderr)
    return 0


def _measure(options: Options, source: str, responses: "list[Response] | None") -> dict[str, Any]:
    import jax
    from rich.console import Console
    from rich.progress import track

    from slm_jax.evaluation.benchmarks import hellaswag, lambada
    from slm_jax.evaluation.logprobs import Scorer, evaluate_source
    from slm_jax.evaluation.responses import reference_loss
    from slm_jax.generation.conversation import template_or_alpaca
    from slm_jax.model import GPTModel

    set_up()
    loaded = load(source, options.tokenizer, options.n_heads, options.mesh, options.weights)
    figures: dict[str, Any] = {"run": str(loaded.folder), "step": loaded.step, "dtype": options.dtype}
    if options.weights is not None:
        figures["weights"] = options.weights
    model = GPTModel(dataclasses.replace(loaded.model_config, dtype=options.dtype))
    given = vars(options)
    text = ("source", "text_column", "split", "validation_fraction", "context_length", "stride")
    measurements: dict[str, partial[dict[str, Any]]] = {}
    if options.source is not None:
        measurements["text"] = partial(evaluate_source, **{name: given[name] for name in text})
    for name, function in (("lambada", lambada), ("hellaswag", hellaswag)):
        if given[name] is not None:
            measurements[name] = partial(function, source=given[name], limit=options.limit)
    if responses is not None:
        template = template_or_alpaca(loaded.template, loaded.folder)
        measurements["references"] = partial(reference_loss, template=template, entries=responses)
    console = Console(stderr=True)
    # By default, accelerators multiply float32 with fewer bits.
    with jax.default_matmul_precision("highest" if options.dtype == "float32" else "default"):
        for name, measure in measurements.items():
            show = partial(track, description=name, console=console, transient=True, disable=not console.is_terminal)
            measured = measure(Scorer(model, loaded.params, loaded.tokenizer, options.batch_size, show))
            # JSON has no NaN and no infinity.
            finite = {key: not isinstance(value, float) or math.isfinite(value) for key, value in measured.items()}
            figures[name] = {key: value if finite[key] else None for key, value in measured.items()}
    return figures

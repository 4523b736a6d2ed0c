"""The page of one run, or of several beside each other."""

import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from safetensors import SafetensorError, safe_open

from slm_jax.model import GPTConfig, param_shapes
from slm_jax.tools.report.attention import read_maps
from slm_jax.tools.report.curves import draw_curves, look
from slm_jax.tools.report.record import Record, Row, defaults, figure, number
from slm_jax.training.progress import format_duration
from slm_jax.training.run_folder import FROZEN
from slm_jax.training.trainable import leaf_table

MOST_SAMPLES, MOST_RESPONSES, MOST_CLASSES = 30, 24, 30
CONSTANTS = ("lora_scale", "lora_drop_rate")  # lie beside adapters and are not parameters
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SCORES = {"loss": ".4f", "perplexity": ",.2f", "accuracy": ".2%", "macro_f1": ".4f", "exact_match": ".2%"}
SCORES |= {"rouge_l": ".4f"}
NAMES = {"loss": "loss, nats", "macro_f1": "macro F1", "exact_match": "exact match", "rouge_l": "ROUGE-L"}
OF_THE_FOLDER = ("run", "runs_dir", "resume")

# HTML has no place for control characters and for halves of characters.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Table(NamedTuple):
    """A table: ``numbers`` are the columns that are aligned right."""

    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[int] = ()
    caption: str = ""


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("slm_jax.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"draw_curves": draw_curves, "look": look, "zip": zip}
    return environment


def _render(template: str, **values: object) -> str:
    return _NOT_TEXT.sub("\ufffd", _environment().get_template(template).render(**values))


def write_page(record: Record, text: str | None = None) -> str:
    """Return the page of a run as HTML, with the attention of a text (None: of the latest sample).

    Raises:
        InputError: a text that the model's tokenizer cannot encode.
    """
    maps = read_maps(record, text)
    return _render(
        "run.html",
        record=record,
        facts=facts(record),
        scores=_scores(record),
        classes=_classes(record),
        responses=record.responses(),
        most_responses=MOST_RESPONSES,
        samples=_spread(record.samples(), MOST_SAMPLES),
        maps=None if isinstance(maps, str) else maps,
        no_maps=maps,
        parameters=_parameters(record),
        config=_config(record),
        environment=Table(["", "trained with"], list(record.environment.items())),
    )


def write_comparison(records: Sequence[Record]) -> str:
    """Return the page of several runs as HTML; runs of different tasks are drawn apart."""
    tasks = dict.fromkeys(record.task for record in records)
    groups = [[record for record in records if record.task == task] for task in tasks]
    return _render(
        "comparison.html",
        records=records,
        groups=[{"records": group, "same_tokens": _same_tokens(group), "tables": _compare(group)} for group in groups],
    )


def facts(record: Record) -> dict[str, str]:
    """Return the most important figures of a run by name; unknown ones are left out."""
    shown = {"steps": f"{record.last_step:,}"}
    total = record.config.get("train.steps")
    if isinstance(total, int) and total != record.last_step:
        shown["steps"] += f" of {total:,}"
    if (best := record.best()) is not None:
        shown["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        if record.unit == "token":
            shown["its perplexity"] = f"{math.exp(min(best[1], 700)):,.2f}"
    test = record.measured("after")
    for key, name in (("accuracy", "test accuracy"), ("rouge_l", "test ROUGE-L")):
        if key in test:
            shown[name] = figure(test[key], SCORES[key])
    train = [row for row in record.rows if row["split"] == "train"]
    if train:
        shown["last training loss"] = figure(train[-1].get("loss"), ".4f")
        shown["tokens"] = figure(train[-1].get("tokens"), ",.0f")
    _, rates = record.points("train", "tokens_per_second")
    if np.isfinite(rates).any():
        shown["tokens a second"] = f"{np.nanmedian(rates):,.0f} (median)"
    seconds = np.array([number(row["seconds"]) for row in [*record.rows, record.summary] if "seconds" in row])
    if np.isfinite(seconds).any():
        shown["time"] = format_duration(float(np.nanmax(seconds)))
    if rows := parameter_rows(record):
        trained, whole = sum(row["count"] for row in rows if row["trained"]), sum(row["count"] for row in rows)
        shown["parameters"] = f"{whole:,}" if trained == whole else f"{whole:,} ({trained:,} trained)"
    return shown


# --- What a task measured ---


def _scores(record: Record) -> Table | None:
    """Return the figures of each split before and after training; None if nothing was measured."""
    moments = [moment for moment in ("before", "after") if record.measured(moment)]
    splits = [split for split in ("test", "validation", "train") if any(record.measured(m, split) for m in moments)]
    rows = []
    for split, (key, form) in itertools.product(splits, SCORES.items()):
        cells = [record.measured(moment, split).get(key) for moment in moments]
        if any(cell is not None for cell in cells):
            rows.append([split, NAMES.get(key, key), *(figure(cell, form, "–") for cell in cells)])
    head = ["split", "", *(f"{moment} training" for moment in moments)]
    return Table(head, rows, range(2, len(head))) if rows else None


def _classes(record: Record) -> dict[str, Any] | None:
    """Return the confusion matrices of a classifier by split, and the table of its classes; None if it is none."""
    moments = [moment for moment in ("before", "after") if "confusion" in record.measured(moment)]
    if not moments:
        return None
    matrices = {
        split: [
            matrix
            for moment in moments
            if (matrix := _matrix(record.measured(moment, split), f"{split} texts, {moment} training"))
        ]
        for split in ("test", "validation", "train")
    }
    last = record.measured(moments[-1])
    names = last.get("classes")
    columns = [last.get(name) for name in ("classes", "precision", "recall", "f1", "support")]
    rows = []
    if all(isinstance(column, list) for column in columns):
        rows = [
            [name, *(figure(value, ".4f", "–") for value in values[:3]), figure(values[3], ",.0f", "–")]
            for name, *values in zip(*columns, strict=False)
        ]
    caption = f"test texts, {moments[-1]} training"
    return {
        "too_many": len(names) if isinstance(names, list) and len(names) > MOST_CLASSES else 0,
        "picture": (record.folder.path / "confusion.png").is_file() and not record.continued,
        "matrices": matrices,
        "by_class": Table(["class", "precision", "recall", "F1", "texts"], rows, range(1, 5), caption)
        if rows
        else None,
    }


def _matrix(figures: Row, caption: str) -> dict[str, Any] | None:
    """Return a confusion matrix with each cell's share of its true class; None if the figures hold none."""
    names = figures.get("classes")
    try:
        counts = np.array(figures.get("confusion"), np.int64)
    except (TypeError, ValueError, OverflowError):
        return None
    if not isinstance(names, list) or counts.shape != (len(names), len(names)) or (counts < 0).any():
        return None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {"caption": caption, "names": names, "counts": counts.tolist(), "shares": shares.tolist()}


def _spread(items: list[tuple[int, str]], most: int) -> dict[str, Any]:
    """Return at most so many items at equal distances, the first and the last included, and how many there are."""
    n_shown = min(most, len(items))
    shown = [items[round(i)] for i in np.linspace(0, len(items) - 1, n_shown)] if items else []
    return {"shown": shown, "total": len(items)}


# --- Parameters, configuration ---


def parameter_rows(record: Record) -> list[Row]:
    """Return path, shape, count, dtype and whether it is trained, of each array of the model; read from headers."""
    try:
        leaves = record.metadata.get("leaves") or leaf_table(param_shapes(GPTConfig(**record.metadata["model"])))
    except (KeyError, TypeError, ValueError):
        return []
    trained = [(path, shape, dtype, True) for path, (*shape, dtype) in leaves.items()]
    return [
        {"path": path, "shape": shape, "count": math.prod(shape), "dtype": dtype, "trained": is_trained}
        for path, shape, dtype, is_trained in [*trained, *_frozen(record)]
        if not path.endswith(CONSTANTS)
    ]


def _frozen(record: Record) -> list[tuple[str, list[int], str, bool]]:
    file = record.folder.path / FROZEN
    if record.metadata.get("trainable", "all") == "all" or not file.is_file():
        return []
    try:
        with safe_open(file, "numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            dtypes = {name: DTYPES.get(part.get_dtype(), part.get_dtype()) for name, part in slices.items()}
            return [(name, part.get_shape(), dtypes[name], False) for name, part in slices.items()]
    except (SafetensorError, OSError):
        return []


def _parameters(record: Record) -> Table | None:
    rows = parameter_rows(record)
    whole = sum(row["count"] for row in rows)
    if not whole:
        return None
    head = ["path", "shape", "count", "share", "dtype", "trained"]
    cells = [
        [
            _code(row["path"]),
            " × ".join(map(str, row["shape"])),
            f"{row['count']:,}",
            "< 0.1%" if row["count"] < 0.0005 * whole else f"{row['count'] / whole:.1%}",
            row["dtype"],
            "yes" if row["trained"] else "no",
        ]
        for row in rows
    ]
    return Table(head, [*cells, ["all", "", f"{whole:,}", "", "", ""]], (2, 3))


def _config(record: Record) -> dict[str, Any]:
    """Return the tables of the keys that differ from their defaults, and of all keys."""
    usual = {**defaults(record.task), "run": record.config.get("run")}  # a name is no default
    changed = {key: value for key, value in record.config.items() if key not in usual or usual[key] != value}
    rows = [
        [_code(key), _typed(value), _typed(usual[key]) if key in usual else "no such key now"]
        for key, value in changed.items()
    ]
    every = [[_code(key), _typed(value, key in changed)] for key, value in record.config.items()]
    return {
        "changed": Table(["differs from the default", "here", "default"], rows),
        "all": Table(["key", "value"], every),
    }


def _code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(text)


def _typed(value: object, marked: bool = False) -> Markup:
    """Return a value as it is typed in a recipe."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _code(Markup("<mark>{}</mark>").format(text) if marked else text)


# --- Several runs ---


def _same_tokens(records: Sequence[Record]) -> bool:
    """Return whether all known tokenizers are the same, or the loss is not one of tokens."""
    known = [record.metadata["tokenizer"] for record in records if record.metadata.get("tokenizer")]
    return records[0].unit != "token" or all(tokenizer == known[0] for tokenizer in known)


def _compare(records: Sequence[Record]) -> dict[str, Table]:
    """Return the tables of the final figures and of the settings that differ."""
    figures = [{"state": record.state, **facts(record)} for record in records]
    names = list(dict.fromkeys(name for one in sorted(figures, key=len, reverse=True) for name in one))
    rows = [
        [record.label, *(one.get(name, "–") for name in names)] for record, one in zip(records, figures, strict=True)
    ]
    settings = [
        {**record.config, **{f"environment: {key}": value for key, value in record.environment.items()}}
        for record in records
    ]
    keys = dict.fromkeys(key for one in settings for key in one if key not in OF_THE_FOLDER)
    shown = {key: [_typed(one[key]) if key in one else Markup("–") for one in settings] for key in keys}
    different = [[_code(key), *values] for key, values in shown.items() if len(set(values)) > 1]
    return {
        "figures": Table(["run", *names], rows, range(2, len(names) + 1)),
        "settings": Table(["key", *(record.label for record in records)], different),
    }

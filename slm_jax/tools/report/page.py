"""The page of one run, or of several beside each other."""

import functools
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from slm_jax.config import flatten, to_dict
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.runs import read_frozen
from slm_jax.tasks.config import TASKS, FinetuneConfig, RunConfig
from slm_jax.tools.report.pictures import draw_curves, look, read_maps
from slm_jax.tools.report.record import Record, Row, figure
from slm_jax.training.progress import format_duration
from slm_jax.training.trainable import leaf_table

MOST_SAMPLES, MOST_RESPONSES, MOST_CLASSES = 30, 24, 30
CONSTANTS = ("lora_scale", "lora_drop_rate")  # lie beside adapters and are not parameters
# Figures of a split: name and form.
SCORES = {
    "loss": ("loss, nats", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "accuracy": ("accuracy", ".2%"),
    "macro_f1": ("macro F1", ".4f"),
    "exact_match": ("exact match", ".2%"),
    "rouge_l": ("ROUGE-L", ".4f"),
}
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
    loader = PackageLoader("slm_jax.tools.report")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
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
    samples = record.folder.samples()
    spread = np.linspace(0, len(samples) - 1, min(MOST_SAMPLES, len(samples))).round().astype(int)
    return _render(
        "run.html",
        record=record,
        facts=facts(record),
        scores=_scores(record),
        classes=_classes(record),
        responses=record.responses(),
        most_responses=MOST_RESPONSES,
        samples={"shown": [samples[i] for i in spread], "total": len(samples)},
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
    if total and total != record.last_step:
        shown["steps"] += f" of {total:,}"
    if (best := record.best()) is not None:
        shown["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        if record.unit == "token":
            shown["its perplexity"] = f"{math.exp(min(best[1], 700)):,.2f}"
    test = record.measured("after")
    for key in ("accuracy", "rouge_l"):
        if key in test:
            name, form = SCORES[key]
            shown[f"test {name}"] = figure(test[key], form)
    train = [row for row in record.rows if row["split"] == "train"]
    if train:
        shown["last training loss"] = figure(train[-1]["loss"], ".4f")
        shown["tokens"] = f"{train[-1]['tokens']:,}"
    rates = [row["tokens_per_second"] for row in train if row["tokens_per_second"] is not None]
    if rates:
        shown["tokens a second"] = f"{np.median(rates):,.0f} (median)"
    seconds = [row["seconds"] for row in [*record.rows, record.summary] if "seconds" in row]
    if seconds:
        shown["time"] = format_duration(max(seconds))
    if rows := parameter_rows(record):
        trained, whole = sum(row["count"] for row in rows if row["trained"]), sum(row["count"] for row in rows)
        shown["parameters"] = f"{whole:,}" if trained == whole else f"{whole:,} ({trained:,} trained)"
    return shown


# --- What a task measured ---


def _scores(record: Record) -> Table | None:
    """Return the figures of each split before and after training; None if nothing was measured."""
    moments = [moment for moment in ("before", "after") if record.measured(moment)]
    rows = []
    for split, (key, (name, form)) in itertools.product(("test", "validation", "train"), SCORES.items()):
        cells = [record.measured(moment, split).get(key) for moment in moments]
        if any(cell is not None for cell in cells):
            rows.append([split, name, *(figure(cell, form, "–") for cell in cells)])
    head = ["split", "", *(f"{moment} training" for moment in moments)]
    return Table(head, rows, range(2, len(head))) if rows else None


def _classes(record: Record) -> dict[str, Any] | None:
    """Return the figures of a classifier's matrices by split, and the table of its classes; None if it is none."""
    moments = [moment for moment in ("before", "after") if "confusion" in record.measured(moment)]
    if not moments:
        return None
    matrices = {
        split: [(f"{split} texts, {moment} training", record.measured(moment, split)) for moment in moments]
        for split in ("test", "validation", "train")
    }
    caption, last = matrices["test"][-1]
    by_class = [last[name] for name in ("classes", "precision", "recall", "f1", "support")]
    rows = [
        [name, *(figure(share, ".4f", "–") for share in shares), f"{support:,}"]
        for name, *shares, support in zip(*by_class, strict=True)
    ]
    n_classes = len(rows)
    return {
        "too_many": n_classes if n_classes > MOST_CLASSES else 0,
        "picture": (record.folder.path / "confusion.png").is_file() and not record.continued,
        "matrices": matrices,
        "by_class": Table(["class", "precision", "recall", "F1", "texts"], rows, range(1, 5), caption),
    }


# --- Parameters, configuration ---


def parameter_rows(record: Record) -> list[Row]:
    """Return path, shape, count, dtype and whether it is trained, of each array of the model."""
    if not record.metadata:
        return []
    leaves = record.metadata.get("leaves") or leaf_table(param_shapes(GPTConfig(**record.metadata["model"])))
    arrays = [(path, shape, dtype, True) for path, (*shape, dtype) in leaves.items()]
    if record.metadata.get("trainable", "all") != "all":
        try:
            frozen = flatten_dict(read_frozen(record.folder.path, record.metadata), sep="/")
        except InputError:
            frozen = {}
        arrays += [(path, leaf.shape, str(leaf.dtype), False) for path, leaf in frozen.items()]
    return [
        {"path": path, "shape": shape, "count": math.prod(shape), "dtype": dtype, "trained": trained}
        for path, shape, dtype, trained in arrays
        if not path.endswith(CONSTANTS)
    ]


def _parameters(record: Record) -> Table:
    rows = parameter_rows(record)
    whole = sum(row["count"] for row in rows)
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
    head = ["path", "shape", "count", "share", "dtype", "trained"]
    return Table(head, [*cells, ["all", "", f"{whole:,}", "", "", ""]] if rows else [], (2, 3))


def _config(record: Record) -> dict[str, Table]:
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


def defaults(task: str) -> dict[str, Any]:
    """Return the default configuration of a task, by dotted key."""
    config = RunConfig() if TASKS[task].command == "train" else FinetuneConfig(task=task)  # type: ignore[arg-type]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(to_dict(config)).items()}


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

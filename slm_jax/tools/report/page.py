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
from slm_jax.tools.report.run_data import Row, RunData, figure
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


def write_page(run: RunData, text: str | None = None) -> str:
    """Return the page of a run as HTML, with the attention of a text (None: of the latest sample)."""
    maps = read_maps(run, text)
    samples = run.folder.samples()
    spread = np.linspace(0, len(samples) - 1, min(MOST_SAMPLES, len(samples))).round().astype(int)
    return _render(
        "run.html",
        run=run,
        facts=facts(run),
        scores=_scores(run),
        classes=_classes(run),
        responses=run.responses(),
        most_responses=MOST_RESPONSES,
        samples={"shown": [samples[i] for i in spread], "total": len(samples)},
        maps=None if isinstance(maps, str) else maps,
        no_maps=maps,
        parameters=_parameters(run),
        config=_config(run),
        environment=Table(["", "trained with"], list(run.environment.items())),
    )


def write_comparison(runs: Sequence[RunData]) -> str:
    """Return the page of several runs as HTML; runs of different tasks are drawn apart."""
    tasks = dict.fromkeys(run.task for run in runs)
    groups = [[run for run in runs if run.task == task] for task in tasks]
    return _render(
        "comparison.html",
        runs=runs,
        groups=[{"runs": group, "same_tokens": _same_tokens(group), "tables": _compare(group)} for group in groups],
    )


def facts(run: RunData) -> dict[str, str]:
    """Return the most important figures of a run by name; unknown ones are left out."""
    shown = {"steps": f"{run.last_step:,}"}
    total = run.config.get("train.steps")
    if isinstance(total, int) and total != run.last_step:
        shown["steps"] += f" of {total:,}"
    if (best := run.best()) is not None:
        shown["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        if run.unit == "token":
            shown["its perplexity"] = f"{math.exp(min(best[1], 700)):,.2f}"
    test = run.measured("after")
    for key in ("accuracy", "rouge_l"):
        if key in test:
            name, form = SCORES[key]
            shown[f"test {name}"] = figure(test[key], form)
    train = [row for row in run.rows if row["split"] == "train"]
    if train:
        shown["last training loss"] = figure(train[-1].get("loss"), ".4f")
        shown["tokens"] = f"{train[-1].get('tokens', 0):,}"
    rates = [row["tokens_per_second"] for row in train if row.get("tokens_per_second") is not None]
    if rates:
        shown["tokens a second"] = f"{np.median(rates):,.0f} (median)"
    seconds = [row["seconds"] for row in [*run.rows, run.summary] if row.get("seconds") is not None]
    if seconds:
        shown["time"] = format_duration(max(seconds))
    if rows := parameter_rows(run):
        trained, whole = sum(row["count"] for row in rows if row["trained"]), sum(row["count"] for row in rows)
        shown["parameters"] = f"{whole:,}" if trained == whole else f"{whole:,} ({trained:,} trained)"
    return shown


# --- What a task measured ---


def _scores(run: RunData) -> Table | None:
    moments = [moment for moment in ("before", "after") if run.measured(moment)]
    rows = []
    for split, (key, (name, form)) in itertools.product(("test", "validation", "train"), SCORES.items()):
        cells = [run.measured(moment, split).get(key) for moment in moments]
        if any(cell is not None for cell in cells):
            rows.append([split, name, *(figure(cell, form, "–") for cell in cells)])
    head = ["split", "", *(f"{moment} training" for moment in moments)]
    return Table(head, rows, range(2, len(head))) if rows else None


def _classes(run: RunData) -> dict[str, Any] | None:
    """Return the figures of a classifier's matrices by split, and the table of its classes; None if it is none."""
    moments = [moment for moment in ("before", "after") if "confusion" in run.measured(moment)]
    if not moments:
        return None
    matrices = {
        split: [(f"{split} texts, {moment} training", run.measured(moment, split)) for moment in moments]
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
        "picture": (run.folder.path / "confusion.png").is_file() and not run.continued,
        "matrices": matrices,
        "by_class": Table(["class", "precision", "recall", "F1", "texts"], rows, range(1, 5), caption),
    }


# --- Parameters, configuration ---


def parameter_rows(run: RunData) -> list[Row]:
    if not run.metadata:
        return []
    leaves = run.metadata.get("leaves") or leaf_table(param_shapes(GPTConfig(**run.metadata["model"])))
    arrays = [(path, shape, dtype, True) for path, (*shape, dtype) in leaves.items()]
    if run.metadata.get("trainable", "all") != "all":
        try:
            frozen = flatten_dict(read_frozen(run.folder.path, run.metadata), sep="/")
        except InputError:
            frozen = {}
        arrays += [(path, leaf.shape, str(leaf.dtype), False) for path, leaf in frozen.items()]
    return [
        {"path": path, "shape": shape, "count": math.prod(shape), "dtype": dtype, "trained": trained}
        for path, shape, dtype, trained in arrays
        if not path.endswith(CONSTANTS)
    ]


def _parameters(run: RunData) -> Table:
    rows = parameter_rows(run)
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


def _config(run: RunData) -> dict[str, Table]:
    usual = {**defaults(run.task), "run": run.config.get("run")}  # a name is no default
    changed = {key: value for key, value in run.config.items() if key not in usual or usual[key] != value}
    rows = [
        [_code(key), _typed(value), _typed(usual[key]) if key in usual else "no such key now"]
        for key, value in changed.items()
    ]
    every = [[_code(key), _typed(value, key in changed)] for key, value in run.config.items()]
    return {
        "changed": Table(["differs from the default", "here", "default"], rows),
        "all": Table(["key", "value"], every),
    }


def defaults(task: str) -> dict[str, Any]:
    config = RunConfig() if TASKS[task].command == "train" else FinetuneConfig(task=task)  # type: ignore[arg-type]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(to_dict(config)).items()}


def _code(text: object) -> Markup:
    return Markup("<code>{}</code>").format(text)


def _typed(value: object, marked: bool = False) -> Markup:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _code(Markup("<mark>{}</mark>").format(text) if marked else text)


# --- Several runs ---


def _same_tokens(runs: Sequence[RunData]) -> bool:
    """Return whether all known tokenizers are the same, or the loss is not one of tokens."""
    known = [run.metadata["tokenizer"] for run in runs if run.metadata.get("tokenizer")]
    return runs[0].unit != "token" or all(tokenizer == known[0] for tokenizer in known)


def _compare(runs: Sequence[RunData]) -> dict[str, Table]:
    figures = [{"state": run.state, **facts(run)} for run in runs]
    names = list(dict.fromkeys(name for one in sorted(figures, key=len, reverse=True) for name in one))
    rows = [[run.label, *(one.get(name, "–") for name in names)] for run, one in zip(runs, figures, strict=True)]
    settings = [
        {**run.config, **{f"environment: {key}": value for key, value in run.environment.items()}} for run in runs
    ]
    keys = dict.fromkeys(key for one in settings for key in one if key not in OF_THE_FOLDER)
    shown = {key: [_typed(one[key]) if key in one else Markup("–") for one in settings] for key in keys}
    different = [[_code(key), *values] for key, values in shown.items() if len(set(values)) > 1]
    return {
        "figures": Table(["run", *names], rows, range(2, len(names) + 1)),
        "settings": Table(["key", *(run.label for run in runs)], different),
    }

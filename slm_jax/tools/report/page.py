"""The page of one run."""

import math

import numpy as np
from safetensors import SafetensorError, safe_open

from slm_jax.tools.report.attention import attention_section
from slm_jax.tools.report.classes import classes_section
from slm_jax.tools.report.curves import draw_curves, note_not_finite
from slm_jax.tools.report.html import Html, details, page, section, table, tag, typed
from slm_jax.tools.report.read import Record, Row, defaults, figure, listed, number, read_responses, read_samples
from slm_jax.training.progress import format_duration
from slm_jax.training.run_folder import FROZEN
from slm_jax.training.trainable import leaf_table

MOST_SAMPLES, MOST_RESPONSES, OPEN_RESPONSES = 30, 24, 4
CONSTANTS = ("lora_scale", "lora_drop_rate")  # lie beside adapters, and are no parameters
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_page(record: Record, text: str | None = None) -> str:
    """Return the page of a run as HTML.

    Args:
        record: the run.
        text: whose attention is drawn; None: the latest sample.

    Raises:
        InputError: a text that the model's tokenizer cannot encode.
    """
    parts = {
        "curves": ("Curves", _curves(record)),
        "classes": ("Classes", classes_section(record)),
        "responses": ("Responses", _responses(record)),
        "samples": ("Samples", _samples(record)),
        "attention": ("Attention", attention_section(record, text)),
        "parameters": ("Parameters", _parameters(record)),
        "config": ("Configuration", _config(record)),
        "environment": ("Environment", _environment(record)),
    }
    links = [tag("a", title, href=f"#{name}") for name, (title, content) in parts.items() if any(content)]
    sections = [section(name, title, *content) for name, (title, content) in parts.items()]
    return page(
        f"{record.label} · report of a run",
        tag("header", tag("h1", record.label), tag("p", _subtitle(record), class_="dim"), _facts(record)),
        tag("nav", *links, aria_label="sections"),
        *sections,
    )


def _subtitle(record: Record) -> str:
    parts = [record.task]
    if source := record.config.get("data.source"):
        parts.append(f"on {source}")
    if base := record.config.get("base"):
        parts.append(f"from {base}, trainable: {record.config.get('trainable', 'all')}")
    return f"{' '.join(parts)} · {record.state}"


def facts(record: Record) -> dict[str, str]:
    """Return the figures of a run that one looks at first, by name; what is not known is left out."""
    shown = {"steps": f"{record.last_step:,}"}
    total = record.config.get("train.steps")
    if isinstance(total, int) and total != record.last_step:
        shown["steps"] += f" of {total:,}"
    if (best := record.best()) is not None:
        shown["lowest validation loss"] = f"{best[1]:.4f} at step {best[0]:,}"
        if record.unit == "token":
            shown["its perplexity"] = f"{math.exp(min(best[1], 700)):,.2f}"
    test = record.measured("after", "test")
    for key, name, form in (("accuracy", "test accuracy", ".2%"), ("rouge_l", "test ROUGE-L", ".4f")):
        if key in test:
            shown[name] = figure(test[key], form)
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
    rows = parameter_rows(record)
    if rows:
        trained = sum(row["count"] for row in rows if row["trained"])
        whole = sum(row["count"] for row in rows)
        shown["parameters"] = f"{whole:,}" if trained == whole else f"{whole:,} ({trained:,} trained)"
    return shown


def _facts(record: Record) -> Html:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts(record).items()))


def _curves(record: Record) -> list[Html]:
    if not record.rows:
        return [tag("p", "The log is empty.", class_="dim")]
    drawn = draw_curves([record], "run", leave_out=("bits",))
    parts = [drawn or tag("p", "No figure of the log is finite.", class_="dim"), note_not_finite(record)]
    if record.best() is None:
        parts.append(tag("p", "No validation loss yet.", class_="dim"))
    return parts


def _samples(record: Record) -> list[Html]:
    samples = read_samples(record.folder)
    chosen = _spread(samples, MOST_SAMPLES)
    shown = [
        details(f"Step {step:,}", tag("pre", text), opened=i in (0, len(chosen) - 1))
        for i, (step, text) in enumerate(chosen)
    ]
    if len(chosen) < len(samples):
        shown.append(tag("p", f"{len(chosen)} of {len(samples):,}; samples.md has all of them.", class_="dim"))
    return shown


def _spread(items: list[tuple[int, str]], most: int) -> list[tuple[int, str]]:
    """Return so many items at most, at equal distances, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _responses(record: Record) -> list[Html]:
    if record.task != "instruction":
        return []
    return [_scores(record), *_answers(record)]


def _scores(record: Record) -> Html:
    before, after = (record.measured(moment, "test") for moment in ("before", "after"))
    rows = []
    for key, name, form in (
        ("loss", "loss, nats a token", ".4f"),
        ("perplexity", "perplexity", ",.2f"),
        ("exact_match", "exact match", ".2%"),
        ("rouge_l", "ROUGE-L", ".4f"),
    ):
        cells = [figure(figures[key], form) if key in figures else "–" for figures in (before, after)]
        if key in before or key in after:
            rows.append([name, *cells])
    if not rows:
        return Html("")
    return table(["test instructions", "before", "after training"], rows, numbers=(1, 2))


def _answers(record: Record) -> list[Html]:
    answers = read_responses(record)
    shown = [_response(*answer) for answer in answers[:MOST_RESPONSES]]
    parts = shown[:OPEN_RESPONSES]
    if rest := shown[OPEN_RESPONSES:]:
        parts.append(details(f"{len(rest)} more", *rest))
    if len(answers) > len(shown):
        file = "responses-before.json" if answers[0][2] is None else "responses.json"
        parts.append(tag("p", f"{len(shown)} of {len(answers):,}; {file} has all of them.", class_="dim"))
    return parts


def _response(entry: Row, before: str | None, after: str | None) -> Html:
    asked = [entry.get("instruction"), entry.get("input")]
    messages = [message for message in listed(entry.get("messages")) if isinstance(message, dict)]
    asked += [f"{message.get('role')}: {message.get('content')}" for message in messages]
    texts = {"reference": entry.get("output"), "before training": before, "after training": after}
    columns = [tag("div", tag("h4", name), tag("pre", text)) for name, text in texts.items() if text is not None]
    return tag(
        "article", tag("h3", "\n".join(str(part) for part in asked if part)), tag("div", *columns, class_="answers")
    )


def parameter_rows(record: Record) -> list[Row]:
    """Return path, shape, count, dtype and whether it is trained, of each array of the model; read from headers."""
    leaves = _leaves(record.metadata.get("leaves")) or _leaves_of_model(record)
    trained = [(path, shape, dtype, True) for path, (*shape, dtype) in leaves.items()]
    return [
        {"path": path, "shape": shape, "count": math.prod(shape), "dtype": dtype, "trained": is_trained}
        for path, shape, dtype, is_trained in [*trained, *_frozen(record)]
        if not path.endswith(CONSTANTS)
    ]


def _leaves(table: object) -> dict[str, list]:
    """Return the leaves that a checkpoint lists, but for what is no shape with a dtype."""
    leaves = {path: listed(leaf) for path, leaf in table.items()} if isinstance(table, dict) else {}
    return {path: leaf for path, leaf in leaves.items() if leaf and all(isinstance(size, int) for size in leaf[:-1])}


def _leaves_of_model(record: Record) -> dict[str, list]:
    """Return the leaves of a checkpoint that does not list them: those of its model."""
    from slm_jax.model import GPTConfig, param_shapes

    try:
        return leaf_table(param_shapes(GPTConfig(**record.metadata["model"])))
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}


def _frozen(record: Record) -> list[tuple[str, list[int], str, bool]]:
    file = record.folder.path / FROZEN
    if not record.metadata or record.metadata.get("trainable", "all") == "all" or not file.is_file():
        return []
    try:
        with safe_open(file, "numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return [
                (name, part.get_shape(), DTYPES.get(part.get_dtype(), part.get_dtype()), False)
                for name, part in slices.items()
            ]
    except (SafetensorError, OSError):
        return []


def _parameters(record: Record) -> list[Html]:
    rows = parameter_rows(record)
    whole = sum(row["count"] for row in rows)
    if not whole:
        return [tag("p", "Not known: no checkpoint can be read.", class_="dim")]
    partly = not all(row["trained"] for row in rows)
    head = ["path", "shape", "count", "share", "dtype", *(["trained"] if partly else [])]
    cells = []
    for row in rows:
        shape, share = " × ".join(map(str, row["shape"])), _share(row["count"] / whole)
        cells.append([tag("code", row["path"]), shape, f"{row['count']:,}", share, row["dtype"]])
        cells[-1] += [("yes" if row["trained"] else "no")] if partly else []
    cells.append(["all", "", f"{whole:,}", "", *[""] * (len(head) - 4)])
    tied = record.metadata.get("model", {}).get("tie_weights")
    said = "The output head is the token embedding, transposed (tie_weights), and counts once." if tied else ""
    return [table(head, cells, numbers=(2, 3)), tag("p", said, class_="dim") if said else Html("")]


def _share(share: float) -> str:
    return "< 0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _config(record: Record) -> list[Html]:
    if not record.config:
        return [tag("p", "There is no config.yaml that can be read.", class_="dim")]
    usual = defaults(record.task)
    usual["run"] = record.config.get("run")  # a name is nobody's default
    changed = {key for key, value in record.config.items() if key not in usual or usual[key] != value}
    all_rows = [[tag("code", key), typed(value, key in changed)] for key, value in record.config.items()]
    rows = [
        [tag("code", key), typed(value), typed(usual[key]) if key in usual else "no such key now"]
        for key, value in record.config.items()
        if key in changed
    ]
    parts = [table(["differs from the default", "here", "default"], rows)] if rows else []
    if not rows:
        parts = [tag("p", "Every key has its default.")]
    return [*parts, details(f"all {len(all_rows)} keys", table(["key", "value"], all_rows))]


def _environment(record: Record) -> list[Html]:
    if not record.environment:
        return [tag("p", "Not recorded in this run's folder.", class_="dim")]
    return [table(["", "trained with"], [[key, str(value)] for key, value in record.environment.items()])]

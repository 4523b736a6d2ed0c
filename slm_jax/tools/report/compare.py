"""Several runs on one page: the same axes, final figures, and what differs in their configurations."""

from collections.abc import Sequence

from slm_jax.tools.report.curves import draw_curves, legend, note_not_finite
from slm_jax.tools.report.html import Html, page, section, table, tag, typed
from slm_jax.tools.report.page import facts
from slm_jax.tools.report.read import TASKS, Record

_OF_THE_FOLDER = ("run", "runs_dir", "resume")


def write_comparison(records: Sequence[Record]) -> str:
    """Return the page of several runs as HTML; those of different tasks are drawn apart."""
    groups = [[record for record in records if record.task == task] for task in TASKS]
    groups = [group for group in groups if group]
    names = ", ".join(record.label for record in records)
    parts: list[object] = [
        tag("header", tag("h1", f"{len(records)} runs"), tag("p", names, class_="dim")),
    ]
    if len(groups) > 1:
        said = ", ".join(f"{group[0].task} in nats a {group[0].unit}" for group in groups)
        parts.append(tag("p", f"These runs are of different tasks, and their losses are drawn apart: {said}."))
    for group in groups:
        title = group[0].task.capitalize() if len(groups) > 1 else "Curves"
        title += f": {group[0].label}" if len(group) == 1 else ""
        parts.append(section(group[0].task, title, *_curves(group), *_tables(group)))
    return page(f"{names} · comparison of runs", *parts)


def _curves(records: Sequence[Record]) -> list[Html]:
    same = _same_tokens(records)
    drawn = draw_curves(records, records[0].task, leave_out=("bits",) if same else ())
    parts = [
        legend(records) if len(records) > 1 else Html(""),
        drawn or tag("p", "There is nothing to draw in their logs.", class_="dim"),
    ]
    if not same:
        said = "These runs have different tokenizers: their losses and perplexities a token do not compare, "
        said += "bits a byte do, where the validation text is the same."
        parts.insert(1, tag("p", said))
    return [*parts, *map(note_not_finite, records)]


def _same_tokens(records: Sequence[Record]) -> bool:
    """Return whether all known tokenizers are the same, or the loss is not one of tokens."""
    known = [record.metadata["tokenizer"] for record in records if record.metadata.get("tokenizer")]
    return records[0].unit != "token" or all(tokenizer == known[0] for tokenizer in known)


def _tables(records: Sequence[Record]) -> list[Html]:
    figures = [{"state": record.state, **facts(record)} for record in records]
    by_length = sorted(figures, key=len, reverse=True)  # so that they keep their order
    names = list(dict.fromkeys(name for one in by_length for name in one))
    rows = [
        [record.label, *(one.get(name, "–") for name in names)] for record, one in zip(records, figures, strict=True)
    ]
    parts = [tag("h3", "Final figures"), table(["run", *names], rows, numbers=range(2, len(names) + 1))]
    if len(records) == 1:
        return parts
    settings = [
        {**record.config, **{f"environment: {key}": value for key, value in record.environment.items()}}
        for record in records
    ]
    keys = list(dict.fromkeys(key for one in settings for key in one if key not in _OF_THE_FOLDER))
    shown = {key: [typed(one[key]) if key in one else Html("–") for one in settings] for key in keys}
    different = [[tag("code", key), *values] for key, values in shown.items() if len(set(values)) > 1]
    parts.append(tag("h3", "What differs in their configurations"))
    if not different:
        return [*parts, tag("p", "Nothing.")]
    return [*parts, table(["key", *(record.label for record in records)], different)]

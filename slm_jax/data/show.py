"""Prints batches as the model will see them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32
from rich.cells import cell_len, chop_cells
from rich.console import Console

from slm_jax.data.ids import Ids
from slm_jax.data.windows import Batch, PackedRows, TrainBatches, endless_batches, train_batches
from slm_jax.errors import printable
from slm_jax.tokenizer import Tokenizer

ROWS = 2  # rows per batch
COLUMNS = 100  # columns per line
_LABEL, _BAR = 11, 40  # columns of a line's label, and of a bar for a row's documents
_LONGEST = 16  # columns of a token's text
_FIRST, _LAST = 2, 1  # blocks shown at the start and the end of a long row
_DOCUMENTS = 12  # documents drawn per row
_PADDING = 3  # tokens of padding shown
_START, _TEXT = 12, 28  # tokens and columns shown of the start of a document
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})


def show_batches(
    tokens: Ids,
    tokenizer: Tokenizer,
    *,
    n: int,
    context_length: int,
    packing: bool,
    console: Console,
) -> None:
    """Print ``n`` training batches: inputs, targets, which targets count and, if packed, each token's document.

    Windows are shorter than ``context_length`` if there are fewer tokens.
    """
    if tokens.size < 2:
        console.print(f"nothing to show: {tokens.size} tokens, fewer than the 2 that a batch needs", highlight=False)
        return
    batches = _batches(tokens, tokenizer.eot_id, context_length, packing)
    seen = "before it in its own document" if packing else "before it in the row"
    console.print(f"A target is the token to predict from all {seen}. · is a space, ↵ a new line.", highlight=False)
    for i in range(n):
        rows, width = batches[i]["inputs"].shape
        console.print(f"\nbatch {i + 1} of {n}: {rows} row{'s' if rows > 1 else ''} of {width}", highlight=False)
        for row in range(rows):
            for line in _row_lines({name: value[row] for name, value in batches[i].items()}, tokenizer, row + 1):
                console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _batches(tokens: Ids, eot_id: int, width: int, packing: bool) -> TrainBatches:
    if packing:
        rows = PackedRows(tokens, eot_id, width)
        return endless_batches(len(rows), rows.batch, batch_size=min(ROWS, len(rows)), seed=0)
    cut: dict[str, Any] = {"sampling": "random", "stride": None, "shuffle": True}
    return train_batches(tokens, context_length=min(width, tokens.size - 1), batch_size=ROWS, seed=0, **cut)


def _row_lines(row: Batch, tokenizer: Tokenizer, number: int) -> Iterator[str]:
    counted, width = int(row["weights"].sum()), len(row["weights"])
    yield f"\nrow {number}: {counted} of {width} targets count"
    if "segment_ids" in row:
        yield from _document_lines(row, tokenizer)
    shown = min(width, counted + _PADDING)
    blocks = list(_blocks(_table({name: value[:shown] for name, value in row.items()}, tokenizer)))
    for i, (start, lines) in enumerate(blocks):
        if i < _FIRST or i >= len(blocks) - _LAST:
            yield from lines
        elif i == _FIRST:
            yield f"\n  … {blocks[-_LAST][0] - start} more …"
    if shown < width:
        yield f"\n  … {width - shown} more of padding"


def _table(row: Batch, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the cells of each line, one per token, by label."""
    counts = row["weights"] > 0
    unused = ["-"] * int((~counts).sum())  # padding, on the right
    table = {
        "input id": list(map(str, row["inputs"])),
        "input": _texts(tokenizer, row["inputs"][counts]) + unused,
        "target": _texts(tokenizer, row["targets"][counts]) + unused,
        "counts": [str(int(count)) for count in counts],
    }
    if "segment_ids" in row:
        table |= {"document": list(map(str, row["segment_ids"])), "position": list(map(str, row["positions"]))}
    return table


def _blocks(table: dict[str, list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield blocks of as many tokens as fit side by side: the index of the first token, and the lines."""
    widths = [max(map(cell_len, cells)) for cells in zip(*table.values(), strict=True)]
    start = 0
    while start < len(widths):
        end = start + 1
        while end < len(widths) and sum(widths[start : end + 1]) + 2 * (end + 1 - start) <= COLUMNS - _LABEL:
            end += 1
        lines = [""]
        for label, cells in table.items():
            padded = (" " * (widths[i] - cell_len(cells[i])) + cells[i] for i in range(start, end))
            lines.append(f"  {label:<{_LABEL}}" + "  ".join(padded))
        yield start, lines
        start = end


def _document_lines(row: Batch, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a picture of the attention mask: for each document its part of the row, which is all that it sees."""
    segment_ids, width = row["segment_ids"], len(row["segment_ids"])
    n_documents = int(segment_ids.max())
    for segment in range(1, n_documents + 1)[:_DOCUMENTS]:
        (at,) = np.nonzero(segment_ids == segment)
        start, end = int(at[0]), int(at[-1]) + 1
        left = start * _BAR // width
        bar = "█" * max(1, end * _BAR // width - left)
        text = "".join(_texts(tokenizer, row["inputs"][start:end][:_START]))
        place = f"{start}–{end - 1}"
        yield f"  document {segment:<3}|{' ' * left + bar:<{_BAR}}| {place:<11}{_shorten(text, _TEXT)}"
    if n_documents > _DOCUMENTS:
        yield f"  … {n_documents - _DOCUMENTS} more documents …"


def _texts(tokenizer: Tokenizer, ids: Int32[np.ndarray, " tokens"]) -> list[str]:
    texts = [tokenizer.continued().decode([token]).translate(_VISIBLE) for token in ids.tolist()]
    return [
        _shorten("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), _LONGEST)
        for text in texts
    ]


def _shorten(text: str, columns: int) -> str:
    return text if cell_len(text) <= columns else chop_cells(text, columns - 1)[0] + "…"

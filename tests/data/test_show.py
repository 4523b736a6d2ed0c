"""What must hold of batches that are shown: they are the training batches, in lines that a person can read."""

import io

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from slm_jax.data.show import COLUMNS, ROWS, show_batches
from slm_jax.data.windows import PackedRows, endless_batches, train_batches
from slm_jax.tokenizer import BPETokenizer, CharTokenizer

CHARS = CharTokenizer().build_vocab("abcdefghijklmnopqrstuvwxyz \n")
TEXT = ["a cat\nsat", "dogs", "i am", "one more of them", "x"]


def encoded(texts, tokenizer):
    tokens = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eot_id)]
    return np.array(tokens, np.uint16)


def shown(tokens, tokenizer=CHARS, **changed):
    console = Console(file=io.StringIO(), width=COLUMNS)
    options = {"n": 1, "context_length": 12, "packing": False, **changed}
    show_batches(tokens, tokenizer, console=console, **options)
    text = console.file.getvalue()
    assert max(map(cell_len, text.splitlines())) <= COLUMNS
    return text


def cells(text, label):
    """What stands behind a label, row by row of the batches."""
    rows = [part.splitlines() for part in text.split("\nrow ")[1:]]
    return [
        [cell for line in lines if line.startswith(f"  {label} ") for cell in line.removeprefix(f"  {label} ").split()]
        for lines in rows
    ]


def padded(batch, name, shown_cells):
    return [list(map(str, row[: len(found)])) for row, found in zip(batch[name].tolist(), shown_cells, strict=True)]


def test_windows_are_shown_as_training_gets_them():
    tokens = encoded(TEXT, CHARS)
    text = shown(tokens, n=2)
    dataset = train_batches(
        tokens, context_length=12, batch_size=ROWS, sampling="random", stride=None, shuffle=True, seed=0
    )
    batch = {name: np.concatenate([dataset[0][name], dataset[1][name]]) for name in dataset[0]}
    assert cells(text, "input id") == [list(map(str, row)) for row in batch["inputs"].tolist()]
    visible = [CHARS.decode([i]).replace(" ", "·").replace("\n", "↵") for i in range(CHARS.vocab_size)]
    assert cells(text, "input   ") == [[visible[i] for i in row] for row in batch["inputs"]]
    assert cells(text, "target") == [[visible[i] for i in row] for row in batch["targets"]]
    assert cells(text, "counts") == [["1"] * 12] * 4
    assert "batch 2 of 2: 2 rows of 12" in text
    assert "row 1: 12 of 12 targets count" in text
    assert "document" not in text


def test_packed_rows_say_which_document_a_token_is_of_and_where_in_it():
    tokens = encoded(TEXT, CHARS)
    rows = PackedRows(tokens, CHARS.eot_id, 20)
    batch = endless_batches(len(rows), rows.batch, batch_size=ROWS, seed=0)[0]
    text = shown(tokens, context_length=20, packing=True)
    found = cells(text, "input id")
    assert found == padded(batch, "inputs", found)
    assert cells(text, "position") == padded(batch, "positions", found)
    assert cells(text, "document  ") == padded(batch, "segment_ids", found)
    assert [row.count("1") for row in cells(text, "counts")] == batch["weights"].sum(axis=-1).tolist()
    assert "in its own document" in text


def test_a_packed_rows_documents_are_pictured_where_they_are():
    text = shown(encoded(["abc", "defgh", "ij"], CHARS), context_length=20, packing=True)
    bars = [line.split("|")[1] for line in text.splitlines() if "█" in line]
    assert [(bar.index("█"), bar.count("█"), len(bar)) for bar in bars] == [(0, 6, 40), (6, 12, 40), (18, 6, 40)]
    assert "0–2 " in text
    assert "3–8 " in text
    assert "5 more of padding" in text


def test_long_rows_are_cut_in_the_middle():
    text = shown(encoded(["abcdefghij" * 300], CHARS), context_length=1024)
    assert "more …" in text
    assert len(text.splitlines()) < 50
    many = shown(encoded(["ab"] * 100, CHARS), context_length=256, packing=True)
    assert "more documents …" in many
    assert len(many.splitlines()) < 100


def test_tokens_that_are_no_letters_are_made_visible():
    tokenizer = BPETokenizer.train("日本語のテキスト\x07\t[bold]text[/bold] " * 30 + " " * 50, vocab_size=320)
    texts = ["日本語のテキスト\x07\t[bold]text[/bold]" + " " * 40] * 3
    text = shown(encoded(texts, tokenizer), tokenizer, packing=True, context_length=64)
    assert "\x07" not in text
    assert "\\x07" in text
    assert "⇥" in text
    assert "日" in text
    assert "<|endoftext|>" in text


@pytest.mark.parametrize("packing", [False, True])
def test_a_text_shorter_than_a_row_is_shown(packing):
    tokens = encoded(["ab"], CHARS)
    assert "a" in cells(shown(tokens, packing=packing), "input   ")[0]
    assert f"1 of {12 if packing else 1} targets count" in shown(tokens[:2], packing=packing)
    assert "nothing to show: 1 tokens" in shown(tokens[:1])

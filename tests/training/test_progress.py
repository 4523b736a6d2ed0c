"""What must hold of what a person sees: plain lines that a log can keep, a live line in a terminal, true totals."""

import io

import jax
import pytest
from rich.console import Console

from slm_jax.model import GPTConfig, count_params, param_shapes
from slm_jax.training import progress
from slm_jax.training.progress import ProgressLine, format_bytes, format_duration, parameter_table


def row(step, **more):
    numbers = {"step": step, "loss": 2.34567, "learning_rate": 0.001, "tokens_per_second": 12345.6, "mfu": None}
    return {**numbers, **more}


def console(terminal=False, **options):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, **options)


def shown(console):
    return console.file.getvalue()


def test_where_there_is_no_terminal_a_line_is_plain_text():
    out = console()
    with ProgressLine(out, 1000) as line:
        line.validation({"step": 0, "loss": 4.5, "perplexity": 90.017})
        line.train(row(20, mfu=0.4321), 0.5)
    first, second = shown(out).splitlines()
    assert first == "step 0: validation loss 4.5000, perplexity 90.02"
    assert second == "step 20/1,000 · 8 min 10 s left · loss 2.346 · val 4.500 · lr 1.0e-03 · 12,346 tok/s · MFU 43%"
    assert "\x1b" not in shown(out)


def test_plain_lines_come_at_intervals_but_none_of_the_notes_is_lost(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = console()
    line = ProgressLine(out, 1000)
    for step in range(1, 101):
        line.train(row(step), 0.1)
        now[0] += 0.11
        line.note(f"note {step}")
    text = shown(out)
    assert text.count("note") == 100
    assert text.count("tok/s") == 3  # at 0, 5 and 10 seconds


def test_in_a_terminal_the_line_is_live_and_a_note_one_line_that_can_be_copied():
    out = console(terminal=True)
    with ProgressLine(out, 1000, first_step=10) as line:
        for step in range(11, 21):
            line.train(row(step), 0.5)
        line.note("a line [of] its own")
    text = shown(out)
    assert "\x1b[" in text
    assert "20/1,000" in text
    assert "a line [of] its own" in text  # is no markup
    out = console()
    ProgressLine(out, 10).note("word " * 100)
    assert len(shown(out).splitlines()) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_other_hosts_are_silent(terminal):
    out = console(terminal, quiet=True)
    with ProgressLine(out, 10) as line:
        line.train(row(1), 0.1)
        line.validation({"step": 1, "loss": 1.0, "perplexity": 2.7})
        line.note("text")
    assert shown(out) == ""


def test_durations_and_sizes_read_as_a_person_would_write_them():
    durations = {
        0: "0 s",
        0.4: "less than 1 s",
        42: "42 s",
        59.4: "59 s",
        59.6: "1 min 00 s",
        185: "3 min 05 s",
        3599.6: "1 h 00 min",
    }
    assert {seconds: format_duration(seconds) for seconds in durations} == durations
    assert format_duration(360_600) == "100 h 10 min"
    assert [format_bytes(n) for n in (0, 1.5e6, 1.6384e13)] == ["0.0 MB", "1.5 MB", "16,384.00 GB"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_table_lists_every_leaf_and_its_total_is_the_models(tied):
    cfg = GPTConfig(vocab_size=7, context_length=3, emb_dim=4, n_heads=2, n_layers=2, tie_weights=tied)
    shapes = param_shapes(cfg)
    out = console()
    out.print(parameter_table(shapes))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(out).splitlines() if "│" in line]
    table = {name: (shape, count) for name, shape, count in cells}
    total = table.pop("all")
    leaves = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert table == {name: (" × ".join(map(str, leaf.shape)), f"{leaf.size:,}") for name, leaf in leaves.items()}
    assert total == ("", f"{count_params(cfg):,}")

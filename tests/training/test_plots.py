"""What must hold of the pictures: a real PNG of the whole log with its labels."""

import struct

import matplotlib
import pytest

from slm_jax.errors import InputError
from slm_jax.training import record
from slm_jax.training.record import draw_loss

TRAIN = [{"step": step, "split": "train", "loss": 3.0 / step} for step in range(1, 20)]
VALIDATION = [{"step": step, "split": "val", "loss": 4.0 / (step + 1)} for step in (0, 10, 19)]
ACCURACY = [{**row, "accuracy": row["step"] / 20} for row in VALIDATION]
NOT_FINITE = [{"step": 5, "split": split, "loss": None} for split in ("train", "val")]


@pytest.mark.parametrize(
    "rows",
    [TRAIN + VALIDATION, TRAIN, VALIDATION[:1], NOT_FINITE + TRAIN + NOT_FINITE, TRAIN + ACCURACY],
    ids=["both", "training", "one evaluation", "with gaps", "accuracy"],
)
def test_a_png_is_written(tmp_path, rows):
    path = tmp_path / "loss.png"
    draw_loss(rows, path, "a: $loss_ by $step")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(struct.unpack(">II", content[16:24])) > 200  # width and height
    assert content.endswith(b"IEND\xaeB`\x82")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_settings_of_the_machine_do_not_count_and_a_failure_is_an_input_error(tmp_path, monkeypatch):
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        draw_loss(TRAIN, tmp_path / "theirs.png", "a")
    draw_loss(TRAIN, tmp_path / "ours.png", "a")
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "ours.png").read_bytes()
    monkeypatch.setattr(record, "write_png", lambda figure, path: 1 / 0)
    with pytest.raises(InputError, match="matplotlib cannot draw"):
        draw_loss(TRAIN, tmp_path / "none.png", "a")


def test_the_labels_say_what_is_drawn(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(record, "write_png", lambda figure, path: figures.append(figure))
    gaps = [{**row, "accuracy": None} for row in VALIDATION]
    batches = [{**row, "accuracy": 0.5} for row in TRAIN]
    draw_loss(batches + gaps, tmp_path / "loss.png", "a")
    draw_loss(TRAIN + ACCURACY, tmp_path / "loss.png", "a", "nats a text", "accuracy")
    for nothing in ([], NOT_FINITE):
        draw_loss(nothing, tmp_path / "loss.png", "a")
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure in figures]
    assert labels == [["loss (nats a token)"], ["loss (nats a text)", "accuracy"]]
    (line,) = figures[1].axes[1].get_lines()
    assert line.get_linestyle() == "--"
    assert line.get_xydata().tolist() == [[row["step"], row["accuracy"]] for row in ACCURACY]
    names = [text.get_text() for text in figures[1].legends[0].get_texts()]
    assert names == ["training (one batch)", "validation (all)", "validation accuracy"]

"""Curves: nothing that was logged is lost, and equal figures have equal bytes."""

import base64
import math

import numpy as np
import pytest
from reports import make_run, train, val

from slm_jax.tools.report.curves import draw_curves, format_tick, thin_out
from slm_jax.tools.report.record import read_records


def charts(folder, rows, config="task: pretraining\n"):
    (record,) = read_records([str(make_run(folder, rows, config))])
    return draw_curves([record], bits=False)


def svg(chart):
    return base64.b64decode(chart["src"].removeprefix("data:image/svg+xml;base64,")).decode()


def test_thinning_keeps_ends_extremes_and_gaps():
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000)
    values[[4_321, 7_000]] = 50, -50
    values[5_000:5_003] = np.nan
    steps = np.arange(10_000.0)
    kept_steps, kept = thin_out(steps, values, most=200)
    assert len(kept) <= 303
    assert kept_steps[0] == 0
    assert kept_steps[-1] == 9_999
    assert (np.diff(kept_steps) > 0).all()
    assert (np.nanmin(kept), np.nanmax(kept)) == (-50, 50)
    assert np.isnan(kept).any()
    np.testing.assert_array_equal(kept, values[kept_steps.astype(int)])


def test_short_lines_are_whole_and_lines_without_numbers_stay_empty():
    values = np.array([1, np.nan, 3, np.inf, 5])
    assert thin_out(np.arange(5.0), values)[1] is values
    assert np.isnan(thin_out(np.arange(1_000.0), np.full(1_000, np.nan))[1]).all()


def test_equal_curves_have_equal_bytes(tmp_path):
    rows = [val(0, 3.0), *(train(i, 3 - 0.1 * i) for i in range(1, 20)), val(20, 1.5)]
    assert charts(tmp_path / "a", rows) == charts(tmp_path / "b", rows)


def test_what_is_drawn_is_what_was_logged(tmp_path):
    rows = [val(0, 3.0, accuracy=0.5), train(1, 2.0), val(10, 2.5, accuracy=0.75), val(20, 2.75, accuracy=0.7)]
    drawn = {chart["title"]: chart for chart in charts(tmp_path / "a", rows, "task: classification")}
    assert len(drawn) == 5
    assert drawn["Loss"]["alt"] == "loss over 20 steps, between 2 and 3"
    assert drawn["Accuracy"]["alt"] == "accuracy over 20 steps, between 0.5 and 0.75"
    assert "nats a text" in svg(drawn["Loss"])


def test_tick_labels_are_not_rounded_away(tmp_path):
    drawn = charts(tmp_path / "a", [train(i, learning_rate=4e-5 * i) for i in range(1, 9)])
    assert ">0.0003<" in svg(next(chart for chart in drawn if chart["title"] == "Learning rate"))


@pytest.mark.parametrize("loss", [None, "bad", True, math.inf, math.nan])
def test_what_is_no_number_is_a_gap(tmp_path, loss):
    rows = [train(1), train(2, loss), train(3), val(3, loss)]
    (record,) = read_records([str(make_run(tmp_path / "a", rows))])
    assert np.isnan(record.points("train", "loss")[1]).tolist() == [False, True, False]
    assert record.best() is None
    assert record.not_finite() == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (999.5, "999.5"), (1000, "1,000"), (2_500_000, "2,500,000"), (2.5e38, "2.5e+38")],
)
def test_numbers_on_axes_are_short(value, text):
    assert format_tick(value) == text

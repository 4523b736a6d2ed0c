"""Curves: nothing that was logged is lost, and equal figures have equal bytes."""

import base64
import math

import numpy as np
import pytest
from reports import make_run, train, val

from slm_jax.tools.report.curves import draw_curves, format_tick
from slm_jax.tools.report.record import read_records


def charts(folder, rows, config="task: pretraining\n"):
    (record,) = read_records([str(make_run(folder, rows, config))])
    return draw_curves([record], bits=False)


def svg(chart):
    return base64.b64decode(chart["src"].removeprefix("data:image/svg+xml;base64,")).decode()


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
    labels = {0.25: "0.25", 999.5: "999.5", 1000: "1,000", 2_500_000: "2,500,000", 2.5e38: "2.5e+38"}
    assert {value: format_tick(value) for value in labels} == labels


@pytest.mark.parametrize("loss", [None, "bad", True, math.inf, math.nan])
def test_what_is_no_number_is_a_gap(tmp_path, loss):
    rows = [train(1), train(2, loss), train(3), val(3, loss)]
    (record,) = read_records([str(make_run(tmp_path / "a", rows))])
    assert np.isnan(record.points("train", "loss")[1]).tolist() == [False, True, False]
    assert record.best() is None
    assert record.not_finite() == 1

"""What must hold of the curves: nothing that was logged is missed, and a page is the same whenever it is written."""

import math

import numpy as np
import pytest
from reports import Page, make_run, train, val

from slm_jax.tools.report.curves import _shown, draw_curves, not_finite, thin_out
from slm_jax.tools.report.read import read_records
from slm_jax.tools.report.svg import COLORS, INK, new_figure, to_svg


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


def test_a_short_line_is_drawn_whole():
    steps, values = np.arange(5.0), np.array([1, np.nan, 3, np.inf, 5])
    assert thin_out(steps, values)[1] is values


def test_a_line_without_a_number():
    steps = np.arange(1_000.0)
    assert np.isnan(thin_out(steps, np.full(1_000, np.nan))[1]).all()


def test_colours_are_the_pages(tmp_path):
    figure = new_figure()
    figure.axes[0].plot([0.00012345, 2], [1, 2], color=COLORS[3])
    svg = to_svg(figure, "one", '"<x>"')
    assert svg.startswith('<svg viewBox="0 0 400 250" role="img" aria-label="&quot;&lt;x&gt;&quot;">')
    assert "currentColor" in svg
    assert "var(--c3)" in svg
    assert not [part for part in (INK, COLORS[3], "http", "<style", "<metadata") if part in svg]
    assert Page(svg).values("id") == [name for name in Page(svg).values("id") if name.startswith("one-")]


def test_curves_are_the_same_whenever_they_are_drawn(tmp_path):
    rows = [val(0, 3.0), *(train(i, 3 - 0.1 * i) for i in range(1, 20)), val(20, 1.5)]
    (record,) = read_records([str(make_run(tmp_path / "a", rows))])
    assert draw_curves([record], "x") == draw_curves([record], "x")
    assert draw_curves([record], "x") != draw_curves([record], "y")


def test_what_is_drawn_is_what_was_logged(tmp_path):
    rows = [val(0, 3.0, accuracy=0.5), train(1, 2.0), val(10, 2.5, accuracy=0.75), val(20, 2.75, accuracy=0.7)]
    (record,) = read_records([str(make_run(tmp_path / "a", rows, "task: classification"))])
    page = Page(draw_curves([record], "x"))
    assert page.elements.count("figcaption") == 5
    assert "lowest 2.5000 at step 10" in page.text
    assert "nats a text" in page.text
    labels = page.values("aria-label")
    assert "loss over 20 steps, between 2 and 3" in labels
    assert "accuracy over 20 steps, between 0.5 and 0.75" in labels


def test_tick_labels_are_not_rounded_away(tmp_path):
    (record,) = read_records([str(make_run(tmp_path / "a", [train(i, learning_rate=4e-5 * i) for i in range(1, 9)]))])
    assert "0.0003" in Page(draw_curves([record], "x")).text


@pytest.mark.parametrize("loss", [None, "bad", True, math.inf, math.nan])
def test_what_is_no_number_is_a_gap(tmp_path, loss):
    rows = [train(1), train(2, loss), train(3), val(3, loss)]
    (record,) = read_records([str(make_run(tmp_path / "a", rows))])
    assert np.isnan(record.points("train", "loss")[1]).tolist() == [False, True, False]
    assert record.best() is None
    assert not_finite(record) == 1
    Page(draw_curves([record], "x"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.25, "0.25"),
        (999.5, "999.5"),
        (1000, "1,000"),
        (2_500_000, "2,500,000"),
        (2.5e38, "2.5e+38"),
        (-4e7, "-4e+07"),
    ],
)
def test_numbers_on_axes_are_short(value, text):
    assert _shown(value) == text

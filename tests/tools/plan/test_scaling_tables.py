"""The tables of docs/scaling.md: every shape fits every cluster, and they say what the page says."""

import pytest

from slm_jax.tools.plan.scaling import CLUSTERS, SHAPES, scaling_rows, scaling_table


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "n_params"), [("gpt2-xl", 1_557_611_200), ("7b", 6_714_695_680)])
def test_each_shape_on_each_cluster(shape, n_params):
    rows = scaling_rows(shape)
    assert [row.cluster for row in rows] == list(CLUSTERS)
    for row in rows:
        assert row.plan.n_params == n_params
        assert row.plan.fits
        assert row.plan.step.mfu[1] <= row.plan.step.mfu[0] <= 0.4
    assert len(SHAPES) == 2


def test_the_table_has_a_column_for_each_cluster():
    lines = scaling_table("gpt2-xl").splitlines()
    assert all(line.count("|") == len(CLUSTERS) + 2 for line in lines)
    assert "`v5p-256`" in lines[0]

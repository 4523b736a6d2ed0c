"""A recipe's batch on any number of devices: kept, cut into other micro-batches or filled up, with the same losses."""

import eight_devices
import jax
import numpy as np
import pytest
from eight_devices import OPTIMIZER
from recipes import RECIPES, read

from slm_jax.data.windows import fill_up
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.batch_size import fit_batch
from slm_jax.training.config import TrainConfig
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.step import make_train_step


def fitted(n_shards, batch_size, accumulate=1):
    train = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    config, changes = fit_batch(RunConfig(train=train), n_shards)
    return config.train.batch_size, config.train.accumulate, changes


@pytest.mark.parametrize(
    ("case", "rows", "accumulate", "words"),
    [
        ((1, 12, 4), 12, 4, []),
        ((8, 64, 4), 64, 4, []),
        ((8, 64, 32), 64, 8, ["64 rows on 8 devices", "train.accumulate is 8 instead of 32"]),
        ((64, 512, 32), 512, 8, ["accumulate is 8"]),
        ((8, 12), 16, 1, ["4 of 16 rows are empty, 25%", "8 or 16"]),
        ((8, 2), 8, 1, ["6 of 8 rows are empty, 75%", "train.batch_size 8)"]),
        ((2, 9, 3), 12, 3, ["3 of 12 rows"]),  # not 10 rows at once: 5 on a device, which was to have 3
        ((6, 64, 32), 66, 11, ["2 of 66 rows", "accumulate is 11"]),
    ],
)
def test_fewer_micro_batches_come_before_empty_rows_and_both_are_said(case, rows, accumulate, words):
    *found, changes = fitted(*case)
    assert found == [rows, accumulate]
    assert len(changes) == bool(words)
    assert all(word in changes[0] for word in words)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_any_number_of_devices_with_no_more_rows_on_each(path):
    config = read(path.stem)
    for n_shards in (1, 2, 3, 4, 6, 8, 16, 64, 256):
        train = fit_batch(config, n_shards)[0].train
        assert train.batch_size % (n_shards * train.accumulate) == 0
        assert 0 <= train.batch_size - config.train.batch_size < n_shards * train.accumulate
        micro_batch = train.batch_size // (n_shards * train.accumulate)
        assert micro_batch <= config.train.batch_size // config.train.accumulate


def test_empty_rows_change_no_loss_and_no_gradient_even_with_dropout():
    loss_fn = make_loss_fn(eight_devices.model(0.1))
    step = make_train_step(loss_fn, make_optimizer(OPTIMIZER), make_schedule(OPTIMIZER, 5))
    state, step = jax.jit(eight_devices.initial_state)(), jax.jit(step)
    batch = eight_devices.batches()[0]
    _, whole = step(state, {}, batch)
    _, filled = step(state, {}, fill_up(batch, len(batch["inputs"]) + 4))
    assert float(filled.weight_sum) == float(whole.weight_sum)
    np.testing.assert_allclose(float(filled.loss), float(whole.loss), rtol=1e-6)
    np.testing.assert_allclose(float(filled.grad_norm), float(whole.grad_norm), rtol=1e-5)

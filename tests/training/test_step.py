"""What must hold of one optimizer step: a bad step changes nothing, keys by step, a true loss."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from slm_jax.model import GPTConfig, GPTModel, init_params
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.optimizer import make_optimizer, make_schedule
from slm_jax.training.program import CompiledByShape
from slm_jax.training.step import TrainState, accumulated_gradients, make_eval_step, make_train_step

BATCH, SEQ, VOCAB = 8, 12, 29


def gpt(**overrides):
    fields = {"vocab_size": VOCAB, "context_length": SEQ, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    return GPTModel(GPTConfig(**{**fields, **overrides}))


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(gpt().cfg, jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    """Random tokens; row i counts its first i + 1 targets, so that no two ways of cutting it weigh the same."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB, size=(BATCH, SEQ + 1)).astype(np.int32)
    weights = (np.arange(SEQ)[None, :] <= np.arange(BATCH)[:, None]).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def distance(a, b):
    differences = jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b)
    return np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(differences)))


def same_bits(a, b):
    raw = partial(jax.tree.map, lambda x: np.asarray(x).tobytes())
    return raw(a) == raw(b)


# Mechanics, on a model of one matrix


def toy_loss(trainable, frozen, batch, key):
    """Squared error, and a root whose gradient is not finite where ``x`` is 0 and ``root`` is 1."""
    products = batch["x"] @ trainable["kernel"]
    y = products + trainable["bias"]
    roots = jnp.sqrt(jnp.abs(products)) * batch["root"][:, None]
    losses = jnp.square(y - 1).sum(1) + roots.sum(1)
    return jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"]), {}


TOY = OptimizerConfig(learning_rate=0.1, schedule="cosine", warmup_steps=4, clip_norm=1.0)
SCHEDULE = make_schedule(TOY, 20)


def toy_batch(**changes):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    return {"x": x, "root": np.zeros(4, np.float32), "weights": np.ones(4, np.float32), **changes}


@cache
def toy_step(accumulate=1):
    return jax.jit(make_train_step(toy_loss, make_optimizer(TOY), SCHEDULE, accumulate))


def toy_state():
    rng = np.random.default_rng(4)
    params = {"kernel": jnp.float32(rng.normal(size=(3, 2))), "bias": jnp.zeros(2)}
    return TrainState(jnp.int32(0), params, make_optimizer(TOY).init(params), jax.random.key(5))


def with_row(value, row=2):
    x = toy_batch()["x"]
    x[row] = value
    return x


BAD_BATCHES = {
    "NaN in the data": toy_batch(x=with_row(np.nan)),
    "infinity in the data": toy_batch(x=with_row(np.inf)),
    "a gradient that overflows": toy_batch(x=with_row(1e18)),
    "a finite loss with a gradient that is not": toy_batch(x=with_row(0.0), root=np.float32([0, 0, 1, 0])),
    "NaN in the weights": toy_batch(weights=np.float32([1, 1, np.nan, 1])),
    "no target that counts": toy_batch(weights=np.zeros(4, np.float32)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_a_bad_batch_leaves_parameters_and_optimizer_untouched(bad, accumulate):
    step = toy_step(accumulate)
    state, metrics = step(toy_state(), {}, toy_batch())
    assert not metrics.skipped
    after, metrics = step(state, {}, BAD_BATCHES[bad])
    assert metrics.skipped
    if "finite loss" in bad:  # which proves nothing of the gradients
        assert np.isfinite(metrics.loss)
        assert not np.isfinite(metrics.grad_norm)
        assert any(metrics.bad)
    assert same_bits((after.trainable, after.opt_state), (state.trainable, state.opt_state))
    assert same_bits(jax.random.key_data(after.key), jax.random.key_data(state.key))
    assert (int(state.step), int(after.step)) == (1, 2)


def test_the_step_after_a_skipped_one_reads_the_schedule_at_its_own_number():
    """The optimizer's own count stands still meanwhile, as for Adam's bias correction it must."""
    state, first = toy_step()(toy_state(), {}, toy_batch())
    state, skipped = toy_step()(state, {}, BAD_BATCHES["NaN in the data"])
    count = next(part.count for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    assert int(count) == 1
    state, third = toy_step()(state, {}, toy_batch())
    for step, metrics in enumerate((first, skipped, third)):
        assert float(metrics.learning_rate) == pytest.approx(0.1 * (step + 1) / 4, rel=1e-6)
    assert not third.skipped


def test_the_update_is_made_with_the_rate_of_the_step():
    """A rate of zero at one step only: that step alone changes nothing."""
    step = jax.jit(make_train_step(toy_loss, make_optimizer(TOY), lambda step: jnp.where(step == 1, 0.0, 0.1)))
    states = [toy_state()]
    for _ in range(3):
        states.append(step(states[-1], {}, toy_batch())[0])
    moved = [distance(a.trainable, b.trainable) > 0 for a, b in itertools.pairwise(states)]
    assert moved == [True, False, True]


def test_only_the_trainable_tree_is_updated_and_the_frozen_one_is_read():
    def loss_fn(trainable, frozen, batch, key):
        return toy_loss({**trainable, **frozen}, {}, batch, key)

    state = toy_state()
    frozen = {"bias": state.trainable["bias"] + 0.25}
    trainable = {"kernel": state.trainable["kernel"]}
    optimizer = make_optimizer(TOY)
    state = state.replace(trainable=trainable, opt_state=optimizer.init(trainable))
    step = jax.jit(make_train_step(loss_fn, optimizer, SCHEDULE))
    after, metrics = step(state, frozen, toy_batch())
    assert after.trainable.keys() == {"kernel"}
    other = step(state, {"bias": frozen["bias"] + 1}, toy_batch())[1]
    assert float(metrics.loss) != float(other.loss)


def test_reported_loss_and_norm_are_means_over_the_counted_targets():
    weights = np.float32([1, 0, 2, 0.5])
    _, metrics = toy_step(2)(toy_state(), {}, toy_batch(weights=weights))
    kernel, x = np.float64(toy_state().trainable["kernel"]), np.float64(toy_batch()["x"])
    error = x @ kernel - 1
    assert float(metrics.weight_sum) == 3.5
    assert float(metrics.loss) == pytest.approx((np.square(error).sum(1) * weights).sum() / 3.5, rel=1e-6)
    by_y = 2 * error * weights[:, None] / 3.5
    norm = np.sqrt(np.square(x.T @ by_y).sum() + np.square(by_y.sum(0)).sum())
    assert norm > TOY.clip_norm  # so that it shows that the norm is the one before clipping
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-5)


def test_each_step_and_each_micro_batch_has_a_key_of_its_own():
    """The loss is what the key draws; from the means of the draws and of their squares one reads that they differ."""

    def loss_fn(trainable, frozen, batch, key):
        draw = jax.random.uniform(key)
        return trainable["w"] * 0 + jnp.where(batch["square"][0], draw**2, draw), jnp.float32(1), {}

    def loss(step, accumulate, square=False, seed=0):
        optimizer = optax.identity()
        state = TrainState(jnp.int32(step), {"w": jnp.float32(0)}, optimizer.init({}), jax.random.key(seed))
        train_step = make_train_step(loss_fn, optimizer, lambda step: 0.0, accumulate)
        return float(train_step(state, {}, {"square": np.full(accumulate, square)})[1].loss)

    assert len({loss(step, 1) for step in range(5)}) == 5
    assert loss(3, 1) == loss(3, 1)
    assert loss(3, 1) != loss(3, 1, seed=1)
    assert loss(3, 4, square=True) - loss(3, 4) ** 2 > 1e-4  # the variance of equal draws is 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_exchange_the_gradients_of_micro_batches_in_the_dtype_of_the_model(params, batch, dtype):
    """As XLA does without micro-batches; they are summed in float32."""
    step = partial(accumulated_gradients, make_loss_fn(gpt(dtype=dtype)), accumulate=2, dtype=dtype)
    with use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        jaxpr, (gradients, _) = jax.make_jaxpr(step, return_shape=True)(params, {}, batch, key=jax.random.key(0))
    (summed,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    sent = [e.invars[0].aval for e in summed.params["jaxpr"].eqns if e.primitive.name == "psum"]
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert {aval.dtype.name for aval in sent if aval.shape in shapes and aval.shape} == {dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"float32"}


def test_evaluation_has_no_dropout(params, batch):
    with_dropout = jax.jit(make_eval_step(make_loss_fn(gpt(drop_rate=0.5))))(params, {}, batch)
    without = jax.jit(make_eval_step(make_loss_fn(gpt())))(params, {}, batch)
    assert same_bits(with_dropout, without)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_scalar_metrics_are_means_over_the_weights_and_arrays_are_for_evaluation(accumulate):
    def loss_fn(trainable, frozen, batch, key):
        weights = batch["weights"]
        metrics = {"margin": jnp.sum(weights * batch["x"]), "table": jnp.outer(weights, weights)}
        return jnp.sum(weights * trainable["w"] * batch["x"]), jnp.sum(weights), metrics

    batch = {"x": np.float32([1, 2, 3, 6]), "weights": np.float32([1, 0, 1, 2])}
    state = TrainState(jnp.int32(0), {"w": jnp.float32(2)}, optax.identity().init({}), jax.random.key(0))
    _, metrics = make_train_step(loss_fn, optax.identity(), lambda step: 0.0, accumulate)(state, {}, batch)
    assert metrics.metrics.keys() == {"margin"}
    assert float(metrics.metrics["margin"]) == 4.0
    assert float(metrics.loss) == 8.0


def test_loss_and_metrics_are_float32_when_the_model_computes_in_bfloat16(params, batch):
    loss_fn = make_loss_fn(gpt(dtype="bfloat16"))
    optimizer = make_optimizer(OptimizerConfig())
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
    step = jax.jit(make_train_step(loss_fn, optimizer, SCHEDULE, 2))
    after, metrics = jax.eval_shape(step, state, {}, batch)
    assert {leaf.dtype for leaf in metrics[:4]} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trainable)} == {jnp.dtype("float32")}
    loss, weight, _ = jax.jit(make_eval_step(loss_fn))(params, {}, batch)
    exact, *_ = jax.jit(make_eval_step(make_loss_fn(gpt())))(params, {}, batch)
    assert loss.dtype == jnp.float32
    assert float(loss / weight) != float(jnp.bfloat16(loss / weight))  # it holds more digits than bfloat16 has
    assert float(loss) == pytest.approx(float(exact), rel=1e-2)


def test_parameters_in_bfloat16_stay_so_and_so_does_the_optimizers_state(params, batch):
    """As the loop does it: compiled ahead of time for the first state, which takes no other dtypes."""
    half = jax.tree.map(jnp.bfloat16, params)
    optimizer = make_optimizer(OptimizerConfig())
    state = TrainState(jnp.int32(0), half, optimizer.init(half), jax.random.key(0))
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
    train_step = make_train_step(make_loss_fn(gpt(param_dtype="bfloat16")), optimizer, SCHEDULE, 2)
    compiled = CompiledByShape(jax.jit(train_step), jax.eval_shape(lambda: state), {})
    for _ in range(2):
        state, metrics = compiled(state, {}, batch)
        assert not metrics.skipped
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == dtypes
    assert distance(state.trainable, half) > 0


def test_a_step_is_compiled_while_python_goes_on_and_once_for_a_shape(params, batch):
    traced = []

    def step(params, batch):
        traced.append(batch["inputs"].shape)
        return batch["inputs"].sum()

    compiled = CompiledByShape(jax.jit(step), params)
    begun = compiled.begin(batch)
    assert compiled.begin(batch) is begun
    half = {name: value[: len(value) // 2] for name, value in batch.items()}
    for rows in (batch, half, batch):
        assert compiled(params, rows) == rows["inputs"].sum()
    assert traced == [batch["inputs"].shape, half["inputs"].shape]

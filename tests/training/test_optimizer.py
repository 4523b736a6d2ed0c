"""What must hold of the optimizer: it is AdamW, decay follows the leaf's name, rates follow the configured course."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from slm_jax.config import OptimizerConfig
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, init_params, param_shapes
from slm_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from slm_jax.training.step import TrainState, make_train_step

CFG = GPTConfig(vocab_size=11, context_length=4, emb_dim=6, n_heads=2, n_layers=2, tie_weights=False)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_steps=3, weight_decay=0.3, beta1=0.8, beta2=0.95, clip_norm=5.0
)
STEPS = 8

# The leaves that the params tree of DESIGN.md calls matrices and embeddings; everything else is a scale or a bias.
DECAYED = {
    "tok_emb/embedding",
    "pos_emb/embedding",
    "blocks/attn/qkv/kernel",
    "blocks/attn/out_proj/kernel",
    "blocks/ff/fc/kernel",
    "blocks/ff/proj/kernel",
    "out_head/kernel",
}


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def gradients(params):
    """One tree a step; the norms lie on both sides of the clipping norm."""
    rng = np.random.default_rng(1)
    scales = np.geomspace(0.02, 2.0, STEPS)[rng.permutation(STEPS)]
    trees = [jax.tree.map(lambda p, s=s: (s * rng.normal(size=p.shape)).astype(np.float32), params) for s in scales]
    norms = [global_norm(tree) for tree in trees]
    assert min(norms) < OPTIMIZER.clip_norm < max(norms)
    return trees


def global_norm(tree):
    return np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(tree)))


def linear_loss(trainable, frozen, batch, key):
    """A loss whose gradient is the batch."""
    products = jax.tree.map(lambda p, g: jnp.sum(p * g), trainable, batch)
    return sum(jax.tree.leaves(products)), jnp.float32(1), {}


def train(cfg, params, gradients, total_steps):
    optimizer = make_optimizer(cfg)
    step = jax.jit(make_train_step(linear_loss, optimizer, make_schedule(cfg, total_steps)))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
    for gradient in gradients:
        state, _ = step(state, {}, gradient)
    return state.trainable


def largest_difference(a, b):
    return max(np.abs(np.float64(x) - np.float64(y)).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_steps_are_those_of_optax_adamw(params, gradients):
    """The same transformation as Optax puts together, with its own count as the step."""
    schedule = make_schedule(OPTIMIZER, STEPS)
    reference = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(schedule, b1=0.8, b2=0.95, eps=OPTIMIZER.eps, weight_decay=0.3, mask=decay_mask),
    )

    @jax.jit
    def update(gradient, opt_state, reference_params):
        updates, opt_state = reference.update(gradient, opt_state, reference_params)
        return optax.apply_updates(reference_params, updates), opt_state

    expected, opt_state = params, reference.init(params)
    for gradient in gradients:
        expected, opt_state = update(gradient, opt_state, expected)
    actual = train(OPTIMIZER, params, gradients, STEPS)
    assert largest_difference(actual, expected) <= 1e-6 * largest_difference(params, expected)


@pytest.mark.parametrize("clip_norm", [5.0, None])
def test_the_steps_are_those_of_adamw_written_in_numpy(params, gradients, clip_norm):
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    cfg = OptimizerConfig(**{**vars(OPTIMIZER), "clip_norm": clip_norm})
    p = {name: np.float64(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    m = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    v = {name: np.zeros_like(leaf) for name, leaf in p.items()}
    for step, tree in enumerate(gradients):
        norm = global_norm(tree)
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        if step < 3:
            rate = 1e-2 * (step + 1) / 3
        else:
            rate = 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + np.cos(np.pi * (step - 3) / (STEPS - 3)))
        for name, gradient in flatten_dict(tree, sep="/").items():
            g = scale * np.float64(gradient)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = m[name] / (1 - 0.8 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.3 * p[name] if name in DECAYED else 0.0
            p[name] = p[name] - rate * (direction + decay)
    actual = flatten_dict(train(cfg, params, gradients, STEPS), sep="/")
    moved = largest_difference(params, actual)
    assert largest_difference(p, actual) <= 1e-5 * moved


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_and_embeddings_decay_and_nothing_else(tied):
    cfg = GPTConfig(vocab_size=11, context_length=4, emb_dim=6, n_heads=2, n_layers=2, tie_weights=tied)
    shapes = param_shapes(cfg)
    assert shapes["blocks"]["norm1"]["scale"].ndim == 2  # so that a rule by rank would be wrong
    mask = flatten_dict(decay_mask(shapes), sep="/")
    assert {name for name, decays in mask.items() if decays} == DECAYED - ({"out_head/kernel"} if tied else set())
    assert {"blocks/norm1/scale", "blocks/norm2/bias", "blocks/attn/qkv/bias", "final_norm/scale"} <= mask.keys()


def test_without_gradients_only_the_decayed_leaves_shrink(params):
    cfg = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    after = flatten_dict(train(cfg, params, [jax.tree.map(jnp.zeros_like, params)], 1), sep="/")
    for name, before in flatten_dict(params, sep="/").items():
        factor = 1 - 0.1 * 0.5 if name in DECAYED else 1.0
        np.testing.assert_allclose(after[name], before * factor, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("scale", "clipped"), [(100.0, True), (1e-3, False)])
def test_clipping_is_by_the_norm_of_the_whole_tree(params, scale, clipped):
    """What reaches Adam has the clipping norm, or is untouched: read from its first moment after one step."""
    optimizer = make_optimizer(OPTIMIZER)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, scale), params)
    _, opt_state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    moment = next(part.mu for part in opt_state if isinstance(part, optax.ScaleByAdamState))
    norm = global_norm(moment) / (1 - OPTIMIZER.beta1)
    assert norm == pytest.approx(OPTIMIZER.clip_norm if clipped else global_norm(gradient), rel=1e-5)
    directions = [leaf / jnp.float32(norm) for leaf in jax.tree.leaves(moment)]
    spread = np.ptp(np.concatenate([np.ravel(leaf) for leaf in directions]))
    assert spread <= 1e-6  # every leaf by the same factor


def rates(total_steps, **settings):
    """The rates of steps 0 to twice the run."""
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **settings), total_steps)
    return np.float64(schedule(jnp.arange(2 * total_steps + 1)))


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_warmup_rises_in_equal_parts_to_the_peak_and_never_above(schedule, warmup):
    values = rates(50, schedule=schedule, warmup_steps=warmup)
    np.testing.assert_allclose(values[:warmup], 2.0 * np.arange(1, warmup + 1) / max(1, warmup), rtol=1e-6)
    assert values[warmup] == pytest.approx(2.0, rel=1e-6)
    assert values.max() <= 2.0 * (1 + 1e-6)
    assert values.min() > 0
    assert (np.diff(values[warmup:]) <= 1e-6).all()


def test_cosine_falls_from_the_peak_to_the_final_rate_and_stays():
    values = rates(40, schedule="cosine", warmup_steps=10, final_learning_rate=0.5)
    assert values[10] == pytest.approx(2.0, rel=1e-6)
    assert values[20] == pytest.approx(0.5 + 1.5 * 0.75, rel=1e-5)  # cos 60° = 1/2
    assert values[25] == pytest.approx(1.25, rel=1e-5)
    np.testing.assert_allclose(values[40:], 0.5, rtol=1e-5)


def test_cosine_ends_at_decay_steps():
    values = rates(40, schedule="cosine", warmup_steps=10, decay_steps=20, final_learning_rate=0.5)
    assert values[15] == pytest.approx(1.25, rel=1e-5)
    np.testing.assert_allclose(values[20:], 0.5, rtol=1e-5)


def test_constant_stays():
    np.testing.assert_array_equal(rates(40, schedule="constant", warmup_steps=10)[10:], 2.0)


def test_wsd_is_stable_and_then_falls_in_a_line():
    values = rates(40, schedule="wsd", warmup_steps=10, decay_steps=20, final_learning_rate=0.0)
    np.testing.assert_array_equal(values[10:21], 2.0)
    np.testing.assert_allclose(values[20:41], 2.0 * np.arange(20, -1, -1) / 20, atol=1e-6)
    np.testing.assert_array_equal(values[40:], 0.0)


def test_wsd_decays_over_the_last_tenth_by_default():
    values = rates(40, schedule="wsd", warmup_steps=10)
    np.testing.assert_array_equal(values[10:37], 2.0)
    assert values[38] == pytest.approx(1.1, rel=1e-5)
    np.testing.assert_allclose(values[40:], 0.2, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("final", "expected"), [(None, 0.2), (0.0, 0.0), (0.3, 0.3)])
def test_the_final_rate_is_a_tenth_of_the_peak_unless_told(schedule, final, expected):
    values = rates(20, schedule=schedule, warmup_steps=2, final_learning_rate=final)
    assert values[20] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 5, 100])
def test_a_trial_of_fewer_steps_than_the_recipes_warmup_still_trains(schedule, total_steps):
    values = rates(total_steps, schedule=schedule, warmup_steps=100)[:total_steps]
    assert (values > 0).all()
    assert (values <= 2.0 * (1 + 1e-6)).all()


@pytest.mark.parametrize("total_steps", [1, 2, 5, 100])
def test_a_short_trial_with_cosine_reaches_the_peak(total_steps):
    values = rates(total_steps, schedule="cosine", warmup_steps=100)[:total_steps]
    assert values.max() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 31), (40, None), (41, 1)])
def test_wsd_that_does_not_fit_is_refused_with_its_numbers(warmup, decay):
    with pytest.raises(InputError, match=rf"optimizer\.warmup_steps {warmup}.*40"):
        rates(40, schedule="wsd", warmup_steps=warmup, decay_steps=decay)


def test_wsd_that_just_fits_is_taken():
    values = rates(40, schedule="wsd", warmup_steps=10, decay_steps=30, final_learning_rate=0.0)
    assert values[10] == pytest.approx(2.0)
    assert values[40] == 0.0


def test_a_cosine_that_ends_within_the_warmup_is_refused():
    with pytest.raises(InputError, match=r"optimizer\.decay_steps is 10.*warmup_steps 10"):
        rates(40, schedule="cosine", warmup_steps=10, decay_steps=10)

"""What must hold of the optimizers: AdamW and Muon as published, what decays, rates as configured."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, init_params, param_shapes
from slm_jax.tasks.config import RunConfig
from slm_jax.training.checkpoint import Checkpoints
from slm_jax.training.config import LoRAConfig, OptimizerConfig
from slm_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, muon_or_adam
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.training.trainable import split_params

CFG = GPTConfig(vocab_size=11, context_length=4, emb_dim=6, n_heads=2, n_layers=2, tie_weights=False)
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule="cosine", warmup_steps=3, weight_decay=0.3, beta1=0.8, beta2=0.95, clip_norm=5.0
)
STEPS = 8

# The leaves that the params tree of DESIGN.md calls matrices and embeddings; everything else is a scale or a bias.
DECAYED = {
    "tok_emb/embedding",
    "pos_emb/embedding",
    *(f"blocks/attn/{name}/kernel" for name in ("q", "k", "v", "out_proj")),
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
    # With the emitters that the tests do without: they round alike in the programs of two optimizers.
    options = {"xla_cpu_use_fusion_emitters": True}
    step = make_train_step(linear_loss, optimizer, make_schedule(cfg, total_steps))
    step = jax.jit(step, compiler_options=options)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0))
    for gradient in gradients:
        state, _ = step(state, {}, gradient)
    return state.trainable


def largest_difference(a, b):
    return max(np.abs(np.float64(x) - np.float64(y)).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


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
    assert {"blocks/norm1/scale", "blocks/norm2/bias", "blocks/attn/q/bias", "final_norm/scale"} <= mask.keys()


# Muon


MUON = dataclasses.replace(OPTIMIZER, kind="muon", muon_learning_rate=0.03)  # three times AdamW's
MATRICES = {name for name in DECAYED if name.startswith("blocks/")}


def as_matrices(name, leaf):
    """A stacked kernel as (layers, in, out): the axes of heads and their width become one."""
    n_inputs = CFG.emb_dim * (4 if name == "blocks/ff/proj/kernel" else 1)
    return np.asarray(leaf).reshape(len(leaf), n_inputs, -1)


def test_the_steps_are_those_of_muon_written_in_numpy(params, gradients):
    """Jordan et al. 2024: Nesterov momentum, five Newton-Schulz iterations, scaled by shape; in float64.

    With Optax's corrections of the momentum's bias, as in Nadam (Dozat 2016).
    """
    actual = flatten_dict(train(MUON, params, gradients, STEPS), sep="/")
    rates = np.float64(make_schedule(MUON, STEPS)(jnp.arange(STEPS)))
    for name in MATRICES:
        p = as_matrices(name, np.float64(flatten_dict(params, sep="/")[name]))
        m = np.zeros_like(p)
        for step, tree in enumerate(gradients):
            g = as_matrices(name, np.float64(flatten_dict(tree, sep="/")[name]))
            g *= min(1.0, MUON.clip_norm / global_norm(tree))
            m = 0.95 * m + 0.05 * g
            ahead = 0.95 * m / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
            for layer in range(CFG.n_layers):
                x = ahead[layer] / np.linalg.norm(ahead[layer])
                for _ in range(5):
                    x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
                scale = 3 * np.sqrt(max(1, x.shape[1] / x.shape[0]))
                p[layer] -= rates[step] * (scale * x + MUON.weight_decay * p[layer])
        moved = np.abs(p - as_matrices(name, flatten_dict(params, sep="/")[name])).max()
        np.testing.assert_allclose(as_matrices(name, actual[name]), p, atol=1e-4 * moved, err_msg=name)


def test_what_is_no_matrix_of_a_block_moves_as_under_adamw(params, gradients):
    muon, adamw = (flatten_dict(train(cfg, params, gradients, STEPS), sep="/") for cfg in (MUON, OPTIMIZER))
    same = {name for name in muon if np.array_equal(muon[name], adamw[name])}
    assert same == muon.keys() - MATRICES


def test_muon_keeps_one_moment_of_a_matrix_and_two_of_the_rest(params):
    count = {name: leaf.size for name, leaf in flatten_dict(params, sep="/").items()}
    matrices = sum(count[name] for name in MATRICES)
    state = jax.tree.leaves(make_optimizer(MUON).init(params))
    scalars = 1 + 1 + 3  # two counts of updates, and the coefficients of the iteration
    assert sum(leaf.size for leaf in state) == matrices + 2 * (sum(count.values()) - matrices) + scalars


@pytest.mark.parametrize(
    ("trainable", "by_muon"),
    [("head", set()), ("lora", set()), ("last_n_blocks", {name.replace("blocks", "blocks_1") for name in MATRICES})],
)
def test_of_a_part_of_the_model_muon_takes_the_matrices_that_are_in_it(params, trainable, by_muon):
    config = RunConfig(trainable=trainable, base="a-run", trainable_blocks=1, lora=LoRAConfig(rank=2))
    part, _ = split_params(params, config, jax.random.key(0))
    labels = flatten_dict(muon_or_adam(part), sep="/")
    assert {name for name, label in labels.items() if label == "muon"} == by_muon
    assert set(labels.values()) <= {"muon", "adam"}
    optimizer = make_optimizer(MUON)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, part), optimizer.init(part), part)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(updates))


def test_muon_goes_on_from_a_checkpoint_to_the_same_bits(params, gradients, tmp_path):
    optimizer = make_optimizer(MUON)
    step = jax.jit(make_train_step(linear_loss, optimizer, make_schedule(MUON, STEPS)))

    def advance(state, trees):
        for tree in trees:
            state, _ = step(state, {}, tree)
        return state

    first = advance(TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key(0)), gradients[:3])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(first, {})
        checkpoints.wait()
        restored = checkpoints.restore(3, first)
    broken, whole = (advance(state, gradients[3:]) for state in (restored, first))
    jax.tree.map(np.testing.assert_array_equal, broken.opt_state, whole.opt_state)
    jax.tree.map(np.testing.assert_array_equal, broken.trainable, whole.trainable)
    assert int(whole.step) == STEPS


# Learning rates


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
    values = rates(40, schedule="cosine", warmup_steps=10, decay_steps=20, final_learning_rate=0.5)
    assert values[15] == pytest.approx(1.25, rel=1e-5)
    np.testing.assert_allclose(values[20:], 0.5, rtol=1e-5)
    assert rates(20, schedule="cosine", warmup_steps=2)[20] == pytest.approx(0.2, rel=1e-5)  # a tenth by default
    np.testing.assert_array_equal(rates(40, schedule="constant", warmup_steps=10)[10:], 2.0)


def test_wsd_is_stable_and_then_falls_in_a_line():
    values = rates(40, schedule="wsd", warmup_steps=10, decay_steps=20, final_learning_rate=0.0)
    np.testing.assert_array_equal(values[10:21], 2.0)
    np.testing.assert_allclose(values[20:41], 2.0 * np.arange(20, -1, -1) / 20, atol=1e-6)
    np.testing.assert_array_equal(values[40:], 0.0)
    values = rates(40, schedule="wsd", warmup_steps=10)  # by default over the last tenth, to a tenth
    np.testing.assert_array_equal(values[10:37], 2.0)
    np.testing.assert_allclose(values[[38, 40, 41]], [1.1, 0.2, 0.2], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 5, 100])
def test_a_trial_of_fewer_steps_than_the_recipes_warmup_still_trains(schedule, total_steps):
    values = rates(total_steps, schedule=schedule, warmup_steps=100)[:total_steps]
    assert (values > 0).all()
    assert values.max() <= 2.0 * (1 + 1e-6)
    if schedule == "cosine":
        assert values.max() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "wsd", "warmup_steps": 10, "decay_steps": 31}, "10.*40"),
        ({"schedule": "wsd", "warmup_steps": 40}, "40.*40"),
        ({"schedule": "cosine", "warmup_steps": 10, "decay_steps": 10}, r"decay_steps is 10.*warmup_steps 10"),
    ],
)
def test_a_warmup_and_decay_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        rates(40, **settings)

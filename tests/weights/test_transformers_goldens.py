"""What must hold beside Hugging Face's GPT-2: the same numbers from the same weights, through our own reader.

The goldens were computed by transformers on a CPU (``goldens/make.py`` says how and with which versions), so that
neither it nor PyTorch is needed here. If a limit breaks, ours moved: theirs is a file.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from golden_files import read_golden

from slm_jax.generation.decode import generate
from slm_jax.model import GPTModel, init_cache
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.config import OptimizerConfig
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.weights.gpt2 import FORMAT
from slm_jax.weights.names import leaf_shapes

SHAPES = ("three-heads", "five-heads", "padded", "untied", "head-dim-7", "one-head")
GREEDY = (SHAPES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES[1:3]))
NEW_TOKENS = 200


class Golden:
    """One golden file: our model with its weights, and what transformers computed from them."""

    def __init__(self, name, folder):
        self.name = name
        cfg, self.params, self.trees, self.figures = read_golden(name, folder)
        self.cfg = dataclasses.replace(cfg, unpadded_vocab_size=self.figures["used"])
        self.model = GPTModel(self.cfg)

    @functools.cached_property
    def apply(self):
        return jax.jit(lambda params, tokens, **more: self.model.apply({"params": params}, tokens, **more))

    def theirs(self, kind):
        """One of the file's trees, by the names that our map has."""
        return {FORMAT.clean(name): value for name, value in self.trees[kind].items()}

    def in_their_names(self, params):
        """Cut one of our trees into their tensors."""
        leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
        assert {path: leaf.shape for path, leaf in leaves.items()} == leaf_shapes(self.cfg)
        return {name: slot.read(leaves) for name, slot in FORMAT.names(self.cfg).items()}

    @functools.cached_property
    def training(self):
        """State and metrics after each of three steps of clipped SGD; compiled once, for all that is compared."""
        figures = self.figures
        beta1, beta2 = figures["betas"]
        adamw = make_optimizer(OptimizerConfig(beta1=beta1, beta2=beta2, clip_norm=figures["clip_norm"]))
        optimizer = sgd_and_what_adamw_would_keep(figures["clip_norm"], adamw)
        schedule = optax.constant_schedule(figures["sgd_rate"])
        step = jax.jit(make_train_step(make_loss_fn(self.model), optimizer, schedule))
        state = TrainState(jnp.int32(0), self.params, optimizer.init(self.params), jax.random.key(0))
        history = []
        for tokens in self.trees["batches"][""]:
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
            state, metrics = step(state, {}, {**batch, "weights": np.ones(tokens[:, 1:].shape, np.float32)})
            history.append((state, metrics))
        return history


def sgd_and_what_adamw_would_keep(clip_norm, adamw):
    """An optimizer that takes SGD's steps; its state has the gradients and what AdamW makes of them."""
    clip = optax.clip_by_global_norm(clip_norm)

    def init(params):
        return params, adamw.init(params)

    def update(gradients, state, params):
        _, adamw_state = adamw.update(gradients, state[1], params)
        return clip.update(gradients, clip.init(params))[0], (gradients, adamw_state)

    return optax.GradientTransformation(init, update)


@functools.cache
def _golden(name, root):
    folder = root / name
    folder.mkdir()
    return Golden(name, folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("goldens")


@pytest.fixture(scope="module", params=SHAPES)
def golden(request, root):
    return _golden(request.param, root)


@pytest.fixture(scope="module", params=GREEDY)
def greedy_golden(request, root):
    return _golden(request.param, root)


@pytest.fixture(autouse=True)
def _float32_products():
    with jax.default_matmul_precision("highest"):
        yield


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def norm(tensors):
    return float(np.sqrt(sum(np.square(t, dtype=np.float64).sum() for t in tensors.values())))


def difference(ours, theirs):
    """Ours minus theirs: the same tensors, of the same shapes."""
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    return {name: ours[name] - theirs[name] for name in ours}


def check(golden, what, value, limit):
    print(f"{golden.name}: {what} {value:.1e}, limit {limit:g}")
    assert value <= limit


@pytest.mark.parametrize("length", ["full", "short"])
def test_log_probabilities(golden, length):
    tokens = golden.trees["tokens"][length]
    assert (tokens.shape[1] == golden.cfg.context_length) == (length == "full")
    ours, theirs = log_softmax(golden.apply(golden.params, tokens)), log_softmax(golden.trees["logits"][length])
    check(golden, f"log-probabilities, {length} rows", np.abs(ours - theirs).max(), 1e-4)


def test_gradients_and_adamw_moments(golden):
    gradients, adamw_state = golden.training[0][0].opt_state
    adam = next(part for part in adamw_state if isinstance(part, optax.ScaleByAdamState))
    for kind, tree in (("gradients", gradients), ("exp_avg", adam.mu), ("exp_avg_sq", adam.nu)):
        ours, theirs = golden.in_their_names(tree), golden.theirs(kind)
        check(golden, f"{kind}, of their norm", norm(difference(ours, theirs)) / norm(theirs), 1e-5)


def test_parameters_after_three_clipped_sgd_steps(golden):
    figures, start, theirs = golden.figures, golden.theirs("state"), golden.theirs("sgd")
    for i, (_, metrics) in enumerate(golden.training):
        np.testing.assert_allclose(metrics.loss, figures["losses"][i], rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, figures["grad_norms"][i], rtol=1e-5)
        assert metrics.grad_norm > figures["clip_norm"]
    assert norm(difference(theirs, start)) > figures["sgd_rate"] * figures["clip_norm"]  # they went somewhere
    error = difference(golden.in_their_names(golden.training[-1][0].trainable), theirs)
    check(golden, "parameters after 3 steps", max(np.abs(e).max() for e in error.values()), 1e-6)


def test_greedy_continuations_with_and_without_cache(greedy_golden):
    golden = greedy_golden
    assert golden.figures["smallest_margin"] > 1e-4  # no near tie that rounding could decide
    if golden.name == "padded":  # an unused id would win if it were allowed
        assert (golden.trees["logits"]["full"].argmax(axis=-1) >= golden.figures["used"]).any()
    theirs = list(golden.trees["greedy"].values())
    prompts = [ids[:-NEW_TOKENS] for ids in theirs]
    assert len({len(prompt) for prompt in prompts}) == 5
    together = generate(
        golden.model, golden.params, [p.tolist() for p in prompts], max_new_tokens=NEW_TOKENS, temperature=0.0
    )
    for expected, cached, uncached in zip(theirs, together, without_cache(golden, prompts), strict=True):
        np.testing.assert_array_equal(cached, expected)
        np.testing.assert_array_equal(uncached, expected)


def without_cache(golden, prompts):
    """Feed the model all that there is for each token; what fills up a row lies behind it, where nothing looks."""
    lengths = np.array([len(prompt) for prompt in prompts])
    window = np.stack([np.pad(prompt, (0, golden.cfg.context_length - len(prompt))) for prompt in prompts])
    rows = np.arange(len(prompts))

    @jax.jit
    def fill(params, window):
        def add_token(i, window):
            logits = golden.model.apply({"params": params}, window)[rows, lengths + i - 1]
            return window.at[rows, lengths + i].set(jnp.argmax(logits[:, : golden.figures["used"]], axis=-1))

        return jax.lax.fori_loop(0, NEW_TOKENS, add_token, window)

    return [row[: n + NEW_TOKENS] for row, n in zip(np.asarray(fill(golden.params, window)), lengths, strict=True)]


def test_cached_log_probabilities_are_the_uncached(golden):
    tokens = golden.trees["tokens"]["full"]
    expected = log_softmax(golden.apply(golden.params, tokens))
    for piece in (1, 5):
        cache = init_cache(golden.cfg, golden.params, *tokens.shape)
        cached = []
        whole, rest = divmod(tokens.shape[1], piece)
        for part in np.split(tokens, np.cumsum([piece] * whole + [1] * rest)[:-1], axis=1):
            logits, cache = golden.apply(golden.params, part, cache=cache)
            cached.append(logits)
        cached = log_softmax(np.concatenate(cached, axis=1))
        check(golden, f"log-probabilities, cached in pieces of {piece}", np.abs(cached - expected).max(), 1e-5)

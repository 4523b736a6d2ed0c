"""What must hold of what is trained: the book's counts, two disjoint trees that lead back to one, no wasted work."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.model import GPTClassifier, GPTConfig, get_gpt_config, init_params
from slm_jax.nn.blocks import merge_params
from slm_jax.tasks.classification import make_loss_fn
from slm_jax.tasks.config import RunConfig
from slm_jax.training.checkpoint import checkpoint_bytes
from slm_jax.training.config import LoRAConfig, OptimizerConfig
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.step import TrainState, make_train_step
from slm_jax.training.trainable import from_leaf_table, leaf_table, split_params, whole_params

CFG = GPTConfig(vocab_size=29, context_length=16, emb_dim=16, n_heads=2, n_layers=4, unroll=False)
UNROLLED = dataclasses.replace(CFG, unroll=True)  # XLA counts the work of a loop's body once


def config(trainable, **more):
    return RunConfig(base="x", trainable=trainable, **more)


MODES = {
    "all": config("all"),
    "head": config("head"),
    "last_block": config("last_block"),
    "last_2_blocks": config("last_n_blocks", trainable_blocks=2),
    "last_4_blocks": config("last_n_blocks", trainable_blocks=4),
    "lora": config("lora", lora=LoRAConfig(rank=2)),
    "lora everywhere": config("lora", lora=LoRAConfig(rank=16, targets=("*",))),
}


def classifier_params(cfg):
    tokens, lengths = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    return GPTClassifier(cfg, n_classes=2).init(jax.random.key(0), tokens, lengths)["params"]


@functools.cache
def language_model():
    return jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))


@functools.cache
def params():
    return jax.jit(classifier_params, static_argnums=0)(CFG)


def flat(tree):
    return flatten_dict(tree, sep="/")


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat(tree).items()}


def split(params, mode):
    return split_params(params, MODES[mode], jax.random.key(1))


@pytest.mark.parametrize(("mode", "expected"), [("last_block", 7_090_946), ("lora everywhere", 2_666_528)])
def test_the_book_trains_as_many_parameters(mode, expected):
    """From shapes alone: GPT-2 small with OpenAI's biases and two classes; rank 16 beside every linear layer."""
    shapes = jax.eval_shape(lambda: classifier_params(get_gpt_config("gpt2-small", qkv_bias=True)))
    assert count(jax.eval_shape(functools.partial(split, mode=mode), shapes)[0]) == expected


@pytest.mark.parametrize("mode", MODES)
def test_what_is_split_leads_back_to_the_whole_bitwise(mode):
    trainable, frozen = split(params(), mode)
    assert not flat(trainable).keys() & flat(frozen).keys()
    assert bits(whole_params(trainable, frozen)) == bits(params())


@pytest.mark.parametrize("mode", ["last_block", "lora everywhere"])
def test_the_two_trees_give_the_logits_of_the_whole(mode):
    apply = jax.jit(lambda params, *texts: GPTClassifier(CFG).apply({"params": params}, *texts))
    texts = (jnp.arange(24, dtype=jnp.int32).reshape(2, 12), jnp.int32([12, 5]))
    parts = apply(merge_params(*split(params(), mode)), *texts)
    np.testing.assert_allclose(parts, apply(params(), *texts), rtol=0, atol=1e-6)


def test_what_is_trained_is_what_is_said():
    names = {mode: set(split(params(), mode)[0]) for mode in MODES}
    assert names["all"] == set(params())
    assert names["head"] == {"class_head"}
    assert names["last_block"] == names["last_2_blocks"] == {"blocks_1", "final_norm", "class_head"}
    assert names["last_4_blocks"] == {"blocks", "final_norm", "class_head"}
    for mode, length in (("last_block", 1), ("last_2_blocks", 2)):
        assert split(params(), mode)[0]["blocks_1"]["norm1"]["scale"].shape[0] == length
    lora = split(params(), "lora")[0]
    assert {path.rpartition("/")[2] for path in flat({"blocks": lora["blocks"]})} == {"lora_a", "lora_b"}
    assert set(lora) == {"blocks", "class_head"}  # without an adapter the head is trained whole
    assert count(lora["class_head"]) == 2 * CFG.emb_dim + 2
    trainable, frozen = split(params(), "lora everywhere")
    assert "class_head" not in trainable
    assert count(frozen["class_head"]) == 2 * CFG.emb_dim + 2


@pytest.mark.parametrize("mode", ["last_block", "lora everywhere"])
def test_a_tree_of_shapes_is_rebuilt_from_its_table(mode):
    trainable, _ = split(params(), mode)
    rebuilt = from_leaf_table(json.loads(json.dumps(leaf_table(trainable))))
    assert flat(rebuilt).keys() == flat(trainable).keys()
    for path, leaf in flat(trainable).items():
        assert (flat(rebuilt)[path].shape, flat(rebuilt)[path].dtype) == (leaf.shape, leaf.dtype)


def test_a_tied_head_alone_and_more_blocks_than_there_are_cannot_be_trained():
    with pytest.raises(InputError, match=r"trainable is head.*tie_weights.*expected last_block"):
        split(language_model(), "head")
    untied = jax.eval_shape(lambda: init_params(dataclasses.replace(CFG, tie_weights=False), jax.random.key(0)))
    assert set(split(untied, "head")[0]) == {"out_head"}
    assert set(split(language_model(), "last_block")[0]) == {"blocks_1", "final_norm"}  # the embeddings are frozen
    with pytest.raises(InputError, match=r"trainable_blocks is 5.*4 blocks"):
        split_params(params(), config("last_n_blocks", trainable_blocks=5), jax.random.key(0))
    with pytest.raises(InputError, match=r"trainable is last_block.*base is null"):
        RunConfig(trainable="last_block")


def step_flops(mode):
    """Floating-point operations of a training step, as XLA counts them before it optimises."""
    state, frozen = initial_state(mode)
    batch = {
        "inputs": jnp.zeros((8, 16), jnp.int32),
        "lengths": jnp.full(8, 16, jnp.int32),
        "labels": jnp.zeros(8, jnp.int32),
        "weights": jnp.ones(8),
    }
    loss_fn = make_loss_fn(GPTClassifier(UNROLLED))
    step = jax.jit(make_train_step(loss_fn, make_optimizer(OptimizerConfig()), lambda step: 1e-3))
    return step.lower(state, frozen, batch).cost_analysis()["flops"]


def initial_state(mode):
    trainable, frozen = jax.eval_shape(functools.partial(split, mode=mode), params())
    opt_state = jax.eval_shape(make_optimizer(OptimizerConfig()).init, trainable)
    return TrainState(jax.ShapeDtypeStruct((), "int32"), trainable, opt_state, jax.random.key(0)), frozen


def test_no_gradient_is_computed_through_what_is_frozen():
    """Backward is twice the work of forward: with one block of four it is (4 + 2) / (4 + 8) of the whole, and less."""
    flops = {mode: step_flops(mode) for mode in ("all", "last_2_blocks", "last_block", "head")}
    assert flops["head"] < 0.4 * flops["all"]
    assert flops["head"] < 0.85 * flops["last_block"]
    assert flops["last_block"] < 0.6 * flops["all"]
    assert flops["last_block"] < 0.85 * flops["last_2_blocks"] < flops["all"]


@pytest.mark.parametrize("mode", ["head", "last_block", "lora"])
def test_frozen_leaves_have_no_state(mode):
    """Two moments of what is trained, and a count; a checkpoint is no larger than that."""
    state, frozen = initial_state(mode)
    trained = count(state.trainable)
    assert trained < 0.5 * count(frozen)
    assert count(state.opt_state) == 2 * trained + 1
    nbytes = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    assert checkpoint_bytes(state) == nbytes

"""What must hold of low-rank adapters: the base at the start, q, k and v apart, merged = beside, PEFT's numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_files import read_golden
from safetensors.numpy import load_file

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, GPTModel, init_cache, init_params
from slm_jax.nn.blocks import merge_params, unstack_blocks
from slm_jax.nn.lora import TARGETS, Adapter, add_adapters, find_targets, init_adapters, merge_adapters, split_adapters
from slm_jax.runs import load_gpt2
from slm_jax.tasks.config import RunConfig
from slm_jax.tasks.pretraining import make_loss_fn
from slm_jax.training.config import LoRAConfig
from slm_jax.training.trainable import split_params, whole_params
from slm_jax.weights.adapters import load_adapters, save_adapters
from slm_jax.weights.trees import write_tree
from slm_jax.weights.writer import save_gpt2

CFG = GPTConfig(vocab_size=29, context_length=16, emb_dim=12, n_heads=3, n_layers=2, tie_weights=False)
RANK, ALPHA = 3, 7.0
ALL = tuple(target for target in TARGETS if target not in ("class_head", "ff/gate"))
TOKENS = jnp.int32(np.random.default_rng(1).integers(CFG.vocab_size, size=(2, CFG.context_length)))


def flat(tree):
    return flatten_dict(tree, sep="/")


def same_bits(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return all(np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes() for path in a)


@functools.cache
def apply(cfg=CFG):
    return jax.jit(lambda params, tokens: GPTModel(cfg).apply({"params": params}, tokens))


@functools.cache
def base():
    """Random parameters in which every one matters: no zero bias, no norm of scale 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.float32(rng.normal(0.1, 0.3, leaf.shape)), shapes)


def adapted(targets=ALL, drop_rate=0.0):
    """The parts that are trained and that are frozen of the base with new adapters."""
    lora = LoRAConfig(rank=RANK, alpha=ALPHA, targets=targets, drop_rate=drop_rate)
    return split_params(base(), RunConfig(base="x", trainable="lora", lora=lora), jax.random.key(2))


def trained(targets=ALL, drop_rate=0.0):
    """The whole tree with adapters as training would have left them: all of B changed, too."""
    rng = np.random.default_rng(3)
    trainable, frozen = adapted(targets, drop_rate)
    return merge_params(
        frozen, jax.tree.map(lambda leaf: leaf + jnp.float32(rng.normal(0, 0.3, leaf.shape)), trainable)
    )


def assert_close(actual, expected, limit):
    assert np.abs(np.asarray(actual) - np.asarray(expected)).max() <= limit * np.abs(np.asarray(expected)).max()


# The start


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unrolled"])
def test_the_first_step_begins_with_the_base_bitwise(unroll):
    cfg = dataclasses.replace(CFG, unroll=unroll)
    params = merge_params(*adapted())
    assert sum("lora_a" in path for path in flat(params)) == len(ALL)
    assert same_bits({"logits": apply(cfg)(params, TOKENS)}, {"logits": apply(cfg)(base(), TOKENS)})


@pytest.mark.parametrize("form", [lambda params: params, unstack_blocks], ids=["stacked", "unstacked"])
def test_with_a_cache_too(form):
    @jax.jit
    def generate(params):
        cache = init_cache(CFG, params, len(TOKENS), CFG.context_length)
        first, cache = GPTModel(CFG).apply({"params": params}, TOKENS[:, :9], cache=cache)
        rest, _ = GPTModel(CFG).apply({"params": params}, TOKENS[:, 9:10], cache=cache)
        return jnp.concatenate([first, rest], 1)

    with_new, with_trained = form(merge_params(*adapted())), form(trained())
    assert same_bits({"logits": generate(with_new)}, {"logits": generate(form(base()))})
    assert_close(generate(with_trained), apply()(trained(), TOKENS)[:, :10], 1e-5)


def test_new_adapters_are_a_random_a_and_a_zero_b():
    made, again, other = (
        init_adapters(jax.random.key(seed), base(), ALL, rank=RANK, alpha=ALPHA) for seed in (0, 0, 1)
    )
    assert same_bits(made, again)
    other = flat(other)
    matrices = []
    for path, leaf in flat(made).items():
        if path.endswith("lora_scale"):
            np.testing.assert_allclose(leaf, ALPHA / RANK, rtol=1e-6)
            continue
        if path.endswith("lora_b"):
            assert not leaf.any()
            continue
        bound = leaf.shape[-2] ** -0.5
        assert 0.8 * bound < np.abs(leaf).max() <= bound
        assert not np.array_equal(leaf, other[path])
        matrices.append(np.asarray(leaf).tobytes())
    assert len(set(matrices)) == len(matrices) == len(ALL)


# What is changed


@pytest.mark.parametrize("target", ALL)
def test_each_target_changes_its_matrix_and_the_logits(target):
    merged, before = flat(merge_adapters(trained((target,)))), flat(base())
    changed = [path for path in before if not np.array_equal(before[path], merged[path])]
    assert changed == [f"{TARGETS[target]}/kernel"]
    assert not np.allclose(apply()(trained((target,)), TOKENS), apply()(base(), TOKENS), atol=1e-3)


def test_merged_adapters_give_the_logits_of_those_beside_and_are_exported(tmp_path):
    params = trained()
    tied = dataclasses.replace(CFG, tie_weights=True)
    lora = {path: leaf for path, leaf in flat(params).items() if not path.startswith("out_head")}
    for cfg, tree in ((CFG, params), (tied, unflatten_dict(lora, sep="/"))):
        merged = merge_adapters(tree)
        assert_close(apply(cfg)(merged, TOKENS), apply(cfg)(tree, TOKENS), 1e-5)
        for name, given in (("merged", merged), ("beside", tree)):
            loaded_cfg, loaded = load_gpt2(save_gpt2(cfg, given, tmp_path / f"{name}-{cfg.tie_weights}"))
            assert_close(apply(loaded_cfg)(loaded, TOKENS), apply(cfg)(tree, TOKENS), 1e-5)
            assert same_bits(loaded, merged)
    assert same_bits(merge_adapters(base()), base())


# Gradients


def batch_of(tokens):
    tokens = jnp.asarray(tokens)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones(tokens[:, 1:].shape)}


def test_the_first_gradient_of_b_is_that_of_the_dense_matrix_seen_through_a():
    """dL/dB = alpha / rank · Aᵀ dL/dW while B is 0; that of A is 0."""
    batch, loss_fn = batch_of(TOKENS), make_loss_fn(GPTModel(CFG))

    @jax.jit
    def gradient(trainable, frozen):
        return jax.grad(lambda trainable: loss_fn(trainable, frozen, batch, None)[0])(trainable)

    trainable, frozen = adapted()
    found, dense, parts = flat(gradient(trainable, frozen)), flat(gradient(base(), {})), flat(trainable)
    for target in ALL:
        place = f"{TARGETS[target]}_adapter"
        a, b = parts[f"{place}/lora_a"], parts[f"{place}/lora_b"]
        wanted = np.asarray(dense[f"{TARGETS[target]}/kernel"]).reshape(*a.shape[:-1], b.shape[-1])
        expected = ALPHA / RANK * np.swapaxes(a, -1, -2) @ wanted
        assert np.abs(expected).max() > 1e-3
        assert_close(found[f"{place}/lora_b"], expected, 1e-5)
        assert not found[f"{place}/lora_a"].any()


# Dropout


def test_dropout_applies_in_training_only():
    params, without = trained(drop_rate=0.5), trained()
    assert same_bits({"logits": apply()(params, TOKENS)}, {"logits": apply()(without, TOKENS)})

    @jax.jit
    def drop(params, key):
        return GPTModel(CFG).apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": key})

    one, two = jax.random.key(1), jax.random.key(2)
    assert np.array_equal(drop(params, one), drop(params, one))
    assert not np.allclose(drop(params, one), drop(params, two), atol=1e-3)
    assert np.array_equal(drop(without, one), drop(without, two))


def test_dropout_keeps_the_mean():
    """The sum of 100,000 inputs, a quarter of which is dropped."""
    n = 100_000
    params = {"lora_a": jnp.ones((n, 1)), "lora_b": jnp.ones((1, 1)), "lora_scale": 2.0, "lora_drop_rate": 0.25}
    x, y = jnp.ones((1, n)), jnp.full((1, 1), 5.0)
    dropped = Adapter().apply({"params": params}, y, x, False, rngs={"dropout": jax.random.key(0)})
    assert float(Adapter().apply({"params": params}, y, x)[0, 0]) == 5 + 2 * n
    assert float(dropped[0, 0]) != 5 + 2 * n
    assert float(dropped[0, 0]) == pytest.approx(2 * n, rel=0.01)


# Files


def test_adapters_are_saved_and_loaded_apart_bitwise(tmp_path):
    params = trained(drop_rate=0.1)
    file = save_adapters(tmp_path / "adapters.safetensors", params)
    loaded = load_adapters(file)
    assert same_bits(loaded, split_adapters(params)[1])
    assert same_bits(add_adapters(base(), loaded), params)
    assert file.stat().st_size < sum(leaf.nbytes for leaf in jax.tree.leaves(base()))


def test_what_has_no_adapters_or_is_damaged_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no adapters.*trainable: lora"):
        save_adapters(tmp_path / "adapters.safetensors", base())
    assert not list(tmp_path.iterdir())
    for name, tree in (("model", base()), ("part", {"blocks": {"ff": {"fc_adapter": {"lora_a": np.ones(3)}}}})):
        file = write_tree(tmp_path / f"{name}.safetensors", jax.tree.map(np.asarray, tree))
        with pytest.raises(InputError, match=r"holds no adapters"):
            load_adapters(file)
    file = save_adapters(tmp_path / "adapters.safetensors", trained())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{file}.*restore"):
        load_adapters(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"emb_dim": 24}, r"attn/q is for a matrix \(2, 12, 12\), and the model's is \(2, 24, 24\)"),
        ({"n_layers": 1}, r"attn/q is for a matrix \(2, 12, 12\), and the model's is \(1, 12, 12\)"),
        ({"vocab_size": 31}, r"out_head is for a matrix \(12, 29\), and the model's is \(12, 31\)"),
        ({"tie_weights": True}, r"the adapter of out_head has no matrix out_head/kernel"),
    ],
    ids=str,
)
def test_adapters_of_another_model_are_refused(changes, said):
    adapters = split_adapters(trained())[1]
    cfg = dataclasses.replace(CFG, **changes)
    other = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    with pytest.raises(InputError, match=said):
        add_adapters(other, adapters)


# Patterns


def test_patterns_name_targets():
    assert find_targets(base(), ("attn/*",)) == ["attn/q", "attn/k", "attn/v", "attn/out_proj"]
    assert find_targets(base(), ("*proj", "out_head")) == ["attn/out_proj", "ff/proj", "out_head"]
    assert find_targets(base(), ("*",)) == list(ALL)


@pytest.mark.parametrize("pattern", ["attention/*", "class_head", "", "ATTN/q"])
def test_a_pattern_that_matches_nothing_is_told_the_names(pattern):
    with pytest.raises(InputError, match=r"lora\.targets: .* matches nothing") as caught:
        find_targets(base(), ("attn/q", pattern))
    assert repr(pattern) in str(caught.value)
    assert ", ".join(ALL) in str(caught.value)


# PEFT


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """The golden's model, its adapters in our tree, and its numbers; see goldens/make_lora.py."""
    cfg, params, trees, figures = read_golden("lora", tmp_path_factory.mktemp("peft"))
    lora = LoRAConfig(rank=figures["rank"], alpha=figures["alpha"], targets=("attn/*", "ff/*"))
    trainable, frozen = split_params(params, RunConfig(base="x", trainable="lora", lora=lora), jax.random.key(0))
    ours = in_our_tree(trees["lora"], cfg, figures["rank"])
    assert {path: leaf.shape for path, leaf in flat(trainable).items()} == {p: a.shape for p, a in flat(ours).items()}
    return cfg, ours, frozen, trees, figures


def in_our_tree(theirs, cfg, rank):
    """Stack the layers, transpose, and cut q, k and v out of PEFT's one adapter of three times the rank."""

    def stacked(name, part):
        return np.stack([theirs[f"h.{i}.{name}.lora_{part}.weight"].T for i in range(cfg.n_layers)])

    found = {}
    for place, name in (("attn/out_proj", "attn.c_proj"), ("ff/fc", "mlp.c_fc"), ("ff/proj", "mlp.c_proj")):
        for part in "ab":
            found[f"blocks/{place}_adapter/lora_{part}"] = stacked(name, part.upper())
    a, b = stacked("attn.c_attn", "A"), stacked("attn.c_attn", "B")
    for i, letter in enumerate("qkv"):
        ranks, columns = slice(i * rank, (i + 1) * rank), slice(i * cfg.emb_dim, (i + 1) * cfg.emb_dim)
        found[f"blocks/attn/{letter}_adapter/lora_a"] = a[..., ranks]
        found[f"blocks/attn/{letter}_adapter/lora_b"] = b[..., ranks, columns]
    return unflatten_dict(found, sep="/")


def test_forward_equals_pefts(peft):
    cfg, trainable, frozen, trees, _ = peft
    tokens = trees["tokens"][""][:, :-1]
    params = merge_params(frozen, trainable)
    assert_close(apply(cfg)(params, tokens), trees["logits"][""], 1e-5)
    plain = np.asarray(apply(cfg)(split_adapters(params)[0], tokens))
    assert np.abs(plain - trees["logits"][""]).max() > 0.1 * np.abs(plain).max()  # the adapters matter


def test_gradients_equal_pefts(peft):
    cfg, trainable, frozen, trees, figures = peft
    batch, loss_fn = batch_of(trees["tokens"][""]), make_loss_fn(GPTModel(cfg))

    def mean_loss(trainable, frozen):
        loss, weight, _ = loss_fn(trainable, frozen, batch, None)
        return loss / weight

    # As users' programs are compiled: with fewer optimisations (tests/conftest.py) sums round more often.
    optimised = {"xla_backend_optimization_level": 3}
    found = flat(jax.jit(jax.grad(mean_loss), compiler_options=optimised)(trainable, frozen))
    expected = flat(in_our_tree(trees["gradients"], cfg, figures["rank"]))
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in expected.values()))
    error = np.sqrt(sum(((np.float64(found[path]) - leaf) ** 2).sum() for path, leaf in expected.items()))
    assert found.keys() == expected.keys()
    assert error <= 1e-5 * norm


def test_merged_weights_equal_pefts(peft, tmp_path):
    cfg, trainable, frozen, trees, _ = peft
    found = load_file(save_gpt2(cfg, whole_params(trainable, frozen), tmp_path / "merged") / "model.safetensors")
    for name, expected in trees["merged"].items():
        assert_close(found[f"transformer.{name}"], expected, 1e-6)

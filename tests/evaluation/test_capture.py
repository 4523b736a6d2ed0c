"""What must hold of capture and ablate: what is seen adds up to the logits, and taking a part out equals surgery."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_files import read_golden

import slm_jax
from slm_jax import lora
from slm_jax.errors import InputError
from slm_jax.evaluation.capture import _run
from slm_jax.model import GPTClassifier, GPTConfig, GPTModel, param_shapes
from slm_jax.nn.blocks import split_blocks, unstack_blocks

CFG = GPTConfig(vocab_size=19, context_length=8, emb_dim=12, n_heads=3, n_layers=3)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 19, (2, 7)), jnp.int32)


def random_params(cfg):
    """Parameters in which every one matters: no zero bias, no norm of scale 1."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), param_shapes(cfg))


PARAMS = random_params(CFG)
MODEL = GPTModel(CFG)


@functools.partial(jax.jit, static_argnames="cfg")
def apply(cfg, params, **options):
    return GPTModel(cfg).apply({"params": params}, TOKENS, **options)


def close(actual, expected, limit=1e-6):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


@pytest.fixture(scope="module")
def everything():
    names = ("embeddings", "blocks/*", "blocks/*/*", "blocks/*/*/*", "final_norm")
    return slm_jax.capture(MODEL, PARAMS, TOKENS, names)


def test_names_come_in_the_order_of_the_model_with_their_shapes(everything):
    _, seen = everything
    stream, heads = (2, 7, 12), (2, 7, 3, 4)
    block = {"norm1": stream, "attn/q": heads, "attn/k": heads, "attn/v": heads, "attn/weights": (2, 3, 7, 7)}
    block |= {"attn/heads": heads, "attn": stream, "norm2": stream, "ff/hidden": (2, 7, 48), "ff": stream}
    expected = {"embeddings": stream}
    for i in range(3):
        expected |= {f"blocks/{i}/{name}": shape for name, shape in block.items()} | {f"blocks/{i}": stream}
    assert [(name, array.shape) for name, array in seen.items()] == [*expected.items(), ("final_norm", stream)]
    _, seen = slm_jax.capture(MODEL, PARAMS, TOKENS, ["logits", "blocks/*"])  # `*` stands for one part of a name
    assert list(seen) == ["blocks/0", "blocks/1", "blocks/2", "logits"]
    assert slm_jax.capture(MODEL, PARAMS, TOKENS, "*")[1].keys() == {"embeddings", "final_norm", "logits"}
    assert slm_jax.capture(MODEL, PARAMS, TOKENS, ())[1] == {}


def test_the_branches_sum_to_the_residual_stream_which_gives_the_logits(everything):
    logits, seen = everything
    normed = MODEL.apply({"params": PARAMS}, seen["blocks/2"], method=lambda model, x: model.final_norm(x))
    close(normed, seen["final_norm"])
    close(MODEL.apply({"params": PARAMS}, seen["final_norm"], method="logits"), logits)
    stream = seen["embeddings"]
    embedded = [PARAMS[name]["embedding"] for name in ("tok_emb", "pos_emb")]
    close(stream, embedded[0][TOKENS] + embedded[1][:7])
    for i in range(3):
        stream = stream + seen[f"blocks/{i}/attn"] + seen[f"blocks/{i}/ff"]
        close(seen[f"blocks/{i}"], stream)


def test_weights_are_causal_distributions_that_mix_values_into_heads_which_project_to_what_is_added(everything):
    _, seen = everything
    for i in range(3):
        q, k, v, weights, heads = (seen[f"blocks/{i}/attn/{name}"] for name in ("q", "k", "v", "weights", "heads"))
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        assert (np.triu(weights, 1) == 0).all()
        scores = np.where(np.tri(7, dtype=bool), np.einsum("bqhd,bkhd->bhqk", q, k) / 2, -np.inf)
        close(weights, jax.nn.softmax(scores, axis=-1))
        close(np.einsum("bhqk,bkhd->bqhd", weights, v), heads)
        attn, ff = (jax.tree.map(lambda leaf, i=i: leaf[i], PARAMS["blocks"][name]) for name in ("attn", "ff"))
        mixed = np.einsum("bthd,hde->bte", heads, attn["out_proj"]["kernel"])
        close(mixed + attn["out_proj"]["bias"], seen[f"blocks/{i}/attn"])
        close(seen[f"blocks/{i}/ff/hidden"] @ ff["proj"]["kernel"] + ff["proj"]["bias"], seen[f"blocks/{i}/ff"])


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Transformers' GPT-2 and what it has inside (``goldens/make_captured.py``), and our model with its weights."""
    cfg, params, trees, _ = read_golden("captured", tmp_path_factory.mktemp("gpt2"))
    return trees, GPTModel(cfg), params


def test_what_is_seen_is_what_transformers_has_inside(golden):
    theirs, model, params = golden
    inside = {f"blocks/{name}": value for name, value in theirs["blocks"].items()}
    assert len(inside) == 3 * 5
    names = ["embeddings", "blocks/*", "final_norm", *inside]
    logits, seen = slm_jax.capture(model, params, jnp.asarray(theirs["tokens"][""]), names)
    close(logits, theirs["logits"][""], 1e-5)
    for i, name in enumerate(("embeddings", "blocks/0", "blocks/1", "final_norm")):
        close(seen[name], theirs["hidden"][f"{i}"], 1e-5)
    for name, value in inside.items():
        close(seen[name].reshape(value.shape), value, 1e-5)


@pytest.mark.parametrize("name", ["blocks/1/attn/heads/1", "blocks/0/attn", "blocks/2/ff"])
def test_what_is_taken_out_has_the_effect_that_it_has_in_transformers(golden, name):
    theirs, model, params = golden
    close(slm_jax.ablate(model, params, jnp.asarray(theirs["tokens"][""]), name), theirs["without"][name], 1e-5)


VARIANTS = {
    "loop": {"remat": "dots", "unroll": False},
    "no bias": {"bias": False, "tie_weights": False},
    "xla": {"attention": "xla"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_it_holds_however_the_model_is_executed(fields):
    cfg = dataclasses.replace(CFG, **fields)
    params = random_params(cfg)
    names = ("embeddings", "blocks/*", "blocks/*/attn", "blocks/*/ff", "blocks/0/attn/weights", "blocks/0/attn/heads")
    logits, seen = slm_jax.capture(GPTModel(cfg), params, TOKENS, names)
    close(logits, apply(cfg, params))
    branches = (value for key, value in seen.items() if key.endswith(("/attn", "/ff")))
    close(sum(branches, seen["embeddings"]), seen["blocks/2"])
    np.testing.assert_allclose(seen["blocks/0/attn/weights"].sum(-1), 1, rtol=1e-6)


def test_params_may_be_stacked_cut_or_unstacked():
    _, expected = slm_jax.capture(MODEL, PARAMS, TOKENS, "blocks/*/*")
    for params in (split_blocks(PARAMS, 1), unstack_blocks(PARAMS), jax.tree.map(np.asarray, PARAMS)):
        _, seen = slm_jax.capture(MODEL, params, TOKENS, "blocks/*/*")
        assert list(seen) == list(expected)
        assert all((seen[name] == expected[name]).all() for name in seen)


def test_bfloat16_is_seen_as_it_is_computed():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    logits, seen = slm_jax.capture(GPTModel(cfg), PARAMS, TOKENS, ("embeddings", "blocks/*", "blocks/*/attn/weights"))
    assert {array.dtype for array in seen.values()} == {jnp.bfloat16.dtype}
    close(logits, apply(cfg, PARAMS), 0.03)  # what is seen is rounded, what stays inside one kernel is not


def test_adapters_take_part_and_go_with_what_is_in_front_of_them():
    adapters = lora.init_adapters(jax.random.key(2), PARAMS, ("attn/*", "ff/*"), rank=2, alpha=4.0)
    adapters = jax.tree.map(lambda leaf: leaf + 0.3 if leaf.ndim == 3 else leaf, adapters)  # B is 0 at the start
    adapted = lora.add_adapters(PARAMS, adapters)
    names = ("blocks/*/attn/*", "blocks/*/ff", "blocks/*")
    removed = ("blocks/1/attn/heads/2", "blocks/0/ff/hidden/5", "blocks/2/attn")
    logits, seen = slm_jax.capture(MODEL, adapted, TOKENS, names, ablate=removed)
    expected_logits, expected = slm_jax.capture(MODEL, lora.merge_adapters(adapted), TOKENS, names, ablate=removed)
    close(logits, expected_logits, 1e-5)
    for name in seen:
        close(seen[name], expected[name], 1e-5)


def test_packed_documents_do_not_look_at_each_other():
    segment_ids = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]] * 2)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3]] * 2)
    options = {"segment_ids": segment_ids, "positions": positions}
    logits, seen = slm_jax.capture(MODEL, PARAMS, TOKENS, ("blocks/1", "blocks/*/attn/weights"), **options)
    close(logits, apply(CFG, PARAMS, **options))
    assert all((seen[f"blocks/{i}/attn/weights"][:, :, 3:, :3] == 0).all() for i in range(3))
    _, alone = slm_jax.capture(MODEL, PARAMS, TOKENS[:, 3:], "blocks/1")
    close(seen["blocks/1"][:, 3:], alone["blocks/1"])


def changed(path, change):
    """The parameters with one leaf changed."""
    flat = flatten_dict(PARAMS, sep="/")
    return unflatten_dict(flat | {path: change(flat[path])}, sep="/")


SURGERY = {
    "blocks/0/ff/hidden/17": lambda: changed("blocks/ff/proj/kernel", lambda w: w.at[0, 17].set(0)),
    "blocks/*/attn/heads/1": lambda: changed("blocks/attn/out_proj/kernel", lambda w: w.at[:, 1].set(0)),
}


@pytest.mark.parametrize("name", SURGERY)
def test_taking_a_part_out_equals_zeroing_its_parameters(name):
    logits = slm_jax.ablate(MODEL, PARAMS, TOKENS, name)
    close(logits, apply(CFG, SURGERY[name]()))
    assert np.abs(logits - apply(CFG, PARAMS)).max() > 1e-3


def test_skipping_blocks_equals_a_model_without_them_and_what_is_seen_is_seen_without_the_part():
    shorter = PARAMS | {"blocks": jax.tree.map(lambda leaf: leaf[1:2], PARAMS["blocks"])}
    expected = apply(dataclasses.replace(CFG, n_layers=1), shorter)
    close(slm_jax.ablate(MODEL, PARAMS, TOKENS, ["blocks/0", "blocks/2"]), expected)
    removed = ("blocks/0/attn/heads/1", "blocks/1/ff", "blocks/2")
    names = ("blocks/*", "blocks/0/attn/heads", "blocks/1/ff")
    logits, seen = slm_jax.capture(MODEL, PARAMS, TOKENS, names, ablate=removed)
    assert np.abs(logits - apply(CFG, PARAMS)).max() > 1e-3
    heads = np.abs(seen["blocks/0/attn/heads"]).max((0, 1, 3))
    assert heads[1] == 0
    assert heads[[0, 2]].min() > 0
    assert (seen["blocks/1/ff"] == 0).all()
    assert (seen["blocks/2"] == seen["blocks/1"]).all()
    assert (seen["blocks/1"] != seen["blocks/0"]).any()


def test_another_head_needs_no_other_program():
    slm_jax.ablate(MODEL, PARAMS, TOKENS, "blocks/0/attn/heads/0")
    compiled = _run._cache_size()
    for names in ("blocks/2/attn/heads/1", "blocks/1", ("blocks/*/ff", "blocks/0/ff/hidden/3")):
        slm_jax.ablate(MODEL, PARAMS, TOKENS, names)
    assert _run._cache_size() == compiled


def test_gradients_go_through_what_is_captured():
    """The gradient of a sum over one residual stream is that of the model cut after it."""

    def captured(params):
        return jnp.square(slm_jax.capture(MODEL, params, TOKENS, "blocks/1")[1]["blocks/1"]).sum()

    def cut(params):
        shorter = params | {"blocks": jax.tree.map(lambda leaf: leaf[:2], params["blocks"])}
        model = GPTModel(dataclasses.replace(CFG, n_layers=2))
        _, seen = slm_jax.capture(model, shorter, TOKENS, "blocks/1")
        return jnp.square(seen["blocks/1"]).sum()

    gradient, expected = (jax.jit(jax.grad(function))(PARAMS) for function in (captured, cut))
    assert (gradient["blocks"]["attn"]["q"]["kernel"][2] == 0).all()
    assert (gradient["final_norm"]["scale"] == 0).all()
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-4)


def test_it_runs_inside_jit_and_vmap():
    names = ("blocks/*", "blocks/0/attn/weights")

    def seen(tokens):
        return slm_jax.capture(MODEL, PARAMS, tokens, names, ablate="blocks/1/attn/heads/0")

    logits, expected = seen(TOKENS)
    jitted_logits, jitted = jax.jit(seen)(TOKENS)
    mapped_logits, mapped = jax.vmap(lambda row: seen(row[None]))(TOKENS)
    close(jitted_logits, logits)
    close(mapped_logits[:, 0], logits)
    for name in names[1:]:
        close(jitted[name], expected[name])
        close(mapped[name][:, 0], expected[name])


def test_a_classifier_is_seen_and_cut_too():
    model = GPTClassifier(CFG, n_classes=4)
    lengths = jnp.array([7, 4])
    params = jax.jit(model.init)(jax.random.key(0), TOKENS, lengths)["params"]
    logits, seen = slm_jax.capture(model, params, TOKENS, ("blocks/2", "final_norm", "logits"), lengths=lengths)
    close(logits, jax.jit(model.apply)({"params": params}, TOKENS, lengths))
    head = params["class_head"]
    pooled = seen["final_norm"][jnp.arange(2), lengths - 1]
    close(pooled @ head["kernel"] + head["bias"], seen["logits"])
    without = slm_jax.ablate(model, params, TOKENS, "blocks/0", lengths=lengths)
    assert without.shape == (2, 4)
    assert (without != logits).any()


@pytest.mark.parametrize(
    ("names", "removed", "options", "said"),
    [
        ("blocks/3", (), {}, "'blocks/3'.*3 layers"),
        ("blocks/0/atn", (), {}, "blocks/0/attn"),
        (["blocks/0", "block/*"], (), {}, r"'block/\*'"),
        ((), "blocks/0/attn/heads/3", {}, "3 heads each; expected a name such as .*blocks/0/attn/heads/"),
        ((), "blocks/0/attn/weights", {}, "'blocks/0/attn/weights'"),
        ((), (), {"cache": None}, "no cache; expected positions, segment_ids, lengths"),
    ],
)
def test_unknown_names_and_options_are_refused(names, removed, options, said):
    with pytest.raises(InputError, match=said):
        slm_jax.capture(MODEL, PARAMS, TOKENS, names, ablate=removed, **options)


def test_a_kernel_that_this_machine_lacks_is_refused_unless_weights_are_wanted():
    model = GPTModel(dataclasses.replace(CFG, attention="cudnn"))
    with pytest.raises(InputError, match="'cudnn' cannot be used"):
        slm_jax.capture(model, PARAMS, TOKENS, "blocks/0")
    logits, _ = slm_jax.capture(model, PARAMS, TOKENS, "blocks/0/attn/weights")
    close(logits, apply(CFG, PARAMS))

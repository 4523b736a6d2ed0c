"""What must hold of reading: every tensor in its place whatever the format, and what the files say believed."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign_files import CONFIG, CONTEXT, HEADS, LAYERS, VOCAB, WIDTH, book, huggingface, nanogpt, write, write_shards

from slm_jax.errors import InputError
from slm_jax.model import param_shapes
from slm_jax.runs import load_gpt2
from slm_jax.weights.reader import _heads


def assert_same(actual, expected):
    actual, expected = (flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path, strict=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The configuration and params of the Hugging Face file that every other file says again."""
    return load_gpt2(write(tmp_path_factory.mktemp("hf"), huggingface(), CONFIG))


def test_every_leaf_holds_its_tensor(reference):
    cfg, params = reference
    tensors = huggingface()
    assert (cfg.vocab_size, cfg.context_length, cfg.emb_dim) == (VOCAB, CONTEXT, WIDTH)
    assert (cfg.n_heads, cfg.n_layers, cfg.bias, cfg.qkv_bias, cfg.tie_weights) == (HEADS, LAYERS, True, True, True)
    assert cfg.unpadded_vocab_size is None
    expected = {
        "tok_emb/embedding": tensors["wte.weight"],
        "pos_emb/embedding": tensors["wpe.weight"],
        "final_norm/scale": tensors["ln_f.weight"],
        "final_norm/bias": tensors["ln_f.bias"],
    }
    blocks = {
        "norm1/scale": "ln_1.weight", "norm1/bias": "ln_1.bias",
        "norm2/scale": "ln_2.weight", "norm2/bias": "ln_2.bias",
        "attn/out_proj/kernel": "attn.c_proj.weight", "attn/out_proj/bias": "attn.c_proj.bias",
        "ff/fc/kernel": "mlp.c_fc.weight", "ff/fc/bias": "mlp.c_fc.bias",
        "ff/proj/kernel": "mlp.c_proj.weight", "ff/proj/bias": "mlp.c_proj.bias",
    }  # fmt: skip
    for path, name in blocks.items():
        expected[f"blocks/{path}"] = np.stack([tensors[f"h.{i}.{name}"] for i in range(LAYERS)])
    for leaf, name in (("kernel", "attn.c_attn.weight"), ("bias", "attn.c_attn.bias")):
        fused = np.stack([tensors[f"h.{i}.{name}"] for i in range(LAYERS)])
        for letter, part in zip("qkv", np.split(fused, 3, axis=-1), strict=True):
            expected[f"blocks/attn/{letter}/{leaf}"] = part
    shapes = flatten_dict(param_shapes(cfg), sep="/")
    assert_same(params, {path: leaf.reshape(shapes[path].shape) for path, leaf in expected.items()})


def spelled_as_tensorflow(tensors):
    return {
        name.replace("weight", "gamma").replace("bias", "beta") if ".ln_" in name or name.startswith("ln_") else name: t
        for name, t in tensors.items()
    }


def with_buffers(tensors):
    mask = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.float32))
    more = {f"h.{i}.attn.bias": mask for i in range(LAYERS)}
    more |= {f"h.{i}.attn.masked_bias": np.float32(-1e4).reshape(()) for i in range(LAYERS)}
    return tensors | more


@pytest.mark.real_world
@pytest.mark.parametrize(
    "tensors",
    [
        huggingface(prefix="transformer."),
        spelled_as_tensorflow(huggingface()),
        with_buffers(huggingface()),
        huggingface() | {"lm_head.weight": huggingface()["wte.weight"]},
        {f"_orig_mod.{name}": tensor for name, tensor in huggingface().items()},
    ],
    ids=["prefix", "gamma-beta", "buffers", "tied-head", "compiled"],
)
def test_other_spellings_are_the_same_model(tensors, tmp_path, reference):
    cfg, params = load_gpt2(write(tmp_path, tensors, CONFIG), n_heads=HEADS)
    assert cfg == reference[0]
    assert_same(params, reference[1])


def test_shards_are_the_same_model(tmp_path, reference):
    folder = write_shards(tmp_path, huggingface())
    for source in (folder, folder / "model.safetensors.index.json"):
        cfg, params = load_gpt2(source)
        assert cfg == reference[0]
        assert_same(params, reference[1])


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_book_is_the_same_model_with_a_head_of_its_own(qkv_bias, tmp_path, reference):
    tensors = book(qkv_bias)
    mask = {f"trf_blocks.{i}.att.mask": np.triu(np.ones((CONTEXT, CONTEXT), np.float32), 1) for i in range(LAYERS)}
    cfg, params = load_gpt2(write(tmp_path, tensors | mask) / "model.safetensors", n_heads=HEADS)
    assert cfg == dataclasses.replace(reference[0], tie_weights=False, qkv_bias=qkv_bias)
    expected = flatten_dict(reference[1], sep="/") | {"out_head/kernel": reference[1]["tok_emb"]["embedding"].T}
    if not qkv_bias:
        expected = {path: leaf for path, leaf in expected.items() if not re.fullmatch("blocks/attn/[qkv]/bias", path)}
    assert_same(flatten_dict(params, sep="/"), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_is_the_same_model_with_the_exact_gelu(bias, tmp_path, reference):
    tensors = {f"module._orig_mod.{name}": tensor for name, tensor in nanogpt(bias).items()}
    cfg, params = load_gpt2(write(tmp_path, tensors), n_heads=HEADS)
    assert cfg == dataclasses.replace(reference[0], bias=bias, exact_gelu=True)
    expected = {path: leaf for path, leaf in flatten_dict(reference[1]).items() if bias or path[-1] != "bias"}
    assert_same(params, unflatten_dict(expected))
    blocks = {re.sub(r"(h\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in nanogpt(bias).items()}
    assert load_gpt2(write(tmp_path / "each block compiled", blocks), n_heads=HEADS)[0] == cfg
    mingpt = nanogpt(bias) | {"lm_head.weight": np.ones((VOCAB, WIDTH), np.float32)}
    assert not load_gpt2(write(tmp_path / "minGPT", mingpt), n_heads=HEADS)[0].exact_gelu
    build = write(tmp_path / "build-nanogpt", nanogpt(bias), {"activation_function": "gelu_new"})
    assert not load_gpt2(build, n_heads=HEADS)[0].exact_gelu
    for activation, exact in (("gelu", True), ("gelu_pytorch_tanh", False)):
        config = CONFIG | {"activation_function": activation}
        assert load_gpt2(write(tmp_path, huggingface(), config))[0].exact_gelu is exact


def test_a_head_that_differs_or_that_config_json_calls_untied_is_the_models_own(tmp_path):
    head = np.random.default_rng(5).standard_normal((VOCAB, WIDTH), dtype=np.float32)
    cfg, params = load_gpt2(write(tmp_path, huggingface() | {"lm_head.weight": head}, CONFIG))
    assert not cfg.tie_weights
    np.testing.assert_array_equal(params["out_head"]["kernel"], head.T)
    config = CONFIG | {"tie_word_embeddings": False}
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        load_gpt2(write(tmp_path / "without", huggingface(), config))
    tensors = huggingface() | {"lm_head.weight": huggingface()["wte.weight"]}
    cfg, params = load_gpt2(write(tmp_path / "with", tensors, config))
    assert not cfg.tie_weights
    assert "out_head" in params


def test_heads_are_stated_or_of_openais_shapes_or_given(tmp_path):
    folder = write(tmp_path / "plain", huggingface())
    with pytest.raises(InputError, match=r"plain.model\.safetensors: .*n_heads"):
        load_gpt2(folder)
    assert load_gpt2(folder, n_heads=4)[0].n_heads == 4
    assert load_gpt2(write(tmp_path / "aliased", huggingface(), {"num_attention_heads": 6}))[0].n_heads == 6
    with pytest.raises(InputError, match=r"given as 4.*states 3"):
        load_gpt2(write(tmp_path / "stated", huggingface(), CONFIG), n_heads=4)
    with pytest.raises(InputError, match="n_heads 5"):
        load_gpt2(folder, n_heads=5)
    for width, layers, heads in ((768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)):
        assert _heads({"emb_dim": width, "n_layers": layers}, None) == heads
        assert _heads({"emb_dim": width, "n_layers": layers}, 8) == 8


def test_a_vocabulary_of_50304_is_gpt2s_rounded_up(tmp_path):
    cfg, params = load_gpt2(write(tmp_path, nanogpt(vocab=50_304)), n_heads=HEADS)
    assert (cfg.vocab_size, cfg.unpadded_vocab_size) == (50_304, 50_257)
    assert params["tok_emb"]["embedding"].shape == (50_304, WIDTH)


@pytest.mark.parametrize(("stored", "held"), [("float16", "float32"), ("bfloat16", "float32"), ("float64", "bfloat16")])
def test_numbers_are_converted_from_any_float_to_any(stored, held, tmp_path):
    tensors = {name: tensor.astype(stored) for name, tensor in huggingface().items()}
    cfg, params = load_gpt2(write(tmp_path, tensors, CONFIG), param_dtype=held, dtype="bfloat16")
    assert (cfg.param_dtype, cfg.dtype) == (held, "bfloat16")
    for path, name in (("tok_emb/embedding", "wte.weight"), ("pos_emb/embedding", "wpe.weight")):
        leaf = np.asarray(flatten_dict(params, sep="/")[path])
        np.testing.assert_array_equal(leaf, tensors[name].astype(held), strict=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(getattr(ml_dtypes, held, held))}


def test_leaves_go_where_the_sharding_says_and_survive_being_donated(tmp_path, reference):
    folder = write(tmp_path, huggingface(), CONFIG)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = jax.tree.map(lambda _: sharding, reference[1])
    for given in (sharding, tree, mesh):
        _, params = load_gpt2(folder, sharding=given)
        assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}
        assert_same(params, reference[1])
    # On a CPU a leaf is the memory that the file was read into; a training step that reuses it must not break.
    added = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(load_gpt2(folder)[1])
    assert_same(added, jax.tree.map(lambda x: np.asarray(x) + 1, reference[1]))
    del tree["pos_emb"]
    with pytest.raises(InputError, match="no pos_emb/embedding"):
        load_gpt2(folder, sharding=tree)


PEAK = """
import resource, sys
from pathlib import Path
import jax
from slm_jax.runs import load_gpt2
jax.numpy.zeros(1).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, params = load_gpt2(Path(sys.argv[1]), n_heads=1, param_dtype=sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is counted in other units")
@pytest.mark.parametrize("held", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_peak_of_memory_is_at_most_1_3_times_the_weights(held, tmp_path):
    file = write(tmp_path, huggingface(vocab=30_000, width=1000)) / "model.safetensors"
    command, place = [sys.executable, "-c", PEAK, str(file), held], os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=place)
    assert float(done.stdout) <= 1.3

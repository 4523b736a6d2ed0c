"""What must hold of llama2.c's format: the story that llama2.c tells, and one line for a file of another length."""

import os
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from slm_jax.errors import InputError
from slm_jax.generation.decode import generate
from slm_jax.model import GPTModel
from slm_jax.runs import load_gpt2, load_model

HEADER = (16, 12, 2, 4, 2, 11, 16)  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len


def weights(dim, hidden, layers, heads, kv_heads, vocab, context):
    """Arrays in the order of the file, by their names in llama2.c."""
    kv_dim = dim // heads * kv_heads
    shapes = {
        "token_embedding_table": (abs(vocab), dim), "rms_att_weight": (layers, dim), "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim), "wv": (layers, kv_dim, dim), "wo": (layers, dim, dim),
        "rms_ffn_weight": (layers, dim), "w1": (layers, hidden, dim), "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim), "rms_final_weight": (dim,), "freq_cis": (2, context, dim // heads // 2),
        **({"wcls": (-vocab, dim)} if vocab < 0 else {}),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def content(header=HEADER):
    return struct.pack("<7i", *header) + b"".join(array.tobytes() for array in weights(*header).values())


def test_every_array_is_where_it_belongs(tmp_path):
    header = (*HEADER[:5], -11, 16)
    (tmp_path / "model.bin").write_bytes(content(header))
    cfg, params = load_gpt2(tmp_path / "model.bin")
    found, theirs = jax.tree.map(np.asarray, params), weights(*header)
    assert (cfg.norm, cfg.positions, cfg.mlp, cfg.tie_weights, cfg.bias) == ("rmsnorm", "rope", "swiglu", False, False)
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.hidden_dim, cfg.context_length) == (4, 2, 12, 16)
    block = found["blocks"]
    for leaf, name in (
        (found["tok_emb"]["embedding"], "token_embedding_table"),
        (found["final_norm"]["scale"], "rms_final_weight"),
        (block["norm1"]["scale"], "rms_att_weight"),
        (block["norm2"]["scale"], "rms_ffn_weight"),
    ):
        np.testing.assert_array_equal(leaf, theirs[name])
    np.testing.assert_array_equal(found["out_head"]["kernel"], theirs["wcls"].T)
    for leaf, name in (("gate", "w1"), ("proj", "w2"), ("fc", "w3")):
        np.testing.assert_array_equal(block["ff"][leaf]["kernel"], theirs[name].swapaxes(1, 2))
    np.testing.assert_array_equal(block["attn"]["v"]["kernel"].reshape(2, 16, 8), theirs["wv"].swapaxes(1, 2))
    np.testing.assert_array_equal(block["attn"]["out_proj"]["kernel"].reshape(2, 16, 16), theirs["wo"].swapaxes(1, 2))
    for leaf, name, heads in (("q", "wq", 4), ("k", "wk", 2)):
        # layers, heads, pairs, the two that are rotated together, inputs: ours has the first of every pair in front
        pairs = theirs[name].reshape(2, heads, 2, 2, 16)
        expected = pairs.transpose(0, 4, 1, 3, 2).reshape(2, 16, heads, 4)
        np.testing.assert_array_equal(block["attn"][leaf]["kernel"], expected)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (content()[:-4], r"has [\d,]+ bytes; expected [\d,]+ by its header"),
        (content() + b"\0", r"has [\d,]+ bytes; expected [\d,]+ by its header"),
        (struct.pack("<7i", 1 << 24, 1 << 24, 1_000, 4, 2, 1 << 24, 1 << 24), r"has 28 bytes; expected [\d,]{20,} by"),
        (b"24ka" + struct.pack("<i", 1) + content(), "llama2.c's version 1; expected version 0"),
        (struct.pack("<7i", 16, 12, 2, 3, 2, 11, 16) + content()[28:], "neither"),
        (content()[:20], "neither"),
    ],
    ids=["short", "long", "huge", "version-1", "heads", "header"],
)
def test_another_length_or_version_is_one_line(damaged, message, tmp_path):
    (tmp_path / "model.bin").write_bytes(damaged)
    with pytest.raises(InputError, match=message) as raised:
        load_gpt2(tmp_path / "model.bin")
    assert "\n" not in str(raised.value)


def test_stories260k_tells_what_llama2c_expects():
    folder = Path(os.environ.get("SLM_JAX_DATA", ""))
    if not (folder / "stories260K.bin").is_file():
        pytest.skip("no stories260K.bin in $SLM_JAX_DATA")
    run = load_model(folder / "stories260K.bin")  # with tok512.bin, which is beside it
    prompt = run.tokenizer.encode_prompt("")
    ids = generate(GPTModel(run.model_config), run.params, [prompt], max_new_tokens=200, temperature=0.0)[0]
    assert len(ids) == 201
    assert run.tokenizer.decode(np.asarray(ids)) == (folder / "stories260K.expected.txt").read_text(encoding="utf-8")

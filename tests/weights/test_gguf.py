"""What must hold of reading and writing GGUF: every number in its place, the same bits after a round trip."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import F32, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LLAMA, VOCAB, WIDTH, file, llama_tensors

from slm_jax.data.templates import TEMPLATES, Message, encode_prompt
from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, param_shapes
from slm_jax.runs import load_gpt2, load_model
from slm_jax.tokenizer import BPETokenizer
from slm_jax.weights.gguf_file import KINDS, open_file
from slm_jax.weights.writer import save_pretrained

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")
SMALL = {"vocab_size": 37, "context_length": 16, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
LIKE_LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "bias": False, "qkv_bias": False}


def write(folder, metadata=None, **tensors):
    path = folder / "model.gguf"
    path.write_bytes(file({**LLAMA, **(metadata or {})}, llama_tensors() | tensors))
    return path


def test_every_tensor_of_a_llama_is_where_it_belongs(tmp_path):
    cfg, params = load_gpt2(write(tmp_path))
    assert cfg == GPTConfig(
        **LIKE_LLAMA, vocab_size=VOCAB, context_length=16, emb_dim=WIDTH, n_heads=HEADS, n_layers=1,
        hidden_dim=HIDDEN, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope_theta=500.0, norm_eps=1e-6,
    )  # fmt: skip
    theirs, ours = llama_tensors(), jax.tree.map(lambda leaf: np.asarray(leaf), params)
    block = jax.tree.map(lambda leaf: leaf[0], ours["blocks"])
    for leaf, name in (
        (ours["tok_emb"]["embedding"], "token_embd"),
        (ours["final_norm"]["scale"], "output_norm"),
        (block["norm1"]["scale"], "blk.0.attn_norm"),
        (block["norm2"]["scale"], "blk.0.ffn_norm"),
        (block["ff"]["gate"]["kernel"].T, "blk.0.ffn_gate"),
        (block["ff"]["fc"]["kernel"].T, "blk.0.ffn_up"),
        (block["ff"]["proj"]["kernel"].T, "blk.0.ffn_down"),
        (block["attn"]["v"]["kernel"].reshape(WIDTH, -1).T, "blk.0.attn_v"),
        (block["attn"]["out_proj"]["kernel"].reshape(-1, WIDTH).T, "blk.0.attn_output"),
    ):
        np.testing.assert_array_equal(leaf, theirs[f"{name}.weight"], name)
    for leaf, heads in (("q", HEADS), ("k", KV_HEADS)):
        # heads, pairs, the two that are rotated together, inputs: ours has the first of every pair in front
        pairs = theirs[f"blk.0.attn_{leaf}.weight"].reshape(heads, HEAD_DIM // 2, 2, WIDTH)
        expected = pairs.transpose(3, 0, 2, 1).reshape(WIDTH, heads, HEAD_DIM)
        np.testing.assert_array_equal(block["attn"][leaf]["kernel"], expected)


def test_a_head_of_its_own_and_biases_that_are_only_partly_there(tmp_path):
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    more = {"output.weight": np.full((VOCAB, WIDTH), 0.5, np.float32), "blk.0.attn_q.bias": bias}
    cfg, params = load_gpt2(write(tmp_path, **more))
    assert (cfg.tie_weights, cfg.bias, cfg.qkv_bias) == (False, True, True)
    assert (np.asarray(params["out_head"]["kernel"]) == 0.5).all()
    attn = params["blocks"]["attn"]
    np.testing.assert_array_equal(attn["q"]["bias"][0, 0], [0, 2, 1, 3])
    assert not np.asarray(attn["k"]["bias"]).any()


@needs_gguf
@pytest.mark.parametrize("number", KINDS)
def test_every_quantization_is_what_the_package_makes_of_it(number, tmp_path):
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize

    kind, rng = KINDS[number], np.random.default_rng(number)
    data = rng.integers(0, 256, (5, 512 // kind.n_values * kind.n_bytes), np.uint8)
    their = GGMLQuantizationType[kind.name]
    assert their == number
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("t", data.view(np.uint8), raw_dtype=their)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_file(tmp_path / "model.gguf")[1]["t"]
    with np.errstate(all="ignore"):  # random scales may be infinite
        expected = dequantize(data, their)
        with tensor.rows() as rows:
            parts = [np.asarray(rows[0:2], np.float32), np.asarray(rows[2:5], np.float32)]
    assert tensor.shape == (5, 512)
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_a_quantized_file_without_the_package_is_one_line(tmp_path, monkeypatch):
    from gguf_files import Q8_0, header, tensor

    start = header([], [tensor("t", (1, 32), Q8_0)])
    (tmp_path / "model.gguf").write_bytes(start + bytes(-len(start) % 32) + bytes(34))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is quantized \(Q8_0\), which needs .*: pip install 'slm_jax\[gguf\]'"):
        open_file(tmp_path / "model.gguf")


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_linear_scaling(key, tmp_path):
    cfg, _ = load_gpt2(write(tmp_path, {f"llama.{key}": (F32, 4.0)}))
    assert (cfg.rope_scaling, cfg.rope_factor) == ("linear", 4.0)


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path):
    # Wavelengths of 2 pi · 500^(0, 1/2) with the published parameters: all are far below 8192 / 4.
    cfg, _ = load_gpt2(write(tmp_path, **{"rope_freqs.weight": np.ones(2, np.float32)}))
    assert (cfg.rope_scaling, cfg.rope_factor) == ("llama3", 1.0)
    with pytest.raises(InputError, match="is not Llama 3's scaling"):
        load_gpt2(write(tmp_path, **{"rope_freqs.weight": np.array([1, 8], np.float32)}))
    cfg, _ = load_gpt2(
        write(tmp_path, {"llama.rope.freq_base": (F32, 5e8)}, **{"rope_freqs.weight": np.array([1, 8], np.float32)})
    )
    assert (cfg.rope_scaling, cfg.rope_factor) == ("llama3", 8.0)


def save_gguf(*args, **options):
    return save_pretrained(*args, format="gguf", **options)


def model(**fields):
    cfg = GPTConfig(**{**SMALL, **fields})
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 4, leaf.dtype), param_shapes(cfg)
    )


ROUND_TRIPS = {
    "gpt2": {},
    "gpt2-untied-wide": {"tie_weights": False, "hidden_dim": 48, "norm_eps": 1e-6},
    "gpt2-no-bias": {"bias": False, "qkv_bias": False},
    "one-kv-head": {**LIKE_LLAMA, "n_kv_heads": 1},
    "two-kv-heads-untied": {**LIKE_LLAMA, "n_kv_heads": 2, "tie_weights": False, "rope_theta": 123_456.0},
    "biases": {**LIKE_LLAMA, "bias": True, "qkv_bias": True},
    "head-dim": {**LIKE_LLAMA, "head_dim": 12, "hidden_dim": 40},
    "linear": {**LIKE_LLAMA, "rope_scaling": "linear", "rope_factor": 2.5},
    "llama3": {**LIKE_LLAMA, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 64},
    "qwen3": {**LIKE_LLAMA, "qk_norm": True, "head_dim": 16, "n_kv_heads": 2, "norm_eps": 1e-6},
    "padded": {**LIKE_LLAMA, "unpadded_vocab_size": 30, "drop_rate": 0.1},
}


@needs_gguf
@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_round_trip_in_float32_is_bitwise(fields, tmp_path):
    cfg, params = model(**fields)
    found, again = load_gpt2(save_gguf(cfg, params, tmp_path / "out"))
    filled = {"bias": True, "qkv_bias": True} if cfg.positions == "learned" else {}
    assert found == GPTConfig(**{**vars(cfg), **filled})
    left = jax.tree_util.tree_leaves_with_path(again)
    right = dict(jax.tree_util.tree_leaves_with_path(params))
    for path, leaf in left:
        expected = right.get(path, np.zeros(leaf.shape, np.float32))
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes(), path


@needs_gguf
def test_what_each_dtype_keeps(tmp_path):
    from gguf import GGUFReader

    cfg, params = model(**LIKE_LLAMA, hidden_dim=40)
    for dtype, kinds, limit in (
        ("float16", {"token_embd.weight": "F16", "blk.0.ffn_down.weight": "F16"}, 1e-3),
        ("q8_0", {"token_embd.weight": "Q8_0", "blk.0.ffn_down.weight": "F16"}, 2e-2),
    ):
        path = save_gguf(cfg, params, tmp_path / dtype, dtype=dtype)
        found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path / "model.gguf").tensors}
        assert kinds.items() <= found.items()
        assert found["blk.0.attn_norm.weight"] == "F32"
        _, again = load_gpt2(path)
        for mine, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
            assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() < limit


@needs_gguf
def test_another_program_reads_the_metadata_and_the_tokenizer(tmp_path):
    from gguf import GGUFReader

    tokenizer = BPETokenizer.train("the cat sat on the mat. the cat sat. " * 9, vocab_size=262)
    cfg, params = model(**LIKE_LLAMA, vocab_size=270)
    path = save_gguf(cfg, params, tmp_path / "out", tokenizer=tokenizer, template=TEMPLATES["alpaca"])
    fields = {name: field.contents() for name, field in GGUFReader(path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["llama.block_count"], fields["llama.vocab_size"]) == (2, 270)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 270
    assert tokens[tokenizer.eot_id] == "<|endoftext|>"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eot_id
    assert len(fields["tokenizer.ggml.merges"]) == tokenizer.vocab_size - 257
    again = load_model(path)
    assert again.model_config.unpadded_vocab_size == again.tokenizer.vocab_size == tokenizer.vocab_size
    text = "the cat’s mat, 2 cats\n\n  and\ta hat"
    assert again.tokenizer.encode(text) == tokenizer.encode(text)
    assert again.tokenizer.eot_id == tokenizer.eot_id
    talk = [Message("user", "the cat?")]
    expected = encode_prompt(tokenizer, TEMPLATES["alpaca"], talk)
    assert encode_prompt(again.tokenizer, again.template, talk) == expected


@needs_gguf
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "rmsnorm"}, "norm layernorm"),
        ({"exact_gelu": True}, "exact_gelu false"),
        ({**LIKE_LLAMA, "mlp": "gelu"}, "mlp swiglu"),
        ({**LIKE_LLAMA, "qk_norm": True, "bias": True}, "bias false"),
        ({**LIKE_LLAMA, "qk_norm": True, "rope_scaling": "llama3", "rope_factor": 2.0}, "rope_scaling none or linear"),
    ],
)
def test_a_model_that_no_architecture_holds_is_refused_by_name(fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_gguf(*model(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()

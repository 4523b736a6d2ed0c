"""What must hold of GPT-2's formats that are only read: the same parameters as from Hugging Face's, or one line."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from foreign_files import CONFIG, CONTEXT, HEADS, LAYERS, VOCAB, WIDTH, huggingface, write
from golden_files import read_tensors
from refusals import refused

from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import GPTModel
from slm_jax.runs import load_gpt2
from slm_jax.weights.tensor_bundle import crc32c, open_bundle

THEIRS = huggingface()
LLMC_ORDER = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)


def same(cfg, params, tmp_path, **changes):
    """The model is that of Hugging Face's files, bit for bit, but for some fields."""
    expected_cfg, expected = load_gpt2(write(tmp_path / "hf", THEIRS, CONFIG))
    for field in ("n_heads", "n_layers", "emb_dim", "context_length", "exact_gelu", "tie_weights", "bias", "qkv_bias"):
        assert getattr(cfg, field) == changes.get(field, getattr(expected_cfg, field)), field
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def llmc(version=3, padded=VOCAB, magic=20240326):
    """The bytes of a file of llm.c's."""
    values = [np.pad(THEIRS["wte.weight"], ((0, padded - VOCAB), (0, 0))), THEIRS["wpe.weight"]]
    for name in LLMC_ORDER:
        for i in range(LAYERS):
            tensor = THEIRS[f"h.{i}.{name}"]
            values.append(tensor.T if tensor.ndim == 2 else tensor)
    values += [THEIRS["ln_f.weight"], THEIRS["ln_f.bias"]]
    dtype = jnp.bfloat16.dtype if version == 5 else np.float32
    header = struct.pack("<8i", magic, version, CONTEXT, VOCAB, LAYERS, HEADS, WIDTH, padded).ljust(1024, b"\0")
    return header + b"".join(value.astype(dtype).tobytes() for value in values)


def test_llmc(tmp_path):
    file = tmp_path / "gpt2.bin"
    file.write_bytes(llmc())
    same(*load_gpt2(file), tmp_path)
    file.write_bytes(llmc(padded=32))
    cfg, params = load_gpt2(file)
    assert (cfg.vocab_size, cfg.unpadded_vocab_size) == (32, VOCAB)
    params["tok_emb"]["embedding"] = params["tok_emb"]["embedding"][:VOCAB]
    same(cfg, params, tmp_path / "2")
    file.write_bytes(llmc(version=5))
    cfg, params = load_gpt2(file)
    assert params["blocks"]["ff"]["fc"]["kernel"].dtype == np.float32
    expected = THEIRS["h.1.mlp.c_fc.weight"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["blocks"]["ff"]["fc"]["kernel"][1], expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (llmc(version=1), "version 1; expected 3"),
        (llmc()[:-4], "bytes; expected"),
        (llmc() + b"\0", "bytes; expected"),
        (llmc()[:20], "impossible sizes"),
        (llmc()[:8] + struct.pack("<6i", *[2**31 - 1] * 6) + llmc()[32:], "bytes; expected"),
        (llmc()[:8] + struct.pack("<6i", 1, 9, 1, 1, 1, 8) + llmc()[32:], "impossible sizes"),
    ],
    ids=["version", "truncated", "longer", "header", "enormous", "vocabulary"],
)
def test_damaged_files_of_llmc(content, expected, tmp_path):
    file = tmp_path / "gpt2.bin"
    file.write_bytes(content)
    with refused(f"{file}: .*{expected}"):
        load_gpt2(file)


def flax_tree(**more):
    """Flax's tree of the same numbers, as transformers 4 has it."""
    leaves = {}
    for name, tensor in THEIRS.items():
        kind = "embedding" if name.startswith("w") else "scale" if "ln_" in name else "kernel"
        matrix = tensor.T.copy() if ".c_" in name and tensor.ndim == 2 else tensor
        leaves[f"transformer.{name.replace('weight', kind)}"] = matrix
    return unflatten_dict({**leaves, **more}, sep=".")


def test_flax(tmp_path):
    folder = write(tmp_path / "flax", {}, CONFIG)
    (folder / "model.safetensors").unlink()
    (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(flax_tree()))
    same(*load_gpt2(folder), tmp_path)


def test_what_transformers_saved_with_flax(tmp_path):
    files, expected = read_tensors("flax")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.tobytes())
    cfg, params = load_gpt2(tmp_path)
    logits = GPTModel(cfg).apply({"params": params}, jnp.asarray(expected["tokens"]))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (msgpack_serialize(flax_tree())[:-9], "not msgpack"),
        (b"\x93\1\2\3", "not msgpack"),
        (b"\xdd\x3b\x9a\xca\x00", "not msgpack"),  # a list of a billion elements
        (b"\x91" * 3000, "not msgpack"),
        (b"\x81\xa1a\xc7\x05\x01\x93\x91\xce\xff\xff", "not msgpack"),
        (b"\x81\xa1a\xd4\x63\0", "'a' is a ExtType"),
        (b"", "not msgpack"),
        (msgpack_serialize(flax_tree(lm_head=np.ones((WIDTH, VOCAB)))), "unknown"),
    ],
    ids=["truncated", "list", "billion", "nested", "shape", "type", "empty", "untied"],
)
def test_damaged_files_of_flax(content, expected, tmp_path):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(content)
    with refused(f"{file}: .*{expected}"):
        load_gpt2(file, n_heads=HEADS)


@pytest.fixture
def tensorflow(tmp_path):
    """A folder as OpenAI's: the checkpoint was written by TensorFlow."""
    folder = tmp_path / "124M"
    folder.mkdir()
    files, expected = read_tensors("tensorflow")
    for name, content in files.items():
        (folder / name).write_bytes(content.tobytes())
    return folder, expected


def test_openai(tensorflow):
    folder, expected = tensorflow
    cfg, params = load_gpt2(folder)
    hparams = json.loads((folder / "hparams.json").read_text())
    assert [hparams[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")] == [
        cfg.vocab_size, cfg.context_length, cfg.emb_dim, cfg.n_heads, cfg.n_layers
    ]  # fmt: skip
    assert not cfg.exact_gelu
    blocks = params["blocks"]
    np.testing.assert_array_equal(params["tok_emb"]["embedding"], expected["model/wte"])
    np.testing.assert_array_equal(params["final_norm"]["scale"], expected["model/ln_f/g"])
    for i in range(cfg.n_layers):
        np.testing.assert_array_equal(blocks["ff"]["fc"]["kernel"][i], expected[f"model/h{i}/mlp/c_fc/w"][0])
        parts = np.split(expected[f"model/h{i}/attn/c_attn/w"][0], 3, axis=1)
        for name, part in zip("qkv", parts, strict=True):
            np.testing.assert_array_equal(blocks["attn"][name]["kernel"][i].reshape(cfg.emb_dim, -1), part)


def open_bundle_of(index, content):
    index.write_bytes(content)
    return open_bundle(index).tensors


def test_damaged_files_of_tensorflow(tensorflow):
    folder, _ = tensorflow
    index, data = folder / "model.ckpt.index", folder / "model.ckpt.data-00000-of-00001"
    table, values = index.read_bytes(), data.read_bytes()
    for content in (table[:-1], table[20:], b"", bytes(48) + table[-48:], b"\xff" * 48 + table[-48:], table[:-48]):
        index.write_bytes(content)
        with refused(f"{index}: not the index"):
            load_gpt2(folder)
    shapes = {name: tensor.shape for name, tensor in open_bundle_of(index, table).items()}
    n_refused, tried = 0, range(0, len(table), 3)
    for at in tried:
        try:
            found = open_bundle_of(index, table[:at] + bytes([table[at] ^ 0xFF]) + table[at + 1 :])
            assert {name: tensor.shape for name, tensor in found.items()} == shapes  # the byte is not used
        except InputError:
            n_refused += 1
    assert n_refused > 0.9 * len(tried)
    index.write_bytes(table)
    data.write_bytes(values[:-1])
    with refused(f"{data}: too short for tensor"):
        load_gpt2(folder)
    data.write_bytes(values[:99] + bytes([values[99] ^ 1]) + values[100:])
    with refused(f"{data}: tensor .* is damaged: its CRC-32C is wrong"):
        load_gpt2(folder)
    data.unlink()
    with refused(f"{data}: this file is missing", MissingInputError):
        load_gpt2(folder)


def test_crc32c():
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720's polynomial; a published value
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA  # RFC 3720, B.4
    long = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8)
    crc, table = 0xFFFFFFFF, [crc32c(np.array([byte], np.uint8)) for byte in range(256)]
    for byte in long.tolist():  # one byte after the other, with a table made of the same polynomial
        crc = table[(crc ^ byte) & 255] ^ table[0] ^ crc >> 8
    assert crc32c(long) == crc ^ 0xFFFFFFFF

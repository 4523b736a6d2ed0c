"""What must hold of writing: what comes back is what went out, bit for bit, and no folder is ever half written."""

import json
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from foreign_files import HEADS, VOCAB, WIDTH, book, huggingface, nanogpt, write
from refusals import full_disk, refused
from safetensors import safe_open
from safetensors.numpy import load_file

from slm_jax.errors import InputError
from slm_jax.model import GPTClassifier, GPTConfig, init_classifier, param_shapes
from slm_jax.nn.blocks import split_blocks
from slm_jax.runs import load_gpt2, load_model
from slm_jax.tokenizer import CharTokenizer
from slm_jax.weights.writer import save_gpt2, save_pretrained

THEIRS = huggingface(prefix="transformer.")
SMALL = {"vocab_size": 31, "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 2}


def model(**fields):
    cfg = GPTConfig(**{**SMALL, **fields})
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 4, leaf.dtype), param_shapes(cfg)
    )


@pytest.mark.parametrize(
    ("tensors", "format"),
    [
        (THEIRS, "huggingface"),
        (THEIRS | {"lm_head.weight": np.full((VOCAB, WIDTH), 0.5, np.float32)}, "huggingface"),
        ({name: tensor.astype(np.float16) for name, tensor in THEIRS.items()}, "huggingface"),
        (nanogpt(), "nanogpt"),
        (nanogpt(bias=False), "nanogpt"),
        (book(), "book"),
        (book(qkv_bias=False), "book"),
    ],
    ids=["hf", "hf-untied", "hf-float16", "nanogpt", "nanogpt-nobias", "book", "book-no-qkv-bias"],
)
def test_foreign_to_ours_and_back_is_bitwise(tensors, format, tmp_path):
    source = write(tmp_path / "in", tensors)
    dtype = str(next(iter(tensors.values())).dtype)
    cfg, params = load_gpt2(source, n_heads=HEADS, param_dtype=dtype)
    written = load_file(save_gpt2(cfg, params, tmp_path / "out", format=format) / "model.safetensors")
    assert {name: (t.dtype, t.shape, t.tobytes()) for name, t in written.items()} == {
        name: (t.dtype, t.shape, t.tobytes()) for name, t in tensors.items()
    }


@pytest.mark.parametrize("format", ["huggingface", "nanogpt", "book"])
@pytest.mark.parametrize(
    "fields",
    [{"exact_gelu": True}, {"tie_weights": False}, {"bias": False}, {"qkv_bias": False}, {"param_dtype": "bfloat16"}],
    ids=["exact-gelu", "untied", "no-bias", "no-qkv-bias", "bfloat16"],
)
def test_ours_to_foreign_and_back_is_bitwise_and_only_zeros_or_the_tied_head_are_added(fields, format, tmp_path):
    cfg, params = model(**fields, unpadded_vocab_size=30, drop_rate=0.1)
    if format == "nanogpt" and not cfg.tie_weights:
        with pytest.raises(InputError, match="nanoGPT"):
            save_gpt2(cfg, params, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
        return
    folder = save_gpt2(cfg, params, tmp_path / "out", format=format)
    again, loaded = load_gpt2(folder, param_dtype=cfg.param_dtype)
    stated = (again.n_heads, again.unpadded_vocab_size, again.drop_rate, again.exact_gelu)
    assert stated == (2, 30, 0.1, cfg.exact_gelu)
    before, after = (flatten_dict(tree, sep="/") for tree in (params, loaded))
    assert before.keys() <= after.keys()
    for path, leaf in after.items():
        head = before["tok_emb/embedding"].T if path == "out_head/kernel" else jnp.zeros(leaf.shape, cfg.param_dtype)
        np.testing.assert_array_equal(leaf, before.get(path, head), err_msg=path, strict=True)


def test_what_transformers_reads_beside_the_weights(tmp_path):
    cfg, params = model(drop_rate=0.1, unpadded_vocab_size=28)
    folder = save_gpt2(cfg, params, tmp_path / "a" / "b", card={"validation loss": 1.25, "a|b": "c\nd"})
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 31, "n_positions": 8, "n_ctx": 8,
        "n_embd": 8, "n_head": 2, "n_layer": 2, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "bos_token_id": None,
        "eos_token_id": None, "torch_dtype": "float32",
    }  # fmt: skip
    assert config == expected
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [28, 29, 30]  # they only pad the vocabulary
    with safe_open(folder / "model.safetensors", "numpy") as opened:
        assert opened.metadata()["format"] == "pt"
        assert {name.split(".")[0] for name in opened.keys()} == {"transformer"}  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| validation loss | 1.25 |\n| a\\|b | c d |" in card
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1, "the weights can be read by whoever can read the rest"


def test_the_tokenizer_goes_with_the_weights(tmp_path):
    tokenizer = CharTokenizer("abcdefgh")
    cfg, params = model(vocab_size=9)
    for format in ("huggingface", "nanogpt", "book"):
        folder = save_gpt2(cfg, params, tmp_path / format, format=format, tokenizer=tokenizer)
        loaded = load_model(folder).tokenizer
        assert loaded.encode("<|endoftext|>badge", allow_special=True) == [8, 1, 0, 3, 6, 4]
        assert (loaded.vocab_size, loaded.eot_id, loaded.decode([1, 0, 8])) == (9, 8, "ba<|endoftext|>")
    config = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (8, 8)
    with pytest.raises(InputError, match="27 ids"):
        save_gpt2(cfg, params, tmp_path / "large", tokenizer=CharTokenizer("abcdefghijklmnopqrstuvwxyz"))
    assert not (tmp_path / "large").exists()


def test_a_flipped_bit_is_found_and_its_tensor_named(tmp_path):
    file = save_gpt2(*model(), tmp_path / "out") / "model.safetensors"
    content = bytearray(file.read_bytes())
    name = "transformer.h.1.mlp.c_proj.weight"
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    at = 8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0] + 7
    content[at - 5] ^= 1  # a bit of the mantissa: the number stays finite
    file.write_bytes(content)
    with refused(f"model.safetensors: tensor {name} is damaged"):
        load_gpt2(file)


def test_segments_are_written_as_one_stack(tmp_path):
    cfg, params = model()
    whole = save_gpt2(cfg, params, tmp_path / "whole") / "model.safetensors"
    split = save_gpt2(cfg, split_blocks(params, 1), tmp_path / "split") / "model.safetensors"
    one, other = load_file(whole), load_file(split)
    assert {name: t.tobytes() for name, t in one.items()} == {name: t.tobytes() for name, t in other.items()}


def test_what_is_no_params_tree_is_refused_and_nothing_left(tmp_path):
    cfg, params = model()
    norm = params["final_norm"]
    for wrong, expected in (
        ({"params": params}, r'expected .*\["params"\]'),
        (param_shapes(cfg), "is a ShapeDtypeStruct"),
        (params | {"final_norm": norm | {"scale": jnp.ones(8, jnp.int32)}}, "final_norm/scale is a .* and dtype int32"),
        (params | {"final_norm": norm | {"scale": norm["scale"].at[3].set(jnp.nan)}}, "final_norm/scale holds NaN"),
        (split_blocks(params, 1) | {"final_norm": {}}, "final_norm/.* is a NoneType"),
    ):
        with refused(expected):
            save_gpt2(cfg, wrong, tmp_path / "out")
    with refused("format is 'onnx'"):
        save_gpt2(cfg, params, tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_midway_leaves_nothing(tmp_path):
    cfg, params = model(vocab_size=5_000)
    with refused("cannot be written"), full_disk():
        save_gpt2(cfg, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_gives_the_same_logits_without_its_bias(tmp_path):
    classifier = GPTClassifier(GPTConfig(**SMALL), n_classes=3)
    params = init_classifier(classifier, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 2), params)
    folder = save_pretrained(classifier.cfg, params, tmp_path / "out", classes=("a", "b", "c"))
    tensors = load_file(folder / "model.safetensors")
    moved = params | {
        "final_norm": params["final_norm"] | {"bias": tensors["transformer.ln_f.bias"]},
        "class_head": {"kernel": tensors["score.weight"].T, "bias": jnp.zeros(3)},
    }
    batch = jnp.asarray(rng.integers(31, size=(4, 8))), jnp.array([8, 3, 5, 1])
    before, after = (classifier.apply({"params": tree}, *batch) for tree in (params, moved))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(params["class_head"]["bias"]).min() > 1e-2
    with refused("a classifier .*expected a language model"):
        load_gpt2(folder)
    with refused("class_head"):
        save_pretrained(classifier.cfg, params, tmp_path / "two", classes=("a", "b"))
    params["class_head"]["kernel"] *= 0
    with refused("cannot express"):
        save_pretrained(classifier.cfg, params, tmp_path / "zero", classes=("a", "b", "c"))

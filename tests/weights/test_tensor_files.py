"""What must hold of bad weights: one line that names the file, the tensor or key, and what to do."""

import json
import struct

import numpy as np
import pytest
from foreign_files import CONFIG, VOCAB, WIDTH, huggingface, nanogpt, write, write_shards
from refusals import refused

from slm_jax.errors import InputError, MissingInputError
from slm_jax.runs import load_gpt2


def refusal(source, kind=InputError, **kwargs):
    with refused(".", kind) as caught:
        load_gpt2(source, **kwargs)
    return str(caught.value)


def changed(**tensors):
    """Hugging Face's tensors with some replaced, `None` taken out; underscores in front are dots."""
    merged = huggingface() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


def damaged(value):
    tensor = huggingface()["h.1.mlp.c_fc.weight"]
    tensor[3, 5] = value
    return tensor


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (changed(h__0__ln_2__bias=None, h__1__ln_2__bias=None), "missing: h.0.ln_2.bias, h.1.ln_2.bias;"),
        (changed(wte__weight=None), "wte.weight"),
        (changed(score__weight=np.ones((2, WIDTH), np.float32)), "a classifier (tensor score.weight)"),
        (changed(h__1__ln_1__bias=np.ones(WIDTH + 1, np.float32)), f"h.1.ln_1.bias has the shape ({WIDTH + 1},)"),
        (changed(h__1__mlp__c_fc__weight=damaged(0).T), "h.1.mlp.c_fc.weight has the shape"),
        (changed(h__1__mlp__c_fc__weight=damaged(np.nan)), "h.1.mlp.c_fc.weight holds NaN"),
        (changed(h__0__ln_1__weight=np.ones(WIDTH, np.int32)), "h.0.ln_1.weight is I32"),
        (changed(transformer__wpe__weight=huggingface()["wpe.weight"]), "wpe.weight"),
        (changed(lm_head__weight=np.ones((VOCAB - 1, WIDTH), np.float32)), "lm_head.weight has the shape"),
        *(
            (changed(**{name: np.float32(1).reshape(())}), f"tensor {name} has the shape ()")
            for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "lm_head.weight")
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tensor_is_named(tensors, expected, tmp_path):
    message = refusal(write(tmp_path, tensors, CONFIG))
    assert message.startswith(str(tmp_path / "model.safetensors"))
    assert expected in message


def test_a_transposed_projection_is_named_before_the_user_is_asked_for_heads(tmp_path):
    tensors = huggingface()
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T
    message = refusal(write(tmp_path, tensors))
    assert f"h.0.attn.c_attn.weight has the shape ({3 * WIDTH}, {WIDTH})" in message


@pytest.mark.hostile
def test_names_that_would_break_up_a_line_are_escaped(tmp_path):
    assert r"called 'h.0\nx'" in refusal(write(tmp_path, huggingface() | {"h.0\nx": np.ones(2, np.float32)}, CONFIG))
    assert r"called 'a\x1b[1m'" in refusal(write(tmp_path, {"a\x1b[1m": np.ones(2, np.float32)}))


def test_what_a_narrower_dtype_cannot_hold_is_said(tmp_path):
    folder = write(tmp_path, changed(h__1__mlp__c_fc__weight=damaged(1e6)), CONFIG)
    assert "h.1.mlp.c_fc.weight is too large for float16" in refusal(folder, param_dtype="float16")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt_bigcode"),
        ("activation_function", "relu"),
        ("layer_norm_epsilon", -1.0),
        ("scale_attn_by_inverse_layer_idx", True),
        ("vocab_size", VOCAB + 1),
        ("n_layer", 10**12),
        ("n_positions", "10"),
        ("n_head", 5),
        ("num_attention_heads", 4),
        ("tie_word_embeddings", None),
    ],
)
def test_a_configuration_that_is_not_computed_or_does_not_fit_is_named(key, value, tmp_path):
    ours = {"n_layer": "n_layers", "n_embd": "emb_dim", "n_positions": "context_length", "n_head": "n_heads"}
    ours["layer_norm_epsilon"] = "norm_eps"
    message = refusal(write(tmp_path, huggingface(), CONFIG | {key: value}))
    assert str(tmp_path) in message
    assert ours.get(key, key) in message
    assert str(value) in message or json.dumps(value) in message


def test_a_config_json_that_is_none(tmp_path):
    folder = write(tmp_path, huggingface(), CONFIG)
    for text in ("{", "[1]", '{"n_head": 3, "n_head": 4}'):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder)


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer.h.0.attn.attn.weight", "LitGPT"),
        ("model.layers.0.self_attn.q_proj.weight", "config.json"),
        ("model.layers.0.self_attn.qkv_proj.weight", "Llama"),
        ("roberta.encoder.layer.0.attention.self.query.weight", "BERT"),
        ("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight", "LoRA"),
        ("something.else", "something.else"),
    ],
)
def test_other_models_are_refused_by_name(name, family, tmp_path):
    message = refusal(write(tmp_path, {name: np.ones((4, 4), np.float32)}))
    assert family in message
    assert str(tmp_path) in message


HEADER = b'{"wte.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'


@pytest.mark.real_world
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "0 bytes", id="empty"),
        pytest.param(b"\n<!DOCTYPE html><html><head></head></html>", "HTML page", id="html"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "git lfs pull", id="lfs"),
        pytest.param(b"just some text that is long enough", "neither safetensors nor", id="text"),
        pytest.param(struct.pack("<Q", len(HEADER)) + HEADER + bytes(15), "damaged safetensors", id="short"),
        pytest.param(struct.pack("<Q", len(HEADER)) + HEADER[:-2] + b"  " + bytes(16), "damaged safeten", id="cut"),
    ],
)
def test_a_file_that_is_no_weights_is_named(content, expected, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    message = refusal(file)
    assert message.startswith(str(file))
    assert expected in message


def test_what_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none", MissingInputError)
    assert "no weights in this folder" in refusal(tmp_path, MissingInputError)
    (tmp_path / "adapter_config.json").touch()
    assert "LoRA adapter (PEFT) without its base model" in refusal(tmp_path)


@pytest.mark.hostile
@pytest.mark.parametrize("shard", ["../model-00001-of-00002.safetensors", "c:x.safetensors", "a\nb.safetensors", None])
def test_an_index_cannot_lead_out_of_its_folder(shard, tmp_path):
    folder = write_shards(tmp_path, huggingface())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["wte.weight"] = shard
    index.write_text(json.dumps(content))
    message = refusal(folder)
    assert message.startswith(str(index))
    assert "weight_map" in message


def test_shards_and_their_index_must_agree(tmp_path):
    folder = write_shards(tmp_path / "a", huggingface())
    first, second = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    good = index.read_text()

    index.write_text(good.replace('"h.0.ln_1.bias"', '"h.9.ln_1.bias"'))
    assert "holds tensor h.0.ln_1.bias, unlike" in refusal(folder)
    index.write_text(good.replace(f'"wte.weight": "{second.name}"', f'"wte.weight": "{first.name}"'))
    assert f"{first}: lacks tensor wte.weight, unlike" in refusal(folder)
    index.write_text('{"weight_map": {}}')
    assert "weight_map" in refusal(folder)
    index.write_text(good)
    kept = second.read_bytes()
    second.unlink()
    assert str(second) in refusal(folder, MissingInputError)
    second.write_bytes(first.read_bytes())
    assert f"{second}: holds tensor" in refusal(folder)
    second.write_bytes(kept[:-1])
    assert f"{second}: a damaged safetensors" in refusal(folder)


def test_a_pickle_without_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)  # as if it were not installed
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04" + bytes(60))
    message = refusal(tmp_path / "ckpt.pt")
    assert all(part in message for part in ("ckpt.pt", "torch", "safetensors"))


def test_a_suffix_says_nothing(tmp_path):
    write(tmp_path, nanogpt())
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.pt")
    assert load_gpt2(tmp_path / "weights.pt", n_heads=3)[0].n_layers == 2

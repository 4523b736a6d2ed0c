"""GPT-2 weights in foreign names, made by NumPy: the tests' inputs."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 29, 10, 12, 3, 2
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}


def huggingface(vocab=VOCAB, width=WIDTH, layers=LAYERS, prefix="", seed=0):
    """Hugging Face's tensors: weights (in, out)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32) / 4

    tensors = {"wte.weight": normal(vocab, width), "wpe.weight": normal(CONTEXT, width)}
    for i in range(layers):
        shapes = {
            "ln_1": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
            "ln_2": (width,), "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
        }  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"h.{i}.{name}.weight"] = normal(*shape)
            tensors[f"h.{i}.{name}.bias"] = normal(shape[-1])
    tensors |= {"ln_f.weight": normal(width), "ln_f.bias": normal(width)}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def nanogpt(bias=True, **kwargs):
    """nanoGPT's: the same numbers as Hugging Face's, with weights (out, in), and the tied head."""
    tensors = huggingface(**kwargs)
    tensors = {name: tensor.T.copy() if ".c_" in name else tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": tensor
        for name, tensor in tensors.items()
        if bias or not name.endswith(".bias")
    }


def book(qkv_bias=True, **kwargs):
    """The book's: the same numbers as Hugging Face's, with query, key and value apart."""
    tensors = huggingface(**kwargs)
    out = {"tok_emb.weight": tensors["wte.weight"], "pos_emb.weight": tensors["wpe.weight"]}
    for i in range(LAYERS):
        ours, theirs = f"trf_blocks.{i}.", f"h.{i}."
        for kind, cut in (("weight", 1), ("bias", 0)):
            if kind == "weight" or qkv_bias:
                parts = np.split(tensors[f"{theirs}attn.c_attn.{kind}"], 3, axis=-1)
                for name, part in zip(("query", "key", "value"), parts, strict=True):
                    out[f"{ours}att.W_{name}.{kind}"] = part.T.copy() if cut else part.copy()
            for new, old in (
                ("att.out_proj", "attn.c_proj"),
                ("ff.layers.0", "mlp.c_fc"),
                ("ff.layers.2", "mlp.c_proj"),
            ):
                out[f"{ours}{new}.{kind}"] = tensors[f"{theirs}{old}.{kind}"].T.copy()
        for new, old in (("norm1", "ln_1"), ("norm2", "ln_2")):
            out[f"{ours}{new}.scale"] = tensors[f"{theirs}{old}.weight"]
            out[f"{ours}{new}.shift"] = tensors[f"{theirs}{old}.bias"]
    out |= {"final_norm.scale": tensors["ln_f.weight"], "final_norm.shift": tensors["ln_f.bias"]}
    return out | {"out_head.weight": tensors["wte.weight"]}


def write(folder: Path, tensors, config=None, metadata=None) -> Path:
    """A folder with the tensors and, if given, a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    # safetensors writes memory as it lies, not as it is strided
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def write_shards(folder: Path, tensors, config=CONFIG) -> Path:
    """The same in two shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder

"""Write GGUF: a model with its tokenizer in one file, for llama.cpp and Ollama, through the package ``gguf``."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig, axis_sizes
from slm_jax.weights.gguf import GGUF, OUR_FIELDS, ROPE_FACTORS, rope_factors
from slm_jax.weights.gguf_file import MISSING
from slm_jax.weights.gguf_tokenizer import tokenizer_metadata
from slm_jax.weights.names import POSITIONS
from slm_jax.weights.registry import GGUFDtype
from slm_jax.weights.side_files import About, chat_template
from slm_jax.weights.tensor_files import OURS

_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7}  # general.file_type


def write_gguf(file: Path, form: GGUF, cfg: GPTConfig, tensors: Mapping[str, np.ndarray], about: About) -> None:
    """Write tensors under GGUF's names, with the metadata of the model and its tokenizer.

    Vectors and the position embedding stay float32, whatever the dtype of the matrices; in Q8_0, a matrix whose rows
    are no multiple of 32 values is written in float16. A tokenizer that GGUF has no form for is left out.

    Raises:
        InputError: the package ``gguf`` is not installed.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter, quantize
    except ImportError:
        raise InputError(f"writing GGUF {MISSING}") from None

    writer = GGUFWriter(file, form.architecture)
    try:
        writer.add_file_type(_FILE_TYPES[about.dtype])
        if about.dtype == "q8_0":
            writer.add_quantization_version(2)
        for key, value in {**_model_metadata(form, cfg, about), **_tokenizer_metadata(cfg, about)}.items():
            _add(writer, key, value)
        if cfg.rope_scaling == "llama3":
            writer.add_tensor(ROPE_FACTORS, rope_factors(cfg))
        for name, tensor in tensors.items():
            kind = GGMLQuantizationType[_kind(name, tensor, form, about.dtype)]
            writer.add_tensor(name, quantize(np.asarray(tensor, np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tokenizer_metadata(cfg: GPTConfig, about: About) -> dict[str, Any]:
    tokenizer, values = about.tokenizer, {"tokenizer.ggml.model": "no_vocab"}
    if tokenizer is not None:
        with suppress(InputError):  # which the command reports
            values = tokenizer_metadata(tokenizer, cfg.vocab_size)
    own = None if tokenizer is None else tokenizer.chat_template
    template = own if about.template is None else chat_template(about.template, tokenizer)
    return {**values, **({} if template is None else {"tokenizer.chat_template": template})}


def _kind(name: str, tensor: np.ndarray, form: GGUF, dtype: GGUFDtype) -> str:
    if dtype == "float32" or tensor.ndim == 1 or form.top.get(name) == POSITIONS:
        return "F32"
    return "Q8_0" if dtype == "q8_0" and tensor.shape[-1] % 32 == 0 else "F16"


def _model_metadata(form: GGUF, cfg: GPTConfig, about: About) -> dict[str, Any]:
    sizes = axis_sizes(cfg)
    eps = "attention.layer_norm_epsilon" if form.architecture == "gpt2" else "attention.layer_norm_rms_epsilon"
    values: dict[str, Any] = {
        "vocab_size": sizes["vocab"],
        "context_length": cfg.context_length,
        "embedding_length": sizes["embed"],
        "block_count": sizes["layers"],
        "feed_forward_length": sizes["mlp"],
        "attention.head_count": sizes["heads"],
        "attention.head_count_kv": sizes["kv_heads"],
        eps: cfg.norm_eps,
    }
    if form.architecture != "gpt2":
        values |= dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"), sizes["head_dim"]
        )
        values["rope.freq_base"] = cfg.rope_theta
    if cfg.rope_scaling == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": cfg.rope_factor}
    ours = {name: getattr(cfg, name) for name in OUR_FIELDS if name[:5] != "rope_" or cfg.rope_scaling == "llama3"}
    return {
        "general.name": Path(about.name).name or "slm_jax",
        **{f"{form.architecture}.{key}": value for key, value in values.items()},
        OURS: json.dumps(ours),
    }


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)

"""Flax's GPT-2 of transformers 4: ``flax_model.msgpack``.

The matrices of its ``FlaxConv1D`` are (out, in). Source: ``transformers`` 4, ``modeling_flax_gpt2.py``.
"""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

from slm_jax.errors import InputError
from slm_jax.nn.axes import HEAD
from slm_jax.weights import gpt2
from slm_jax.weights.tensor_files import AGAIN, Tensor, TensorFiles


class FlaxGPT2(gpt2.GPT2):
    """Hugging Face's configuration with Flax's names."""

    def recognise(self, files: TensorFiles) -> bool:
        return "h.0.attn.c_attn.kernel" in files.tensors


def _flax_name(name: str) -> str:
    name = re.sub(r"^(w[tp]e)\.weight$", r"\1.embedding", name)
    return re.sub(r"\.weight$", ".kernel", re.sub(r"(ln_\w)\.weight$", r"\1.scale", name))


FORMAT = FlaxGPT2(
    **{
        **vars(gpt2.FORMAT),
        "title": "Flax's GPT-2",
        "top": {_flax_name(name): path for name, path in gpt2.FORMAT.top.items() if path != HEAD},
        "block": {_flax_name(name): path for name, path in gpt2.FORMAT.block.items()},
        "out_in": True,
        "fixed": {"bias": True, "qkv_bias": True, "tie_weights": True},
    }
)


def open_file(file: Path) -> TensorFiles:
    """Read a file of msgpack that Flax wrote; InputError: it is damaged, or holds something else than arrays."""
    try:
        # It makes only dicts, lists, numbers, text and arrays, none of them larger than the file.
        leaves = flatten_dict(msgpack_restore(file.read_bytes()), sep=".")
    except OSError:
        raise
    except Exception as error:  # of any type: it depends on the bytes
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not msgpack of a Flax model ({reason:.100}); {AGAIN}") from None
    tensors = {}
    for name, value in leaves.items():
        if not isinstance(value, np.ndarray):
            raise InputError(f"{file}: {name!r:.100} is a {type(value).__name__}; expected only arrays")
        tensors[name] = Tensor(file, name, value.shape, value.dtype.name, partial(nullcontext, value))
    return TensorFiles(file, tensors)

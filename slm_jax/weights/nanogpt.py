"""nanoGPT's ``ckpt.pt``: Hugging Face's names, with weights as PyTorch's ``Linear`` has them, (out, in).

``bias=False`` drops every bias. Source: karpathy/nanoGPT, ``model.py`` and ``train.py``.
"""

from typing import Any

import numpy as np

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.nn.axes import HEAD
from slm_jax.weights import gpt2
from slm_jax.weights.names import TOKENS, Slot
from slm_jax.weights.tensor_files import FLOATS, OURS, Tensor, TensorFiles

_FIELDS = {**gpt2.FIELDS, "block_size": "context_length", "bias": "bias"}


class NanoGPT(gpt2.GPT2):
    """Hugging Face's names, other shapes."""

    def stated_fields(self, files: TensorFiles) -> dict[str, Any]:
        fields = {field: files.model_args[key] for key, field in _FIELDS.items() if key in files.model_args}
        for field, value in fields.items():
            if not isinstance(value, int):
                raise InputError(f"{files.file}: model_args has a {type(value).__name__} for {field}; expected int")
        if OURS in files.metadata:  # a file that we wrote states which form of GELU the model was trained with
            return fields
        # nanoGPT only computes the exact form. minGPT and build-nanogpt have the same names and compute the tanh form:
        # minGPT's head is a matrix of its own, and for others a config.json beside the weights may say so.
        head, table = files.tensors.get(self.name_of(HEAD)), files.tensors.get(self.name_of(TOKENS))
        untied = head is not None and table is not None and not np.array_equal(_start(head), _start(table))
        beside = super().stated_fields(files) if not files.model_args else {}
        return {**fields, "exact_gelu": bool(files.model_args) or not untied, **beside}

    def written_names(self, cfg: GPTConfig) -> dict[str, Slot]:
        """Add the tied matrix a second time, as in nanoGPT's state dict."""
        if not cfg.tie_weights:
            raise InputError("nanoGPT has no untied output head, which this model has; expected format huggingface")
        return {**super().written_names(cfg), self.name_of(HEAD): Slot((TOKENS,))}

    def side_files(self, *args: Any, **kwargs: Any) -> dict[str, bytes]:
        return {}


def _start(tensor: Tensor) -> Any:
    return next(tensor.chunks(), None) if tensor.dtype in FLOATS else None


FORMAT = NanoGPT(
    **{
        **vars(gpt2.FORMAT),
        "title": "nanoGPT",
        "needs": {**gpt2.NEEDS, "hidden_dim": None, "norm_eps": 1e-5},
        "out_in": True,
        "class_head": "",
        "fixed": {"qkv_bias": True},  # if there are biases at all
    }
)

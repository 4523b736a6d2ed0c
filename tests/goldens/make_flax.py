"""Make ``flax.safetensors``: a tiny GPT-2 that transformers 4 saved with Flax, and its logits.

    pip install transformers==4.49.0 flax==0.10.4 jax==0.4.38 "numpy<2.2" safetensors
    python tests/goldens/make_flax.py

It holds the files of the folder as bytes (``file/…``), ``tokens`` and ``logits``.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import transformers
from safetensors.numpy import save_file


def main() -> None:
    """Write the file beside this script."""
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model, rng = transformers.FlaxGPT2LMHeadModel(config), np.random.default_rng(0)
    model.params = jax.tree_util.tree_map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), model.params)
    tokens = np.arange(16).reshape(2, 8) % 11
    golden = {"tokens": tokens, "logits": np.array(model(tokens).logits)}
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        for file in ("config.json", "flax_model.msgpack"):
            golden[f"file/{file}"] = np.frombuffer(Path(name, file).read_bytes(), np.uint8)
    save_file(golden, Path(__file__).with_name("flax.safetensors"), {"transformers": transformers.__version__})


if __name__ == "__main__":
    main()

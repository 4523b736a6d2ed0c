"""Make ``tensorflow.safetensors``: a tiny GPT-2 in OpenAI's format, whose checkpoint TensorFlow wrote.

    pip install tensorflow-cpu==2.20.0 safetensors
    python tests/goldens/make_tensorflow.py

It holds the files of the folder as bytes (``file/…``), and the tensors in them by OpenAI's names.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

HPARAMS = {"n_vocab": 11, "n_ctx": 5, "n_embd": 6, "n_head": 2, "n_layer": 2}


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shapes of OpenAI's variables."""
    width = HPARAMS["n_embd"]
    found: dict[str, tuple[int, ...]] = {
        "wte": (HPARAMS["n_vocab"], width), "wpe": (HPARAMS["n_ctx"], width), "ln_f/g": (width,), "ln_f/b": (width,)
    }  # fmt: skip
    for i in range(HPARAMS["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            found |= {f"h{i}/{norm}/g": (width,), f"h{i}/{norm}/b": (width,)}
        sizes = {"attn/c_attn": (1, 3), "attn/c_proj": (1, 1), "mlp/c_fc": (1, 4), "mlp/c_proj": (4, 1)}
        for name, (n_in, n_out) in sizes.items():
            found |= {f"h{i}/{name}/w": (1, n_in * width, n_out * width), f"h{i}/{name}/b": (n_out * width,)}
    return {f"model/{name}": shape for name, shape in found.items()}


def main() -> None:
    """Write the file beside this script."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes().items()}
    v1 = tf.compat.v1
    v1.disable_eager_execution()
    variables = [v1.get_variable(name, initializer=value) for name, value in tensors.items()]
    with tempfile.TemporaryDirectory() as name, v1.Session() as session:
        folder = Path(name)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(variables).save(session, str(folder / "model.ckpt"), write_meta_graph=False)
        (folder / "hparams.json").write_text(json.dumps(HPARAMS))
        for file in sorted(folder.iterdir()):
            if file.name != "checkpoint":  # it names the temporary folder
                tensors[f"file/{file.name}"] = np.frombuffer(file.read_bytes(), np.uint8)
    save_file(tensors, Path(__file__).with_name("tensorflow.safetensors"), {"tensorflow": tf.__version__})


if __name__ == "__main__":
    main()

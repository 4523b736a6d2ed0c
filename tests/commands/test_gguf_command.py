"""What must hold of GGUF on the command line: out and in again, the same text; what goes wrong is one line."""

import importlib.util

import jax
import numpy as np
import pytest
from refusals import fails

from slm_jax import cli
from slm_jax.runs import load_pretrained

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")


@needs_gguf
def test_a_model_goes_out_and_comes_in_again(weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "--run", str(weights), "--format", "gguf", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "Modelfile, model.gguf, tokenizer" in said.out
    assert "llama-cli" not in said.out
    (line,) = said.err.splitlines()
    assert "no tokenizer in model.gguf" in line  # characters
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(out)[1], load_pretrained(weights)[1])
    texts = []
    for run in (weights, out, out / "model.gguf"):
        assert cli.main(["generate", "--run", str(run), "--prompt", "the ", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1


def test_a_dtype_without_gguf_and_a_damaged_file_are_one_line(weights, tmp_path, capsys):
    out = tmp_path / "out"
    fails(["export", "--run", weights, "--out", out, "--dtype", "q8_0"], capsys, "only with --format gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    fails(["generate", "--run", tmp_path / "model.gguf"], capsys, "damaged GGUF file: metadata of 18,446,744,073,709")
    assert not out.exists()

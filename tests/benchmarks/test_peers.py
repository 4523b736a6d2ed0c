"""What must hold of the comparison: paired ratios, the same work, and a line for whatever cannot take part."""

import json
import math

import pytest
from programs import run

TINY = ["--layers=1", "--heads=2", "--width=16", "--vocab=65", "--context=16", "--batch=2", "--rounds=3", "--steps=2"]

# Stands in for a checkout of nanodo: its names, and a model of one matrix.
NANODO = """
import dataclasses, flax.linen as nn, jax.numpy as jnp

@dataclasses.dataclass
class DoConfig:
    D: int
    H: int
    L: int
    N: int
    V: int
    F: int
    dtype: object = jnp.float32
    fsdp_enabled: bool = True

class TransformerDo(nn.Module):
    docfg: DoConfig

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.docfg.V, self.docfg.D)
        return embed.attend(embed(tokens))
"""


@pytest.fixture
def nanodo(tmp_path):
    def make(code):
        package = tmp_path / "nanodo_checkout" / "nanodo"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "model.py").write_text(code)
        return package.parent

    return make


@pytest.mark.slow
def test_contestants_take_turns_and_ratios_are_paired(nanodo, tmp_path):
    output, picture = tmp_path / "result.json", tmp_path / "result.png"
    contestants = ("--contestants", "slm_jax,nanodo,nanogpt", "--nanodo", nanodo(NANODO))
    done = run("peers", *TINY, *contestants, "--output", output, "--picture", picture)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result["contestants"]) == {"slm_jax", "nanodo"}
    ours, theirs = result["contestants"]["slm_jax"], result["contestants"]["nanodo"]
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 3
    ratios = sorted(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))
    assert theirs["ratio"] == ratios[1]
    assert theirs["ratio_range"] == [ratios[0], ratios[2]]
    assert "ratio" not in ours
    for figures in (ours, theirs):
        assert figures["tokens_per_second"] == pytest.approx(2 * 16 / figures["median"])
        assert 0 < figures["loss"] < math.log(65)  # ten steps on one batch: it has begun to learn it
        assert figures["idle_cpu_share"] >= 0
    assert ours["flops_per_second"] == pytest.approx(ours["flops_per_token"] * ours["tokens_per_second"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The third was not there, and a line says how to get it.
    assert list(result["skipped"]) == ["nanogpt"]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("nanogpt")]
    assert "skipped" in line
    assert "--nanogpt FOLDER" in line


def test_what_cannot_take_part_says_why(nanodo):
    # Not one of them needs slm_jax to be built.
    folder = nanodo("raise ValueError('CUDA out of memory.')")
    done = run("peers", *TINY, "--contestants", "transformers,book,nanodo", "--nanodo", folder)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "skipped" in line)
    assert "add --bias" in lines["transformers"]
    assert "add --bias" in lines["book"]
    assert lines["nanodo"] == "skipped: failed: out of memory"


def test_a_contestant_that_dies_or_that_has_no_gpu_is_a_line(nanodo, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # also where the machine has a GPU
    folder = nanodo("import os\nos._exit(9)")
    done = run("peers", *TINY, "--device", "gpu", "--contestants", "slm_jax,nanodo", "--nanodo", folder)
    assert "nanodo        skipped: failed: its process ended with status 9" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("slm_jax")]
    assert "skipped: JAX finds no GPU here; pip install" in line
    assert "Error" not in done.stdout + done.stderr

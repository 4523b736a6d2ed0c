"""What must hold of the check of the real weights: it says yes to the expected figures only, and what is missing."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import load

from slm_jax.model import GPTConfig, GPTModel, param_shapes
from slm_jax.weights.writer import save_gpt2

CFG = GPTConfig(emb_dim=8, n_heads=2, n_layers=1, context_length=256)


@pytest.fixture(scope="module")
def reference():
    return load("gpt2_reference")


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), param_shapes(CFG))


@pytest.fixture(scope="module")
def weights(params, tmp_path_factory):
    return str(save_gpt2(CFG, params, tmp_path_factory.mktemp("weights") / "random"))


@pytest.fixture
def _gpt2_tokenizer(reference):
    try:
        reference.get_tokenizer("gpt2").encode("a")
    except reference.InputError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.usefixtures("named_data", "_gpt2_tokenizer")
def test_random_weights_are_distinguished_from_the_real_ones(reference, weights, capsys, monkeypatch):
    assert reference.main(["--model", weights]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["3.75475" in lines[0], "3.55962" in lines[1], "importance of your work" in lines[2]] == [True] * 3
    assert lines[-1] == "NOT as expected"

    losses = [float(line.split(": ")[1].split(",")[0]) for line in lines[:2]]
    text = ast.literal_eval(lines[2].split(": ", 1)[1].split(", expected ")[0])
    monkeypatch.setattr(reference, "EXPECTED_LOSS", dict(zip(reference.EXPECTED_LOSS, losses, strict=True)))
    assert reference.main(["--model", weights]) == 1
    monkeypatch.setattr(reference, "EXPECTED_TEXT", text)
    assert reference.main(["--model", weights]) == 0


@pytest.mark.slow
def test_the_loss_is_that_of_whole_windows(reference, params):
    ids = np.random.default_rng(1).integers(0, CFG.vocab_size, 2 * 256 + 100)
    windows = ids[: 2 * 256].reshape(2, 256)
    targets = ids[1 : 2 * 256 + 1].reshape(2, 256)
    logits = GPTModel(CFG).apply({"params": params}, jnp.array(windows))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    np.testing.assert_allclose(reference.window_loss(GPTModel(CFG), params, ids.tolist()), expected, rtol=1e-5)


@pytest.mark.usefixtures("named_data")
def test_a_model_that_cannot_be_gpt2_is_refused(reference, capsys, tmp_path, params):
    cfg = GPTConfig(emb_dim=8, n_heads=2, n_layers=1, context_length=256, vocab_size=100)
    small = {**params, "tok_emb": {"embedding": params["tok_emb"]["embedding"][:100]}}
    assert reference.main(["--model", str(save_gpt2(cfg, small, tmp_path / "small"))]) == 2
    assert "50257" in capsys.readouterr().err

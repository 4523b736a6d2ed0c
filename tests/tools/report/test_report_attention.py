"""Attention maps: every head is shown, in words too, and a large model's page stays small."""

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread
from reports import Page, make_run, train

from slm_jax.errors import InputError
from slm_jax.tokenizer import BPETokenizer, CharTokenizer
from slm_jax.tools.report import page as pages
from slm_jax.tools.report.attention import Maps, encode, to_png
from slm_jax.tools.report.record import read_records


def test_the_maps_of_a_large_model(tmp_path, monkeypatch):
    weights = np.random.default_rng(0).dirichlet(np.ones(20), (6, 6, 20)).astype(np.float32)
    weights[2, 3, -1] = np.eye(20)[4]
    tokens = ["<b>", " a", "\n", "\ufffd", "a token", *"abcdefghijklmno"]
    monkeypatch.setattr(pages, "read_maps", lambda *_: Maps(7, tokens, 33, weights, n_layers=12, n_heads=25))
    (record,) = read_records([str(make_run(tmp_path / "a", [train(1)]))])
    page = Page(pages.write_page(record)).check_whole()
    assert "the first 6 of 12 layers and 6 of 25 heads" in page.text
    assert ", in the first 20 of 33 tokens of a text." in page.text
    assert page.elements.count("image") == 36
    described = "attention weights of block 2, head 3: the last token gives 100% to token 4, a·token"
    assert described in page.values("alt")
    assert described in page.values("aria-label")
    assert {"<b>", "·a", "⏎", "a·token"} <= set(page.texts)
    assert len(page.html) < 400_000


def test_a_picture_has_a_pixel_a_weight():
    address = to_png(np.array([[1.0, 0.0], [0.25, np.nan]], np.float32))
    pixels = imread(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert pixels.shape == (2, 2, 4)
    assert pixels[..., 3].tolist()[0] == [1, 0]
    assert 0 < pixels[1, 0, 3] < 1
    assert pixels[1, 1, 3] == 0


def test_a_sample_is_shown_without_what_cannot_be_encoded():
    tokenizer = CharTokenizer().build_vocab("abc")
    assert encode(tokenizer, None, "xaybzc") == tokenizer.encode("abc")
    with pytest.raises(InputError, match="text: character 'x'"):
        encode(tokenizer, "xa", "abc")


def test_a_sample_may_begin_with_the_end_of_a_text():
    tokenizer = BPETokenizer.train("the cat sat on the mat. " * 20, vocab_size=280)
    sample = [tokenizer.eot_id, *tokenizer.encode("the cat sat")]
    assert encode(tokenizer, None, tokenizer.decode(sample)) == sample
    with pytest.raises(InputError, match="text: "):
        encode(tokenizer, "<|endoftext|>", "abc")

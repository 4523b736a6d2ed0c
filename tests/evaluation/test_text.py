"""What must hold of a text's loss: each token but the first counts once, after all that its window shows of it."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from refusals import refused

from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.corpus import load_corpus
from slm_jax.data.token_file import write_token_file
from slm_jax.errors import InputError
from slm_jax.evaluation.logprobs import Scorer, evaluate_source, perplexity, text_loss
from slm_jax.model import GPTConfig, GPTModel, init_params, param_shapes
from slm_jax.tokenizer import CharTokenizer

CONTEXT, VOCAB = 20, 12
TOKENS = np.random.default_rng(2).integers(0, VOCAB, 90).astype(np.uint16)


def windowed(n_tokens, context_length, stride):
    """By the definition: each target, and where the first window that has it starts."""
    return [(target, stride * max(0, math.ceil((target - context_length) / stride))) for target in range(1, n_tokens)]


@pytest.mark.parametrize(
    ("n_tokens", "context_length", "stride"),
    [(90, 20, 20), (90, 20, 7), (60, 20, 19), (12, 20, 4), (2, 1, 1)],
)
def test_each_target_counts_once_after_what_its_first_window_shows(transformer, n_tokens, context_length, stride):
    tokens = TOKENS[:n_tokens]
    expected = -sum(
        transformer.next_logprobs(tokens[start:target])[tokens[target]]
        for target, start in windowed(n_tokens, context_length, stride)
    )
    found = text_loss(transformer.scorer(batch_size=3), tokens, context_length=context_length, stride=stride)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_batch_size_does_not_matter_one_shape_is_compiled_and_windows_do_not_overlap_by_default(
    transformer, shapes
):
    losses = []
    for batch_size in (1, 4, 64):
        shapes.clear()
        losses.append(text_loss(transformer.scorer(batch_size=batch_size), TOKENS, stride=9))
        assert len(set(shapes)) == 1
    assert max(losses) - min(losses) < 1e-6 * 89
    shapes.clear()
    scorer = transformer.scorer()
    default = text_loss(scorer, TOKENS)  # windows do not overlap
    assert default == text_loss(scorer, TOKENS, context_length=CONTEXT, stride=CONTEXT)
    assert shapes[0] == (5, CONTEXT)  # 89 targets
    assert abs(text_loss(scorer, TOKENS, stride=1) - default) > 0.1


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_whole_vocabulary():
    cfg = GPTConfig(
        vocab_size=64, context_length=8, emb_dim=8, n_heads=1, n_layers=1, tie_weights=False, unpadded_vocab_size=50
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(cfg))
    loss = text_loss(Scorer(GPTModel(cfg), params, CharTokenizer("ab")), np.arange(41))
    assert loss == pytest.approx(40 * math.log(64), rel=1e-6)  # padding ids are in the softmax
    assert perplexity(1000.0) == math.inf


@pytest.fixture
def scorer():
    """A tokenizer of characters, and a model for it."""
    tokenizer = CharTokenizer().build_vocab("abcdefgé \n")
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, context_length=8, emb_dim=8, n_heads=1, n_layers=1)
    return Scorer(GPTModel(cfg), jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)), tokenizer)


@pytest.fixture
def text_source(tmp_path):
    (tmp_path / "1.txt").write_text("abc é gé<|endoftext|>fed cab bad" * 3, encoding="utf-8")
    (tmp_path / "2.txt").write_text("dada geg\n" * 9, encoding="utf-8")
    return f"text:{tmp_path / '*.txt'}"


@pytest.fixture
def token_source(tmp_path):
    np.array([1, 2, 3, 4, 5] * 30 + [6] * 13, "<u2").tofile(tmp_path / "ids.bin")
    return f"tokens:{tmp_path / 'ids.bin'}"


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_splits_are_those_of_pretraining(scorer, text_source, token_source, kind):
    source = text_source if kind == "text" else token_source
    corpus = load_corpus(DataConfig(source=source, validation_fraction=0.3), TokenizerConfig(), saved=scorer.tokenizer)
    for split in ("train", "validation"):
        tokens = getattr(corpus, split)
        result = evaluate_source(scorer, source, split=split, validation_fraction=0.3, stride=5)
        assert result["n_targets"] == tokens.size - 1
        assert result["loss"] * (tokens.size - 1) == pytest.approx(text_loss(scorer, tokens, stride=5), rel=1e-6)
    if kind == "text":
        n_bits = result["loss"] * result["n_targets"] / math.log(2)
        assert result["n_bytes"] == pytest.approx(corpus.bytes_per_token * corpus.validation.size)
        assert result["bits_per_byte"] == pytest.approx(n_bits / result["n_bytes"])
    else:
        assert result["n_bytes"] is result["bits_per_byte"] is None


def test_the_whole_of_a_source_has_the_end_of_text_between_documents(scorer, text_source):
    documents = ["abc é gé", *["fed cab badabc é gé"] * 2, "fed cab bad", "dada geg\n" * 9]
    ids = [scorer.tokenizer.encode(document) for document in documents]
    joined = np.array([id_ for document in ids for id_ in [scorer.tokenizer.eot_id, *document]][1:])
    result = evaluate_source(scorer, text_source)
    assert result["loss"] * (joined.size - 1) == pytest.approx(text_loss(scorer, joined), rel=1e-6)
    assert result["n_bytes"] == sum(len(document.encode()) for document in documents)
    assert (result["split"], result["context_length"], result["stride"]) == ("all", 8, 8)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS, {"stride": 0}, "stride is 0; expected 1 to the context length of 20"),
        (TOKENS, {"context_length": 21}, "context_length is 21"),
        (TOKENS[:1], {}, "1 tokens; expected at least 2"),
        (np.array([3, 12, 1]), {}, "token 1 has id 12, outside the model's vocabulary of 12"),
        (np.array([3, -1]), {}, "id -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(transformer, tokens, options, message):
    with pytest.raises(InputError, match=message):
        text_loss(transformer.scorer(), tokens, **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("empty", {}, "empty text"),
        ("foreign", {}, "foreign.txt: character 'z' at offset 1"),
        ("short", {"split": "validation"}, "split validation.*empty text: 1 tokens"),
        ("absent", {}, "no such file"),
    ],
)
def test_mistakes_with_a_source_are_named(scorer, tmp_path, source, options, message):
    for name, text in (("empty", " \n"), ("foreign", "azb"), ("short", "abcdefg")):
        (tmp_path / f"{name}.txt").write_text(text)
    with refused(message):
        evaluate_source(scorer, f"text:{tmp_path / source}.txt", **options)
    larger = CharTokenizer().build_vocab("ABCDEFGHIJKabcdefg")
    with refused(r"\.txt \(split all\): token \d+ has id \d+, outside the model's vocabulary"):
        evaluate_source(dataclasses.replace(scorer, tokenizer=larger), f"text:{tmp_path / 'short'}.txt")
    with write_token_file(tmp_path / "larger.bin", larger, "") as file:
        file.write([1, 2, 3])
    with refused(r"larger\.bin: made with the char tokenizer .*, expected the char tokenizer"):
        evaluate_source(scorer, f"tokens:{tmp_path / 'larger.bin'}")

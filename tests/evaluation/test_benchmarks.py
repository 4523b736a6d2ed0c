"""What must hold of LAMBADA and HellaSwag: texts, choices and figures as the standard scoring has them."""

import json
import math

import numpy as np
import pytest
from refusals import refused

from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.benchmarks import hellaswag, lambada, read_examples
from slm_jax.evaluation.logprobs import Scorer
from slm_jax.tokenizer import BPETokenizer, CharTokenizer

TOKENIZER = CharTokenizer().build_vocab("abcdefghij ")  # with the end of text 12 ids


@pytest.fixture
def jsonl(tmp_path):
    """Write objects, one a line; return the source."""

    def write(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return f"jsonl:{tmp_path / 'rows.jsonl'}"

    return write


@pytest.fixture
def texts(monkeypatch):
    """The texts of the pairs that are scored, context and continuation."""
    seen = []

    def spy(_, pairs):
        seen.extend((bpe.decode(context), bpe.decode(continuation)) for context, continuation in pairs)
        return -np.arange(1.0, len(pairs) + 1), np.zeros(len(pairs), bool)

    monkeypatch.setattr(Scorer, "score", spy)
    bpe = BPETokenizer()  # bytes: what goes in can be read again
    return seen


def test_lambada_s_perplexity_is_the_table_s(bigrams, jsonl):
    rows = ["ab cd ef", "abc de g", "j", "a b c d e f g h i j a b c d e f"]
    scores = []
    for text in rows:
        last = TOKENIZER.encode(" " + text.split(" ")[-1])
        before = TOKENIZER.encode(text)[: -len(last)] or [TOKENIZER.eot_id]
        scores.append(bigrams.score([*before, *last], len(last)))
    result = lambada(bigrams.scorer(TOKENIZER), jsonl(*({"text": text} for text in rows)))
    assert result["perplexity"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-5)
    assert (result["n_examples"], result["n_truncated"]) == (4, 1)


def test_a_hit_is_a_last_word_of_likeliest_tokens_only(bigrams_of, jsonl):
    logits = np.zeros((12, 12))
    for before, after in ("b ", " c", "cd"):
        logits[TOKENIZER.encode(before)[0], TOKENIZER.encode(after)[0]] = 1.0
    table = bigrams_of(logits)
    rows = ["ab c", "ab cd", "j b cd", "ab ce", "ab dd", "abc cd"]  # the last: no space is likely after c
    result = lambada(table.scorer(TOKENIZER), jsonl(*({"text": text} for text in rows)))
    assert result["acc"] == 3 / 6
    assert result["acc_stderr"] == pytest.approx(math.sqrt(0.25 / 5))


def test_lambada_s_target_is_the_last_word_with_its_space(transformer, jsonl, texts):
    passages = ["I saw it. “No,” she said\nto Tom", "two  spaces", "one", " end \n"]
    lambada(transformer.scorer(BPETokenizer()), jsonl(*({"text": text} for text in passages)))
    assert texts == [
        ("I saw it. “No,” she said\nto", " Tom"),
        ("two", "  spaces"),
        ("<|endoftext|>", " one"),
        ("<|endoftext|>", " end"),
    ]


def example(**changes):
    row = {"activity_label": "ab", "ctx_a": "cd", "ctx_b": "e", "endings": ["f", "g"], "label": 0}
    return {key: value for key, value in {**row, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("row", "context", "endings"),
    [
        (  # ActivityNet
            example(activity_label="Roof", ctx_a="A man sits.", ctx_b="he", endings=[" is up. ", "eats"]),
            "Roof: A man sits. He",
            [" is up.", " eats"],
        ),
        (  # WikiHow
            example(
                activity_label="Home and Garden",
                ctx_a="[header] How to rake [title] Get a rake. [step] Walk.",
                ctx_b="",
                endings=["[substeps] Buy [x]one.", "Rake [title] Leaves  [step] all."],
            ),
            "Home and Garden: How to rake. Get a rake. Walk.",
            ["  Buy one.", " Rake. Leaves  all."],  # its two spaces are the harness's
        ),
        (example(ctx_b="THE MAN Ran"), "ab: cd The man ran", [" f", " g"]),
        (example(ctx="cd the man", ctx_a=None, ctx_b=None), "ab: cd the man", [" f", " g"]),
        (example(ctx="cd the man", ctx_b="the man"), "ab: cd The man", [" f", " g"]),
    ],
)
def test_hellaswag_s_texts_are_the_harness_s(transformer, jsonl, texts, row, context, endings):
    hellaswag(transformer.scorer(BPETokenizer()), jsonl(row))
    assert texts == [(context, ending) for ending in endings]


def test_acc_is_by_the_sum_and_acc_norm_by_the_character(bigrams_of, jsonl):
    tokenizer = CharTokenizer().build_vocab("abcdefgE: ")
    logits = np.zeros((11, 11))
    f = tokenizer.encode("f")[0]
    logits[f, f] = 3.0  # a run of f is likely, its first one no more than anything
    table = bigrams_of(logits)
    anything = -math.log(11)
    g, run_of_f = 2 * anything, 2 * anything + 7 * table.logprobs[f, f]  # each after a space
    assert g > run_of_f
    assert g / 1 < run_of_f / 8
    rows = [example(endings=["g", "ffffffff"], label=label) for label in (0, "1", "0", 0)]  # also as text
    result = hellaswag(table.scorer(tokenizer, 3), jsonl(*rows))
    assert (result["acc"], result["acc_norm"], result["n_examples"], result["n_truncated"]) == (0.75, 0.25, 4, 0)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert result["acc_norm_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_the_harness_s_length_has_no_leading_space(transformer, jsonl, monkeypatch):
    for second, right in ((-2.1, 1), (-1.9, 0)):  # per character -1/1 and -2.1/2; with the space -1/2 and -2.1/3
        scores = np.array([-1.0, second]), np.zeros(2, bool)
        monkeypatch.setattr(Scorer, "score", lambda *_, scores=scores: scores)
        row = example(endings=["f", "gg"], label=0)
        assert hellaswag(transformer.scorer(BPETokenizer()), jsonl(row))["acc_norm"] == right
    row = example(endings=["[step]", "ab"], label=1)  # an ending that is only brackets is never the choice
    assert hellaswag(transformer.scorer(BPETokenizer()), jsonl(row))["acc_norm"] == 1


def test_one_example_has_no_standard_error_and_is_truncated_on_the_left(bigrams, jsonl):
    long = lambada(bigrams.scorer(TOKENIZER), jsonl({"text": "ab " * 50 + "cd"}))
    short = lambada(bigrams.scorer(TOKENIZER), jsonl({"text": "ab cd"}))
    assert (long["n_truncated"], short["n_truncated"]) == (1, 0)
    assert long["perplexity"] == pytest.approx(short["perplexity"], rel=1e-5)
    assert short["acc_stderr"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": "a"}, "line 2: no field 'text' .*only texts"),
        ({"text": 3}, "line 2: text is 3; expected text"),
        ({"text": "a z"}, "line 2: character 'z' at offset 2"),
    ],
)
def test_mistakes_in_lambada_are_named_by_line(bigrams, jsonl, row, message):
    with pytest.raises(InputError, match=f"rows.jsonl {message}"):
        lambada(bigrams.scorer(TOKENIZER), jsonl({"text": "a b"}, row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ctx_b": None}, "no field 'ctx_b'"),
        ({"ctx_a": ["x"]}, r"ctx_a is \['x'\]; expected text"),
        ({"endings": ["f"]}, "endings is .*; expected a list of at least two texts"),
        ({"label": -1}, "has no label"),
        ({"label": 2}, "label is 2; expected a number from 0 to 1"),
        ({"ctx_a": "xyz"}, "character 'x'"),
    ],
)
def test_mistakes_in_hellaswag_are_named_by_line(bigrams, jsonl, changes, message):
    tokenizer = CharTokenizer().build_vocab("abcdefgE: ")
    with refused(f"rows.jsonl line 2: .*{message}"):
        hellaswag(bigrams.scorer(tokenizer), jsonl(example(), example(**changes)))


def test_a_limit_leaves_the_rest_unread(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\nnot JSON\n')
    assert [row.fields for row in read_examples(f"jsonl:{path}", "lambada", 2)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(InputError, match="line 4: not JSON"):
        read_examples(f"jsonl:{path}", "lambada", None)
    path.write_text("\n")
    (tmp_path / "a.txt").write_text("A text.")
    for source, message in (
        (f"jsonl:{path}", r"rows\.jsonl is empty"),
        (f"text:{tmp_path}/a.txt", "expected .*jsonl:"),
    ):
        with pytest.raises(InputError, match=message):
            read_examples(source, "lambada", None)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Data sets under the real names, written as TensorFlow Datasets writes them."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from prepared import build

    text = tfds.features.Text()
    more = {"source_id": text, "split_type": text}
    roof = {"context": "A. b", "activity_label": "Roof", "source_id": "activitynet~1", "split_type": "indomain"}
    build(tmp_path, "lambada", {"passage": text}, {"test": [{"passage": f"Zoë says {i}\n"} for i in range(3)]})
    endings = tfds.features.Sequence(text)
    features = {"context": text, "endings": endings, "activity_label": text, "label": np.int32, **more}
    splits = {
        "validation": [{**roof, "endings": ["é", "g"], "label": 1}],
        "test": [{**roof, "endings": ["f", "g"], "label": -1}],
    }
    build(tmp_path, "hellaswag", features, splits, "1.1.0")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


def test_prepared_data_sets_give_what_json_would(prepared):
    rows = read_examples("tfds:lambada", "lambada", None)
    assert sorted(row.fields["text"] for row in rows) == ["Zoë says 0\n", "Zoë says 1\n", "Zoë says 2\n"]
    assert read_examples("tfds:lambada:test", "lambada", 2) == rows[:2]
    (row,) = read_examples("tfds:hellaswag", "hellaswag", None)
    assert {"ctx": "A. b", "endings": ["é", "g"], "activity_label": "Roof", "label": 1}.items() <= row.fields.items()
    assert json.loads(json.dumps(row.fields)) == row.fields
    assert read_examples("tfds:hellaswag:test", "hellaswag", None)[0].where == "tfds:hellaswag:test example 0"
    with pytest.raises(MissingInputError, match="tfds:lambada:nope: Unknown split 'nope'"):
        read_examples("tfds:lambada:nope", "lambada", None)

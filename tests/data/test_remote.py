"""What must hold of token files in object storage: they are read as local ones, and copied once."""

from types import SimpleNamespace

import numpy as np
import pytest
from buckets import fake_bucket
from refusals import refused

from slm_jax.data import remote
from slm_jax.data.config import DataConfig, TokenizerConfig
from slm_jax.data.corpus import load_corpus
from slm_jax.data.sources import parse_source
from slm_jax.data.token_file import open_token_file, write_token_file
from slm_jax.errors import MissingInputError
from slm_jax.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer().build_vocab("abcdefghij")
URL = "gs://bucket/data/ids.bin"


@pytest.fixture
def file(tmp_path):
    with write_token_file(tmp_path / "ids.bin", TOKENIZER, "text:a.txt") as file:
        file.write(np.arange(1000, dtype=np.uint16) % 11)
    return tmp_path / "ids.bin"


@pytest.fixture
def bucket(file, tmp_path, monkeypatch):
    """A bucket with the file; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fake_bucket() as bucket:
        upload(bucket, file)
        yield bucket


def upload(bucket, file):
    bucket.fill({f"data/{path.name}": path.read_bytes() for path in file.parent.glob("ids*")})


def copies(tmp_path):
    return sorted((tmp_path / "cache" / "slm_jax" / "tokens").glob("*/ids.bin"))


def test_it_is_trained_on_as_the_local_file(bucket, file):
    here, there = (load_corpus(DataConfig(source=f"tokens:{name}"), TokenizerConfig()) for name in (file, URL))
    assert there.fingerprint() == here.fingerprint()
    np.testing.assert_array_equal(there.train, here.train)
    assert isinstance(there.train, np.memmap)
    assert there.tokenizer.to_dict() == here.tokenizer.to_dict()


def test_it_is_copied_once_and_again_after_a_change(bucket, file, tmp_path, capsys):
    for _ in range(2):
        assert len(open_token_file(URL).tokens) == 1000
    assert capsys.readouterr().err.count("copying") == 1
    first = copies(tmp_path)
    with write_token_file(file, TOKENIZER, "text:a.txt") as writer:
        writer.write(np.arange(1000, dtype=np.uint16) % 10)
    upload(bucket, file)
    assert open_token_file(URL).tokens.max() == 9
    assert len(first) == 1
    assert len(copies(tmp_path)) == 2


def test_bare_ids_are_copied_too_and_again_after_a_change(bucket, tmp_path):
    bucket.drop("data/ids.bin.json")
    for ids in ([1, 2, 3], [4, 5, 6]):
        bucket.fill({"data/ids.bin": np.array(ids, "<u2").tobytes()})
        opened = open_token_file(URL)
        assert opened.tokens.tolist() == ids
        assert opened.tokenizer is None


def test_shards_are_copied_all_or_none(bucket, file, tmp_path):
    with write_token_file(file, TOKENIZER, "text:a.txt", shard_tokens=400) as writer:
        writer.write(np.arange(1000, dtype=np.uint16) % 7)
    upload(bucket, file)
    bucket.drop("data/ids.bin")
    bucket.fill({"data/ids.bin.json": (file.parent / "ids.bin.json").read_bytes()})
    last = bucket.objects()["data/ids-00002.bin"]
    bucket.drop("data/ids-00002.bin")
    with refused("does not exist, or not all of it", MissingInputError):
        open_token_file(URL)
    assert not list((tmp_path / "cache/slm_jax/tokens").glob("*/"))
    bucket.fill({"data/ids-00002.bin": last})
    there, here = open_token_file(URL), open_token_file(file)
    assert there.sha256 == here.sha256
    np.testing.assert_array_equal(there.tokens[:], here.tokens[:])


def test_the_size_of_the_vocabulary_is_known_without_a_copy(bucket, tmp_path):
    assert parse_source(f"tokens:{URL}").vocab_size() == TOKENIZER.vocab_size
    assert not copies(tmp_path)
    bucket.drop("data/ids.bin.json")
    assert parse_source(f"tokens:{URL}").vocab_size() is None


def test_a_damaged_file_is_refused_and_not_kept(bucket, tmp_path):
    good = bucket.objects()["data/ids.bin"]
    for bad, message in ((b"x" * len(good), "SHA-256"), (good[:-2], "1998 bytes")):
        bucket.fill({"data/ids.bin": bad})
        with refused(f"^{URL}: .*{message}"):
            open_token_file(URL)
        assert not copies(tmp_path)
    bucket.fill({"data/ids.bin": good})
    assert len(open_token_file(URL).tokens) == 1000


def test_what_cannot_be_copied_is_refused(bucket, tmp_path, monkeypatch):
    with refused("gs://bucket/other.bin: does not exist", MissingInputError):
        open_token_file("gs://bucket/other.bin")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with refused("set XDG_CACHE_HOME to a folder with more room"):
        open_token_file(URL)
    monkeypatch.setattr(bucket, "cat_file", lambda *_: (_ for _ in ()).throw(OSError("Forbidden: no\naccess")))
    with refused(f"{URL}: cannot be read: Forbidden: no access"):
        open_token_file(URL)
    assert not copies(tmp_path)

"""What must hold of text files: however they are cut and compressed, the same text, or one line that says why not."""

import gzip
import random
import re
from pathlib import Path

import pyarrow as pa
import pytest
from refusals import refused

from slm_jax.data import text_files
from slm_jax.data.sources import parse_source
from slm_jax.data.text_files import iter_text, read_text
from slm_jax.errors import MissingInputError

TEXT = "\ufeffcafé\r\n\ttwo\n\rthree\r\r\n𝒳 und\u2028so\r"  # the mark, and every kind of line end
READ = "café\n\ttwo\n\rthree\r\n𝒳 und\u2028so\r"


def texts(source: str) -> list[str]:
    return ["".join(pieces) for pieces in parse_source(source).texts()]


def zst(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


COMPRESS = {".txt": bytes, ".gz": gzip.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 100])
def test_text_is_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, suffix, size):
    monkeypatch.setattr(text_files, "PIECE", size)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT.encode()))
    pieces = list(iter_text(path))
    assert "".join(pieces) == READ
    assert all(0 < len(piece) <= size + 1 for piece in pieces)  # a held CR may join


def test_pieces_are_bounded_and_all_bytes_are_reported(tmp_path):
    """Also of a file that is compressed a thousandfold."""
    text = "a line of text\n" * 400_000
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(compress(text.encode()))
        reported = []
        pieces = list(iter_text(path, reported.append))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 1 << 20
        assert sum(reported) == path.stat().st_size
        assert min(reported) >= 0


def test_files_that_were_compressed_in_parts_are_read_whole(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a{suffix.upper()}"
        path.write_bytes(COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"two"))
        assert read_text(path) == "one two"


def test_an_empty_file_has_no_pieces(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a{suffix}"
        path.write_bytes(compress(b""))
        assert list(iter_text(path)) == []


def words(n: int) -> bytes:
    rng = random.Random(0)
    return b" ".join(b"%x" % rng.getrandbits(32) for _ in range(n))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:10] + b"\xff" * 20 + data[30:],
        lambda data: data + b"something else",
        lambda data: words(3),
    ],
)
def test_a_damaged_compressed_file_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](words(300_000))))
    with refused(r"a\.txt\.(gz|zst): the compressed file is truncated or damaged after"):
        read_text(path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_bytes_that_are_not_utf8_are_named_in_any_piece(tmp_path, monkeypatch, suffix, size):
    monkeypatch.setattr(text_files, "PIECE", size)
    path = tmp_path / f"a{suffix}"
    for text, expected in [
        (b"\xef\xbb\xbfone\ncaf\xe9 two", r"byte 10 \(line 2\) is 0xe9"),
        ("é\n".encode() * 50 + b"\xf0\x9f\x98", r"byte 150 \(line 51\) is 0xf0"),
        (b"a\n\n\xff", r"byte 3 \(line 3\) is 0xff"),
    ]:
        path.write_bytes(COMPRESS[suffix](text))
        with refused(f"not UTF-8: {expected}.*iconv"):
            read_text(path)


def test_other_encodings_and_binary_files_are_refused_early(tmp_path):
    path = Path(tmp_path / "a.gz")
    path.write_bytes(gzip.compress("plain words".encode("utf-16")))
    with refused(r"is UTF-16, expected UTF-8.*iconv"):
        read_text(path)
    path.write_bytes(gzip.compress(bytes(5_000_000)))
    with refused("1048576 of 1048576 characters are NUL"):
        read_text(path)


# Which files


def test_each_file_is_a_text_in_the_order_of_paths(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/skip.md", "book [1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}/?.txt") == ["a.txt", "b.txt"]
    assert texts(f"text:{tmp_path}/**/?.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert len(texts(f"text:{tmp_path}/**")) == 5  # folders match `**`, too, and are skipped
    assert texts(f"text:{tmp_path}/book [1].txt") == ["book [1].txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert texts("text:~/a.txt") == texts("text:~/a*.txt") == texts("text:a.txt") == ["a.txt"]


@pytest.mark.parametrize("rest", ["nothing.txt", "no*.txt", "nowhere/**/*.txt", "link.txt"])
def test_missing_files_are_named(tmp_path, monkeypatch, rest):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with refused(re.escape(rest), MissingInputError) as error:
        texts(f"text:{rest}")
    assert str(tmp_path) in str(error.value)


def test_folders_and_unreadable_files_are_named(tmp_path, monkeypatch):
    with refused(r"is a folder; expected files, such as .*\*\*"):
        texts(f"text:{tmp_path}")
    with refused("File name too long"):
        texts("text:" + "x" * 300)
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so no real file will do
    with refused(r"a\.txt: cannot be read: Permission denied"):
        texts(f"text:{tmp_path}/a.txt")

import hashlib
import os
import socket
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from slm_jax.data import builtin, named, sources
from slm_jax.data.documents import read_documents
from slm_jax.data.named import NAMED_FILES, named_file
from slm_jax.data.sources import is_token_source, parse_source
from slm_jax.errors import InputError, MissingInputError


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# The source string


def test_a_source_is_a_kind_and_the_rest():
    assert parse_source("text:books/*.txt") == ("text", "books/*.txt")
    assert parse_source("text:C:\\books\\a.txt") == ("text", "C:\\books\\a.txt")
    assert parse_source("builtin:python-docs") == ("builtin", "python-docs")
    assert is_token_source("tokens:train.bin")
    assert not is_token_source("text:train.bin")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mytext.txt", "text:mytext.txt"),
        ("data/train.bin", "tokens:data/train.bin"),
        ("tinyshakespeare", "named:tinyshakespeare"),
        ("python-docs", "builtin:python-docs"),
        ("C:\\books\\a.txt", "text:C:\\books\\a.txt"),
        ("txt:a.txt", "text:a.txt"),
        ("Named:the-verdict", "named:the-verdict"),
        ("https://example.com/a.txt", "no kind 'https'"),
        ("text:", "text:GLOB"),
        ("", "named:NAME"),
    ],
)
def test_a_wrong_source_string_says_what_is_right(source, expected):
    with pytest.raises(InputError) as error:
        parse_source(source)
    assert expected in message(error)
    if source != "text:":
        assert all(form in message(error) for form in sources.KINDS.values())


# text:


def test_each_file_is_a_document_in_the_order_of_paths(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/skip.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}", encoding="utf-8")
    assert read_documents(f"text:{tmp_path}/*.txt") == ["text of a.txt", "text of b.txt"]
    assert read_documents(f"text:{tmp_path}/**/*.txt") == ["text of a.txt", "text of b.txt", "text of sub/c.txt"]
    assert len(read_documents(f"text:{tmp_path}/**")) == 4  # folders match `**`, too, and are passed over


def test_home_and_the_current_folder_are_understood(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("hello")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_documents("text:~/mine.txt") == read_documents("text:~/m*.txt") == read_documents("text:mine.txt")


def test_a_name_with_brackets_is_found(tmp_path):
    (tmp_path / "book [1].txt").write_text("one")
    assert read_documents(f"text:{tmp_path}/book [1].txt") == ["one"]


def test_text_is_left_alone_but_for_the_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf  caf\xc3\xa9\r\n\ttwo\n\n<|endoftext|>\xef\xbb\xbf \r\n")
    assert read_documents(f"text:{path}") == ["  café\n\ttwo\n\n<|endoftext|>\ufeff \n"]


def test_empty_files_are_left_out_and_all_empty_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\t\n")
    with pytest.raises(InputError, match="empty text") as error:
        read_documents(f"text:{tmp_path}/*.txt")
    assert str(tmp_path) in message(error)
    (tmp_path / "c.txt").write_text("words")
    assert read_documents(f"text:{tmp_path}/*.txt") == ["words"]


@pytest.mark.parametrize("rest", ["nothing.txt", "no*.txt", "nowhere/**/*.txt"])
def test_no_matching_file(tmp_path, monkeypatch, rest):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingInputError) as error:
        read_documents(f"text:{rest}")
    assert rest in message(error)
    assert str(tmp_path) in message(error)


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(InputError, match="is a folder") as error:
        read_documents(f"text:{tmp_path}")
    assert f"text:{tmp_path}/**/*.txt" in message(error).replace("\\", "/")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ncaf\xe9 two")
    with pytest.raises(InputError) as error:
        read_documents(f"text:{path}")
    assert str(path) in message(error)
    assert "byte 10 (line 2) is 0xe9" in message(error)
    assert "iconv" in message(error)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_and_binary_files_are_refused(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes("plain words".encode(encoding))
    with pytest.raises(InputError, match=r"UTF-16.*iconv" if encoding == "utf-16" else "NUL"):
        read_documents(f"text:{path}")


def test_an_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("secret")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so a real one cannot be made
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: Permission denied"):
        read_documents(f"text:{tmp_path}/a.txt")
    with pytest.raises(InputError, match="File name too long"):
        read_documents("text:" + "x" * 5000)


def test_a_link_to_nothing_is_a_missing_file(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(MissingInputError, match=r"a\.txt: no such file"):
        read_documents(f"text:{tmp_path}/*.txt")


def test_token_files_and_unknown_builtins_are_not_text():
    with pytest.raises(InputError, match="holds token ids"):
        read_documents("tokens:train.bin")
    with pytest.raises(InputError, match="builtin:python-docs"):
        read_documents("builtin:python-doc")


# builtin:


def test_the_builtin_text_is_plenty_and_always_the_same():
    first = read_documents("builtin:python-docs")
    builtin._documents.cache_clear()
    assert read_documents("builtin:python-docs") == first
    whole = "\n\n".join(first)
    assert 800_000 < len(whole) < 4_000_000
    assert len(whole.encode("utf-8")) < 1.02 * len(whole)  # English
    assert 'The "while" statement is used for repeated execution' in whole
    assert all(document == document.strip() and document for document in first)


def test_the_builtin_text_does_not_repeat_itself():
    documents = read_documents("builtin:python-docs")
    whole = "\n\n".join(documents)
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 3000
    assert not [document[:60] for document in documents if len(document) > 200 and whole.count(document) > 1]
    documents.clear()
    assert read_documents("builtin:python-docs")


def test_only_prose_is_kept_each_paragraph_on_one_line():
    prose = "A paragraph of several lines that\n    says something in words."
    others = ["short.", "no capital letter at its start, so it is a part of something.", ">>> f(1) + g(2) ** h(3, 4)"]
    table = "Name | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11."
    text = "\n\n".join([prose, *others, table, prose])
    assert builtin._prose(text, set()) == "A paragraph of several lines that says something in words."
    assert builtin._prose(text, {" ".join(prose.split())}) == ""


def test_modules_are_read_without_being_imported(tmp_path, monkeypatch):
    long = "A sentence that is long enough to be kept, since it has many words in it."
    module = f'''"""{long}"""
raise SystemExit
def f():
    """Short."""
class C:
    def g(self):
        """G: {long}"""
'''
    for name in ("loud.py", "pkg/__init__.py", "_private.py", "test/t.py", "site-packages/s.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(module.replace("sentence", name))
    (tmp_path / "copy.py").write_text((tmp_path / "loud.py").read_text())
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\0\xff")
    (tmp_path / "half.py").write_text(f'"""{long} \\ud800"""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    builtin._documents.cache_clear()
    try:
        loud, package = (long.replace("sentence", name) for name in ("loud.py", "pkg/__init__.py"))
        # loud.py says nothing that copy.py did not
        assert read_documents("builtin:python-docs") == [f"{text}\nG: {text}" for text in (loud, package)]
    finally:
        builtin._documents.cache_clear()


def test_docstrings_are_kept_until_a_module_changes_and_no_cache_is_needed(tmp_path, monkeypatch):
    library, cache = tmp_path / "library", tmp_path / "cache"
    library.mkdir()
    module = library / "module.py"
    module.write_text('"""First."""')
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert builtin._kept_modules(library) == [("module.py", "First.")]
    (kept,) = cache.rglob("*.json")
    kept.write_text('[["module.py", "Kept."]]')
    assert builtin._kept_modules(library) == [("module.py", "Kept.")]
    kept.write_text("damaged")
    assert builtin._kept_modules(library) == [("module.py", "First.")]
    module.write_text('"""Second."""')
    assert builtin._kept_modules(library) == [("module.py", "Second.")]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be written there
    assert builtin._kept_modules(library) == [("module.py", "Second.")]


def test_a_python_without_its_source_still_has_the_topics(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    builtin._documents.cache_clear()
    try:
        assert sum(map(len, read_documents("builtin:python-docs"))) > 100_000
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        builtin._documents.cache_clear()
        with pytest.raises(MissingInputError, match=r"python311\.zip"):
            read_documents("builtin:python-docs")
    finally:
        builtin._documents.cache_clear()


# named:

CONTENT = b"It was the best of times,\nit was the worst of times.\n" * 4000


class Server(ThreadingHTTPServer):
    """Gives `body` for every path; counts the requests."""

    body, status, announced, hits = CONTENT, 200, len(CONTENT), 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.hits += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    """No data folder, an empty cache, no proxy; gives the folder where downloads are kept."""
    for name in ("SLM_JAX_DATA", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slm_jax" / "data"


@pytest.fixture
def server(empty_home, monkeypatch):
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}/verdict.txt")
        yield server
        server.shutdown()
        thread.join()


def point_to(monkeypatch, url: str) -> None:
    entry = NAMED_FILES["the-verdict"]._replace(url=url, sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(NAMED_FILES, "the-verdict", entry)


def test_a_named_file_is_downloaded_once(server, empty_home):
    path = named_file("the-verdict")
    assert path == empty_home / "the-verdict.txt"
    assert path.read_bytes() == CONTENT
    assert read_documents("named:the-verdict") == [CONTENT.decode()]
    assert server.hits == 1
    assert list(empty_home.iterdir()) == [path]


def test_the_cache_is_under_home_by_default(tmp_path, server, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_file("the-verdict") == tmp_path / ".cache" / "slm_jax" / "data" / "the-verdict.txt"


def test_a_damaged_file_in_the_cache_is_replaced(server, empty_home):
    empty_home.mkdir(parents=True)
    (empty_home / "the-verdict.txt").write_bytes(CONTENT[:100])
    assert named_file("the-verdict").read_bytes() == CONTENT


def test_the_data_folder_comes_first_and_must_hold_the_right_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path))
    path = tmp_path / "the-verdict.txt"
    path.write_bytes(CONTENT)
    assert named_file("the-verdict") == path
    path.write_bytes(CONTENT + b"!")
    with pytest.raises(InputError) as error:
        named_file("the-verdict")
    for part in (str(path), hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(CONTENT + b"!").hexdigest()):
        assert part in message(error)
    assert server.hits == 0
    path.unlink()
    assert named_file("the-verdict") != path  # not there: downloaded


def test_other_content_is_refused_and_not_kept(server, empty_home):
    server.body = b"<html>Please log in</html>"
    server.announced = len(server.body)
    with pytest.raises(InputError, match="SHA-256") as error:
        named_file("the-verdict")
    assert not isinstance(error.value, MissingInputError)
    assert NAMED_FILES["the-verdict"].sha256 in message(error)
    assert list(empty_home.iterdir()) == []


def assert_missing(error: pytest.ExceptionInfo[InputError]) -> None:
    for part in (NAMED_FILES["the-verdict"].url, "SLM_JAX_DATA", "the-verdict.txt"):
        assert part in message(error)


def test_a_server_that_says_no(server, empty_home):
    server.status = 404
    with pytest.raises(MissingInputError, match="404") as error:
        named_file("the-verdict")
    assert_missing(error)
    assert list(empty_home.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(server, empty_home, monkeypatch):
    server.body = CONTENT[:1000]  # fewer than announced, then the connection closes
    with pytest.raises(InputError):
        named_file("the-verdict")
    assert list(empty_home.iterdir()) == []

    def interrupted(self, size):
        yield CONTENT[:10]
        raise KeyboardInterrupt

    monkeypatch.setattr(requests.Response, "iter_content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        named_file("the-verdict")
    assert list(empty_home.iterdir()) == []


def test_a_proxy_is_used_where_the_name_is_unknown_here(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    point_to(monkeypatch, "http://no-such-host.invalid/verdict.txt")
    assert named_file("the-verdict").read_bytes() == CONTENT


def test_no_network_is_told_within_five_seconds(empty_home, monkeypatch):
    point_to(monkeypatch, "https://no-such-host.invalid/verdict.txt")
    start = time.monotonic()
    with pytest.raises(MissingInputError) as error:
        read_documents("named:the-verdict")
    assert time.monotonic() - start < 5
    assert_missing(error)
    assert list(empty_home.iterdir()) == []


def test_a_name_lookup_that_hangs_is_given_up(empty_home, monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(60)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    assert named.CONNECT_SECONDS + 0.5 < 5
    monkeypatch.setattr(named, "CONNECT_SECONDS", 0.5)  # so that the test is quick
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    point_to(monkeypatch, "https://hangs.invalid/verdict.txt")
    start = time.monotonic()
    try:
        with pytest.raises(MissingInputError, match=r"no answer from hangs\.invalid") as error:
            named_file("the-verdict")
        assert time.monotonic() - start < 1.5
    finally:
        release.set()
    assert_missing(error)


def test_a_cache_that_cannot_be_written(empty_home, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        named_file("the-verdict")


@pytest.mark.parametrize("name", ["tiny-shakespeare", "the_verdict", "moby-dick"])
def test_an_unknown_name(name):
    with pytest.raises(InputError) as error:
        read_documents(f"named:{name}")
    near = {"tiny-shakespeare": "named:tinyshakespeare?", "the_verdict": "named:the-verdict?"}.get(name, "sms-spam")
    assert near in message(error)


@pytest.mark.parametrize("name", ["sms-spam", "instruction-data"])
def test_labelled_data_is_not_text(name):
    with pytest.raises(InputError, match="labelled data, for fine-tuning") as error:
        read_documents(f"named:{name}")
    assert "named:the-verdict, named:tinyshakespeare" in message(error)


@pytest.mark.parametrize("name", NAMED_FILES)
def test_the_real_files_have_their_pinned_content(name):
    folder = os.environ.get("SLM_JAX_DATA", "")
    if not (folder and (Path(folder) / NAMED_FILES[name].file).is_file()):
        pytest.skip(f"$SLM_JAX_DATA ({folder or 'not set'}) has no {NAMED_FILES[name].file}")
    assert named_file(name).parent == Path(folder)
    characters = {"the-verdict": 20_479, "tinyshakespeare": 1_115_394}
    if name in characters:
        assert [len(text) for text in read_documents(f"named:{name}")] == [characters[name]]


def test_the_table_is_whole():
    for entry in NAMED_FILES.values():
        assert entry.url.startswith("https://")
        assert len(entry.sha256) == 64
        assert entry.licence
    assert named.plain_text_names() == ["the-verdict", "tinyshakespeare"]

"""What must hold of named files: downloaded once, always checked, and nothing half there."""

import hashlib
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from refusals import refused

from slm_jax.data import named
from slm_jax.data.named import NAMED_FILES, named_file
from slm_jax.data.sources import parse_source
from slm_jax.errors import InputError, MissingInputError

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
    assert parse_source("named:the-verdict").read_documents() == [CONTENT.decode()]
    assert server.hits == 1
    assert list(empty_home.iterdir()) == [path]


def test_the_cache_is_under_home_by_default_and_a_damaged_file_there_is_replaced(tmp_path, server, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache" / "slm_jax" / "data" / "the-verdict.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert named_file("the-verdict") == path
    assert path.read_bytes() == CONTENT


def test_the_data_folder_comes_first_and_must_hold_the_right_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path))
    path = tmp_path / "the-verdict.txt"
    path.write_bytes(CONTENT)
    assert named_file("the-verdict") == path
    path.write_bytes(CONTENT + b"!")
    wrong, right = (hashlib.sha256(content).hexdigest() for content in (CONTENT + b"!", CONTENT))
    with refused(f"{path}: SHA-256 is {wrong}, expected {right}"):
        named_file("the-verdict")
    assert server.hits == 0
    path.unlink()
    (tmp_path / "cache").write_text("a file where a folder should be")
    with refused("XDG_CACHE_HOME"):
        named_file("the-verdict")
    (tmp_path / "cache").unlink()
    assert named_file("the-verdict") != path  # not there: downloaded


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"body": CONTENT[:26], "announced": 26}, "gave a file with SHA-256 .* put the file as the-verdict.txt into"),
        ({"status": 404}, "the-verdict.*SLM_JAX_DATA.*not downloadable from http.*404"),
        ({"body": CONTENT[:1000]}, "the-verdict.*SLM_JAX_DATA.*not downloadable from http"),  # breaks off
    ],
)
def test_a_download_that_fails_leaves_nothing(server, empty_home, answer, expected):
    vars(server).update(answer)
    with refused(expected, InputError if "announced" in answer else MissingInputError):
        named_file("the-verdict")
    assert not empty_home.exists()


def test_a_proxy_is_used_where_the_name_is_unknown_here(server, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    point_to(monkeypatch, "http://no-such-host.invalid/verdict.txt")
    assert named_file("the-verdict").read_bytes() == CONTENT


def test_a_missing_network_is_reported_within_five_seconds(empty_home, monkeypatch):
    point_to(monkeypatch, "https://no-such-host.invalid/verdict.txt")
    start = time.monotonic()
    with refused("SLM_JAX_DATA.*not downloadable", MissingInputError):
        parse_source("named:the-verdict").read_documents()
    assert time.monotonic() - start < 5
    assert not empty_home.exists()


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
        with refused(r"no answer from hangs\.invalid", MissingInputError):
            named_file("the-verdict")
        assert time.monotonic() - start < 1.5
    finally:
        release.set()


@pytest.mark.parametrize("name", NAMED_FILES)
def test_the_real_files_have_their_pinned_content(name):
    folder = os.environ.get("SLM_JAX_DATA", "")
    if not (folder and (Path(folder) / NAMED_FILES[name].file).is_file()):
        pytest.skip(f"$SLM_JAX_DATA ({folder or 'not set'}) has no {NAMED_FILES[name].file}")
    assert named_file(name).parent == Path(folder)
    characters = {"the-verdict": 20_479, "tinyshakespeare": 1_115_394}
    if name in characters:
        assert [len(text) for text in parse_source(f"named:{name}").read_documents()] == [characters[name]]

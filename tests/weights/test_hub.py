"""What must hold of weights by name: found here first, downloaded once, checked, and offline said at once."""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from foreign_files import CONFIG, huggingface, write, write_shards
from refusals import refused

from slm_jax.errors import InputError, MissingInputError
from slm_jax.model import PRESETS
from slm_jax.runs import load_gpt2
from slm_jax.weights.hub import PINS, find_weights

MEDIUM = PINS["gpt2-medium"].revision


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No data folder, an empty cache, and a server that refuses connections."""
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("SLM_JAX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def put_in_cache(folder, repository, revision, content, name="model.safetensors"):
    """A file as Hugging Face's cache keeps it: under its SHA-256, with a link from the snapshot."""
    blob = folder / f"models--{repository.replace('/', '--')}" / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = blob.parent.parent / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return blob


@pytest.fixture
def weights(tmp_path):
    folder = write(tmp_path / "made", huggingface(width=12), {**CONFIG}, {"format": "pt"})
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("silent", [False, True])
def test_offline_and_silent_servers_are_reported_within_five_seconds(silent, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        if silent:
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with refused(r"gpt2-xl.*timed out" if silent else "gpt2-xl", MissingInputError) as caught:
            load_gpt2("gpt2-xl")
        assert time.monotonic() - start < 5
    assert "$SLM_JAX_DATA/gpt2-xl" in str(caught.value)


def test_a_path_of_that_name_goes_first_then_the_data_folder(tmp_path, monkeypatch):
    write(tmp_path / "data" / "gpt2", huggingface(layers=1), CONFIG | {"n_layer": 1})
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path / "data"))
    assert load_gpt2("gpt2")[0].n_layers == 1
    assert load_gpt2("gpt2-small")[0].n_layers == 1
    write(tmp_path / "gpt2", huggingface(), CONFIG)
    assert load_gpt2("gpt2")[0].n_layers == 2


@pytest.mark.parametrize("repository", ["openai-community/gpt2-medium", "gpt2-medium"])
def test_what_is_in_the_cache_needs_no_network(repository, tmp_path, weights):
    put_in_cache(tmp_path / "cache", repository, MEDIUM, weights)
    assert load_gpt2("gpt2-medium", n_heads=3)[0].n_layers == 2


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_a_file_that_is_not_the_pinned_one_or_changed_is_refused(name, tmp_path, weights):
    blob = put_in_cache(tmp_path / "cache", f"openai-community/{name}", PINS[name].revision, weights)
    if name == "gpt2-medium":
        blob.write_bytes(weights[:-1] + b"\x3f")
    with pytest.raises(InputError, match="SHA-256") as caught:
        load_gpt2(name, n_heads=3)
    assert str(blob) in str(caught.value)


TWICE = """
from slm_jax.runs import load_gpt2
print([load_gpt2("gpt2-medium", n_heads=3)[0].n_layers for _ in range(2)])
"""


def test_a_name_is_downloaded_once_at_its_pinned_revision(tmp_path, weights):
    requests = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append((self.command, self.path))
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(weights).hexdigest()}"')
            self.send_header("X-Repo-Commit", MEDIUM)
            self.send_header("Content-Length", str(len(weights)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()  # notes the command, too
            self.wfile.write(weights)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(tmp_path / "cache")}
    # A process of its own: the library reads its environment when it is imported.
    environment = {**os.environ, **place, "HF_HUB_OFFLINE": "0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWICE]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout == "[2, 2]\n", done.stderr
    downloads = [path for command, path in requests if command == "GET" and path.endswith("model.safetensors")]
    assert downloads == [f"/openai-community/gpt2-medium/resolve/{MEDIUM}/model.safetensors"]


def test_shards_and_the_files_beside_them_come_from_the_pinned_revision(tmp_path):
    pin = PINS["qwen3-1.7b"]
    folder = write_shards(tmp_path / "made", huggingface())
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 7
    for name in files:
        with refused(f"qwen3-1.7b: .*the download of .* from .*/{pin.repository} failed", MissingInputError):
            find_weights("qwen3-1.7b")
        put_in_cache(tmp_path / "cache", pin.repository, pin.revision, (folder / name).read_bytes(), name)
    found = find_weights("qwen3-1.7b")
    assert found.name == "model.safetensors.index.json"
    assert found.parent.name == pin.revision
    assert (found.parent / "tokenizer.json").is_file()
    assert load_gpt2(found)[0].n_layers == 2
    shard = (found.parent / "model-00002-of-00002.safetensors").resolve()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x3f")
    with refused("SHA-256"):
        find_weights("qwen3-1.7b")


def test_names_are_pinned_by_commit_and_gated_ones_say_so():
    for name, pin in PINS.items():
        assert len(pin.revision) == 40, name
        assert pin.sha256 is None or len(pin.sha256) == 64
        if not name.startswith("gpt2"):
            assert {"config.json", "tokenizer.json"} <= set(pin.beside)
    families = {name for name, preset in PRESETS.items() if preset.get("positions") == "rope"}
    assert families - {"stories260k"} <= PINS.keys()
    with refused("llama3.2-1b: .*licence must be accepted .* HF_TOKEN", MissingInputError):
        find_weights("llama3.2-1b")

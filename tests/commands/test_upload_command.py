"""What must hold of an upload: which calls the hub gets, and one line for what goes wrong. No network."""

import huggingface_hub
import pytest
from refusals import fails, refused

from slm_jax import cli
from slm_jax.weights.upload import check_hub_name


@pytest.fixture
def hub(monkeypatch):
    """Records what the hub would be asked to do."""
    calls = []

    class Recorder:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return calls


def test_an_export_goes_to_a_private_repository(weights, hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "--run", str(weights), "--out", str(out), "--push", "ada/cats"]) == 0
    (made, name, how), (uploaded, _, what) = hub
    assert (made, name, how) == ("create_repo", ("ada/cats",), {"private": True, "exist_ok": True})
    assert (uploaded, what["repo_id"], what["folder_path"]) == ("upload_folder", "ada/cats", out)
    assert 'model="ada/cats"' in (out / "README.md").read_text()
    assert capsys.readouterr().out.endswith("/ada/cats\n")
    words = ["export", "--run", str(weights), "--out", str(tmp_path / "2"), "--push", "ada/cats", "--private", "false"]
    assert cli.main(words) == 0
    assert hub[2][2]["private"] is False


def test_a_failure_is_one_line_and_the_folder_stays(weights, hub, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    out = tmp_path / "out"
    fails(["export", "--run", weights, "--out", out, "--push", "ada/cats"], capsys, "no route to host", "hf auth login")
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["cats", "a/b/c", "ada/", "a/ca ts", "../cats", "a/cats.git", "a/c--s", "x" * 200])
def test_what_is_no_name_is_refused_before_anything_is_written(name, weights, hub, tmp_path, capsys):
    fails(["export", "--run", weights, "--out", tmp_path / "out", "--push", name], capsys, "OWNER/NAME")
    assert not (tmp_path / "out").exists()
    assert not hub


def test_names_of_repositories():
    check_hub_name("ada-l/tiny_stories-33M.v2")
    with refused("OWNER/NAME"):
        check_hub_name("")

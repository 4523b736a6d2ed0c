"""What must hold of the doctor's look at a machine: it finds what is wrong, says what to do, and leaves nothing."""

import os
import socket
import time
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

from slm_jax.data.named import NAMED_FILES
from slm_jax.tools.doctor import machine


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)


def only(findings):
    (finding,) = findings
    return finding


def test_every_check_says_lines_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    found = list(machine.examine_machine())
    assert time.monotonic() - began < 10
    assert not any(tmp_path.iterdir())
    names = {finding.name for finding in found}
    assert names >= {"packages", "extras", "devices", "computation", "dtype", "threads", "memory", "disk", "cache"}
    for finding in found:
        assert finding.level in ("ok", "note", "problem")
        assert finding.text
        assert "\n" not in finding.text
        assert "the check itself failed" not in finding.text
    assert not [finding for finding in found if finding.level == "problem"]


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError("no such\ndevice")

    finding = only(machine.guarded("devices", broken))
    assert (finding.level, finding.name) == ("problem", "devices")
    assert "RuntimeError: no such device" in finding.text


def test_versions_are_named_and_compared():
    finding = machine.check_packages()[0]
    assert f"jax {jax.__version__}" in finding.text
    assert machine._problems_with(Requirement("jax>=0.4")) == []
    old = only(machine._problems_with(Requirement("jax>=999")))
    assert old.level == "problem"
    assert f"jax is {jax.__version__}; expected >=999: pip install 'jax>=999'" in old.text
    missing = only(machine._problems_with(Requirement("slm-jax-no-such-package")))
    assert (missing.level, "pip install" in missing.text) == ("problem", True)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine whose ``nvidia-smi`` tells of GPUs."""

    def tell(*lines, status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return tell


@pytest.mark.parametrize(
    ("driver", "remedy"),
    [
        ("580.82.07", "pip install -U -e '.[cuda13]'"),
        ("550.54.15", "pip install -U -e '.[cuda12]'"),
        ("470.256.02", "driver 470.256.02 is too old: install 525 or later"),
    ],
)
def test_a_gpu_that_jax_does_not_see_is_a_problem(nvidia_smi, driver, remedy):
    nvidia_smi(f"Tesla T4, {driver}", f"Tesla T4, {driver}")
    finding = machine._unseen_gpus("cpu")
    assert finding.level == "problem"
    assert finding.text.startswith("Tesla T4, Tesla T4 is in this machine")
    assert remedy in finding.text
    assert machine._unseen_gpus("gpu") is None


@pytest.mark.parametrize(("name", "value"), [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", "-1")])
def test_a_gpu_that_is_left_aside_on_purpose_is_a_note(nvidia_smi, monkeypatch, name, value):
    nvidia_smi("NVIDIA H100, 580.82.07")
    monkeypatch.setenv(name, value)
    finding = machine._unseen_gpus("cpu")
    assert finding.level == "note"
    assert f"{name} is" in finding.text


def test_a_setting_that_asks_for_the_gpu_does_not_hide_it(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA H100, 580.82.07")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine._unseen_gpus("cpu").level == "problem"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_machine_without_gpus_has_none(nvidia_smi):
    assert machine.find_nvidia() is None
    nvidia_smi("NVIDIA-SMI has failed", status=9)
    assert machine.find_nvidia() is None


def test_a_tpu_that_jax_does_not_see_is_a_problem(monkeypatch):
    assert machine._unseen_tpu("cpu") is None
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    finding = machine._unseen_tpu("cpu")
    assert finding.level == "problem"
    assert "pip install -U -e '.[tpu]'" in finding.text
    assert machine._unseen_tpu("tpu") is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert machine._unseen_tpu("cpu").level == "note"


@pytest.mark.parametrize(("nproc", "is_problem"), [(None, True), ("4", True), ("16", False), ("many", True)])
def test_pretend_devices_need_threads(monkeypatch, nproc, is_problem):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.delenv("NPROC", raising=False)
    if nproc:
        monkeypatch.setenv("NPROC", nproc)
    problems = [finding for finding in machine.check_threads() if finding.level == "problem"]
    assert bool(problems) == is_problem
    assert all("set NPROC=16" in finding.text for finding in problems)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    finding = only(machine.check_disk())
    assert (finding.level, "--runs_dir" in finding.text) == ("problem", True)


def test_free_disk_is_that_of_where_runs_would_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"runs in {tmp_path}" in only(machine.check_disk()).text
    (tmp_path / "runs").mkdir()
    assert f"runs in {tmp_path / 'runs'}" in only(machine.check_disk()).text
    assert list((tmp_path / "runs").iterdir()) == []


def test_missing_tokenizer_files_are_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    finding = machine._tokenizer_files()
    assert finding.level == "note"
    assert "TIKTOKEN_CACHE_DIR: " in finding.text
    assert "vocab.bpe" in finding.text


def test_the_folder_of_named_texts_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path / "none"))
    assert machine._named_texts().level == "problem"
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path))
    assert machine._named_texts().text == "SLM_JAX_DATA has none of the named texts"
    (tmp_path / NAMED_FILES["sms-spam"].file).write_text("x")
    assert machine._named_texts().text == "SLM_JAX_DATA has sms-spam"


def test_the_network_is_a_note_at_worst(monkeypatch):
    """Through a proxy, which answers or does not: so the test is the same with and without a network."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        reached = only(machine.check_network())
    assert (reached.level, reached.text) == ("ok", f"reached {', '.join(machine.HOSTS)}")
    refused = only(machine.check_network())  # nobody listens any more
    assert refused.level == "note"
    assert refused.text.startswith("cannot reach huggingface.co (GPT-2's weights), ")
    assert "builtin: sources, your own files and what was downloaded before work without" in refused.text


def test_a_folder_is_as_large_as_its_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"12345")
    (tmp_path / "y").write_bytes(b"123")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert 8 <= machine.folder_size(tmp_path) < 1000
    assert machine.folder_size(tmp_path / "none") == 0

"""The doctor's checks of a machine: they find what is wrong, say what to do, and leave nothing behind."""

import os
import socket
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement

from slm_jax.data.named import NAMED_FILES
from slm_jax.tools.doctor import machine_checks


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "TPU_ACCELERATOR_TYPE", "TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_every_check_yields_lines_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(machine_checks.examine_machine())
    assert not any(tmp_path.iterdir())
    names = {finding.name for finding in found}
    assert names >= {"packages", "devices", "computation", "threads", "memory", "disk", "cache"}
    assert all(finding.text and "\n" not in finding.text for finding in found)
    assert not [finding for finding in found if finding.level == "problem"]


def test_a_check_that_fails_is_a_problem():
    def check_devices():
        yield "ok", "first"
        raise RuntimeError("no such\ndevice")

    first, second = machine_checks.perform([check_devices])
    assert (first.level, first.name) == ("ok", "devices")
    assert (second.level, second.name) == ("problem", "devices")
    assert "RuntimeError: no such device" in second.text


def test_versions_are_listed_and_compared():
    assert f"jax {jax.__version__}" in next(iter(machine_checks.check_packages()))[1]
    assert list(machine_checks.unmet([Requirement("jax>=0.4")])) == []
    old, missing = machine_checks.unmet([Requirement("jax>=999"), Requirement("slm-jax-no-such-package")])
    assert old == ("problem", f"jax is {jax.__version__}; expected >=999: pip install 'jax>=999'")
    assert (missing[0], "pip install" in missing[1]) == ("problem", True)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A machine whose ``nvidia-smi`` prints lines."""

    def make(*lines, status=0):
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


@pytest.mark.parametrize(
    ("driver", "settings", "level", "remedy"),
    [
        ("580.82.07", {}, "problem", "'.[cuda13]'"),
        ("550.54.15", {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": "0"}, "problem", "'.[cuda12]'"),
        ("470.256.02", {}, "problem", "470.256.02 is too old: install 525"),
        ("580.82.07", {"JAX_PLATFORMS": "cpu"}, "note", "JAX_PLATFORMS"),
        ("580.82.07", {"CUDA_VISIBLE_DEVICES": "-1"}, "note", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_jax_does_not_see_is_a_problem_unless_settings_hide_it(
    nvidia_smi, monkeypatch, driver, settings, level, remedy
):
    nvidia_smi(f"Tesla T4, {driver}", f"Tesla T4, {driver}")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    ((found, text),) = machine_checks.unseen_accelerators()
    assert found == level
    assert "Tesla T4, Tesla T4" in text
    assert remedy in text


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_a_tpu_that_jax_does_not_see_is_a_problem_and_a_failing_nvidia_smi_no_gpu(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA-SMI has failed", status=9)
    assert list(machine_checks.unseen_accelerators()) == []
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    ((level, text),) = machine_checks.unseen_accelerators()
    assert (level, "pip install -U -e '.[tpu]'" in text) == ("problem", True)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [level for level, _ in machine_checks.unseen_accelerators()] == ["note"]


@pytest.mark.parametrize(("nproc", "is_problem"), [("", True), ("4", True), ("16", False), ("many", True)])
def test_pretend_devices_need_threads(monkeypatch, nproc, is_problem):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("NPROC", nproc)
    problems = [text for level, text in machine_checks.check_threads() if level == "problem"]
    assert bool(problems) == is_problem
    assert all("set NPROC=16" in text for text in problems)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    ((level, text),) = machine_checks.check_disk()
    assert (level, "--runs_dir" in text) == ("problem", True)


def test_caches_say_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path / "none"))
    found = list(machine_checks.check_cache())
    (note,) = (text for level, text in found if level == "note" and text.startswith("TIKTOKEN_CACHE_DIR: "))
    assert "vocab.bpe" in note
    assert [text for level, text in found if level == "problem"] == [
        f"SLM_JAX_DATA is {tmp_path / 'none'}: no such folder; create it, or unset SLM_JAX_DATA"
    ]
    monkeypatch.setenv("SLM_JAX_DATA", str(tmp_path))
    (tmp_path / NAMED_FILES["sms-spam"].file).write_text("x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--HuggingFaceTB--SmolLM2-135M").mkdir()
    found = list(machine_checks.check_cache())
    assert ("ok", "SLM_JAX_DATA has sms-spam") in found
    assert any(text.startswith(f"Hugging Face's, {tmp_path}: smollm2-135m") for _, text in found)


def test_an_unreachable_network_is_a_note(monkeypatch):
    """Through a proxy, so that the test is the same with and without a network."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert list(machine_checks.check_network()) == [("ok", f"reached {', '.join(machine_checks.HOSTS)}")]
    ((level, text),) = machine_checks.check_network()  # the proxy is gone
    assert level == "note"
    assert text.startswith("cannot reach huggingface.co (pretrained models), ")

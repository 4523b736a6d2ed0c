"""Compilers for devices that are not here: the smallest run on a TPU, and what is said where there is none."""

import importlib.util

import pytest

from slm_jax.errors import InputError
from slm_jax.tasks.config import parse_args
from slm_jax.tools.plan import compilers
from slm_jax.tools.plan.cluster import find_cluster
from slm_jax.tools.plan.compilers import cluster_devices, compile_run

SMALL = (
    *("--model.n_layers", "2", "--model.emb_dim", "256", "--model.n_heads", "2", "--model.context_length", "128"),
    *("--model.unroll", "false", "--train.batch_size", "8", "--train.eval_batch_size", "8", "--mesh.fsdp", "4"),
)


@pytest.mark.parametrize(
    ("device", "message"),
    [("v5e-4", "pip install libtpu"), ("h100x8", r"jax\[cuda13\]")],
)
def test_a_missing_compiler_is_named(device, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=message):
        cluster_devices(find_cluster(device))


def test_a_gpu_without_a_description_is_refused(monkeypatch):
    monkeypatch.setattr(compilers, "_has_plugin", lambda name: True)
    with pytest.raises(InputError, match="expected one of h100, h200"):
        cluster_devices(find_cluster("a100-40gx8"))


@pytest.mark.slow
def test_a_tpu_compiler_splits_weights_and_uses_splash_attention():
    pytest.importorskip("libtpu")
    cluster = find_cluster("v5e-4")
    devices = cluster_devices(cluster)
    programs = compile_run(parse_args(SMALL), cluster, devices)
    step, evaluation, first, generation = programs
    assert [program.problem for program in programs] == [None] * 4
    assert generation.sent > 0
    assert generation.n_bytes < first.n_bytes
    assert {"splash attention", "splash attention backward"} <= set(step.kernels)
    assert set(evaluation.kernels) == {"splash attention"}
    assert step.sent > evaluation.sent > 0
    assert all(one.group_size == 4 for one in step.collectives if not one.kind.startswith("collective-"))


@pytest.mark.parametrize(("name", "n_devices"), [("v4-8", 4), ("v5p-8", 4), ("v3-8", 8), ("tpu7x-8", 8), ("v5e-1", 1)])
def test_the_compiler_counts_the_devices_of_a_slice_as_the_name_does(name, n_devices):
    """Both cores of a v4's chip are one device, as Google Cloud sets it up."""
    pytest.importorskip("libtpu")
    assert len(cluster_devices(find_cluster(name))) == n_devices

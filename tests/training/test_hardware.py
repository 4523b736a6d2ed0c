"""What must hold of the arithmetic on devices: FLOPs counted by hand, a dtype that suits, peaks by the right name."""

from unittest.mock import Mock

import jax
import pytest

from slm_jax.errors import InputError
from slm_jax.model import GPTConfig
from slm_jax.training import hardware
from slm_jax.training.hardware import (
    DEVICES,
    best_dtype,
    device_memory,
    find_device,
    flops_per_token,
    peak_flops,
)


def device(platform, kind="", capability=None):
    """Something that passes for a device of another machine."""
    fake = Mock(spec=jax.Device)
    fake.platform, fake.device_kind = platform, kind
    if capability is not None:
        fake.compute_capability = capability
    return fake


@pytest.mark.parametrize(
    ("fake", "dtype"),
    [
        (device("gpu", "Tesla T4", "7.5"), "float32"),
        (device("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), "bfloat16"),
        (device("cuda", "NVIDIA B200", "10.0"), "bfloat16"),
        (device("gpu", "AMD Instinct MI300X", "gfx942"), "float32"),
        (device("gpu", "another one"), "float32"),
        (device("tpu", "TPU v5 lite"), "bfloat16"),
        (device("cpu", "cpu"), "float32"),
    ],
    ids=lambda value: getattr(value, "device_kind", value),
)
def test_bfloat16_where_the_hardware_has_it(fake, dtype):
    assert best_dtype(fake) == dtype


@pytest.mark.parametrize(
    ("kind", "peak", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),  # TF32, in which JAX multiplies float32 arrays there
        ("NVIDIA L40S", 362e12, 183e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("TPU v5 lite", 197e12, 197e12),  # bfloat16, likewise
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        # Not in the table: a part of a name must not pass for another.
        ("NVIDIA L40", None, None),
        ("NVIDIA T400 4GB", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
        ("cpu", None, None),
    ],
)
def test_the_peak_is_that_of_the_device_and_of_how_jax_multiplies_there(kind, peak, float32):
    assert peak_flops("bfloat16", device("gpu", kind)) == peak
    assert peak_flops("float32", device("gpu", kind)) == float32


@pytest.mark.parametrize("known", DEVICES, ids=lambda known: f"{known.name} {known.kind}")
def test_every_entry_of_the_table_can_be_reached(known):
    """The first match counts, so a longer name must stand before its part."""
    assert peak_flops("bfloat16", device("gpu", known.kind)) == known.peak_16bit
    assert find_device(known.name).peak_16bit == known.peak_16bit


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"'a100-40gb'.*a100-40g, .*cpu"):
        find_device("a100-40gb")


def test_flops_per_token_by_hand():
    """Two blocks of width 6 over a context of 4, with ten tokens."""
    block = (6 + 6) + (6 * 18 + 18) + (6 * 6 + 6) + (6 + 6) + (6 * 24 + 24) + (24 * 6 + 6)
    n_params = 10 * 6 + 2 * block + (6 + 6)  # one 10 × 6 product at the head; positions are looked up
    attention = 12 * 2 * 6 * 4
    cfg = {"vocab_size": 10, "context_length": 4, "emb_dim": 6, "n_heads": 2, "n_layers": 2}
    assert flops_per_token(GPTConfig(**cfg)) == 6 * n_params + attention
    assert flops_per_token(GPTConfig(**cfg, tie_weights=False)) == 6 * n_params + attention


def test_memory_is_what_the_device_or_the_machine_offers():
    assert device_memory(jax.devices("cpu")[0]) > 2**20
    gpu = device("gpu", "NVIDIA H100 80GB HBM3")
    gpu.memory_stats.return_value = {"bytes_limit": 60_000_000_000, "bytes_in_use": 1}
    assert device_memory(gpu) == 60_000_000_000
    gpu.memory_stats.return_value = None
    assert device_memory(gpu) is None


def test_memory_of_a_container_is_what_its_limit_leaves(tmp_path, monkeypatch):
    for name, content in (("max", "1000"), ("current", "900"), ("stat", "anon 500\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    assert hardware.machine_memory() == 400
    (tmp_path / "memory.max").write_text("max")
    assert hardware.machine_memory() > 2**20

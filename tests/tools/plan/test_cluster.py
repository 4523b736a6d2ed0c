"""Names of devices with a number: as clouds name them, to JAX's devices, hosts and slices."""

import pytest

from slm_jax.errors import InputError
from slm_jax.tools.plan.cluster import find_cluster


@pytest.mark.parametrize(
    ("name", "kind", "n_devices", "topology", "hosts", "slices", "domain"),
    [
        ("v5e-1", "v5e", 1, (1, 1), 1, 1, 1),
        ("v5e-8", "v5e", 8, (2, 4), 1, 1, 8),
        ("v5e-64", "v5e", 64, (8, 8), 16, 1, 64),
        ("v5litepod-64", "v5e", 64, (8, 8), 16, 1, 64),
        ("v5e:2x4", "v5e", 8, (2, 4), 1, 1, 8),
        ("v6e-16", "v6e", 16, (4, 4), 4, 1, 16),
        ("V5P-8", "v5p", 4, (2, 2, 1), 1, 1, 4),  # the number counts cores
        ("v5p-256", "v5p", 128, (4, 4, 8), 32, 1, 128),
        ("v5p:2x2x2", "v5p", 8, (2, 2, 2), 2, 1, 8),
        ("v4-32", "v4", 16, (2, 2, 4), 4, 1, 16),
        ("v3-8", "v3", 8, (2, 2), 1, 1, 8),  # each core is a device
        ("tpu7x-8", "tpu7x", 8, (2, 2, 1), 1, 1, 8),
        ("v5e-256x2", "v5e", 512, (16, 16), 128, 2, 256),
        ("h100", "h100", 1, (), 1, 1, 1),
        ("h100x8", "h100", 8, (), 1, 1, 8),
        ("h100x1024", "h100", 1024, (), 128, 1, 8),
        ("a100-40gx16", "a100-40g", 16, (), 2, 1, 8),
        ("h100-pciex2", "h100-pcie", 2, (), 1, 1, 2),
    ],
)
def test_a_name_with_a_number(name, kind, n_devices, topology, hosts, slices, domain):
    cluster = find_cluster(name)
    assert cluster.device.name == kind
    assert (cluster.n_devices, cluster.topology) == (n_devices, topology)
    assert (cluster.n_hosts, cluster.n_slices, cluster.domain) == (hosts, slices, domain)


def test_the_number_may_be_apart():
    assert find_cluster("h100", 16).n_hosts == 2
    assert find_cluster("v5e", 8).n_devices == 8
    assert find_cluster("cpu").device is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-60", "N one of 1, 4, 8, 16, … 256, or a shape such as v5e:4x4"),
        ("v5e-512", "N one of"),
        ("v5p-4", r"N one of 8, 16, 32, 64, … 16384 \(2 cores a chip\)"),
        ("v5p:4x4", "expected 3 sizes"),
        ("v5e-64x0", "number of slices"),
        ("cpux8", "expected cpu, with --devices 8"),
        ("h100x12", r"12 GPUs; expected up to 8, or a multiple of 8"),
        ("h100-8", "such as h100x8"),
        ("h300x8", "device is 'h300'; expected one of h200"),
        ("v5e-", "expected one of"),
        ("", "expected one of"),
    ],
)
def test_what_does_not_exist_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        find_cluster(name)


def test_a_second_number_is_refused():
    with pytest.raises(InputError, match="leave out --devices 4"):
        find_cluster("v5e-64", 4)

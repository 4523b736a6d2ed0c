"""Flash attention on TPUs: the same numbers as plain attention, linear memory, one kernel for each device's rows."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from slm_jax.attention import causal_attention
from slm_jax.errors import InputError
from slm_jax.nn.flash import flash_attention, flash_obstacle
from slm_jax.nn.fused_attention import choose_implementation

AXES, AUTO = ("data", "fsdp"), (AxisType.Auto,) * 2


@pytest.fixture
def interpreted(monkeypatch):
    """Run the kernel's own program on the CPU."""
    make = partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", make)


def value_and_gradients(attention, q, k, v, slope):
    context, backward = jax.vjp(attention, q, k, v)
    return context, backward(slope)


@pytest.mark.parametrize(("seq", "lengths"), [(128, None), (300, ((90, 210), (1, 299)))])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter is for CPUs")
def test_values_and_gradients_are_those_of_plain_attention(interpreted, seq, lengths):
    """300 tokens are three of the kernel's blocks, the last not full, and documents cut across them."""
    ids = mask = None
    if lengths:
        ids = jnp.array([[1] * first + [0] * last for first, last in lengths])
        mask = ids[:, None, :, None] == ids[:, None, None, :]
    q, k, v, slope = jax.random.normal(jax.random.key(0), (4, 2, seq, 2, 8))
    plain = jax.jit(partial(value_and_gradients, lambda q, k, v: causal_attention(q, k, v, mask=mask)[0]))
    flash = jax.jit(partial(value_and_gradients, partial(flash_attention, segment_ids=ids)))
    results = (jax.tree.leaves(f(q, k, v, slope)) for f in (flash, plain))
    for got, wanted in zip(*results, strict=True):
        assert jnp.abs(got - wanted).max() <= 1e-5 * jnp.abs(wanted).max()


def step(q, k, v, slope, ids):
    return value_and_gradients(partial(flash_attention, segment_ids=ids), q, k, v, slope)


def arguments(mesh, batch=8, seq=1024, heads=12, head_dim=64, dtype=jnp.bfloat16):
    """Queries, keys, values, a slope and segment ids, as shapes whose rows the mesh shares where it can."""
    rows = NamedSharding(mesh, PartitionSpec(AXES if batch % mesh.size == 0 else None))
    heads_of_rows = jax.ShapeDtypeStruct((batch, seq, heads, head_dim), dtype, sharding=rows)
    return (*[heads_of_rows] * 4, jax.ShapeDtypeStruct((batch, seq), jnp.int32, sharding=rows))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("batch", "rows_of_each"), [(8, 2), (3, 3)])
def test_each_device_of_a_mesh_has_a_kernel_for_its_rows(dtype, batch, rows_of_each):
    """Three rows are not to be shared by four devices: each computes them all."""
    mesh = AbstractMesh((2, 2), AXES, axis_types=AUTO)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step).trace(*arguments(mesh, batch, dtype=dtype))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert traced.out_info[0].dtype == dtype
    # In jax's and in the kernel's order: (batch, seq, heads, head_dim) and (batch, heads, seq, head_dim).
    calls = re.findall(r"custom_call @tpu_custom_call.*-> \(?(.*)", text)
    assert len(calls) == 3  # forward, keys and values, queries
    assert all(f"tensor<{rows_of_each}x12x1024x64x" in call for call in calls)


def test_one_device_needs_no_mesh():
    inputs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in arguments(AbstractMesh((1, 1), AXES))]
    text = jax.jit(step).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert len(re.findall("custom_call @tpu_custom_call", text)) == 3
    assert "manual_computation" not in text
    # Nothing is as large as the weights of one head.
    assert not re.search(r"1024x1024x(bf16|f32)", text)


def test_what_stands_in_the_way_is_said(monkeypatch):
    """Without a mesh JAX refuses the whole program for several devices: it cannot divide the kernel."""
    for dtype, platform, words in (
        ("float16", "tpu", "bfloat16.*float16"),
        ("bfloat16", "gpu", "needs a TPU.*gpu"),
        ("float32", "cpu", "needs a TPU.*cpu"),
    ):
        assert re.search(words, flash_obstacle(dtype, platform))
    if jax.default_backend() != "tpu":  # devices there need a mesh
        assert flash_obstacle(jnp.dtype("bfloat16"), "tpu") is flash_obstacle("float32", "tpu") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert re.search("4 devices.*jax.set_mesh", flash_obstacle("bfloat16", "tpu"))
    with jax.sharding.use_abstract_mesh(AbstractMesh((4, 1), AXES, axis_types=AUTO)):
        assert flash_obstacle("bfloat16", "tpu") is None


def test_a_mesh_of_other_axes_falls_back_to_plain_attention():
    """The compiler cannot divide the kernel, and the axes do not say what they split."""
    mesh = AbstractMesh((4, 2), ("rows", "columns"), axis_types=AUTO)
    with jax.sharding.use_abstract_mesh(mesh):
        assert re.search("along the mesh's axes rows, columns; it knows", flash_obstacle("bfloat16", "tpu"))
        chosen = partial(
            choose_implementation, dtype=jnp.bfloat16, head_dim=64, needs_weights=False, device=("tpu", None)
        )
        assert chosen("auto") == "xla"
        with pytest.raises(InputError, match=r"'flash' cannot be used: .* rows, columns"):
            chosen("flash")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_a_tpus_compiler_needs_a_quarter_of_the_memory(shape, monkeypatch):
    """GPT-2 small's attention over 8 × 1,024 tokens; measured with one v5e: 134 MB, and 604 MB by jax.nn."""
    pytest.importorskip("libtpu", reason="a TPU's compiler is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # else it looks for the machine's TPU
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), AXES, axis_types=AUTO)

    def plain_step(q, k, v, slope, ids):
        mask = ids[:, None, :, None] == ids[:, None, None, :]
        plain = partial(jax.nn.dot_product_attention, mask=mask, is_causal=True, implementation="xla")
        return value_and_gradients(plain, q, k, v, slope)

    with jax.set_mesh(mesh):
        flash, plain = (jax.jit(f).lower(*arguments(mesh)).compile() for f in (step, plain_step))
    assert flash.memory_analysis().temp_size_in_bytes <= plain.memory_analysis().temp_size_in_bytes / 4
    assert not re.search("all-gather|all-to-all|collective-permute", flash.as_text())

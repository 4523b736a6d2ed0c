"""Collectives and kernels of compiled programs: counted with their loops, in bytes that a device sends."""

import json
import os
import subprocess
import sys

import pytest

from slm_jax.tools.plan.hlo import find_collectives, find_kernels, sent_bytes, shape_bytes

# Written for this test, in the form of XLA's text.
EXCERPT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum.1 = f32[] add(%x, %y)
}

%all-reduce-scatter.3 (p: f32[1024]) -> f32[256] {
  %p = f32[1024]{0} parameter(0)
  %all-reduce.9 = f32[1024]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice.1 = f32[256]{0} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={256}
}

%body.7 (carry: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[512,128]{1,0:T(8,128)(2,1)} all-gather(%w), \
replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(step)/blocks/ff"}
  %k = (f32[64]{0}, f32[8]{0}) custom-call(%w), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/splash_mha_fwd"}
  ROOT %t = (s32[], bf16[64,128]{1,0}) tuple(%i, %w)
}

%condition.7 (carry: (s32[], bf16[64,128])) -> pred[] {
  %constant.12 = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %constant.12), direction=LT
}

%unrolled (carry: (s32[], f32[16])) -> (s32[], f32[16]) {
  %i.2 = s32[] get-tuple-element(%carry.2), index=0
  %two = s32[] constant(2)
  %permute.1 = f32[16]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  %permute.2 = f32[16]{0} collective-permute(%permute.1), source_target_pairs={{0,1},{1,0}}
  %next = s32[] add(%i.2, %two)
  ROOT %t.2 = (s32[], f32[16]{0}) tuple(%next, %permute.2)
}

%up_to_eight (carry: (s32[], f32[16])) -> pred[] {
  %constant.8 = s32[] constant(8)
  %i.3 = s32[] get-tuple-element(%carry.3), index=0
  ROOT %less.2 = pred[] compare(%i.3, %constant.8), direction=LT
}

%async_collective_fusion.1 (u: bf16[8]) -> bf16[64] {
  ROOT %all-gather.5 = bf16[64]{0} all-gather(%u), channel_id=7, replica_groups=mesh['a'=8] {'a'}, dimensions={0}, \
frontend_attributes={chain_id="2"}
}

%async_collective_fusion.2 (u.2: bf16[8]) -> bf16[64] {
  ROOT %all-gather.6 = bf16[64]{0} all-gather(%u.2), channel_id=7, replica_groups=mesh['a'=8] {'a'}, dimensions={0}, \
frontend_attributes={chain_id="2"}
}

%wrapped (q: f32[64]) -> f32[8] {
  ROOT %reduce-scatter.1 = f32[8]{0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: bf16[64,128], /*index=1*/b: f32[1024]) -> f32[] {
  %while.1 = (s32[], bf16[64,128]{1,0}) while(%init), condition=%condition.7, body=%body.7
  %while.2 = (s32[], f32[16]{0}) while(%init.2), condition=%up_to_eight, body=%unrolled
  %fusion.1 = f32[256]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
  %begins = bf16[64]{0} fusion(%b), kind=kCustom, calls=%async_collective_fusion.1
  %ends = bf16[64]{0} fusion(%begins), kind=kCustom, calls=%async_collective_fusion.2
  %start.1 = ((f32[64]{0}), f32[8]{0}, s32[]) async-start(%b), calls=%wrapped
  %done.1 = f32[8]{0} async-done(%start.1), calls=%wrapped
  %ag.1 = (f32[16]{0}, f32[128]{0}) all-gather-start(%b), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %rs.1 = (f32[640]{0}, f32[80]{0}) reduce-scatter-start(%b), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %ag.2 = f32[128]{0} all-gather-done(%ag.1)
  %cp.1 = (f32[32]{0}, f32[32]{0}, u32[], u32[]) collective-permute-start(%b), source_target_pairs={{0,1},{1,0}}
  %alone = f32[4]{0} all-reduce(%b), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %f = (bf16[8]{0}, u8[16]{0}) custom-call(%b), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %axis.1 = f32[2]{0} all-reduce(%b), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  ROOT %last = f32[] all-reduce(%b), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""


def test_collectives_of_a_text():
    """Loops multiply; asynchronous ones count once; a group of one device sends nothing."""
    found = [(one.kind, one.count, one.n_bytes, one.group_size) for one in find_collectives(EXCERPT)]
    assert sorted(found) == sorted([
        ("all-gather", 12, 512 * 128 * 2, 8),
        ("reduce-scatter", 1, 1024 * 4, 4),  # a TPU's fusion
        ("reduce-scatter", 1, 8 * 8 * 4, 8),  # asynchronous
        ("all-gather", 1, 128 * 4, 8),
        ("all-gather", 1, 64 * 2, 8),  # in two fusions of a TPU
        ("reduce-scatter", 1, 640 * 4, 8),  # as XLA abbreviates it for GPUs
        ("collective-permute", 1, 32 * 4 + 4, 2),
        ("all-reduce", 1, 4, 2),
            ("all-reduce", 1, 8, 2),
        *[("collective-permute", 4, 16 * 4, 2)] * 2,  # a loop that is unrolled: 0, 2, 4, 6
    ])  # fmt: skip


def test_the_bytes_that_a_device_sends_and_the_groups():
    one, *others = find_collectives(EXCERPT)
    assert one.sent == 12 * 512 * 128 * 2 * 7 / 8
    assert one.source == "jit(step)/blocks/ff"
    assert [one.groups for one in others if one.kind == "all-reduce"] == [((0, 4), (1, 5), (2, 6), (3, 7))] * 2
    assert [sent_bytes(kind, 800, 8) for kind in ("all-gather", "all-reduce", "collective-permute")] == [700, 1400, 800]


def test_kernels_of_a_text():
    assert find_kernels(EXCERPT) == {"splash attention": 12, "cudnn attention backward": 1}


@pytest.mark.parametrize(
    ("shape", "n_bytes"),
    [("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048), ("f32[]", 4), ("(pred[3]{0}, s4[4]{0})", 5), ("f8e4m3fn[10]{0}", 10)],
)
def test_bytes_of_a_shape(shape, n_bytes):
    assert shape_bytes(shape) == n_bytes


PROGRAM = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from slm_jax.tools.plan.hlo import find_collectives
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
def of(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
def step(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(x @ w, P("fsdp")), None), x, weights)
    return x.sum()
with jax.set_mesh(mesh):
    text = jax.jit(step).lower(of((6, 64, 64), None, "fsdp"), of((32, 64), "fsdp")).compile().as_text()
print(json.dumps([(one.kind, one.count, one.n_bytes, one.group_size) for one in find_collectives(text)]))
"""


def test_a_real_program_on_eight_devices_gathers_its_weights_layer_by_layer():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["all-gather", 6, 64 * 64 * 4, 8], ["all-reduce", 1, 4, 8]]

"""What must hold of the loss in pieces: losses and gradients of whole logits, at a fraction of their memory."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.nn import loss as module
from slm_jax.nn.loss import cross_entropy, n_pieces
from slm_jax.nn.target import compiling_for

BATCH, SEQ, EMB, VOCAB = 2, 10, 16, 101
EPS = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}  # of one rounding


@pytest.fixture
def arrays():
    """Hidden states, kernel, targets and weights, a third of which are 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (BATCH, SEQ, EMB)),
        jax.random.normal(keys[1], (EMB, VOCAB)),
        jax.random.randint(keys[2], (BATCH, SEQ), 0, VOCAB),
        jnp.maximum(jax.random.uniform(keys[3], (BATCH, SEQ)) - 1 / 3, 0),
    )


def plain(hidden, kernel, targets, weights):
    """The same of whole float32 logits."""
    logits = jnp.matmul(hidden.astype(jnp.float32), kernel.astype(hidden.dtype).astype(jnp.float32))
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)


def gradients(loss, arrays):
    """Compile again: the number of pieces is no argument."""
    return jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays), (0, 1)))(*arrays)


def assert_same_gradients(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (np.asarray(value, np.float64) for value in (ours, theirs))
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.fixture(params=[1, 4, SEQ])
def pieces(request, monkeypatch):
    """As many of them; 4 do not divide the sequence, and there are never more than tokens."""
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * BATCH * SEQ * VOCAB / request.param)
    assert n_pieces(BATCH, SEQ, VOCAB) == request.param
    return request.param


@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # for a TPU with padded columns; that program runs here, too
def test_losses_and_gradients_are_those_of_whole_logits(arrays, pieces, platform):
    expected, expected_grads = gradients(plain, arrays)
    with compiling_for(platform):
        loss, grads = gradients(cross_entropy, arrays)
        evaluated = jax.jit(lambda *arrays: cross_entropy(*arrays))(*arrays)
    np.testing.assert_allclose([loss, evaluated], expected, rtol=1e-6)
    assert_same_gradients(grads, expected_grads, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_sixteen_bits_round_once(arrays, pieces, dtype, platform):
    hidden, *others = arrays
    arrays = (hidden.astype(dtype), *others)
    expected, expected_grads = gradients(plain, arrays)
    with compiling_for(platform):
        loss, grads = gradients(cross_entropy, arrays)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # accumulated in float32
    assert [grad.dtype for grad in grads] == [dtype, jnp.float32]
    assert_same_gradients(grads, expected_grads, 2 * EPS[dtype])


def test_the_gradient_is_scaled_by_what_follows(arrays):
    _, found = gradients(lambda *arrays: 0.25 * cross_entropy(*arrays) ** 2, arrays)
    _, expected = gradients(lambda *arrays: 0.25 * plain(*arrays) ** 2, arrays)
    assert_same_gradients(found, expected, 1e-6)


@pytest.mark.parametrize(("wanted", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_only_gradients_that_are_asked_for_are_computed(arrays, pieces, wanted, products):
    """A frozen head needs none of its kernel, a head that is trained alone none of the hidden states."""
    function = jax.grad(cross_entropy, wanted) if wanted else cross_entropy
    assert str(jax.make_jaxpr(function)(*arrays)).count("dot_general") == products


def test_targets_of_weight_0_have_no_part(arrays):
    hidden, kernel, targets, weights = arrays
    assert (weights == 0).any()
    others = (targets + (weights == 0)) % VOCAB
    found, expected = (gradients(cross_entropy, (hidden, kernel, ids, weights)) for ids in (others, targets))
    assert float(found[0]) == float(expected[0])
    assert_same_gradients(found[1], expected[1], 0)
    assert not np.asarray(found[1][0])[np.asarray(weights) == 0].any()


# Memory


def large(loss, dtype="float32", rows=8):
    """Loss and gradients of GPT-2's vocabulary and context, not compiled yet; float32 logits are 0.2 GB a row."""
    shapes = {"hidden": ((rows, 1024, 8), dtype), "kernel": ((8, 50_257), "float32")}
    shapes |= {"targets": ((rows, 1024), "int32"), "weights": ((rows, 1024), "float32")}
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.values()]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arguments)


@pytest.mark.parametrize("backward", [False, True], ids=["evaluation", "training"])
def test_memory_is_that_of_a_piece(backward):
    def temporaries(loss):
        traced = large(loss if backward else lambda *arrays: jax.lax.stop_gradient(loss(*arrays)))
        return traced.lower().compile().memory_analysis().temp_size_in_bytes

    assert n_pieces(8, 1024, 50_257) == 4
    piece = 8 * 256 * 50_257 * 4
    assert temporaries(plain) >= (8 if backward else 4) * piece
    # Logits and, in training, their gradient; jax 0.7 holds one array more.
    assert temporaries(cross_entropy) <= (3.1 if backward else 2.1) * piece


def test_small_batches_are_not_cut():
    """Char-level and small models, and GPT-2 small on a CPU, compile to a program without a loop."""
    assert n_pieces(64, 256, 65) == n_pieces(32, 128, 4096) == n_pieces(2, 256, 50_257) == 1
    assert "while" not in large(cross_entropy, rows=2).lower().as_text()
    assert "while" in large(cross_entropy, rows=4).lower().as_text()


@pytest.mark.parametrize(("platform", "capability"), [("tpu", None), ("cuda", 8.0)])
def test_accelerators_multiply_padded_pieces_in_16_bits(platform, capability):
    with compiling_for(platform, capability):
        text = large(cross_entropy, "bfloat16").lower(lowering_platforms=(platform,)).as_text()
    products = set(re.findall(r"dot_general .* : (\(.*\)) -> (tensor<.*?>)", text))
    logits, matrix, hidden = "tensor<2048x50304x{}>", "tensor<8x50304x{}>", "tensor<2048x8x{}>"  # 8 × 256 rows
    assert products == {
        (f"({hidden.format('bf16')}, {matrix.format('bf16')})", logits.format("f32")),
        (f"({logits.format('bf16')}, {matrix.format('bf16')})", hidden.format("bf16")),
        (f"({hidden.format('bf16')}, {logits.format('bf16')})", matrix.format("f32")),
    }
    assert not re.search("8x1024x50|8192x50", text)  # whole logits


# Devices


def test_sharded_is_unsharded():
    """On 8 pretend devices, which take a process of their own: this file, run as a program."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, __file__], env={**os.environ, **flags}, capture_output=True, text=True, check=True
    )
    for name, (losses, error, gathered) in json.loads(run.stdout).items():
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name
        assert error < 1e-6, name
        assert all(shape == [EMB, VOCAB] for shape in gathered), name  # the kernel, but never the batch


def on_eight_devices() -> dict[str, tuple[list[float], float, list[list[int]]]]:
    """For each mesh the losses, the gradients' error, and the shapes that were gathered."""
    rows = 16
    module.PIECE_BYTES = rows // 8 * SEQ * VOCAB  # a quarter of a device's share
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(rows, SEQ, EMB)).astype(np.float32),
        rng.normal(size=(EMB, VOCAB)).astype(np.float32),
        rng.integers(VOCAB, size=(rows, SEQ)).astype(np.int32),
        rng.uniform(size=(rows, SEQ)).astype(np.float32),
    )
    expected, expected_grads = gradients(plain, tuple(map(jnp.asarray, arrays)))
    found = {}
    for data, fsdp in ((8, 1), (4, 2), (1, 8)):
        mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        specs = [jax.sharding.PartitionSpec(*names) for names in ((("data", "fsdp"),), ("fsdp",))]
        by_rows, by_width = (jax.sharding.NamedSharding(mesh, spec) for spec in specs)
        placed = [jax.device_put(value, by_width if index == 1 else by_rows) for index, value in enumerate(arrays)]
        step = (
            jax.jit(jax.value_and_grad(cross_entropy, (0, 1)), out_shardings=(None, (by_rows, by_width)))
            .lower(*placed)
            .compile()
        )
        loss, grads = step(*placed)
        pairs = list(zip(grads, expected_grads, strict=True))
        error = max(float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)) for a, b in pairs)
        gathered = re.findall(r"= \(?\w+\[([\d,]*)\].* all-gather(?:-start)?\(", step.as_text())
        shapes = [[int(size) for size in shape.split(",")] for shape in gathered]
        found[f"data={data}, fsdp={fsdp}"] = ([float(loss), float(expected)], error, shapes)
    return found


if __name__ == "__main__":
    print(json.dumps(on_eight_devices()))

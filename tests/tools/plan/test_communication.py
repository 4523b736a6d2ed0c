"""Formulas of what a step exchanges, against numbers computed by hand."""

import pytest

from slm_jax.tasks.config import parse_args
from slm_jax.tools.plan import make_plan
from slm_jax.tools.plan.communication import wire_seconds
from slm_jax.training.hardware import find_device

GPT2 = ("--model.preset", "gpt2-small", "--tokenizer.kind", "gpt2", "--train.batch_size", "1024")
BLOCK = 12 * 768 * 768 + 9 * 768 + 4 * 768  # matrices, biases, and scales and biases of two norms
VOCABULARY, POSITIONS, NORM = 50_257 * 768, 1024 * 768, 2 * 768
GRADIENTS = 2 * 12 * BLOCK + (2 + 4) * VOCABULARY + 2 * POSITIONS  # bfloat16; of the tied head float32
N_PARAMS = 124_439_808


def exchanges(device, *words):
    step = make_plan(parse_args([*GPT2, *words]), device).step
    return {(one.what, one.kind): one for one in step.exchanges}


def test_data_parallel_devices_sum_their_gradients_once_a_step():
    for accumulate, n_bytes in ((1, GRADIENTS + 2 * NORM), (4, 2 * N_PARAMS)):
        found = exchanges("h100x8", "--train.accumulate", str(accumulate))
        assert list(found) == [("gradients", "all-reduce")]
        one = found["gradients", "all-reduce"]
        assert one.n_bytes == n_bytes
        assert one.sent == pytest.approx(2 * n_bytes * 7 / 8)
        assert (one.size, one.spans) == (8, 1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fsdp_gathers_weights_twice_and_scatters_gradients(accumulate):
    found = exchanges("v5e-8", "--mesh.fsdp", "8", "--train.accumulate", str(accumulate))
    weights, scattered = found["weights", "all-gather"], found["gradients", "reduce-scatter"]
    assert weights.n_bytes == accumulate * 2 * (2 * 12 * BLOCK + 2 * VOCABULARY + POSITIONS)
    assert scattered.n_bytes == accumulate * GRADIENTS
    assert found["gradients", "all-reduce"].n_bytes == 2 * NORM


def test_recomputation_gathers_queries_keys_and_values_once_more():
    none, full = (exchanges("v5e-8", "--mesh.fsdp", "8", "--model.remat", remat) for remat in ("none", "full"))
    more = full["weights", "all-gather"].n_bytes - none["weights", "all-gather"].n_bytes
    assert more == 2 * 12 * 3 * 768 * 768


def test_most_slices_of_tpus_sum_gradients_whole():
    """Their compiler has a reduce-scatter for few chips only."""
    for device, fsdp, kind in (
        ("v5e-16", 16, "all-reduce"),
        ("v5e-8", 8, "reduce-scatter"),
        ("v5p:2x2x2", 8, "all-reduce"),
        ("h100x8", 8, "reduce-scatter"),
    ):
        step = make_plan(parse_args([*GPT2, "--mesh.fsdp", str(fsdp)]), device).step
        (scattered,) = [one for one in step.exchanges if (one.what, one.axes) == ("gradients", ("fsdp",))]
        assert (scattered.kind, scattered.n_bytes) == (kind, GRADIENTS)


def test_copies_of_shards_are_summed_over_the_network():
    found = exchanges("h100x64", "--mesh.fsdp", "8")
    assert (found["weights", "all-gather"].size, found["weights", "all-gather"].spans) == (8, 1)
    copies = found["gradients of other copies", "all-reduce"]
    assert (copies.size, copies.spans) == (8, 8)
    assert copies.n_bytes == GRADIENTS / 8


def test_times_on_links_and_network_by_hand():
    h100 = find_device("h100")
    assert wire_seconds(h100, "all-gather", 8e9, 8, 1) == (7e9 / 450e9, 0.0)
    # 16 GPUs on two hosts: inside, 7/8 of the array twice; between hosts half of an eighth, twice.
    assert wire_seconds(h100, "all-reduce", 8e9, 16, 2) == (14e9 / 450e9, 1e9 / 50e9)
    assert wire_seconds(h100, "all-reduce", 8e9, 4, 4) == (0.0, 12e9 / 50e9)


def test_mfu_and_the_batch_below_which_communication_decides():
    plan = make_plan(parse_args([*GPT2, "--mesh.fsdp", "64"]), "v5e-64")
    step, tokens = plan.step, 1024 * 1024 / 64
    seconds = plan.flops_per_token * tokens / 197e12
    assert step.compute == pytest.approx(seconds)
    assert step.mfu == pytest.approx((0.4, seconds / (seconds / 0.4 + step.wires)))
    assert step.bound_below == pytest.approx(tokens * step.wires / (seconds / 0.4))
    assert plan.tokens_per_second == pytest.approx(1024 * 1024 / (seconds / 0.4))
    small = [*GPT2, "--mesh.fsdp", "64", "--train.batch_size", "64", "--model.context_length", "128"]
    bound = make_plan(parse_args(small), "v5e-64")
    assert bound.step.bound_below > 128
    assert bound.step.overlapped == bound.step.wires
    assert bound.step.mfu[0] < 0.4

"""What must hold of many devices and many processes: the losses of one, parameters really split, one run folder."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import batches_of_hosts
import eight_devices
import interleaved_hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from pretraining import metrics, options

from slm_jax.cli import main
from slm_jax.errors import InputError
from slm_jax.nn.loss import cross_entropy
from slm_jax.nn.sharding import MESH_AXES, constrain, state_shardings
from slm_jax.tasks import pretraining
from slm_jax.training.checkpoint import Checkpoints
from slm_jax.training.config import MeshConfig
from slm_jax.training.sharding import (
    compiler_options,
    host_rows,
    make_mesh,
    mesh_sizes,
)

ROOT = Path(__file__).parents[2]
QUICK = os.environ["XLA_FLAGS"]
# In how many parts each cuts a large leaf: along fsdp, and along tensor.
MESHES = {
    "data=8": (1, 1),
    "fsdp=8": (8, 1),
    "tensor=8": (1, 8),
    "data=2,fsdp=2,tensor=2": (2, 2),
    "replica=2,data=2,fsdp=2": (2, 1),
}
each_mesh = pytest.mark.parametrize("mesh", MESHES)


def n_parts(mesh, name):
    """Tensor splits heads, hidden features and vocabulary: not positions; of adapters the side of hidden features."""
    fsdp, tensor = MESHES[mesh]
    of_features = name.endswith(("ff/fc_adapter/lora_b", "ff/proj_adapter/lora_a"))
    return fsdp * (tensor if of_features or ("lora_" not in name and "pos_emb" not in name) else 1)


def environment(**changes):
    """This process's environment, importing this checkout, without what tells of devices and other processes."""
    removed = ("XLA_FLAGS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    env = {name: value for name, value in os.environ.items() if name not in removed}
    return {**env, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **changes}


@pytest.fixture(scope="module")
def state_of_one():
    """A state after some steps on one device."""
    state = jax.jit(eight_devices.initial_state)()
    step = jax.jit(eight_devices.train_step(1))
    for batch in eight_devices.batches()[:3]:
        state, _ = step(state, {}, batch)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eight")


@pytest.fixture(scope="module")
def eight(folder, state_of_one):
    """What eight_devices.py printed. NPROC: without more threads than devices the collectives can deadlock."""
    with Checkpoints(folder / "from_one") as checkpoints:
        checkpoints.save(state_of_one, {"data": {}}, None)
    env = environment(XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}", NPROC="16")
    worker = Path(eight_devices.__file__)
    done = subprocess.run([sys.executable, worker, folder], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@each_mesh
def test_eight_devices_give_the_losses_of_one(eight, mesh):
    """With accumulation there is dropout too: it depends on the step alone, not on the mesh."""
    for accumulate in (1, 2) if mesh in eight_devices.WITH_DROPOUT else (1,):
        one = eight["one"][f"accumulate={accumulate}"]
        assert len(set(one)) == len(one) == eight_devices.STEPS + 1
        np.testing.assert_allclose(eight["mesh"][f"{mesh} accumulate={accumulate}"], one, rtol=1e-5)


@pytest.mark.slow
def test_weights_and_gradients_travel_but_no_activations(eight):
    """Along fsdp, however many rows there are; copies of the parameters reduce once a step, also with accumulation."""
    total = {name: sum(kinds.values()) for name, kinds in eight["sent"].items()}
    assert 1 < total["fsdp"] <= 3.2
    assert "all-to-all" not in eight["sent"]["fsdp"]
    assert total["twice the rows"] == pytest.approx(total["fsdp"], rel=0.05)
    assert 0.9 < total["accumulated"] <= 1.1 * total["data"]


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_fewer_kv_heads_are_split_where_tensor_divides_them_and_else_whole(eight, n_kv_heads):
    one, split = eight[f"qwen3, {n_kv_heads} kv heads"]
    assert len(set(one)) == len(one)
    np.testing.assert_allclose(split, one, rtol=1e-5)


@pytest.mark.slow
def test_muon_on_split_matrices_moves_as_on_whole_ones(eight):
    whole, split = eight["muon whole"], eight["muon split"]
    assert len(set(whole["losses"])) == len(whole["losses"]) == eight_devices.STEPS + 1
    np.testing.assert_allclose(split["losses"], whole["losses"], rtol=1e-5)
    moments = {name for name, (shape, _) in whole["shards"].items() if "muon" in name and len(shape) >= 3}
    assert len(moments) == 6  # the matrices of a block
    for name in moments:
        assert 4 * np.prod(split["shards"][name][1][0]) == np.prod(whole["shards"][name][1][0]), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", eight_devices.WITH_LORA)
def test_a_classifier_with_adapters_trains_on_eight_devices_as_on_one(eight, mesh):
    """What is trained and what is frozen are both split."""
    one, many = eight["lora"]["one"], eight["lora"][mesh]
    assert len(set(one["losses"])) == len(one["losses"]) == eight_devices.STEPS
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    for tree in ("trainable", "frozen"):
        large = {name: leaf for name, leaf in many[tree].items() if np.prod(leaf[0]) >= 4096}
        assert len(large) >= 4
        for name, (shape, shards) in large.items():
            assert np.prod(shards[0]) == np.prod(shape) // n_parts(mesh, name), name


@pytest.mark.slow
def test_a_mesh_of_other_axes_gives_the_losses_of_one_device(eight):
    np.testing.assert_allclose(eight["own mesh"], eight["one"]["accumulate=2"][:-1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", eight_devices.GENERATED)
def test_devices_that_share_a_model_write_what_one_writes(eight, mesh):
    """Greedily and at random, from the cache and beyond the context."""
    for texts in eight["generated"].values():
        assert texts[mesh] == texts["one"]
    assert len({texts["one"] for texts in eight["generated"].values()}) == 2


@pytest.mark.slow
def test_tensor_splits_the_cache_by_heads(eight):
    assert len(eight["cache"]) == 2
    for shape, (shard,) in eight["cache"].values():
        assert shard[1] * 8 == shape[1]


@pytest.mark.slow
@each_mesh
@pytest.mark.parametrize("tree", ["params", "opt_state"])
def test_parameters_and_optimizer_state_are_split(eight, mesh, tree):
    """After training: each device holds its share of every large leaf, and all of the small ones."""
    for accumulate in (1, 2) if mesh in eight_devices.WITH_DROPOUT else (1,):
        leaves = eight["shards"][f"{mesh} accumulate={accumulate}"][tree]
        assert any("attn/q" in name for name in leaves)
        split = 0
        for name, (shape, shards) in leaves.items():
            large = np.prod(shape) >= 4096
            assert len(shards) == 1, f"{name}: unequal parts"
            assert np.prod(shards[0]) == np.prod(shape) // (n_parts(mesh, name) if large else 1), name
            split += large
        assert split >= 4 * (2 if tree == "opt_state" else 1)


@pytest.mark.slow
@each_mesh
def test_what_one_device_saved_is_restored_on_eight(eight, state_of_one, mesh):
    restored = eight[f"restored on {mesh}"]
    assert restored["bits"] == eight_devices.bits(eight_devices.raw(state_of_one))
    shape, shards = next(leaf for name, leaf in restored["shards"].items() if "attn/q" in name and "kernel" in name)
    assert np.prod(shape) // np.prod(shards[0]) == np.prod(MESHES[mesh])


@pytest.mark.slow
def test_what_eight_devices_saved_is_restored_on_one(eight, folder, state_of_one):
    saved = eight["saved by eight"]
    shapes = jax.eval_shape(eight_devices.initial_state)
    like = eight_devices.abstract(shapes, state_shardings(make_mesh(MeshConfig()), shapes))
    with Checkpoints(folder / "from_eight") as checkpoints:
        restored = checkpoints.restore(saved["step"], like)
    assert int(restored.step) == saved["step"] == eight_devices.STEPS
    assert eight_devices.bits(eight_devices.raw(restored)) == saved["bits"]


@pytest.mark.parametrize(
    ("sizes", "n_devices", "words"),
    [
        ({"data": 3, "fsdp": 2}, 8, r"mesh\.data is 3 and mesh\.fsdp is 2.*8 device"),
        ({"fsdp": 3}, 8, r"mesh\.fsdp is 3; expected a divisor of the 8 device"),
        ({"data": 2}, 1, r"mesh\.data is 2; .*1 device"),
        ({"fsdp": 2, "tensor": 3}, 8, r"mesh\.fsdp is 2 and mesh\.tensor is 3; .* divides the 8 device"),
    ],
)
def test_a_mesh_of_another_size_than_the_devices_is_refused(sizes, n_devices, words):
    with pytest.raises(InputError, match=words):
        mesh_sizes(MeshConfig(**sizes), n_devices)


@pytest.mark.parametrize(
    ("process_of_device", "rows"),
    [
        ([[0, 0], [1, 1]], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([[0, 1], [0, 1]], [[0, 1, 4, 5], [2, 3, 6, 7]]),  # as on TPU slices of four and more hosts
        ([[1, 0], [0, 1]], [[2, 3, 4, 5], [0, 1, 6, 7]]),
    ],
)
def test_a_process_feeds_the_rows_of_its_devices_wherever_they_are_in_the_mesh(monkeypatch, process_of_device, rows):
    devices = [[mock.Mock(process_index=process) for process in row] for row in process_of_device]
    mesh = Mesh(np.array(devices)[None, ..., None], MESH_AXES)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert host_rows(mesh, 8).tolist() == rows[process]


def test_a_mesh_whose_axes_the_compiler_may_not_divide_is_refused():
    """As jax.make_mesh makes them by default since jax 0.9."""
    x, mesh = jnp.zeros((4, 4)), AbstractMesh((4, 1), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(InputError, match=r"data, tensor are AxisType.Explicit; .*Auto"),
    ):
        constrain(x, "batch", None)


# Several processes


def test_a_run_names_its_mesh_where_it_traces(text_file, tmp_path, monkeypatch):
    """A kernel that the compiler cannot divide, such as a TPU's flash attention, asks for it."""
    meshes = []

    def watched(*arguments):
        meshes.append(jax.sharding.get_abstract_mesh())
        return cross_entropy(*arguments)

    monkeypatch.setattr(pretraining, "cross_entropy", watched)
    more = {"train__steps": 1, "train__eval_every": 1, "sample__every": 0}
    assert main(["train", *options(text_file, tmp_path, **more)]) == 0
    assert len(meshes) >= 2  # training and evaluation
    assert all(mesh.axis_names == MESH_AXES and mesh.size == jax.device_count() for mesh in meshes)


def start(arguments, log, folder, n_devices=1, **env):
    """Start Python; its output goes to a file, so that no pipe fills."""
    flags = f"{QUICK} --xla_force_host_platform_device_count={n_devices}"
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(XLA_FLAGS=flags, NPROC=str(4 * n_devices), **env),
            stdout=out,
            stderr=out,
            cwd=folder,
        )


def training(text, folder, steps):
    """The options of a very small run, with dropout, which tells a row by its place in the batch."""
    every = dict.fromkeys(("train.eval_every", "checkpoint.every", "sample.every"), 3)
    return ["train", *options(text, folder, **{"train.steps": steps, **every, "optimizer.decay_steps": 6})]


def start_processes(n, arguments, folder, **more):
    """Start processes that join; return them and their logs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    logs = [folder / f"process{index}.log" for index in range(n)]
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)}
    return [start(arguments, log, folder, JAX_PROCESS_ID=str(i), **env, **more) for i, log in enumerate(logs)], logs


def run_processes(n, arguments, folder, **more):
    """Run processes that join; return their logs."""
    processes, logs = start_processes(n, arguments, folder, **more)
    try:
        status = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert status == [0] * n, "\n".join(log.read_text()[-3000:] for log in logs)
    return logs


@pytest.mark.slow
def test_the_death_of_process_0_ends_the_other_with_one_line_that_names_it(tmp_path):
    """Instead of JAX's abort with a C++ trace; benchmarks/process_failures.py has the other cases."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps on. " * 20)
    processes, logs = start_processes(2, ["-m", "slm_jax", *training(text, tmp_path, 100_000)], tmp_path)
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "small" / "metrics.jsonl").exists():
            assert time.monotonic() < limit, logs[0].read_text()
            time.sleep(0.1)
        processes[0].kill()
        assert processes[1].wait(60) == 75
    finally:
        for process in processes:
            process.kill()
    (line,) = (line for line in logs[1].read_text().splitlines() if not line.startswith("[Gloo]"))
    assert line.startswith("slm-jax train: process 0 ")
    assert "start all processes again to resume: slm-jax train " in line


@pytest.mark.slow
def test_a_batch_is_the_batch_wherever_hosts_are_in_the_mesh(tmp_path):
    """Three processes of two devices: a host makes the rows of its devices, and only those."""
    logs = run_processes(3, [batches_of_hosts.__file__], tmp_path, n_devices=2)
    shown = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    for layout in batches_of_hosts.LAYOUTS:
        assert all(host[layout]["whole"] == list(range(12)) for host in shown), layout
    rows = {layout: [host[layout]["rows"] for host in shown] for layout in batches_of_hosts.LAYOUTS}
    assert rows["interleaved"] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert rows["rows of two hosts"] == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2 + [[8, 9, 10, 11]]
    assert rows["one host has all rows"] == [[0, 1, 2, 3, 4, 5], list(range(12)), [6, 7, 8, 9, 10, 11]]


@pytest.mark.slow
def test_two_processes_make_one_run_with_the_losses_of_one_process(tmp_path):
    """A run of six steps in two halves, the second resumed on four devices whose hosts are interleaved in the mesh;
    against one process that does it without a break."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps on. " * 20)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    alone = start(["-m", "slm_jax", *training(text, one, 6)], one / "log", one)
    assert alone.wait(timeout=120) == 0, (one / "log").read_text()[-3000:]
    logs = run_processes(2, ["-m", "slm_jax", *training(text, two, 3)], two)
    assert logs[1].read_text().count("step") == 0  # only the first process talks
    run_processes(2, [interleaved_hosts.__file__, *training(text, two, 6)], two, n_devices=2)

    assert {path.name for path in two.iterdir() if path.is_dir()} == {"small"}
    assert {p.name for p in (two / "small").iterdir()} == {p.name for p in (one / "small").iterdir()}
    rows, of_two = (metrics(run / "small") for run in (one, two))
    assert [(row["step"], row["split"]) for row in of_two] == [(row["step"], row["split"]) for row in rows]
    assert sum(row["split"] == "train" for row in rows) == 6
    np.testing.assert_allclose([row["loss"] for row in of_two], [row["loss"] for row in rows], rtol=1e-5)
    assert json.loads((two / "small/summary.json").read_text())["environment"]["processes"] == 2
    saved = [sorted(p.name for p in (run / "small/checkpoints").iterdir()) for run in (one, two)]
    assert saved[0] == saved[1]


def test_several_gpus_compute_while_they_exchange_gradients_unless_the_user_said_otherwise():
    (option,) = compiler_options("gpu", 2, {})
    assert jax.jit(lambda x: x + 1, compiler_options={option: True})(1) == 2  # this XLA knows it
    assert not compiler_options("gpu", 2, {"XLA_FLAGS": f"--{option}=false"})
    for platform, n_devices in (("gpu", 1), ("tpu", 8), ("cpu", 8)):
        assert not compiler_options(platform, n_devices, {})

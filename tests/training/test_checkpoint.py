"""What must hold of checkpoints: bitwise whatever happens meanwhile, the right ones kept, damage found and named."""

import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import refused

from slm_jax.errors import InputError
from slm_jax.files import sha256
from slm_jax.training import checkpoint, manifest
from slm_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    best_step,
    checksums,
    load_opt_state,
    load_params,
    read_metadata,
)
from slm_jax.training.manifest import CHECKSUMS, METADATA, find_damage, saved_steps, write_manifest
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.step import TrainState

OPTIMIZER = optax.adam(1e-3)


def make_state(step=0, size=64):
    params = {"block": {"kernel": jax.random.normal(jax.random.key(step), (size, size)), "bias": jnp.ones(size)}}
    params["half"] = {"scale": jnp.full(4, 0.1, jnp.bfloat16)}
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), OPTIMIZER.init(params))
    return TrainState(jnp.int32(step), params, opt_state, jax.random.key(7 + step))


def shapes(state):
    """What a state looks like before there is one, as the loop makes it."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(lambda: state)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)


def copy(state):
    """A copy on the host; of a copy on the device, for a NumPy view of an array keeps it from being donated."""
    return jax.tree.map(lambda x: np.asarray(jnp.copy(x)), state.replace(key=jax.random.key_data(state.key)))


def assert_same_bits(actual, expected):
    actual, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected))
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (e.dtype, e.shape, e.tobytes()), jax.tree_util.keystr(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Checkpoints of the steps 10, 20 and 30, of which 20 has the lowest validation loss."""
    folder = tmp_path_factory.mktemp("template") / "checkpoints"
    with Checkpoints(folder, keep=3) as checkpoints:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            checkpoints.save(make_state(step), {"note": f"step {step}"}, loss)
    return folder


@pytest.fixture
def saved(template, folder):
    """A copy of them that may be damaged."""
    return shutil.copytree(template, folder)


@pytest.mark.parametrize("like", [shapes, lambda state: make_state(0)], ids=["shapes", "arrays"])
def test_a_state_comes_back_bit_for_bit(template, like):
    state = make_state(20)
    with Checkpoints(template, keep=3) as checkpoints:
        restored = checkpoints.restore(20, like(state))
    assert_same_bits(copy(restored), copy(state))
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


def test_steps_that_reuse_the_memory_do_not_change_what_is_being_saved(folder):
    """Donated as soon as ``save`` has returned; on a CPU JAX does not reuse those that Orbax looks at."""

    def change(state):
        values = jax.tree.map(lambda x: (x * 1.5 + 1).astype(x.dtype), (state.trainable, state.opt_state))
        return state.replace(step=state.step + 1, trainable=values[0], opt_state=values[1])

    change = jax.jit(change, donate_argnums=0)
    state, expected = make_state(0, size=1024), {}
    like = shapes(state)
    with Checkpoints(folder, keep=20) as checkpoints:
        for step in range(1, 21):
            given, state = state, change(state)
            assert given.trainable["block"]["kernel"].is_deleted() or step - 1 in expected
            if step % 4 == 0 or step == 1:
                expected[step] = copy(state)
                checkpoints.save(state, {}, None)
    with Checkpoints(folder, keep=20) as checkpoints:
        for step, values in expected.items():
            assert_same_bits(copy(checkpoints.restore(step, like)), values)


def test_the_latest_are_kept_and_the_best_apart_from_them(folder):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: None}
    kept = {}
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(make_state(step), {}, loss)
            checkpoints.wait()
            kept[step] = saved_steps(folder)
    assert kept == {10: [10], 20: [10, 20], 30: [20, 30], 40: [20, 30, 40], 50: [20, 40, 50], 60: [20, 50, 60]}
    assert best_step(folder) == 20
    with Checkpoints(folder, keep=1) as checkpoints:  # a resumed run knows the losses of earlier starts
        checkpoints.save(make_state(70), {}, 0.5)
    assert saved_steps(folder) == [70]
    assert best_step(folder) == 70


def test_a_step_may_be_saved_anew(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(10), {"note": "first"}, 2.0)
        other = make_state(3).replace(step=jnp.int32(10))
        metadata = {"epochs": None, "run": "ünïcode ☃ \n", "rate": 0.1, "merges": [[1, 2]], "big": 2**60}
        checkpoints.save(other, metadata, 1 / 3)
        checkpoints.wait()
        assert find_damage(folder / "10") is None
        saved = read_metadata(folder, 10)
        assert saved.pop("checksums") == {}  # of one process, which reads the files' SHA-256
        assert saved == {**metadata, "validation_loss": 1 / 3}
        assert_same_bits(copy(checkpoints.restore(10, shapes(other))), copy(other))


@pytest.mark.parametrize(
    "change", [{"validation_loss": loss} for loss in ("1.0", [1], {}, True)] + [{"format": 1}, "{"]
)
def test_metadata_that_cannot_be_used_are_refused_by_name(change, saved):
    path = saved / "20" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    assert content["custom_metadata"]["format"] == 2
    content["custom_metadata"] |= {} if change == "{" else change
    path.write_text("{" if change == "{" else json.dumps(content))
    with pytest.raises(InputError, match=f"{path}: "):
        best_step(saved)


@pytest.mark.parametrize(("losses", "best"), [((float("nan"), 2.0, 3.0), 20), ((None, None, None), 30), ((), None)])
def test_a_loss_that_diverged_is_not_the_lowest_and_without_losses_the_latest_counts_as_best(folder, losses, best):
    finished = []
    with Checkpoints(folder, 5, lambda: finished.append(len(list(folder.glob(f"*/{CHECKSUMS}"))))) as checkpoints:
        for step, loss in zip((10, 20, 30), losses, strict=False):
            checkpoints.save(make_state(step), {}, loss)
            assert step in checkpoints.saved_steps()  # while it is being saved, too
    assert best_step(folder) == best
    assert finished == list(range(1, 1 + len(losses)))


# Damage


def payload(step_folder, item):
    """The largest file of an item."""
    return max((p for p in (step_folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("item", ["params", "state"])
@pytest.mark.parametrize(
    ("spoil", "message"), [(flip, "damaged"), (truncate, "damaged"), (lambda p: p.unlink(), "missing")]
)
def test_a_changed_file_is_found_and_named(saved, item, spoil, message):
    assert find_damage(saved / "20") is None
    path = payload(saved / "20", item)
    spoil(path)
    damage = find_damage(saved / "20")
    assert damage is not None
    assert str(path) in damage
    assert message in damage
    assert find_damage(saved / "30") is None
    with pytest.raises(InputError, match=r"choose another step of 10, 30"):
        load_params(saved, 20, make_state().trainable)


def test_every_file_of_a_checkpoint_has_a_checksum_and_damaged_checksums_are_damage(saved):
    sums = json.loads((saved / "20" / CHECKSUMS).read_text())["files"]
    files = {str(p.relative_to(saved / "20")) for p in (saved / "20").rglob("*") if p.is_file()}
    assert sums.keys() == files - {CHECKSUMS}
    assert "_CHECKPOINT_METADATA" in sums
    for text in ("{", "[]", "{}", "7", "[" * 100_000):
        (saved / "20" / CHECKSUMS).write_text(text)
        assert CHECKSUMS in find_damage(saved / "20")


def test_several_processes_verify_arrays_as_they_were_loaded(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "has_checksums", lambda path: True)
    metadata = read_metadata(saved, 20) | {"checksums": checksums(checkpoint._items(make_state(20)))}
    monkeypatch.setattr(checkpoint, "read_metadata", lambda folder, step: metadata)
    read = []
    monkeypatch.setattr(manifest, "sha256", lambda path: read.append(path) or "")
    assert find_damage(saved / "20", arrays=False) is not None  # of the first small file: not this SHA-256
    assert payload(saved / "20", "params") not in read
    monkeypatch.setattr(manifest, "sha256", sha256)
    largest = payload(saved / "20", "params")
    content = largest.read_bytes()
    truncate(largest)
    assert f"{largest} is damaged: its size" in find_damage(saved / "20", arrays=False)
    largest.write_bytes(content)
    changed = make_state(20)
    changed.trainable["block"]["bias"] = changed.trainable["block"]["bias"].at[5].add(1e-6)
    with Checkpoints(saved) as checkpoints:
        checkpoints.restore(20, shapes(changed))
        monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", lambda *_: checkpoint._items(changed))
        with pytest.raises(
            DamagedCheckpoint, match=re.escape(f"{saved / '20'} is damaged: ['params']['block']['bias']")
        ):
            checkpoints.restore(20, shapes(changed))


@pytest.mark.parametrize(("processes", "sums", "later"), [(1, {"a": 1}, False), (2, {}, False), (2, {"a": 1}, True)])
def test_only_several_processes_that_know_checksums_verify_after_loading(saved, monkeypatch, processes, sums, later):
    """The others read all files before: arrays without checksums would not be verified at all."""
    monkeypatch.setattr(checkpoint.jax, "process_count", lambda: processes)
    monkeypatch.setattr(checkpoint, "read_metadata", lambda folder, step: {"checksums": sums})
    assert checkpoint.has_checksums(saved / "20") is later


def test_damaged_metadata_are_said_with_the_steps_that_are_left(saved):
    flip(saved / "20" / METADATA)
    with pytest.raises(InputError, match=r"choose another step of 10, 30"):
        load_params(saved, 20, make_state().trainable)


def test_a_checksum_notices_what_is_changed_and_what_is_swapped():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    changes = [x.at[1, 2, 3].add(2e-6), x.at[0].set(x[1]).at[1].set(x[0]), x.reshape(4, 6).T.reshape(2, 3, 4), -x]
    changes += [x.at[0, 0, 0].multiply(-1)]
    assert len({checksums([leaf])["[0] float32"] for leaf in (x, *changes)}) == 6
    for dtype in ("bool", "uint8", "bfloat16", "int32"):
        zeros = jnp.zeros(5, dtype)
        assert checksums([zeros]) != checksums([zeros.at[3].set(1)])


@pytest.mark.parametrize("text", [None, "", "{", '{"step": 20, "files": {}}', '{"step": 20}'])
def test_a_folder_without_a_manifest_that_verifies_is_no_checkpoint(saved, text):
    file = saved / "20" / CHECKSUMS
    file.unlink() if text is None else file.write_text(text)
    assert CHECKSUMS in find_damage(saved / "20")
    assert saved_steps(saved) == ([10, 30] if text is None else [10, 20, 30])
    with refused(rf"{file} .*choose another step of 10, 30"):
        load_params(saved, 20, make_state().trainable)


def test_a_checkpoint_that_was_renamed_to_another_step_is_noticed(saved):
    (saved / "20").rename(saved / "40")
    assert "is not step 40: it was saved as step 20" in find_damage(saved / "40")


def test_what_was_not_written_completely_is_never_committed(folder, monkeypatch):
    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", lambda *_, **__: SimpleNamespace(result=dict))
    with refused("step 1 cannot be saved: .*_CHECKPOINT_METADATA was not written"), Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(1), {}, None)
    assert saved_steps(folder) == []


@pytest.mark.parametrize("name", ["[2024] notes*?", "a\\b"])
def test_a_path_is_no_pattern_and_one_that_cannot_be_used_is_refused(tmp_path, name):
    state = make_state(1)
    if "\\" in name:
        with refused("has a backslash"):
            RunFolder(tmp_path / name).create()
        assert not (tmp_path / name).exists()
    else:
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(state, {}, None)
            checkpoints.wait()
            assert_same_bits(copy(checkpoints.restore(1, shapes(state))), copy(state))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", [{"half": {"scale": jnp.ones(3)}}, {"half": {}}, {"more": {"scale": jnp.ones(4)}}])
def test_parameters_of_another_model_are_refused(template, part):
    with refused(rf"{template / '20'}: .*other step"):
        load_params(template, 20, make_state().trainable | part)


def test_parameters_load_without_the_optimizer(saved):
    """They do even where no array of the optimizer is left."""
    for path in (saved / "20" / "state").rglob("d/*"):
        path.write_bytes(b"")
    write_manifest(saved / "20", 20)
    expected = make_state(20).trainable
    loaded = load_params(saved, 20, jax.eval_shape(lambda: expected))
    assert_same_bits(jax.tree.map(np.asarray, loaded), jax.tree.map(np.asarray, expected))


def test_the_optimizers_state_loads_alone_to_the_host(template):
    expected = make_state(20).opt_state
    loaded = load_opt_state(template, 20, jax.eval_shape(lambda: expected))
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(loaded))
    assert_same_bits(loaded, jax.tree.map(np.asarray, expected))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("optimizer", "size"), [(optax.sgd(0.1, momentum=0.9), 64), (OPTIMIZER, 32)])
def test_the_state_of_another_optimizer_or_model_is_refused(template, optimizer, size):
    like = jax.eval_shape(lambda: optimizer.init(make_state(20, size).trainable))
    with refused(rf"{template / '20'}: its state cannot be loaded"):
        load_opt_state(template, 20, like)


# Errors and interruptions


@pytest.mark.parametrize("call", ["wait", "save", "leave"])
def test_an_error_in_the_background_is_raised_by_the_next_call_and_once(folder, monkeypatch, call):
    def fail(folder, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    checkpoints = Checkpoints(folder)
    checkpoints.save(make_state(1), {}, None)
    with refused(rf"{folder}: step 1 cannot be saved: No space left on device .* free\); checkpoints there: none"):
        {
            "wait": checkpoints.wait,
            "save": lambda: checkpoints.save(make_state(2), {}, None),
            "leave": lambda: checkpoints.__exit__(None, None, None),
        }[call]()
    monkeypatch.undo()
    checkpoints.wait()
    if call != "leave":
        checkpoints.save(make_state(3), {}, None)
        checkpoints.__exit__(None, None, None)
        assert 3 in saved_steps(folder)
        assert find_damage(folder / "3") is None


def test_a_disk_that_is_too_full_is_said_before_anything_is_written(folder, monkeypatch):
    with Checkpoints(folder) as checkpoints:
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with refused(rf"{folder}: step 5 cannot be saved: No space left on device \(.* needed, .* free\)"):
            checkpoints.save(make_state(5), {}, None)
        monkeypatch.undo()
        assert checkpoints.saved_steps() == []
        checkpoints.save(make_state(6), {}, None)
    assert saved_steps(folder) == [6]


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_cleared_away(saved):
    leftovers = [saved / name for name in (".saving", ".saving.orbax-checkpoint-tmp", ".removed-1")]
    for leftover in leftovers:
        shutil.copytree(saved / "30", leftover)
    (saved / "50").write_text("not a folder")
    (saved / "notes").mkdir()
    assert saved_steps(saved) == [10, 20, 30]
    assert best_step(saved) == 20
    (saved / "50").unlink()
    (saved / "notes").rmdir()
    with Checkpoints(saved, keep=4) as checkpoints:
        assert checkpoints.saved_steps() == [10, 20, 30]
        checkpoints.save(make_state(40), {}, 4.0)
    assert saved_steps(saved) == [10, 20, 30, 40]
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_run_that_went_back_behind_damaged_checkpoints_keeps_what_it_saves_next(saved):
    """20 and 30 are damaged, so the run resumes from 10: its step 15 is the latest, whatever the others' numbers."""
    for step in (20, 30):
        flip(payload(saved / str(step), "params"))
    with Checkpoints(saved, keep=1) as checkpoints:
        checkpoints.restore(10, shapes(make_state(10)))
        checkpoints.save(make_state(15), {}, None)
    assert 15 in saved_steps(saved)
    assert find_damage(saved / "15") is None

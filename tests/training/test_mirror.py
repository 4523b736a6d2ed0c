"""What must hold of a mirror: a whole copy in the end, whatever happens to it meanwhile, and training never waits."""

import errno
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from slm_jax.errors import InputError
from slm_jax.tasks.config import RunConfig
from slm_jax.training import mirror as mirror_module
from slm_jax.training.checkpoint import CHECKSUMS, METADATA, Checkpoints, find_damage, saved_steps
from slm_jax.training.config import CheckpointConfig
from slm_jax.training.mirror import Mirror, copy_checkpoint, find_mirror, other_files
from slm_jax.training.run_folder import RunFolder
from slm_jax.training.start import Start, find_start
from slm_jax.training.step import TrainState
from slm_jax.weights.trees import write_tree


def save(checkpoints, step, loss=None):
    params = {"kernel": jax.random.normal(jax.random.key(step), (16, 16))}
    checkpoints.save(TrainState(jnp.int32(step), params, (), jax.random.key(0)), {}, loss)
    checkpoints.wait()


class Place:
    """A run's folder, its mirror, and what was said."""

    def __init__(self, folder, keep=2):
        self.root = folder / "drive"
        self.config = RunConfig(
            run="run", runs_dir=str(folder / "runs"), checkpoint=CheckpointConfig(keep=keep, mirror=str(self.root))
        )
        self.run, self.there = self.config.folder, self.root / "run"
        self.said = []
        (self.run / "tokenizer").mkdir(parents=True)
        (self.run / "tokenizer" / "tokenizer.json").write_text("{}")
        (self.run / "config.yaml").write_text("seed: 0\n")
        (self.run / "metrics.jsonl").write_text("")
        assert find_mirror(self.config).path == self.there

    def mirror(self):
        return Mirror(RunFolder(self.run), RunFolder(self.there), self.config.checkpoint.keep, self.said.append)

    def checkpoints(self, mirror=None):
        on_saved = None if mirror is None else mirror.checkpoint_saved
        return Checkpoints(self.run / "checkpoints", self.config.checkpoint.keep, on_saved)

    def is_there(self, step):
        folder = self.there / "checkpoints" / str(step)
        return (folder / METADATA).is_file() and (folder / CHECKSUMS).is_file() and find_damage(folder) is None

    def contents(self, folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(mirror_module, "RETRY_INTERVAL", 0.02)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_in_the_end_the_mirror_is_a_copy_of_the_run(place):
    """With what was written last; without the checkpoints that were kept for a while only."""
    with place.mirror() as mirror:
        with place.checkpoints(mirror) as checkpoints:
            for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0), (40, 3.0), (50, 3.0)):
                (place.run / "metrics.jsonl").write_text(f"until {step}")
                save(checkpoints, step, loss)
                wait_for(lambda step=step: place.is_there(step))
        (place.run / "summary.json").write_text("{}")
        (place.run / "metrics.jsonl").write_text("until the end")
        (place.run / "metrics.jsonl.partial").write_text("not whole")
        (place.run / ".lock").write_text("")
    assert saved_steps(place.there / "checkpoints") == [20, 40, 50]
    expected = place.contents(place.run)
    del expected["metrics.jsonl.partial"], expected[".lock"]
    assert place.contents(place.there) == expected
    assert place.said == []


def test_training_does_not_wait_and_only_the_newest_wish_counts(place, monkeypatch):
    """While the mirror stands still the run saves four times; it takes what is there when it goes on."""
    go_on, copied = threading.Event(), []

    def stand_still(source, target):
        go_on.wait(30)
        copied.append(str(source))
        return copy(source, target)

    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", stand_still)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        for step in (10, 20, 30, 40):
            save(checkpoints, step)
        assert not copied
        go_on.set()
    assert saved_steps(place.there / "checkpoints") == [30, 40]
    assert not any("checkpoints/10" in name or "checkpoints/20" in name for name in copied)


def rename_away(root):
    root.rename(root.with_name("gone"))
    return lambda: root.with_name("gone").rename(root)


def become_a_file(root):
    root.rename(root.with_name("gone"))
    root.write_text("")

    def come_back():
        root.unlink()
        root.with_name("gone").rename(root)

    return come_back


def become_empty_later(root):
    """The drive is mounted anew, and all on it is gone."""
    root.rename(root.with_name("gone"))
    return root.mkdir


def forbid_writing(root):
    root.chmod(0o500)
    (root / "run").chmod(0o500)
    (root / "run" / "checkpoints").chmod(0o500)

    def come_back():
        for folder in (root, root / "run", root / "run" / "checkpoints"):
            folder.chmod(0o700)

    return come_back


NEEDS_RIGHTS = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "vanish", [rename_away, become_a_file, become_empty_later, pytest.param(forbid_writing, marks=NEEDS_RIGHTS)]
)
def test_a_mirror_that_vanishes_and_comes_back_has_the_latest(place, vanish):
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10, 1.0)
        wait_for(lambda: place.is_there(10))
        come_back = vanish(place.root)
        for step in (20, 30, 40):
            save(checkpoints, step, 2.0)
        wait_for(lambda: place.said)
        time.sleep(0.3)  # many attempts
        assert len(place.said) == 1
        for text in (str(place.there), "since", "training goes on", "the latest there is of step 10"):
            assert text in place.said[0]
        come_back()
        wait_for(lambda: place.is_there(40))  # without another checkpoint
        wait_for(lambda: len(place.said) > 1)
    assert place.said[1:] == [f"{place.there} is back; the latest there is of step 40"]
    assert saved_steps(place.there / "checkpoints") == [10, 30, 40]
    assert all(place.is_there(step) for step in (10, 30, 40))


@pytest.mark.usefixtures("impatient")
def test_a_full_mirror_keeps_what_it_has_until_there_is_room(place, monkeypatch):
    copy = shutil.copyfile

    def run_out(source, target):
        if "/30" in str(target):
            target.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10)
        save(checkpoints, 20)
        wait_for(lambda: place.is_there(20))
        monkeypatch.setattr(shutil, "copyfile", run_out)
        save(checkpoints, 30)
        wait_for(lambda: place.said)
        assert "No space left on device" in place.said[0]
        assert f"({place.there}/checkpoints/30.partial/" in place.said[0]
        assert saved_steps(place.run / "checkpoints") == [20, 30]
        assert saved_steps(place.there / "checkpoints") == [10, 20]
        monkeypatch.setattr(shutil, "copyfile", copy)
        wait_for(lambda: place.is_there(30))
    assert saved_steps(place.there / "checkpoints") == [20, 30]


@pytest.mark.usefixtures("impatient")
def test_trouble_is_said_again_after_a_while_and_at_the_end(place, monkeypatch):
    monkeypatch.setattr(mirror_module, "SAY_INTERVAL", 0.5)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        rename_away(place.root)
        began = time.monotonic()
        save(checkpoints, 10)
        time.sleep(0.8)
        seconds = time.monotonic() - began
    during, end = place.said[:-1], place.said[-1]
    assert 2 <= len(during) <= 1 + (seconds + 1) / 0.5
    assert len({text.split("since ")[1][:8] for text in during}) == 1  # the same moment
    assert "no checkpoint is there" in end
    assert str(place.there) in end.split("(")[1]
    assert "mend that, then start the same command again" in end


@pytest.mark.usefixtures("impatient")
def test_a_copy_that_was_spoiled_on_the_way_never_gets_its_name(place, monkeypatch):
    copy = shutil.copyfile
    spoil = True

    def spoil_large_ones(source, target):
        copy(source, target)
        if spoil and target.stat().st_size > 500 and "checkpoints" in str(target):
            content = bytearray(target.read_bytes())
            content[len(content) // 2] ^= 1
            target.write_bytes(content)

    monkeypatch.setattr(shutil, "copyfile", spoil_large_ones)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10)
        wait_for(lambda: place.said)
        assert "SHA-256" in place.said[0]
        assert saved_steps(place.there / "checkpoints") == []
        spoil = False
        wait_for(lambda: place.is_there(10))


def test_there_is_always_a_whole_checkpoint_there(place, monkeypatch):
    """Looked at whenever the mirror is about to remove or rename something; ``keep`` is 1."""
    place.config = RunConfig(
        run="run", runs_dir=str(place.run.parent), checkpoint=CheckpointConfig(keep=1, mirror=str(place.root))
    )
    whole, remove = [], shutil.rmtree

    def look(path, **more):
        if str(path).startswith(str(place.root)) and saved_steps(place.there / "checkpoints"):
            whole.append(any(place.is_there(step) for step in saved_steps(place.there / "checkpoints")))
        remove(path, **more)
        if whole:
            whole.append(any(place.is_there(step) for step in saved_steps(place.there / "checkpoints")))

    monkeypatch.setattr(shutil, "rmtree", look)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        for step in (10, 20, 30):
            save(checkpoints, step)
            wait_for(lambda step=step: place.is_there(step))
    assert saved_steps(place.there / "checkpoints") == [30]
    assert len(whole) > 3
    assert all(whole)


def test_what_only_the_mirror_has_stays_as_long_as_it_would_here(place):
    """A run on a fresh machine has few checkpoints; the mirror's, and the best of them, are not lost by that."""
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        for step, loss in ((10, 1.0), (20, 2.0), (30, 2.0)):
            save(checkpoints, step, loss)
    shutil.rmtree(place.run / "checkpoints")
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 40, 3.0)
        wait_for(lambda: place.is_there(40))
        assert saved_steps(place.there / "checkpoints") == [10, 30, 40]
        save(checkpoints, 50, 3.0)
    assert saved_steps(place.there / "checkpoints") == [10, 40, 50]


def test_a_checkpoint_that_was_written_anew_is_copied_anew(place):
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10, None)
        wait_for(lambda: place.is_there(10))
        save(checkpoints, 10, 1.0)
    assert place.contents(place.there / "checkpoints" / "10") == place.contents(place.run / "checkpoints" / "10")
    assert sorted(path.name for path in (place.there / "checkpoints").iterdir()) == ["10"]


def test_a_checkpoint_that_is_damaged_here_is_said_and_not_copied(place):
    with place.checkpoints() as checkpoints:
        save(checkpoints, 10)
        save(checkpoints, 20)
    files = [path for path in (place.run / "checkpoints" / "10").rglob("*") if path.is_file()]
    payload = max(files, key=lambda path: path.stat().st_size)
    payload.write_bytes(b"x" * payload.stat().st_size)
    with place.mirror():
        wait_for(lambda: place.said)
    assert len(place.said) == 1
    assert str(payload) in place.said[0]
    assert saved_steps(place.there / "checkpoints") == [20]


def test_files_are_copied_again_only_when_they_have_changed(place, monkeypatch):
    copy, copied = shutil.copyfile, []

    def note(source, target):
        copied.append(source.name)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", note)
    (place.run / "frozen.safetensors").write_bytes(b"large" * 1000)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        for step in (10, 20):
            (place.run / "metrics.jsonl").write_text(f"until {step}")
            save(checkpoints, step)
            wait_for(lambda step=step: place.is_there(step))
    assert copied.count("frozen.safetensors") == 1
    assert copied.count("metrics.jsonl") >= 2
    (place.run / "tokenizer" / ".tokenizer.json.tmp").write_text("not finished")
    assert other_files(place.run)[0] == "config.yaml"
    assert not any(".tmp" in name for name in other_files(place.run))


def test_a_mirror_that_hangs_is_not_waited_for_for_ever(place, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(mirror_module, "QUIET_CLOSE", 0.2)
    monkeypatch.setattr(mirror_module, "CLOSE_TIMEOUT", 0.2)
    monkeypatch.setattr(mirror_module, "SAY_INTERVAL", 0.0)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: never.wait(30))
    began = time.monotonic()
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10)
        time.sleep(0.05)
        save(checkpoints, 20)
    assert time.monotonic() - began < 10
    assert "is slow" in place.said[0]
    assert "too slow" in place.said[-1]
    assert "no checkpoint is there" in place.said[-1]
    never.set()


def test_a_copy_replaces_what_an_interrupted_one_left(place, tmp_path):
    with place.checkpoints() as checkpoints:
        save(checkpoints, 10)
    source, target = place.run / "checkpoints" / "10", tmp_path / "copy" / "10"
    for name in ("10", "10.partial", "10.replaced.partial"):
        (target.parent / name).mkdir(parents=True)
        (target.parent / name / "some.file").write_text("left")
    copy_checkpoint(source, target)
    assert place.contents(target) == place.contents(source)
    assert [path.name for path in target.parent.iterdir()] == ["10"]


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        ("nowhere/mirror", "mount it"),
        ("a-file", "cannot write there"),
        ("runs", "own folder"),
        ("runs/run", "own folder"),
        ("runs/run/backup", "own folder"),
    ],
)
def test_a_mirror_that_cannot_be_one_is_refused_in_one_line(tmp_path, mirror, said):
    (tmp_path / "a-file").write_text("")
    config = RunConfig(
        run="run", runs_dir=str(tmp_path / "runs"), checkpoint=CheckpointConfig(mirror=str(tmp_path / mirror))
    )
    with pytest.raises(InputError, match=said) as caught:
        find_mirror(config)
    assert f"checkpoint.mirror is {tmp_path / mirror}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file"]


def test_without_a_mirror_there_is_none(tmp_path):
    assert find_mirror(RunConfig(runs_dir=str(tmp_path))) is None


@pytest.fixture
def slow(monkeypatch):
    """Every file takes a while to copy; the sources are noted."""
    copy, copied = shutil.copyfile, []

    def copy_slowly(source, target):
        time.sleep(0.03)
        copied.append(str(target))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_slowly)
    return copied


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.usefixtures("slow", "impatient")
def test_a_mirror_slower_than_the_checkpoints_gets_newer_ones_all_the_same(tmp_path, monkeypatch, has_links):
    """Of each the original is removed long before its copy is whole."""
    place, n_copied = Place(tmp_path, keep=1), set()
    if not has_links:

        def refuse(source, target):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(mirror_module, "_pin", pin_at_once(mirror_module._pin))
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        for step in range(10, 300, 10):
            save(checkpoints, step)
            time.sleep(0.1)
            n_copied.update(saved_steps(place.there / "checkpoints"))
    assert len(n_copied) >= 3
    assert saved_steps(place.there / "checkpoints")[-1] == 290
    assert place.is_there(290)
    assert place.said == []
    assert not (place.run / mirror_module.PINNED).exists()


def pin_at_once(pin):
    """The run's own disk is quick."""

    def pin_quickly(source, target):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "copyfile", lambda one, other: other.write_bytes(one.read_bytes()))
            pin(source, target)

    return pin_quickly


def test_a_latest_checkpoint_that_is_lost_is_said(place, monkeypatch):
    with place.checkpoints() as checkpoints:
        save(checkpoints, 10)

    def lose(source, target):
        shutil.rmtree(source)
        return mirror_pin(source, target)

    mirror_pin = mirror_module._pin
    monkeypatch.setattr(mirror_module, "_pin", lose)
    with place.mirror():
        pass
    assert f"step 10 is not copied, as it was removed from {place.run} just now" in place.said[0]
    assert len(place.said) == 1


def test_the_newest_does_not_wait_for_older_ones_when_the_run_ends(tmp_path, slow, monkeypatch):
    monkeypatch.setattr(mirror_module, "QUIET_CLOSE", 0.1)
    place = Place(tmp_path, keep=6)
    with place.checkpoints() as checkpoints:
        for step in (10, 20, 30, 40):
            save(checkpoints, step, 1.0 if step == 20 else 2.0)
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        wait_for(lambda: any("checkpoints/40" in name for name in slow))
        save(checkpoints, 50, 2.0)
    assert saved_steps(place.there / "checkpoints") == [20, 40, 50]  # 40 was under way; 20 is the best
    steps = [name.split("checkpoints/")[1][:2] for name in slow if "checkpoints/" in name]
    assert list(dict.fromkeys(steps)) == ["40", "50", "20"]


def spoil(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_copy_that_was_damaged_there_is_mended_by_the_next_start(place):
    with place.mirror(), place.checkpoints() as checkpoints:
        save(checkpoints, 10)
        save(checkpoints, 20)
    spoil(largest(place.there / "checkpoints" / "10"))
    spoil(place.there / "config.yaml")
    assert not place.is_there(10)
    with place.mirror():
        pass
    assert place.is_there(10)
    assert place.contents(place.there) == place.contents(place.run)
    assert place.said == []


def test_a_copy_that_lost_bytes_there_is_mended_while_training(place):
    with place.mirror() as mirror, place.checkpoints(mirror) as checkpoints:
        save(checkpoints, 10)
        wait_for(lambda: place.is_there(10))
        largest(place.there / "checkpoints" / "10").write_bytes(b"")
        save(checkpoints, 20)
        wait_for(lambda: place.is_there(10))


def test_what_is_not_trained_is_copied_once_and_compared_at_each_start(place, monkeypatch):
    copy, copied = shutil.copyfile, []

    def note(source, target):
        copied.append(source.name)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", note)
    frozen = place.there / "frozen.safetensors"
    write_tree(place.run / "frozen.safetensors", {"kernel": np.ones((64, 64), np.float32)})
    for _ in range(2):
        with place.mirror():
            pass
    assert copied.count("frozen.safetensors") == 1
    spoil(frozen)
    with place.mirror():
        pass
    assert frozen.read_bytes() == (place.run / "frozen.safetensors").read_bytes()
    spoil(frozen)
    with place.checkpoints() as checkpoints:
        save(checkpoints, 10)
    fresh = RunFolder(place.root.parent / "fresh")
    copy_checkpoint(place.run / "checkpoints" / "10", place.there / "checkpoints" / "10")
    with pytest.raises(InputError, match=r"drive/run/frozen.safetensors: kernel is damaged"):
        Start(fresh, 10, {"identity": {}}, mirror=RunFolder(place.there)).fetched({}, print)
    assert saved_steps(fresh.checkpoints) == []


@pytest.mark.usefixtures("impatient")
def test_a_file_that_was_spoiled_on_the_way_never_gets_its_name(place, monkeypatch):
    copy = shutil.copyfile

    def spoil_copy(source, target):
        copy(source, target)
        if "tokenizer" in str(target):
            spoil(target)

    monkeypatch.setattr(shutil, "copyfile", spoil_copy)
    with place.mirror():
        wait_for(lambda: place.said)
    assert "tokenizer.json.partial: is damaged" in place.said[0]
    assert not (place.there / "tokenizer" / "tokenizer.json").exists()


def test_a_full_mirror_is_told_at_the_end_with_what_to_do(place, monkeypatch):
    def run_out(source, target):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", run_out)
    with place.mirror():
        pass
    reason = f"({place.there}/config.yaml.partial: {os.strerror(errno.EDQUOT)})"
    assert f"{reason}; free space there, then start the same command again" in place.said[-1]


def test_a_mirror_that_vanished_is_not_made_again(place, tmp_path):
    with place.checkpoints() as checkpoints:
        save(checkpoints, 10)
    shutil.rmtree(place.root)
    with place.mirror():
        pass
    with pytest.raises(FileNotFoundError):
        copy_checkpoint(place.run / "checkpoints" / "10", place.there / "checkpoints" / "10")
    assert not place.root.exists()


def test_a_run_in_a_folder_of_its_name_has_its_mirror(tmp_path):
    config = RunConfig(run="a/b", runs_dir=str(tmp_path), checkpoint=CheckpointConfig(mirror=str(tmp_path / "drive")))
    config.folder.mkdir(parents=True)
    (config.folder / "config.yaml").write_text("seed: 0\n")
    with Mirror(RunFolder(config.folder), find_mirror(config), 2, pytest.fail):
        pass
    assert (tmp_path / "drive" / "a" / "b" / "config.yaml").is_file()


@pytest.mark.parametrize(
    ("hosts", "said"),
    [([[20, 0], [20, 0]], None), ([[20, 0], [-1, 0]], "20, none"), ([[20, 0], [20, 1]], "20, 20 in the mirror")],
)
def test_hosts_that_see_different_checkpoints_are_refused(place, monkeypatch, hosts, said):
    found = []

    def gather(value):
        found.append(value.tolist())
        return np.array(hosts)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    if said is None:
        assert find_start(place.config).step is None
    else:
        with pytest.raises(InputError, match=rf"different checkpoints \({said}\); expected the same on each"):
            find_start(place.config)
    assert found == [[-1, 0]]


def test_a_start_that_was_ended_at_once_leaves_a_mirror_that_can_be_one(place, monkeypatch):
    """Neither files without the configuration, which makes them a run, nor a part of that one are in the way."""
    config = place.run / "config.yaml"
    config.rename(place.run.parent / "later")
    with place.mirror():
        pass
    assert not place.there.exists()
    (place.run.parent / "later").rename(config)

    def run_out(source, target):
        target.write_bytes(b"see")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", run_out)
    with place.mirror():
        pass
    assert [path.name for path in place.there.iterdir()] == ["config.yaml.partial"]
    assert find_start(place.config).step is None

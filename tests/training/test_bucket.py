"""What must hold of a mirror in object storage: nothing counts before it is whole, and a lost machine costs nothing."""

import hashlib
import json
import shutil

import fsspec
import jax
import numpy as np
import pytest
from buckets import fake_bucket
from fsspec.registry import _registry, known_implementations
from pretraining import metrics, options
from refusals import contents, fails

from slm_jax import cli
from slm_jax.commands import finetune
from slm_jax.files import Bucket
from slm_jax.runs import load_gpt2
from slm_jax.tasks.config import FinetuneConfig, parse_args
from slm_jax.tools.doctor.run_checks import check_mirror
from slm_jax.training.config import CheckpointConfig
from slm_jax.training.manifest import CHECKSUMS, METADATA, saved_steps
from slm_jax.training.mirror import BucketCopy, Mirror
from slm_jax.training.resume import find_start
from slm_jax.training.run_folder import RunFolder

URL = "gs://bucket/all/run"
SMALL = {"run": "run", "model__emb_dim": 8, "model__context_length": 8, "model__drop_rate": 0.0, "train__steps": 8}
SMALL |= {"train__batch_size": 2, "train__accumulate": 1, "train__eval_every": 2, "checkpoint__every": 2}
SMALL |= {"sample__every": 0, "optimizer__warmup_steps": 0, "optimizer__schedule": "constant"}


def words(folder, runs="runs", **more):
    values = {**SMALL, "checkpoint__mirror": "gs://bucket/all/", **more}
    return options(folder / "text.txt", folder / runs, **values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eight steps, unbroken, and what its mirror has of it."""
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "text.txt").write_text("a bad cafe\n" * 40)
    with fake_bucket() as bucket:
        assert cli.main(["train", *words(folder)]) == 0
        return folder, bucket.objects()


@pytest.fixture
def bucket(trained):
    """The bucket, as the run left it."""
    with fake_bucket() as bucket:
        bucket.fill(trained[1])
        yield bucket


@pytest.fixture
def place(trained, tmp_path):
    """A copy of the run that may be changed."""
    shutil.copytree(trained[0] / "runs", tmp_path / "runs")
    return tmp_path


def start(trained, tmp_path, *more):
    """Where a new machine would start."""
    return find_start(parse_args([*words(trained[0]), "--runs_dir", str(tmp_path / "new"), *more]))


def update(place, notes=None, keep=2, **how):
    run = RunFolder(place / "runs" / "run")
    Mirror(run, BucketCopy(URL), keep, [].append if notes is None else notes.append).update(**how)


def test_the_bucket_has_what_the_run_has(trained):
    here = contents(trained[0] / "runs" / "run")
    assert trained[1] == {f"all/run/{name}": content for name, content in here.items() if not name.startswith(".")}


def test_a_run_whose_machine_was_lost_resumes_bit_for_bit(trained, bucket, tmp_path, capsys):
    """It was killed after step 6, before the checkpoint of step 8 was whole."""
    bucket.drop(f"all/run/checkpoints/8/{CHECKSUMS}")
    bucket.drop("all/run/summary.json")
    assert cli.main(["train", *words(trained[0]), "--runs_dir", str(tmp_path)]) == 0
    assert "step 6 was copied from gs://bucket/all/run" in " ".join(capsys.readouterr().out.split())
    unbroken, resumed = trained[0] / "runs" / "run", tmp_path / "run"
    assert metrics(resumed) == metrics(unbroken)
    assert saved_steps(resumed / "checkpoints") == saved_steps(unbroken / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, *(load_gpt2(f"{run}@8")[1] for run in (unbroken, resumed)))
    assert bucket.objects("all/run") == {n: c for n, c in contents(resumed).items() if not n.startswith(".")}


def test_a_bucket_that_denies_writing_ends_in_one_line_before_anything_is_done(trained, bucket, tmp_path, capsys):
    bucket.is_denied = True
    args = ["train", *words(trained[0]), "--runs_dir", str(tmp_path / "new")]
    fails(args, capsys, "checkpoint.mirror", "gs://bucket/all/run: cannot write there (Forbidden: ")
    assert not (tmp_path / "new").exists()
    assert bucket.objects() == trained[1]


def test_one_that_fails_later_is_a_warning_and_the_next_update_catches_up(place, bucket):
    notes = []
    bucket.drop("all/run")
    bucket.is_denied = True
    update(place, notes)
    (warning,) = notes
    assert "gs://bucket/all/run: the run cannot be copied there now (Forbidden: " in warning
    assert "\n" not in warning
    bucket.is_denied = False
    update(place)
    assert bucket.objects("all/run") == {
        name: content for name, content in contents(place / "runs/run").items() if not name.startswith(".")
    }


def test_what_makes_a_checkpoint_count_is_written_last_and_nothing_is_written_twice(place, bucket):
    bucket.drop("all/run")
    target = BucketCopy(URL)
    target.update(RunFolder(place / "runs/run"), 2)
    assert bucket.sent[0] == "all/run/config.yaml"
    for step in (6, 8):
        of_step = [name for name in bucket.sent if name.startswith(f"all/run/checkpoints/{step}/")]
        assert of_step.index(f"all/run/checkpoints/{step}/{CHECKSUMS}") == len(of_step) - 1
    bucket.sent.clear()
    with (place / "runs/run/metrics.jsonl").open("a") as log:
        log.write("{}\n")
    target.update(RunFolder(place / "runs/run"), 2)
    assert bucket.sent == ["all/run/metrics.jsonl"]


def test_a_log_that_grows_while_it_is_copied_is_no_failure(place, bucket, monkeypatch):
    log, notes, write = place / "runs/run/metrics.jsonl", [], bucket._open
    lines = log.read_bytes()

    def open_and_train_on(self, path, mode="rb", **kwargs):
        if mode == "wb":
            log.write_bytes(log.read_bytes() + b"{}\n")
        return write(self, path, mode, **kwargs)

    monkeypatch.setattr(bucket, "_open", open_and_train_on)
    bucket.drop("all/run")
    update(place, notes)
    assert not notes
    assert bucket.objects("all/run")["metrics.jsonl"] == lines


def test_old_checkpoints_are_removed_as_in_the_run_and_interrupted_copies_too(place, bucket):
    whole = bucket.objects("all/run/checkpoints/6")
    for step, loss in ((1, 0.001), (2, 9.0), (3, 9.0)):
        content = json.loads(whole[METADATA])
        content["custom_metadata"]["validation_loss"] = loss
        about = {**whole, METADATA: json.dumps(content).encode()}
        bucket.fill({f"all/run/checkpoints/{step}/{name}": data for name, data in about.items()})
    bucket.fill({"all/run/checkpoints/7/params/_METADATA": b"", "all/run/checkpoints/8/params/stray": b"an old copy"})
    bucket.drop(f"all/run/checkpoints/8/{CHECKSUMS}")
    shutil.rmtree(place / "runs/run/checkpoints/6")
    update(place)
    assert BucketCopy(URL).steps() == [1, 6, 8]  # the best, and the latest two
    steps = {name.split("/")[1] for name in bucket.objects("all/run") if name.startswith("checkpoints/")}
    assert steps == {"1", "6", "8"}
    assert bucket.objects("all/run/checkpoints/8") == contents(place / "runs/run/checkpoints/8")


def damage(bucket, step):
    """Change the largest file of a checkpoint, which is only noticed once it was copied."""
    objects = bucket.objects(f"all/run/checkpoints/{step}")
    name = max((name for name in objects if "/d/" in name), key=lambda name: len(objects[name]))
    bucket.fill({f"all/run/checkpoints/{step}/{name}": b"x" * len(objects[name])})


def test_a_damaged_checkpoint_is_not_used(trained, bucket, tmp_path):
    damage(bucket, 8)
    found = start(trained, tmp_path)
    assert found.step == 6
    assert "gs://bucket/all/run/checkpoints/8/" in found.notes[0]
    assert "SHA-256" in found.notes[0]
    shutil.rmtree(tmp_path / "new")
    damage(bucket, 6)
    for _ in range(2):  # what it leaves is no run
        with pytest.raises(ValueError, match=r"all/run: every checkpoint is damaged"):
            start(trained, tmp_path)


def test_the_newer_of_run_and_bucket_wins(trained, bucket, tmp_path):
    assert start(trained, tmp_path).step == 8
    bucket.drop("all/run/checkpoints/8")
    bucket.sent.clear()
    found = start(trained, tmp_path)
    assert (found.step, found.notes) == (8, ())


def test_the_best_is_copied_along(trained, bucket, tmp_path):
    """Training would never save it again."""
    best = {n: c for n, c in bucket.objects("all/run/checkpoints/6").items() if n != CHECKSUMS}
    content = json.loads(best[METADATA])
    content["custom_metadata"]["validation_loss"] = 0.001
    sums = json.loads(bucket.objects()[f"all/run/checkpoints/6/{CHECKSUMS}"])
    best[METADATA] = json.dumps(content).encode()
    sums["files"][METADATA] = [len(best[METADATA]), hashlib.sha256(best[METADATA]).hexdigest()]
    best[CHECKSUMS] = json.dumps(sums).encode()
    bucket.fill({f"all/run/checkpoints/6/{name}": data for name, data in best.items()})
    assert start(trained, tmp_path).step == 8
    assert saved_steps(tmp_path / "new/run/checkpoints") == [6, 8]


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        (["--seed", "1"], "gs://bucket/all/run holds another run: seed is 1 now and was 0"),
        (["--resume", "never"], "gs://bucket/all/run already holds a run"),
    ],
)
def test_another_run_of_that_name_is_refused_and_left_as_it_is(trained, bucket, tmp_path, more, pattern):
    with pytest.raises(ValueError, match=pattern):
        start(trained, tmp_path, *more)
    assert bucket.objects() == trained[1]
    assert not (tmp_path / "new").exists()


def test_something_else_there_is_not_touched(trained, bucket, tmp_path):
    bucket.drop("all/run")
    bucket.fill({"all/run/holiday.jpg": b"", "all/running/config.yaml": b""})
    with pytest.raises(ValueError, match="gs://bucket/all/run is not empty and holds no run"):
        start(trained, tmp_path)


def test_a_name_that_leads_out_of_the_run_is_not_followed(trained, bucket, tmp_path):
    bucket.fill({"all/run/checkpoints/8/../../../../out": b"", "all/run/tokenizer/../../../out": b""})
    assert start(trained, tmp_path).step == 8
    assert not list(tmp_path.rglob("out"))


def test_the_doctor_compares_the_steps(trained, bucket):
    run = RunFolder(trained[0] / "runs" / "run")
    ((level, text),) = check_mirror(run)
    assert (level, "has step 6, step 8" in text) == ("ok", True)
    bucket.drop("all/run/checkpoints/8")
    ((level, text),) = check_mirror(run)
    assert (level, "not the latest, 8" in text) == ("note", True)


def test_fine_tuning_that_only_the_bucket_has_needs_no_base(trained, bucket, tmp_path):
    config = FinetuneConfig(run="run", runs_dir=str(tmp_path), base=str(tmp_path / "tiny"))
    assert finetune._missing_base(config) is not None
    mirrored = CheckpointConfig(mirror="gs://bucket/all")
    assert finetune._missing_base(FinetuneConfig(**{**vars(config), "checkpoint": mirrored})) is None


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/all", ["s3://bucket/all/run: needs a package", 'pip install "slm-jax[s3]"']),
        ("cloud://bucket/all", ["cloud://bucket/all/run", "not known: cloud"]),
        ("gs://", ["gs:", "names no bucket"]),
    ],
)
def test_storage_that_cannot_be_reached_is_one_line(trained, bucket, tmp_path, capsys, monkeypatch, url, parts):
    monkeypatch.setitem(known_implementations, "s3", {"class": "no_such_package.S3", "err": "none"})
    monkeypatch.delitem(_registry, "s3", raising=False)
    args = ["train", *words(trained[0], checkpoint__mirror=url), "--runs_dir", str(tmp_path / "new")]
    fails(args, capsys, *parts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train", "--runs_dir", "gs://bucket/runs"], ["runs_dir is", "--checkpoint.mirror gs://bucket/runs"]),
        (["generate", "--run", "gs://bucket/runs/tiny"], ["gs://bucket/runs/tiny: expected a path on this machine"]),
        (["train", "--run", "gs://bucket/x"], ["run is 'gs://bucket/x'"]),
        (["train", "--data.source", "text:gs://bucket/a.txt"], ["gs://bucket/a.txt: expected a path on this machine"]),
        (["prepare", "--source", "builtin:python-docs", "--out", "gs://bucket/a.bin"], ["gs://bucket/a.bin"]),
    ],
)
def test_where_a_path_is_needed_a_url_is_refused_and_makes_no_folder(args, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(args, capsys, *parts)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_storage_is_one_line_whatever_its_kind(bucket, monkeypatch):
    class RefreshError(Exception):
        """As of google-auth, which knows no OSError."""

    def fail(*_, **__):
        raise RefreshError("no\ncredentials")

    monkeypatch.setattr(bucket, "find", fail)
    with pytest.raises(OSError, match="no credentials") as caught:
        Bucket(URL).sizes()
    assert caught.value.filename == URL


@pytest.mark.slow
def test_a_server_that_speaks_s3_is_such_a_bucket(trained, place, tmp_path, monkeypatch):
    """With the real client; needs s3fs and moto[server]."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server.start()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://{}:{}".format(*server.get_host_and_port())})
    try:
        mirror = ["--checkpoint.mirror", "s3://bucket/all"]
        with pytest.raises(ValueError, match="s3://bucket/all/run: cannot write there"):  # no such bucket
            start(trained, tmp_path, *mirror)
        fsspec.filesystem("s3").mkdir("bucket")
        run, there = RunFolder(place / "runs/run"), Bucket("s3://bucket/all/run")
        here = {name: len(content) for name, content in contents(run.path).items() if not name.startswith(".")}
        target = BucketCopy(there.url)
        target.update(run, 2)
        assert there.sizes() == here
        shutil.rmtree(run.step_path(6))
        target.update(run, 1)
        assert there.sizes() == {name: size for name, size in here.items() if not name.startswith("checkpoints/6/")}
        assert start(trained, tmp_path, *mirror).step == 8
        new = contents(tmp_path / "new/run")
        assert {n: c for n, c in new.items() if not n.startswith(".")} == {
            n: c for n, c in contents(run.path).items() if not n.startswith(".")
        }
        assert there.version("config.yaml") == there.version("config.yaml")
        assert there.is_older("config.yaml", 4e9)
        with pytest.raises(FileNotFoundError):
            there.read("nothing")
        there.remove("nothing")
    finally:
        server.stop()

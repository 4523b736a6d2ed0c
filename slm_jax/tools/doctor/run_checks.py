"""Checks of a run's folder: whether it is intact, how far it is, how it went, and what can be done next."""

import contextlib
import math
from collections.abc import Iterator

import jax

from slm_jax.errors import InputError
from slm_jax.runs import RunFolder, best_step, find_damage, read_frozen, read_metadata, saved_steps, try_metadata
from slm_jax.tasks.config import TASKS, RunConfig, parse_args
from slm_jax.tools.doctor.machine_checks import Finding, Found, folder_size, perform, start_error
from slm_jax.tools.report.run_data import figure
from slm_jax.training.hardware import environment, rounding_changes
from slm_jax.training.mirror import BucketCopy
from slm_jax.training.progress import format_bytes, format_duration


def examine_run(run: RunFolder) -> Iterator[Finding]:
    """Yield what each check of a run finds; reads every file of every checkpoint."""
    checks = (check_config, check_checkpoints, check_log, check_machine, check_mirror, check_size, check_next)
    return perform(checks, run)


def check_config(run: RunFolder) -> Found:
    try:
        config = _read_config(run)
    except InputError as error:
        yield "problem", f"{error}; the checkpoints can still be used: slm-jax generate --run {run.path}"
        return
    if config is None and run.metrics_file.is_file():
        yield "note", "no config.yaml: the command that trained the run resumes it and writes the file again"
        return
    if config is None:
        yield "note", "no config.yaml: weights only, usable for generation and as --base; training cannot resume here"
        return
    base = "" if config.base is None else f", from {config.base}, trainable {config.trainable}"
    yield "ok", f"{config.task} on {config.data.source}{base}"


def _read_config(run: RunFolder) -> RunConfig | None:
    file = run.path / "config.yaml"
    return parse_args(["--config", str(file)]) if file.is_file() else None


def _config(run: RunFolder) -> RunConfig | None:
    """Return the configuration, None if there is none or it is invalid, which :func:`check_config` reports."""
    with contextlib.suppress(InputError):
        return _read_config(run)
    return None


def check_checkpoints(run: RunFolder) -> Found:
    steps = saved_steps(run.checkpoints)
    if not steps:
        yield "note", "none yet; one is saved every checkpoint.every steps"
        return
    damage = {step: _damage(run, step) for step in steps}
    intact = [step for step in steps if not damage[step]]
    best = best_step(run.checkpoints) if intact == steps else None
    for step in steps:
        folder = run.step_path(step)
        if damage[step]:
            yield "problem", f"step {step:,}: {damage[step]}; delete {folder}, the others are not affected"
            continue
        loss = read_metadata(run.checkpoints, step)["validation_loss"]
        text = f"step {step:,}" + ("" if loss is None else f", validation loss {loss:.4f}")
        text += ", the latest" * (step == steps[-1]) + ", the best" * (step == best)
        yield "ok", f"{text}: intact (SHA-256)"
    if not intact:
        yield "problem", "every checkpoint is damaged: copy the run from its mirror or a backup, or train again"
    elif (metadata := read_metadata(run.checkpoints, intact[-1])).get("trainable", "all") != "all":
        try:
            read_frozen(run.path, metadata)
        except InputError as error:
            yield "problem", f"frozen parameters: {error}"
        else:
            yield "ok", "frozen.safetensors, the frozen parameters: intact"
    others = [path for path in run.checkpoints.iterdir() if path.is_dir() and path.name not in map(str, steps)]
    if others:
        size, names = format_bytes(sum(map(folder_size, others))), ", ".join(path.name for path in others[:3])
        text = f"{len(others)} damaged or unfinished ({names}), {size}: may be deleted while nothing trains the run"
        yield "note", text


def _damage(run: RunFolder, step: int) -> str | None:
    damage = find_damage(run.step_path(step))
    if damage is None:
        try:
            read_metadata(run.checkpoints, step)
        except InputError as error:
            return str(error)
    return damage


def check_log(run: RunFolder) -> Found:
    rows = run.metrics()
    if not rows:
        yield "note", "empty"
        return
    n_lines = len(run.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines())
    if n_lines > len(rows):
        where = f"{n_lines - len(rows):,} of {n_lines:,} lines of metrics.jsonl are damaged"
        yield "problem", f"{where}; they are ignored, and dropped when the run resumes"
    last = rows[-1]
    text = f"{len(rows):,} lines up to step {last['step']:,}"
    train, validation = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    if train:
        text += f", training loss {figure(train[-1].get('loss'), '.4f')}"
    if validation:
        lowest = min(validation, key=lambda row: math.inf if row.get("loss") is None else row["loss"])
        final, least = (figure(row.get("loss"), ".4f") for row in (validation[-1], lowest))
        text += f", validation loss {final} (lowest {least} at step {lowest['step']:,})"
    if last.get("seconds") is not None:
        text += f", {format_duration(last['seconds'])} in all"
    yield "ok", text
    skipped = [f"{row['step']:,}" for row in train if row.get("loss") is None or row.get("skipped")]
    if skipped:
        shown = ", ".join(skipped[:5]) + (" …" if len(skipped) > 5 else "")
        what = f"loss or gradients were not finite in {len(skipped)} logged steps, which were skipped: {shown}"
        yield "note", f"{what}; if more follow, lower --optimizer.learning_rate or raise --optimizer.warmup_steps"
    steps = saved_steps(run.checkpoints)
    if steps and last["step"] > steps[-1]:
        yield "note", f"{last['step'] - steps[-1]:,} steps after the latest checkpoint; a resume repeats them"


def check_machine(run: RunFolder) -> Found:
    metadata = try_metadata(run, reversed(saved_steps(run.checkpoints)))
    if "environment" not in metadata or start_error():
        return
    was, now = metadata["environment"], environment(jax.device_count())
    versions = ", ".join(f"{name} {was[name]}" for name in ("jax", "flax", "python") if name in was)
    trained = f"trained on {was.get('devices', '?')} × {was.get('device', '?')} with {versions}"
    if changed := rounding_changes(was, now):
        here = ", ".join(f"{key} {now[key]} (was {was[key]})" for key in changed)
        yield "note", f"{trained}; here {here}: a resume reads the same data in the same order, but is not bit for bit"
        return
    # The kernels of a GPU add in whatever order threads arrive.
    but = ", apart from kernels that round differently from run to run" if jax.default_backend() == "gpu" else ""
    yield "ok", f"{trained}, as here: a resume is bit for bit the unbroken run{but}"


def check_mirror(run: RunFolder) -> Found:
    config = _config(run)
    if config is not None and config.mirror_url is not None:
        yield from _check_bucket(run, config.mirror_url)
    if config is None or config.mirror_folder is None:
        return
    mirror = RunFolder(config.mirror_folder)
    if mirror.path.resolve() == run.path.resolve():
        yield "ok", "this is the mirror; training with the same --run and --checkpoint.mirror resumes from it"
        return
    if not mirror.path.is_dir():
        yield "problem", f"{mirror.path} does not exist; mount it: until then the run is on this disk only"
        return
    here, there = saved_steps(run.checkpoints), saved_steps(mirror.checkpoints)
    for step in there:
        if damage := _damage(mirror, step):
            again = ", and the next start copies it again" if step in here else ""
            remedy = f"delete that checkpoint there{again}"
            yield "problem", f"{mirror.path}: step {step:,}: {damage}; {remedy}"
            return
    text = f"{mirror.path} has {', '.join(f'step {step:,}' for step in there) or 'no checkpoint'}"
    if here and (not there or there[-1] < here[-1]):
        yield "note", f"{text}, not the latest, {here[-1]:,}; the next start copies it"
    else:
        yield "ok", f"{text}, each intact"


def _check_bucket(run: RunFolder, url: str) -> Found:
    """Compare steps only: to read the files would be a download of all of them."""
    try:
        there = BucketCopy(url).steps()
    except InputError as error:
        yield "problem", str(error)
        return
    except OSError as error:
        yield "problem", f"{url}: cannot be read ({error.strerror}); until it can, the run is on this disk only"
        return
    here = saved_steps(run.checkpoints)
    text = f"{url} has {', '.join(f'step {step:,}' for step in there) or 'no checkpoint'}"
    if here and (not there or there[-1] < here[-1]):
        yield "note", f"{text}, not the latest, {here[-1]:,}; the next start copies it"
    else:
        yield "ok", f"{text}; their SHA-256 are compared when a run is copied from there"


def check_size(run: RunFolder) -> Found:
    whole, checkpoints = folder_size(run.path), folder_size(run.checkpoints)
    yield "ok", f"{format_bytes(whole)} in {run.path}, including {format_bytes(checkpoints)} of checkpoints"


def check_next(run: RunFolder) -> Found:
    if run.is_locked():
        yield "note", "another process is training it now"
        return
    config = _config(run)
    if config is None:
        yield "ok", f"slm-jax generate --run {run.path}"
        return
    task = TASKS[config.task]
    resume = f"slm-jax {task.command} --config {run.path / 'config.yaml'}"
    if config.folder.resolve() != run.path.resolve():
        resume += f" --runs_dir {run.path.parent} --run {run.path.name}"
    summary, last = run.read_json("summary.json"), max(saved_steps(run.checkpoints), default=0)
    if isinstance(summary, dict) and last and summary.get("step") == last:
        yield "ok", f"finished, {last:,} steps: slm-jax {task.use} --run {run.path}; for more: {resume} --train.steps N"
        return
    total = f" of {config.train.steps:,}" if config.train.steps else ""
    yield "ok", f"at step {last:,}{total}; to resume: {resume}"

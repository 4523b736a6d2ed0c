"""Where a run starts: anew, or from a checkpoint of its folder that is whole and of the same identity."""

import dataclasses
from typing import Any

from slm_jax.config import RunConfig
from slm_jax.errors import InputError, MissingInputError
from slm_jax.identity import first_difference
from slm_jax.training.checkpoint import find_damage, read_metadata, saved_steps
from slm_jax.training.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: the run's.
        step: the checkpoint to go on from; None: from nothing.
        metadata: what that checkpoint says of its run; empty without one.
        warnings: what a person should know, a line each.
        saved: the steps that have a checkpoint, damaged or not.
    """

    folder: RunFolder
    step: int | None
    metadata: dict[str, Any]
    warnings: tuple[str, ...] = ()
    saved: tuple[int, ...] = ()

    def check_unchanged(self) -> None:
        """Refuse to go on if another process has trained in the folder since it was looked at.

        Raises:
            InputError: there are other checkpoints now.
        """
        if self.folder.writes and tuple(saved_steps(self.folder.checkpoints)) != self.saved:
            raise InputError(f"{self.folder.path}: another process has just trained this run; start again to go on")

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """The tokenizer of the run that goes on, as plain data."""
        return self.metadata.get("tokenizer")

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Refuse to go on if the run was of something else.

        Raises:
            InputError: naming the first key that differs.
        """
        difference = first_difference(self.metadata["identity"], identity) if self.step is not None else None
        if difference:
            raise InputError(
                f"{self.folder.path} holds another run: {difference}; change it back, or start anew with --run NAME"
            )


def find_start(config: RunConfig) -> Start:
    """Look at the run's folder and decide where to start.

    Raises:
        InputError: ``resume`` forbids what is there; the folder holds something else; every checkpoint is damaged.
        MissingInputError: ``resume: must`` and nothing to go on from.
    """
    run = RunFolder(config.folder)
    steps = saved_steps(run.checkpoints)
    if config.resume == "never" and (steps or (run.path / "config.yaml").exists()):
        raise InputError(
            f"{run.path} already holds a run and resume is never; choose another name with --run, or go on with "
            "--resume auto"
        )
    if config.resume == "must" and not steps:
        raise MissingInputError(
            f"{run.checkpoints}: no checkpoint to go on from, and resume is must; use --resume auto"
        )
    if run.path.exists() and not run.path.is_dir():
        raise InputError(f"{run.path} is a file; choose another name with --run")
    if not steps and run.path.is_dir() and any(run.path.iterdir()) and not (run.path / "config.yaml").exists():
        raise InputError(f"{run.path} is not empty and holds no run; choose another name with --run")
    warnings: list[str] = []
    for step in reversed(steps):
        damage = find_damage(run.checkpoints / str(step))
        try:
            if damage is None:
                return Start(run, step, read_metadata(run.checkpoints, step), tuple(warnings), tuple(steps))
        except InputError as error:
            damage = str(error)
        warnings.append(f"{damage}; going back to an earlier checkpoint")
    if steps:
        raise InputError(f"{run.checkpoints}: every checkpoint is damaged ({damage}); start anew with --run NAME")
    if run.metrics("train"):
        warnings.append(f"{run.path} has a log but no checkpoint; the run begins anew, and so does its log")
    return Start(run, None, {}, tuple(warnings))

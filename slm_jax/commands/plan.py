"""``slm-jax plan``: what a run will need of an accelerator that is not here."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from slm_jax.commands import stdout_console, use_compile_cache
from slm_jax.config import Positive, given, parse
from slm_jax.tasks.config import TASKS, FinetuneConfig, RunConfig


@dataclasses.dataclass(frozen=True)
class Options(RunConfig):
    """Estimate what a run (any keys of train or finetune) needs of a device that may be elsewhere, and whether it fits.

    Nothing is trained or downloaded; on cpu a small model is compiled, which takes seconds.

    Attributes:
        device: h200, h100, h100-pcie, b200, a100-80g, a100-40g, l40s, l4, v100, t4, tpu7x, v6e, v5e, v5p, v4, v3, v2,
            or cpu: this machine. A number may follow, as in h100x64 (GPUs, 8 on a host), v5e-64 (a TPU slice, by Google
            Cloud's name), v5p:2x2x4 (by its shape in chips) or v5e-256x2 (two slices).
        devices: number of such devices that share each batch, if the name has none.
        compile: whether to compile the run's programs with XLA's own compiler for the device, which takes minutes and
            shows their memory, collectives and kernels. Needs libtpu for a TPU, jax[cuda13] for an h100 or h200; the
            device itself is not needed.
        mfu: share of the device's peak FLOP/s that is reached, above 0, at most 1; null: 0.4, an assumption. Not for
            cpu, whose peak is unknown.
        tokens: tokens to train on, such as 10e9; null: those of train.steps.
        format: table, or json with bytes, FLOP/s and hours.
    """

    device: str = "cpu"
    devices: Positive = 1
    compile: bool = False
    mfu: Annotated[float, Gt(0), Le(1)] | None = None
    tokens: Annotated[float, Ge(1)] | None = None
    format: Literal["table", "json"] = "table"


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(FinetuneConfig, Options):
    """The same, with the defaults of finetune."""


def main(args: Sequence[str]) -> int:
    task = TASKS.get(str(given(Options, args).get("task", Options.task)))
    fine_tunes = task is not None and task.command == "finetune"
    return run(parse(FinetuneOptions if fine_tunes else Options, args, "slm-jax plan"))


def run(options: Options) -> int:
    import jax

    from slm_jax.tools.plan.cluster import find_cluster
    from slm_jax.tools.plan.compilers import cluster_devices, compile_run, prepare_environment
    from slm_jax.tools.plan.estimate import make_plan
    from slm_jax.tools.plan.tables import print_compiled, print_plan

    jax.config.update("jax_platforms", "cpu")  # leave accelerators to those who train
    cluster = find_cluster(options.device, options.devices)
    if options.compile:
        prepare_environment(cluster)
        devices = cluster_devices(cluster)
    else:
        use_compile_cache()
    plan, console = make_plan(options, options.device, options.devices, options.mfu, options.tokens), stdout_console()
    if options.format == "table":
        print_plan(plan, console)
    programs = compile_run(options, cluster, devices) if options.compile else []
    if options.format == "json":
        compiled = {"compiled": [program.as_dict() for program in programs]} if options.compile else {}
        print(json.dumps(dataclasses.asdict(plan) | compiled, indent=2))
    elif programs:
        print_compiled(programs, plan, console)
    return 0

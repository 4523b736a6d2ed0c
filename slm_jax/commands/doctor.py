"""``slm-jax doctor``: check this machine, or a run, and say what to fix."""

import dataclasses
import itertools
import json
from typing import Literal

from slm_jax.commands import use_compile_cache
from slm_jax.errors import for_terminal


@dataclasses.dataclass(frozen=True)
class Options:
    """Check this machine, and a run; nothing is downloaded. The exit status is 1 if there is a problem.

    Attributes:
        run: the folder of a run to check as well, such as runs/tiny; every checkpoint of it is read. null: none.
        format: text, one line a check, or json, a list of objects with level, name and text.
    """

    run: str | None = None
    format: Literal["text", "json"] = "text"


def run(options: Options) -> int:
    from slm_jax.runs import find_run
    from slm_jax.tools.doctor.machine_checks import examine_machine
    from slm_jax.tools.doctor.run_checks import examine_run

    folder = None if options.run is None else find_run(options.run)
    use_compile_cache()

    found = []
    for finding in itertools.chain(examine_machine(), () if folder is None else examine_run(folder)):
        found.append(finding)
        if options.format == "text":
            print(for_terminal(f"{finding.level:<8} {finding.name:<12} {finding.text}"), flush=True)
    n_problems, n_notes = (sum(finding.level == level for finding in found) for level in ("problem", "note"))
    if options.format == "json":
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        print(f"\nproblems: {n_problems}, notes: {n_notes}")
    return 1 if n_problems else 0

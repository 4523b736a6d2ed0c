"""``slm-jax report``: a run, or several beside each other, as one HTML page."""

import dataclasses
from pathlib import Path

from slm_jax.commands import use_compile_cache
from slm_jax.config import Words
from slm_jax.errors import InputError
from slm_jax.files import check_new_file, write_file

FILE = "report.html"
PAGES = (".html", ".htm")  # the only existing files that are replaced


@dataclasses.dataclass(frozen=True)
class Options:
    """Write a run as one HTML page that needs no network; several runs are compared on the same axes.

    Words that belong to no option are runs; all words after -- are.

    Attributes:
        run: a run's folder, such as runs/tiny, or runs/tiny@800 for the attention of one of its checkpoints; may be
            given several times, and without --run.
        out: the file to write, such as page.html; an existing file is replaced if its name ends in .html or .htm.
            null: report.html, in the run's folder, or for several runs in the current one.
        text: for a single run, the text whose attention is drawn (at most its first 20 tokens); null: the run's latest
            sample, or an English sentence.
    """

    run: Words = ()
    out: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if not self.run:
            raise InputError("no run; expected one or several, such as slm-jax report runs/tiny")
        if self.text == "":
            raise InputError("text is ''; expected at least one character")


def run(options: Options) -> int:
    import jax

    from slm_jax.tools.report.page import write_comparison, write_page
    from slm_jax.tools.report.run_data import read_runs

    jax.config.update("jax_platforms", "cpu")  # leave accelerators to those who train
    use_compile_cache()
    runs = read_runs(options.run)
    single = runs[0] if len(runs) == 1 else None
    if single is None and options.text is not None:
        raise InputError(f"text is {options.text!r:.60} and there are {len(runs)} runs; expected one run with it")
    folder = Path() if single is None else single.folder.path
    out = check_new_file(folder / FILE if options.out is None else options.out, "out", "page.html")
    if options.out is None and out.is_symlink():
        raise InputError(f"{out}: is a link in a run's folder; remove it, or choose another --out")
    if out.exists() and out.resolve().suffix.lower() not in PAGES:
        raise InputError(f"{out}: exists, and only files that end in .html are replaced; choose another --out")
    content = write_comparison(runs) if single is None else write_page(single, options.text)
    write_file(out, content)
    print(f"written to {out}")
    return 0

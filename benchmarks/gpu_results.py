"""What gpu.py has measured into a folder, and the summary of it: each figure beside its bar.

python benchmarks/gpu_results.py benchmarks/results/FOLDER        # writes its summary.md again
"""

import json
import sys
from pathlib import Path
from typing import Any

import step_profile

Figures = dict[str, Any]


def read(folder: Path, name: str) -> Figures:
    """Return what a measurement wrote; empty where there is nothing."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def figures_of(result: Figures, contestant: str) -> Figures:
    """Return a contestant's figures; empty where it has none."""
    return result.get("contestants", {}).get(contestant, {})


def has_figures(result: Figures) -> bool:
    """Return whether a measurement has any; a comparison has none where all contestants were skipped."""
    return bool(result.get("contestants", result))


def best(folder: Path, prefix: str, contestant: str) -> tuple[Figures, Figures]:
    """Return work and figures of the fastest measurement whose name begins so; both empty where there is none."""
    results = [read(folder, file.stem) for file in sorted(folder.glob(f"{prefix}-*.json"))]
    found = [(result["work"], figures_of(result, contestant)) for result in results if figures_of(result, contestant)]
    return max(found, key=lambda pair: pair[1]["tokens_per_second"], default=({}, {}))


def summary(folder: Path) -> str:
    """Return everything as Markdown."""
    lines = ["# What was measured here", "", "| what | bar | here | met |", "|---|---|---|---|"]
    lines += [f"| {what} | {bar} | {here} | {met} |" for what, bar, here, met in _bars(folder)]
    lines += ["", "## Beside peers", "", "| measurement | contestant | a step | tokens/s | MFU | peak memory | ratio |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for file in sorted(folder.glob("*.json")):
        result = read(folder, file.stem)
        for name, figures in result.get("contestants", {}).items():
            mfu = f"{figures['mfu']:.1%}" if "mfu" in figures else ""
            lines.append(
                f"| {file.stem} | {name} | {1000 * figures['median']:.2f} ms | {figures['tokens_per_second']:,.0f} "
                f"| {mfu} | {figures['peak_bytes'] / 1e9:.2f} GB | {_ratio(figures)} |"
            )
        lines += [f"| {file.stem} | {name} | skipped: {why} |" for name, why in result.get("skipped", {}).items()]
    if profile := read(folder, "profile"):
        lines += ["", "## Where a step's time goes", "", step_profile.table(profile)]
    return "\n".join(lines) + "\n"


def _bars(folder: Path) -> list[tuple[str, str, str, str]]:
    """Return what, bar, figure and whether it is met, of what the project has set itself for one GPU."""
    nanogpt = figures_of(read(folder, "train-nanogpt"), "nanogpt")
    ours = figures_of(read(folder, "train-nanogpt"), "slm_jax")
    alone, small = best(folder, "sweep", "slm_jax")
    _, peer_alone = best(folder, "peer-sweep", "nanogpt")
    large, xl = best(folder, "xl", "slm_jax")
    data = read(folder, "reader").get("figures", {})
    ratio, mfu, xl_mfu = nanogpt.get("ratio"), small.get("mfu"), xl.get("mfu")
    rate, share = data.get("tokens_per_second"), data.get("share_of_step")
    rows = [
        _bar("training beside nanoGPT compiled, in turns", "≥ 1.15×", ratio, (ratio or 0) >= 1.15, _ratio(nanogpt)),
        _bar("model FLOPs utilisation, GPT-2 small", "≥ 50%", mfu, (mfu or 0) >= 0.5, _mfu(alone, small)),
        _bar("model FLOPs utilisation, GPT-2 XL", "≥ 55%", xl_mfu, (xl_mfu or 0) >= 0.55, _mfu(large, xl)),
        _bar("data reader", "≥ 20M tokens/s", rate, (rate or 0) >= 2e7, f"{(rate or 0) / 1e6:.1f}M"),
        _bar("data reader's share of a step", "≤ 2%", share, (share or 0) <= 0.02, f"{share or 0:.2%}"),
    ]
    figures = [
        ("peak memory, in turns with nanoGPT", f"{_gigabytes(ours)} against {_gigabytes(nanogpt)}", ours and nanogpt),
        ("each at its own best batch, ours over nanoGPT's",
         f"{small.get('tokens_per_second', 0) / peer_alone.get('tokens_per_second', 1):.2f}×", small and peer_alone),
    ]  # fmt: skip
    for file in sorted(folder.glob("decode-*.json")):
        result = read(folder, file.stem)
        decoded = figures_of(result, "slm_jax")
        beside = _ratio(figures_of(result, "transformers")) or "not beside transformers"
        rate_text = f"{decoded.get('tokens_per_second', 0):,.0f} tokens/s, {beside}"
        figures.append((f"generation, batch {file.stem.partition('-')[2]}, against transformers", rate_text, decoded))
    for name in ("cold", "warm"):
        compiled = figures_of(read(folder, f"compile-{name}"), "slm_jax")
        figures.append(
            (f"first step, {name} compile cache", f"{compiled.get('first_step_seconds', 0):.1f} s", compiled)
        )
    base = figures_of(read(folder, "flags-none"), "slm_jax")
    for file in sorted(folder.glob("flags-*.json")):
        flagged = figures_of(read(folder, file.stem), "slm_jax")
        gain = base.get("median", 0) / flagged.get("median", 1)
        figures.append((f"XLA flags {file.stem.partition('-')[2]}, over none", f"{gain:.3f}×", base and flagged))
    return rows + [(what, "", here if there else "not measured", "") for what, here, there in figures]


def _bar(what: str, bar: str, figure: float | None, met: bool, text: str) -> tuple[str, str, str, str]:
    if figure is None:
        return what, bar, "not measured", ""
    return what, bar, text, "yes" if met else "no"


def _ratio(figures: Figures) -> str:
    if "ratio" not in figures:
        return ""
    low, high = figures["ratio_range"]
    return f"{figures['ratio']:.2f}× ({low:.2f} to {high:.2f})"


def _mfu(work: Figures, figures: Figures) -> str:
    return f"{figures.get('mfu', 0):.1%} at batch {work.get('batch')}, remat {work.get('remat')}"


def _gigabytes(figures: Figures) -> str:
    return f"{figures.get('peak_bytes', 0) / 1e9:.2f} GB"


def write_summary(folder: Path) -> Path:
    """Write the summary beside the figures; return its file."""
    file = folder / "summary.md"
    file.write_text(summary(folder))
    return file


if __name__ == "__main__":
    print(write_summary(Path(sys.argv[1])))

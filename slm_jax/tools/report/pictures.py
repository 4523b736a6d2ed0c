"""The pictures of a report: curves of the log, of one run or of several, and attention weights of a run's model."""

import base64
import contextlib
import dataclasses
import io
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from slm_jax.errors import InputError, MissingInputError
from slm_jax.evaluation.capture import capture
from slm_jax.model import GPTClassifier, GPTModel, Params
from slm_jax.nn.axes import STACK
from slm_jax.pictures import own_style
from slm_jax.runs import is_classifier, read_checkpoint
from slm_jax.tokenizer import Tokenizer, tokenizer_from_dict
from slm_jax.tools.report.run_data import RunData, steps_to_try

# --- Curves ---

COLORS = ("#1f6fb4", "#c2410c", "#2e7d32", "#8a3fb0", "#92700a", "#0b7a80", "#b42a66", "#5a6270")
INK = "#45505e"
# An <img> cannot read the page's colours; in dark mode the style sheet inverts the whole picture.
_STYLE: Any = {
    "font.size": 11.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "path.simplify_threshold": 1.0,  # units of which 72 are an inch: a long line has no more points than a screen
    "svg.fonttype": "none",
    "svg.hashsalt": "slm-jax",
}


class Curve(NamedTuple):
    """A split's figure over steps: its name in the log, title, unit, and the limits of its axis."""

    split: str
    key: str
    title: str
    unit: str
    low: float | None = None
    high: float | None = None


CURVES = (
    Curve("val", "loss", "Loss", ""),
    Curve("val", "bits_per_byte", "Bits a byte", "bits a byte"),
    Curve("val", "accuracy", "Accuracy", "share of the validation texts", 0, 1.03),
    Curve("train", "learning_rate", "Learning rate", "", 0),
    Curve("train", "grad_norm", "Gradient norm", "norm before clipping", 0),
    Curve("train", "tokens_per_second", "Speed", "tokens a second", 0),
)


def draw_curves(runs: Sequence[RunData], bits: bool) -> list[dict[str, str]]:
    """Return the picture of each figure of runs of one task; ``bits``: also bits per byte, for different tokenizers."""
    pictures = (_draw(runs, curve) for curve in CURVES if bits or curve.key != "bits_per_byte")
    return [picture for picture in pictures if picture is not None]


def look(index: int) -> tuple[str, str]:
    return COLORS[index % len(COLORS)], ("-", "--", ":", "-.")[index // len(COLORS) % 4]


def _draw(runs: Sequence[RunData], curve: Curve) -> dict[str, str] | None:
    """Return a figure as an SVG, equal figures with equal bytes; None if no value is finite."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    is_loss, is_validation = curve.key == "loss", curve.split == "val"
    file, seen = io.StringIO(), []
    with own_style(_STYLE):
        figure = Figure(figsize=(400 / 72, 250 / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            color, dash = look(index)
            if is_loss:
                seen.append(_plot(axes, *run.points("train", "loss"), color=color, linewidth=0.8, alpha=0.65))
            if is_validation and len(runs) == 1:
                color = COLORS[1]
            line: dict[str, Any] = {"color": color, "linestyle": dash, "linewidth": 1.5, "zorder": 3}
            seen.append(_plot(axes, *run.points(curve.split, curve.key), is_validation, is_loss, **line))
        values = np.concatenate(seen)
        if not values.size:
            return None
        last = max(1, *(run.last_step for run in runs))
        axes.set(xlim=(-0.02 * last, 1.02 * last), ylim=(curve.low, curve.high), xlabel="step")
        axes.set_ylabel(f"nats a {runs[0].unit}" if is_loss else curve.unit)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=axis is axes.xaxis, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(format_tick))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    of = "" if len(runs) == 1 else f" of {len(runs)} runs"
    extent = f"over {last:,} steps, between {values.min():.4g} and {values.max():.4g}"
    src = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()
    return {"title": curve.title, "src": src, "alt": f"{curve.title.lower()}{of} {extent}"}


def _plot(
    axes: Any, steps: np.ndarray, values: np.ndarray, marked: bool = False, ring: bool = False, **line: Any
) -> np.ndarray:
    """Plot a line with gaps for NaN, each point marked or only those that no line leads to; return finite values."""
    finite = np.isfinite(values)
    if finite.any():
        padded = np.pad(finite, 1)
        alone = finite & ~padded[:-2] & ~padded[2:]
        axes.plot(steps, values, marker="o", markersize=3, markevery=None if marked else alone, **line)
        if ring:
            lowest = np.nanargmin(values)
            axes.plot(steps[lowest], values[lowest], "o", color=line["color"], markersize=8, fillstyle="none")
    return values[finite]


def format_tick(value: float, _position: int | None = None) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


# --- Attention ---

MOST_LAYERS, MOST_HEADS, MOST_TOKENS = 6, 6, 20
TEXT = "If the file does not exist, an error is raised, and the function returns None."
MAP_COLOR = (58, 143, 222)  # visible on white and on black


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """Attention weights of one text."""

    step: int
    tokens: list[str]  # the first ones
    n_tokens: int  # of the whole text
    weights: Float[np.ndarray, "layers heads seq seq"]  # of the first layers and heads: query, key
    n_layers: int  # of the model
    n_heads: int

    @property
    def names(self) -> list[str]:
        """The tokens with spaces and line breaks made visible."""
        shown = [token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅" for token in self.tokens]
        return [name if len(name) <= 24 else f"{name[:23]}…" for name in shown]

    def blocks(self) -> list[list[dict[str, str]]]:
        """Return ``{src, alt}`` of the picture of each head of each block."""
        return [
            [
                {
                    "src": to_png(head),
                    "alt": f"attention weights of block {block}, head {i}: the last token gives {head[-1].max():.0%} "
                    f"to token {head[-1].argmax()}, {self.names[head[-1].argmax()]}",
                }
                for i, head in enumerate(heads)
            ]
            for block, heads in enumerate(self.weights)
        ]


def read_maps(run: RunData, text: str | None) -> Maps | str:
    """Return the maps of a text (None: the latest sample, or an English sentence), or why there are none."""
    steps = steps_to_try(run.folder, run.step)
    if not steps:
        return "None: no checkpoint yet."
    samples = [TEXT, *(sample for _, sample in run.folder.samples() if sample.strip())]
    for step in steps:
        try:
            loaded = _load(run, step)
        except InputError:
            continue
        try:
            maps = _maps(step, *loaded, text, samples[-1])
        except MissingInputError as error:  # the tokenizer's own files
            return f"None: the text cannot be encoded ({error})."
        return maps if maps.tokens else "None: the text has no token that this model knows."
    which = "no checkpoint" if run.step is None else f"the checkpoint of step {run.step:,} not"
    command = f"slm-jax doctor --run {shlex.quote(str(run.folder.path))}"
    return f"None: {which} readable. This command shows what is damaged: {command}"


def _load(run: RunData, step: int) -> tuple[GPTModel, Params, Tokenizer]:
    folder, classifier = run.folder.path, is_classifier(run.metadata)
    cfg, params, metadata = read_checkpoint(folder, step, "float32", classifier=classifier)
    model = GPTModel(cfg)
    if classifier:
        model = GPTClassifier(cfg, n_classes=len(metadata["classes"]), pooling=metadata["pooling"])
    return model, params, tokenizer_from_dict(metadata["tokenizer"])


def _maps(step: int, model: GPTModel, params: Params, tokenizer: Tokenizer, text: str | None, sample: str) -> Maps:
    cfg = model.cfg
    whole = encode(tokenizer, text, sample)
    ids = whole[: min(MOST_TOKENS, cfg.context_length)]
    n_layers, n_heads = min(cfg.n_layers, MOST_LAYERS), min(cfg.n_heads, MOST_HEADS)
    weights = np.zeros((n_layers, n_heads, len(ids), len(ids)), np.float32)
    if ids:
        lengths: dict[str, Any] = {"lengths": jnp.array([len(ids)])} if isinstance(model, GPTClassifier) else {}
        names = [f"{STACK}/{layer}/attn/weights" for layer in range(n_layers)]
        _, seen = capture(model, params, jnp.array([ids], jnp.int32), names, **lengths)
        weights = np.stack([np.asarray(seen[name], np.float32)[0, :n_heads] for name in names])
    tokens = [tokenizer.continued().decode([token]) for token in ids]
    return Maps(step, tokens, len(whole), weights, cfg.n_layers, cfg.n_heads)


def encode(tokenizer: Tokenizer, text: str | None, sample: str) -> list[int]:
    """Encode the requested text, or without one a sample, leaving out characters that the tokenizer cannot encode."""
    try:
        return tokenizer.encode(sample, allow_special=True) if text is None else tokenizer.encode(text)
    except MissingInputError:
        raise
    except InputError as error:
        if text is not None:
            raise InputError(f"text: {error}") from None
    ids: list[int] = []
    for character in sample:
        with contextlib.suppress(InputError):
            ids += tokenizer.encode(character)
    return ids


def to_png(weights: Float[np.ndarray, "seq seq"]) -> str:
    """Return a map as the data URL of a picture with one pixel a weight; larger weights are more opaque."""
    from matplotlib.image import imsave

    pixels = np.zeros((*weights.shape, 4), np.uint8)
    pixels[..., :3] = MAP_COLOR
    pixels[..., 3] = np.rint(255 * np.clip(np.nan_to_num(weights), 0, 1) ** 0.7)  # small weights stay visible
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": ""})  # the same bytes with any version
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

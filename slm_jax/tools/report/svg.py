"""Pictures as SVG inside an HTML page: text stays text, and the page's style sheet gives the colours."""

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from slm_jax.tools.report.html import Html, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_COLORS = 8

# Matplotlib takes only colours that it knows; these stand for those of the page.
INK = "#010203"
COLORS = tuple(f"#0102{16 + number:02x}" for number in range(N_COLORS))

_STYLE: Any = {
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
}


def new_figure(width: float = 400, height: float = 250) -> "Figure":
    """Return an empty figure of so many units; 11 of them are the height of its text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        figure.add_subplot().patch.set_visible(False)
    return figure


def to_svg(figure: "Figure", name: str, label: str) -> Html:
    """Return a figure as an ``<svg>`` element, the same whenever it is drawn.

    Args:
        figure: of :func:`new_figure`.
        name: unlike that of any other figure of the page: what its parts are called begins with it.
        label: what it shows, for those who do not see it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that Matplotlib's font lacks: the page's has them
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(style|metadata).*?</\1>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    view_box = re.findall(r'viewBox="[^"]*"', text)[0]
    text = text[text.index(">") + 1 :]
    text = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*|font-family: [^;\"]*; ?", _font_size, text)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#([\w.-]+)', rf"\1#{name}-\2", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"<[^>]*>", lambda found: _rounded(found[0]), text)
    text = re.sub(r">\s+<", "><", text).replace(INK, "currentColor")
    for number, color in enumerate(COLORS):
        text = text.replace(color, f"var(--c{number})")
    return Html(f'<svg {view_box} role="img" aria-label="{escape(label)}">{text.strip()}')


def _rounded(element: str) -> str:
    """Return an element with coordinates of a hundredth at most."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", element)


def _font_size(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}px" if found[1] else ""

"""Pictures through matplotlib, which look the same whatever its settings on this machine are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_jax.errors import InputError
from slm_jax.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def own_style(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw in matplotlib's default style with these settings: the user's may need LaTeX, or fonts that are not here.

    Raises:
        InputError: matplotlib cannot be imported or cannot draw.
    """
    try:
        import matplotlib.style

        with matplotlib.style.context(["default", dict(settings or {})]):
            yield
    except (InputError, OSError):
        raise
    except Exception as error:  # of any kind: matplotlib's settings and back ends have their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"matplotlib cannot draw ({reason}); MPLBACKEND or a matplotlibrc may be wrong") from None


def write_png(figure: "Figure", path: Path) -> None:
    """Write a picture atomically: a reader sees the old file or the new one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))

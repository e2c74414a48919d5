"""How figures look: one set of colours that a colour-blind reader can tell apart, in light and in dark.

Figures are drawn in the light colours; in the HTML report each of them becomes a CSS variable, so that the
page's own scheme decides.
"""

from __future__ import annotations

import io
import re
from functools import wraps
from typing import Any, TypeVar

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe-Ito, without the yellow that cannot be read on white; blue first, then vermilion.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
INK, MUTED, GRID, SURFACE = "#1b1f24", "#57606b", "#d5dae1", "#fefefd"
PHASES = ("#e4ebf4", "#f6ecdc", "#e3f0ea")
CMAP = "viridis"

_Function = TypeVar("_Function", bound=Any)

_VARIABLES = {
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES)},
    **{colour: f"var(--phase{i})" for i, colour in enumerate(PHASES)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
}

STYLE: Any = {
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "figure.constrained_layout.use": True,
    "image.cmap": CMAP,
    "svg.fonttype": "none",
    "path.simplify_threshold": 0.3,
}


def new_figure(width: float = 4.7, height: float = 2.9) -> Figure:
    """An empty figure of the given size in inches; it needs no pyplot and no display."""
    with mpl.rc_context(STYLE):
        return Figure(figsize=(width, height))


def styled(function: _Function) -> _Function:
    """Draw in the package's style without changing the caller's."""

    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with mpl.rc_context(STYLE):
            return function(*args, **kwargs)

    return inner  # type: ignore[return-value]


def axes_of(ax: Axes | None, width: float = 4.7, height: float = 2.9) -> Axes:
    """The given axes, or those of a new figure."""
    return ax if ax is not None else new_figure(width, height).subplots()


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes belong to."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def to_svg(figure: Figure, *, label: str, key: str) -> str:
    """Figure as an inline SVG whose colours and font are the page's.

    Args:
        figure: What to draw.
        label: Text for readers who do not see the picture.
        key: Unique on the page; keeps the ids of several pictures apart.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(buffer.getvalue(), label=label, key=key)


def inline_svg(svg: str, *, label: str, key: str) -> str:
    """Turn matplotlib's SVG file into an element of a page: theme, ids, size, role."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    # Only what is referred to needs an id; the groups' would appear again in every picture.
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r' id="image[0-9a-f]+"', "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", body, count=2)
    body = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{key}-", body)
    body = re.sub(r"\n\s*", "\n", body)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return body.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


SHADES = 64  # steps of the rank colours in HTML tables


def shade(value: float, top: float) -> int:
    """Number of the rank colour of `value` on a scale from 0 to `top`."""
    return round(SHADES * min(max(value / top, 0.0), 1.0)) if top > 0 else 0


def rank_classes() -> str:
    """CSS classes `h0` to `h64`: colour of the map and a text colour that can be read on it."""
    rules = []
    for i in range(SHADES + 1):
        red, green, blue, _ = mpl.colormaps[CMAP](i / SHADES)
        luminance = sum(w * _linear(c) for w, c in zip((0.2126, 0.7152, 0.0722), (red, green, blue)))
        # WCAG contrast against white is 1.05 / (L + .05), against black (L + .05) / .05.
        text = "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"
        rules.append(f".h{i}{{background:{mpl.colors.to_hex((red, green, blue))};color:{text}}}")
    return "\n".join(rules)


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

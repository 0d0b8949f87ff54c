"""Charts of a report as SVG that takes its colours from the page, so that light and dark both read well."""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tasks.curation.funnel import Funnel
from tasks.curation.funnel_picture import KEPT, REJECTED, TEXT, funnel_figure

BINS = 40
AXES = (0.125, 0.12, 0.855, 0.83)
"""Where a histogram stands in its figure: room for ticks of six digits. Finding the room out takes most of the time."""
LINE = "#b5442e"
COLOURS = {TEXT: "var(--text)", KEPT: "var(--kept)", REJECTED: "var(--rejected)", LINE: "var(--line)"}


def funnel_chart(funnel: Funnel, what: str = "samples") -> str:
    """Return the funnel as SVG; `what` is the word for what it counts."""
    return _svg(funnel_figure(funnel, what), name=f"funnel of {what}")


def histogram(name: str, values: NDArray[np.float64], kept: NDArray[np.bool_], lines: Sequence[float]) -> str:
    """Return a histogram of kept and rejected rows as SVG, thresholds as dashed lines.

    The axis spans 99.8 % of the values and the lines; what lies beyond is counted in the outermost bars.
    """
    finite = np.isfinite(values)
    low, high = _span(values[finite], lines)
    inside = np.clip(values, low, high)
    figure = Figure(figsize=(4.2, 2.1))
    axes = figure.add_axes(AXES)
    edges = np.linspace(low, high, BINS + 1)
    stay = np.histogram(inside[finite & kept], edges)[0]
    every = stay + np.histogram(inside[finite & ~kept], edges)[0]
    axes.stairs(every, edges, baseline=stay, fill=True, color=REJECTED, linewidth=0)
    axes.stairs(stay, edges, fill=True, color=KEPT, linewidth=0)
    axes.set_ylim(0, 1.05 * max(1, every.max()))
    for line in lines:
        axes.axvline(line, color=LINE, linestyle="--", linewidth=1.2)
    axes.tick_params(colors=TEXT, labelsize=8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.locator_params(axis="y", nbins=4, integer=True)
    for place, side in axes.spines.items():
        side.set_visible(place == "bottom")
        side.set_color(TEXT)
    return _svg(figure, name=name)


def _span(values: NDArray[np.float64], lines: Sequence[float]) -> tuple[float, float]:
    ends = [*np.quantile(values, [0.001, 0.999]), *lines] if len(values) else [0.0, 1.0, *lines]
    low, high = float(min(ends)), float(max(ends))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _svg(figure: Figure, *, name: str) -> str:
    """The figure as an SVG element to put into a page: text as text, colours by the page's names for them."""
    FigureCanvasSVG(figure)
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg

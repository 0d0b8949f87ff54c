"""The funnel of a decision as a picture, for a README or a report. Apart from the data because matplotlib is heavy."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.curation.funnel import Funnel

KEPT, REJECTED, TEXT = "#2a6f77", "#d8c9a8", "#333333"


def draw_funnel(funnel: Funnel, path: Path) -> None:
    """Draw the funnel as a picture, PNG or SVG by `path`'s ending."""
    with matplotlib.rc_context({"svg.hashsalt": "tamis"}):  # the same funnel gives the same file
        funnel_figure(funnel).savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def funnel_figure(funnel: Funnel, what: str = "samples") -> Figure:
    """Return the funnel as a bar chart: what is left after each stage, and what it took; `what` is what it counts."""
    stages = funnel.stages
    left = [funnel.samples, *(stage.remaining for stage in stages)]
    whole = max(1, funnel.samples)
    names = ["pool", *(stage.name for stage in stages)]
    figure = Figure(figsize=(8, 0.42 * len(left) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(left))
    axes.barh(places, left, color=KEPT)
    axes.barh(places[1:], -np.diff(left), left=left[1:], color=REJECTED)
    axes.set_yticks(places, names)
    for at, (before, after) in enumerate(zip([left[0], *left], left, strict=False)):
        taken = f"{after:,}" if before == after else f"{after:,}   −{before - after:,}"
        axes.text(before + 0.01 * whole, at, taken, va="center", color=TEXT, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * whole)
    axes.set_xticks([])
    axes.tick_params(length=0, colors=TEXT)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        f"{funnel.policy}: {funnel.kept:,} of {funnel.samples:,} {what} kept", loc="left", color=TEXT, fontsize=11
    )
    return figure

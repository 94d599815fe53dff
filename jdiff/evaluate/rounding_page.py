"""`rounding`'s figures as a page: curves by noise level and by step, pictures side by side, and which kernels err most."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jdiff import report
from jdiff.evaluate.calibration import BINS
from jdiff.evaluate.rounding import Alone, Distance
from jdiff.pipelines import grid

MOST_BARS = 40
MOST_PICTURES = 8
Sensitivity = tuple[Sequence[Alone], Sequence[Alone]]


def write(
    path: Path,
    title: str,
    originals_BHWC: np.ndarray,
    found: Mapping[str, Distance],
    sensitivities: Mapping[str, Sensitivity],
) -> None:
    """Writes one page. title: says of what. originals_BHWC: uint8, of the first sampler; found: as `compare` gives it;
    sensitivities: by recipe, as `sensitivity` gives them."""
    body = _curves(found)
    samplers = next(iter(found.values())).psnr
    cells = lambda one: (*(f"{one.psnr[sampler]:.1f}" for sampler in samplers), f"{one.size / 1e6:.2f}")  # noqa: E731
    rows = [(name, *cells(one)) for name, one in found.items()]
    body += report.table(("PSNR, dB, from the same noise", *samplers, "weights, MB"), rows)
    sheets = {
        "the original": originals_BHWC,
        **{name: one.pictures[next(iter(samplers))] for name, one in found.items()},
    }
    for name, pictures_BHWC in sheets.items():
        shown = pictures_BHWC[:MOST_PICTURES]
        body += f"<p>{html.escape(name)}</p>" + report.picture(grid(shown, columns=len(shown)), name)
    for recipe, (alone, whole) in sensitivities.items():
        body += f"<h2>{html.escape(recipe)}: each kernel rounded alone</h2>" + _bars(alone, whole)
        rows = [(one, f"{one.error:.3e}", f"{one.again:.3e}") for one in (*alone, *whole)]
        body += report.table(("rounded alone", "relative squared error of the output", "with other noise"), rows)
    report.write_html(path, html.escape(title), body)


def _curves(found: Mapping[str, Distance]) -> str:
    samplers = next(iter(found.values())).drift
    figure = report.new_figure(4 * (1 + len(samplers)), 3.4)
    panels = {"error of the output, by noise level": {name: one.error for name, one in found.items()}}
    panels |= {f"drift after each step of {s}": {name: one.drift[s] for name, one in found.items()} for s in samplers}
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, values in curves.items():
            at = [(b + 0.5) / BINS for b in range(BINS)] if i == 0 else range(1, len(values) + 1)
            axes.plot(at, values, linewidth=1, marker=".", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(fontsize=7)
    return report.drawing(figure, "error by noise level, drift by step")


def _bars(alone: Sequence[Alone], whole: Sequence[Alone]) -> str:
    shown = alone[:MOST_BARS]
    figure = report.new_figure(10, 1.2 + 0.2 * len(shown))
    axes, places = figure.add_subplot(), range(len(shown))
    axes.barh(places, [one.error for one in shown], height=0.7, color="C0")
    axes.plot([one.again for one in shown], places, "|", color="black", label="with other noise")
    for i, one in enumerate(whole):
        axes.axvline(one.error, color=f"C{i + 1}", linewidth=1, label=str(one))
    axes.set_yticks(places, [str(one) for one in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("relative squared error of the output")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    return report.drawing(figure, "error by kernel")

"""One page of a run, or of several side by side: curves, scores, speed, sample grids over time, settings.

A file that opens anywhere, without a server.
"""

import base64
import dataclasses
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jdiff.logbook import read_metrics
from jdiff.paths import whole

SPEED = {
    "steps_per_second": "steps/s",
    "images_per_second": "images/s",
    "model_flops_per_second": "model FLOP/s",
    "mfu": "MFU",
    "data_wait_share": "share of waiting for data",
    "peak_memory_bytes": "peak memory, bytes",
}
"""A record's numbers of the machine: a table's, not curves."""
QUARTERS = tuple(f"loss_quarter_{i}" for i in range(1, 5))
SCORES = "scores.jsonl"
"""What tools/evaluate.py and a run with eval_every leave in a workdir: a line a scoring."""
PIECE = 500
"""Points of a curve that are drawn at once. In one piece noisy curves of 5,000 leave a training process 17 MiB larger."""
MOST_GRIDS = 12
MOST_GRIDS_EACH = 6
"""Of a run among several."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a page says of one run. config: its keys, flat; scores: the lines of `SCORES`."""

    name: str
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    grids: Sequence[Path]
    scores: Sequence[Mapping[str, Any]] = ()


def read_run(workdir: Path, config: Mapping[str, Any]) -> Run:
    """A run from its metrics.jsonl, samples/*.png and scores.jsonl, as far as they are there."""
    grids = sorted((workdir / "samples").glob("step_*.png"))
    records = read_metrics(workdir / "metrics.jsonl")
    return Run(workdir.resolve().name, config, records, grids, read_metrics(workdir / SCORES))


def write_report(workdir: Path, config: Mapping[str, Any]) -> Path:
    """Writes WORKDIR/report.html; returns its path."""
    return write_page([read_run(workdir, config)], workdir / "report.html")


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Writes one page of all runs; returns its path. ValueError where there is nothing to show of a run."""
    for run in runs:
        if not run.records and not run.grids:
            raise ValueError(f"{run.name} has neither metrics nor samples: is it a training run's workdir?")
    title = html.escape(", ".join(run.name for run in runs))
    body = "".join((*_speed(runs), *_score_tables(runs), *_figure(runs), *_grids(runs), _settings(runs)))
    write_html(path, title, body)
    return path


def write_html(path: Path, title: str, body: str) -> None:
    """Writes a page, at once. title: escaped."""
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;color:#222}}img{{max-width:100%}}
figure{{display:inline-block;margin:.5rem;max-width:340px}}figcaption{{text-align:center;color:#666}}
td,th{{padding:0 1rem 0 0;text-align:left;font-size:13px}}td{{font-family:ui-monospace,monospace}}
.differs td{{background:#fff3c4}}.grids{{white-space:nowrap;overflow-x:auto}}</style>
<h1>{title}</h1>{body}</html>
"""
    with whole(path) as partial:
        partial.write_text(page)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], marked: Sequence[bool] = ()) -> str:
    """Rows of anything as HTML; some marked."""
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)  # noqa: E731
    lines = [
        f"<tr{' class=differs' if i < len(marked) and marked[i] else ''}>{cells('td', row)}</tr>"
        for i, row in enumerate(rows)
    ]
    return f"<table><tr>{cells('th', header)}</tr>{''.join(lines)}</table>"


def _speed(runs: Sequence[Run]) -> Iterator[str]:
    """Steps, the last loss, and medians of what the machine did (of memory the most)."""
    runs = [run for run in runs if run.records]
    rows = [("steps", *(f"{run.records[-1]['step']:,}" for run in runs))]
    losses = [[r["loss"] for r in run.records if "loss" in r] or [float("nan")] for run in runs]
    rows.append(("last loss", *(f"{found[-1]:.4g}" for found in losses)))
    for key, title in SPEED.items():
        values = [[r[key] for r in run.records if r.get(key) is not None] for run in runs]
        middle = max if "peak" in key else np.median
        if any(values):
            rows.append((title, *(f"{middle(found):.4g}" if found else "" for found in values)))
    if runs:
        yield table(("", *(run.name for run in runs)), rows)


def _score_tables(runs: Sequence[Run]) -> Iterator[str]:
    """A table for all scores that compare: of one reference, network, number of pictures and way of sampling."""
    alike: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for run in runs:
        for line in run.scores:
            told = (f"{k} {v}" for k, v in line.items() if not isinstance(v, list) and k not in ("samples", "step"))
            alike.setdefault("; ".join(told), []).append((run.name, line))
    for title, lines in alike.items():
        metrics = list(dict.fromkeys(k for _, line in lines for k, v in line.items() if isinstance(v, list)))
        cell = lambda value: "{:.4g} [{:.4g}, {:.4g}]".format(*value) if value else ""  # noqa: E731
        yield f"<h2>Scores</h2><p>{html.escape(title)}</p>"
        rows = [(name, line.get("step", ""), *(cell(line.get(metric)) for metric in metrics)) for name, line in lines]
        yield table(("run", "step", *metrics), rows)


def _grids(runs: Sequence[Run]) -> Iterator[str]:
    most = MOST_GRIDS if len(runs) == 1 else MOST_GRIDS_EACH
    for run in runs:
        grids = run.grids
        if len(grids) > most:  # evenly over time, the first and the last among them
            grids = [grids[round(i * (len(grids) - 1) / (most - 1))] for i in range(most)]
        if len(runs) > 1:
            yield f"<h2>{html.escape(run.name)}</h2>"
        yield "<div>" if len(runs) == 1 else "<div class=grids>"
        for path in grids:
            step = int(path.stem.split("_")[1])
            yield f"<figure>{_png(path.read_bytes(), '')}<figcaption>step {step:,}</figcaption></figure>"
        yield "</div>"


def _png(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _settings(runs: Sequence[Run]) -> str:
    """All keys; those in which the runs differ first, and marked."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [(key, *(str(run.config.get(key, "")) for run in runs)) for key in keys]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)  # stable: else in the configs' order
    header = ("", *(run.name for run in runs))
    settings = table(header, rows, [len(set(row[1:])) > 1 for row in rows])
    return f"<details{' open' if len(runs) > 1 else ''}><summary>Configuration</summary>{settings}</details>"


def _figure(runs: Sequence[Run]) -> Iterator[str]:
    """Curves as one PNG: a panel a metric, the loss first; by noise-level quarter, if there are any, last for a single run."""
    found = {name for run in runs for record in run.records for name in record} - {"step", *SPEED}
    quarters = [name for name in QUARTERS if name in found]
    panels = [(name, [name]) for name in sorted(found - {*QUARTERS}, key=lambda name: (name != "loss", name))]
    if quarters and len(runs) == 1:
        panels.append(("loss by quarter of the noise level", quarters))
    elif quarters:
        panels += [(f"loss, quarter {name[-1]} of the noise level", [name]) for name in quarters]
    if not panels:
        return
    columns = 3
    rows = -(-len(panels) // columns)
    figure = new_figure(12, 2.8 * rows)
    for i, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        values = []
        for number, run in enumerate(runs):
            for key in keys:
                points = [(r["step"], r[key]) for r in run.records if r.get(key) is not None]
                label = run.name if len(runs) > 1 else key[-1]
                if points:
                    colour = f"C{number if len(runs) > 1 else keys.index(key)}"
                    axes.plot(*zip(*points, strict=True), linewidth=1, label=label, color=colour)
                    values += [value for _, value in points]
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if ("loss" in title or title in ("mse", "vb")) and values and min(values) > 0:
            axes.set_yscale("log")
        if len(keys) > 1 or (i == 0 and len(runs) > 1):
            axes.legend(fontsize=8)
    yield drawing(figure, "curves")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, on no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def picture(image: Image.Image, alt: str) -> str:
    """A picture as HTML's img, whole in the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return _png(buffer.getvalue(), alt)


def drawing(figure: Any, alt: str) -> str:
    """A figure as HTML's img, whole in the page."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"agg.path.chunksize": PIECE}):
        figure.savefig(buffer, format="png", dpi=110)
    return _png(buffer.getvalue(), alt)

"""One page of a run: its curves, and its sample grids over time. A file that opens anywhere, without a server."""

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jdiff.logbook import read_metrics

HIDDEN = ("step", "steps_per_second", "model_flops_per_second", "data_wait_share", "mfu")
"""Of a record's numbers, those without a curve."""
QUARTERS = tuple(f"loss_quarter_{i}" for i in range(1, 5))
MOST_GRIDS = 12


def write_report(workdir: Path, config: Mapping[str, Any]) -> Path:
    """Writes WORKDIR/report.html from metrics.jsonl and samples/*.png; returns its path."""
    records = read_metrics(workdir / "metrics.jsonl")
    grids = sorted((workdir / "samples").glob("step_*.png"))
    if len(grids) > MOST_GRIDS:  # evenly over time, the first and the last among them
        grids = [grids[round(i * (len(grids) - 1) / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    figures = [f'<img alt="curves" src="data:image/png;base64,{_curves(records)}">'] if records else []
    for path in grids:
        image = base64.b64encode(path.read_bytes()).decode()
        step = int(path.stem.split("_")[1])
        figures.append(
            f'<figure><img src="data:image/png;base64,{image}"><figcaption>step {step:,}</figcaption></figure>'
        )
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in config.items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(workdir.name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;color:#222}}img{{max-width:100%}}
figure{{display:inline-block;margin:.5rem;max-width:340px}}figcaption{{text-align:center;color:#666}}
td{{padding:0 1rem 0 0;font-family:ui-monospace,monospace;font-size:13px}}</style>
<h1>{html.escape(workdir.name)}</h1>{"".join(figures)}
<details><summary>Configuration</summary><table>{rows}</table></details></html>
"""
    path = workdir / "report.html"
    partial_path = path.with_suffix(".tmp")
    partial_path.write_text(page)
    partial_path.replace(path)
    return path


def _curves(records: list[dict[str, Any]]) -> str:
    """The curves as a base64 PNG: one panel a metric, the loss first and by noise-level quarter (if there are) last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {name for record in records for name in record} - {*HIDDEN, *QUARTERS}
    panels = [(name, [name]) for name in sorted(found, key=lambda name: (name != "loss", name))]
    if any(name in record for record in records for name in QUARTERS):
        panels.append(("loss by quarter of the noise level", list(QUARTERS)))
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, keys) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1, label=key[-1] if len(keys) > 1 else None)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if "loss" in title or title in ("mse", "vb"):
            values = [r[k] for r in records for k in keys if r.get(k)]
            if values and min(values) > 0:
                axes.set_yscale("log")
        if len(keys) > 1:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()

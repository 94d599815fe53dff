"""How a DiT's training step grows with depth, width, tokens, batch and devices, beside its FLOPs."""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jdiff
from benchmarks import dit
from benchmarks.timing import Call, Row, turns
from jdiff import runtime
from jdiff.report import new_figure

BASE = {"image_size": 32, "depth": 12, "width": 384, "batch": 4}
SWEEPS: dict[str, tuple[int, ...]] = {
    "image_size": (32, 48, 64),
    "depth": (12, 20, 28),
    "width": (384, 576, 768),
    "batch": (4, 8, 16, 32),
}
"""Of latents with patches of 2: 256, 576 and 1024 tokens. Heads have a width of 64."""


def growth(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each value of a sweep, all on one device, those of a sweep in turn; then one for one device and for all.

    `growth` is the time's growth from a sweep's first value divided by that of the FLOPs a device: 1 is the ideal, and less where
    the small are wasteful.
    """
    asked = args.only.split(",") if args.only else [*SWEEPS, "devices"]
    for sweep in [name for name in SWEEPS if name in asked]:
        settings = {f"{sweep} {value}": BASE | {sweep: value} for value in SWEEPS[sweep]}
        yield from _grown(_rows(settings, _on(1, args)))
    if "devices" in asked:
        most = BASE | {"batch": max(SWEEPS["batch"])}
        counts = sorted({1, runtime.cpu_devices(most["batch"])})
        titles = {n: f"devices {n}, batch {most['batch']}" for n in counts}
        yield from _grown([row for n in counts for row in _rows({titles[n]: most}, _on(n, args))])


def _grown(rows: list[Row]) -> list[Row]:
    first = rows[0]
    for row in rows:
        ideal = row["gflop_a_device"] / first["gflop_a_device"]
        row["growth"] = round(row["jdiff_min_ms"] / first["jdiff_min_ms"] / ideal, 3)
    return rows


def plot(rows: list[Row], file: str) -> None:
    """Draws each sweep's least time and peak memory, the time beside its first one's grown as the FLOPs."""
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        sweeps.setdefault(row["case"].split()[1], []).append(row)
    figure = new_figure(4 * len(sweeps), 6)
    axes = figure.subplots(2, len(sweeps), squeeze=False)
    for (name, found), (above, below) in zip(sweeps.items(), axes.T, strict=True):
        values = [int(row["case"].split()[2].rstrip(",")) for row in found]
        if name == "image_size":
            name, values = "tokens", [(size // 2) ** 2 for size in values]
        work, times = [row["gflop_a_device"] for row in found], [row["jdiff_min_ms"] / 1e3 for row in found]
        above.plot(values, [times[0] * each / work[0] for each in work], "--", color="gray", label="as the FLOPs")
        above.plot(values, times, "o-", label="measured")
        below.plot(values, [row["jdiff_rss_mib"] / 1024 for row in found], "o-")
        above.set(title=name, ylabel="s a step", xticks=values, ylim=0)
        below.set(xlabel=name, ylabel="peak GiB", xticks=values, ylim=0)
        above.legend()
    figure.savefig(file, dpi=80)


def _on(devices: int, args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"devices": devices})


def _rows(settings: dict[str, dict[str, int]], args: argparse.Namespace) -> list[Row]:
    times = turns({name: functools.partial(training, each) for name, each in settings.items()}, args, args.rounds)
    rows = []
    for name, each in settings.items():
        flops, least = 6 * each["batch"] * jdiff.create(args.model, **_shape(each)).macs(), times[f"{name}_min_ms"]
        rows.append(
            {
                "case": f"growth {name}",
                "jdiff_ms": times[f"{name}_ms"],
                "jdiff_min_ms": least,
                "jdiff_rss_mib": times[f"{name}_rss_mib"],
                "jdiff_gflops": round(flops / least / 1e6, 1),
                "gflop_a_device": round(flops / args.devices / 1e9, 1),
                "others": times["others"],
            }
        )
    return rows


def _shape(settings: dict[str, int]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "batch"} | {"heads": settings["width"] // 64}


def training(settings: dict[str, int], args: argparse.Namespace) -> Call:
    changed = {"batch": settings["batch"], "shape": _shape(settings)}
    return dit.training(argparse.Namespace(**vars(args) | changed))

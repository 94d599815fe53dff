"""One page of several training runs: their curves in one picture, scores, speed, sample grids over time, settings that differ.

    python tools/report.py runs/a runs/b --out report.html

A run's own page, runs/a/report.html, is written as it trains.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jdiff import command


def main() -> int:
    """Parses, writes the page, prints where it is; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a training run's workdir")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    return command.run("report.py", report, parser.parse_args())


def report(options: argparse.Namespace) -> int:
    """The work behind `main`."""
    import dataclasses

    from jdiff import runtime
    from jdiff.report import read_run, write_page

    runtime.prepare()
    runs = [read_run(workdir, settings(workdir)) for workdir in options.runs]
    if len({run.name for run in runs}) < len(runs):  # of several folders: told apart by their paths
        runs = [dataclasses.replace(run, name=str(path)) for run, path in zip(runs, options.runs, strict=True)]
    print(f"report: {write_page(runs, options.out)}")
    return 0


def settings(workdir: Path) -> dict[str, Any]:
    """A run's config, flat, from its newest checkpoint that can be read; none where there is none."""
    from jdiff import checkpoint, config

    if not workdir.is_dir():
        raise ValueError(f"{workdir} is no folder")
    there = checkpoint.steps(workdir)
    if not there:
        return {}
    return config.flat(checkpoint.newest_whole(there, lambda step: checkpoint.read_meta(workdir, step))["config"])


if __name__ == "__main__":
    sys.exit(main())

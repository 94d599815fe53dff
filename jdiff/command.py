"""What the tools' command lines have in common. Imports nothing heavy, so that --help and a wrong option are answered at once."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence


def run(name: str, work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """`work(options)`, the exit code; what a user can mend is one line on stderr, after the command's name, and 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return work(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def check_above_zero(options: argparse.Namespace, names: Sequence[str]) -> None:
    """ValueError for the first of these options that is given and not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be above 0")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """What `processes.join` reads: how the processes of one run find each other."""
    group = parser.add_argument_group("several processes (docs/scale.md)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", metavar="N", help="how many; auto asks SLURM, Open MPI or the TPU's metadata")
    group.add_argument("--process", metavar="I", type=int, help="this one's number, from 0")
    limit = {"type": float, "metavar": "SECONDS"}
    group.add_argument("--start-limit", default=300.0, help="to wait for all to start (300)", **limit)
    group.add_argument("--lost-after", default=30.0, help="without a sign of life a process is lost (30)", **limit)

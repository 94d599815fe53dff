"""Trains what a config describes.

    python launch.py --config configs/dit_s2.py [--workdir runs/a] [--config.KEY=VALUE ...]

A run resumes from its workdir; without --workdir it gets the next numbered folder under runs/. Every key of the config can
be overridden, as --config.optim.lr=2e-4; `--config FILE --help` lists them. The exit code is 0 when the run is complete,
2 for a mistake in the arguments or the data, 143 (SIGTERM) or 130 (Ctrl-C) when it was stopped and saved, 75 when another
process of the run is lost, missing or has failed: docs/scale.md.

    python launch.py --config configs/dit_xl2_imagenet256.py --plan v5e:16x16 [--search] [--plan-json FILE] [--config.KEY=VALUE ...]

trains nothing: the step is compiled for that machine (v5e:4x4, v5p:4x4x4, cpu:1; of h100x8 there is arithmetic), and what it
needs and would take is printed. Data that is not at hand is stood for by --config.data.name=noise --config.data.path=32x32x4:1000.
"""

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jdiff.processes import Peers


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`--config.a.b=c` or `--config.a.b c` -> {"a.b": "c"}; ValueError for anything else."""
    overrides, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            raise ValueError(f"unknown argument {argument!r}; config keys are given as --config.KEY=VALUE")
        if not equals:
            if not rest:
                raise ValueError(f"{name} has no value")
            value = rest.pop(0)
        overrides[name.removeprefix("--config.")] = value
    return overrides


def next_workdir(name: str) -> Path:
    """runs/NNN-name, one above the highest number there."""
    taken = [int(m[1]) for p in Path("runs").glob("*") if (m := re.match(r"(\d+)-", p.name))]
    return Path("runs") / f"{max(taken, default=0) + 1:03d}-{name}"


def plan(config: Any, machine: str, search: bool, file: Path | None) -> int:
    """Prints the config's plan for a machine; returns the exit code."""
    from jdiff.plan import report, topology, training
    from jdiff.plan.search import search as search_for

    try:
        topology.prepare(topology.parse(machine))
        plans = search_for(config, machine) if search else [training.plan(config, machine)]
    except (ValueError, OSError) as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(map(report.describe, plans)))
    if file is not None:
        report.write_json(plans, file)
    return 0


def main() -> int:
    """Parses, checks, trains; returns the exit code."""
    from jdiff import command

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--config", metavar="FILE", help="an experiment, as configs/dit_s2.py")
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="where the run is kept, and resumed from")
    command.add_process_options(parser)
    parser.add_argument("--plan", metavar="MACHINE", help="only say what a step needs and takes there, as v5e:4x4")
    parser.add_argument(
        "--search", action="store_true", help="with --plan: also other meshes, and the largest batch that fits"
    )
    parser.add_argument("--plan-json", metavar="FILE", type=Path, help="with --plan: write it down, too")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the keys of --config FILE")
    options, rest = parser.parse_known_args()

    from jdiff import config as configs

    try:
        if options.help:
            parser.print_help()
            for key, value in configs.flat(configs.load_file(options.config)).items() if options.config else ():
                print(f"  --config.{key}={value}" if key != "task" else f"  task {value}")
            return 0
        if options.config is None:
            raise ValueError("--config FILE is missing, as --config configs/dit_s2.py")
        config = configs.load_file(options.config)
        for key, text in parse_overrides(rest).items():
            configs.override(config, key, text)
        configs.check(config)
        if options.plan is None and (options.search or options.plan_json):
            raise ValueError("--search and --plan-json go with --plan MACHINE, as --plan v5e:4x4")
        if options.plan is not None:
            return plan(config, options.plan, options.search, options.plan_json)

        from jdiff import processes

        peers = processes.join(options)
    except ValueError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    return peers.run(lambda: train(config, options, peers))


def train(config: Any, options: argparse.Namespace, peers: "Peers") -> int:
    """Trains as one of several processes, or alone; returns the exit code."""
    import jax

    from jdiff import checkpoint, interrupt, runtime
    from jdiff import config as configs
    from jdiff.train import fit

    if peers.count > 1 and options.workdir is None:
        raise ValueError("--workdir is missing: several processes need one folder that all of them see")
    workdir = options.workdir or next_workdir(Path(options.config).stem)
    rows = config.batch_size // config.accumulate
    runtime.prepare(runtime.cpu_devices(rows, **config.mesh, processes=peers.count))
    if peers.count > 1:
        code = {"git revision": checkpoint.git_revision(), "devices": jax.local_device_count()}
        peers.agree({**configs.flat(config.to_dict()), **code})
    level = logging.INFO if peers.index == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", force=True)
    try:
        path = fit(config, workdir, peers)
    except interrupt.Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    if peers.index == 0:
        print(f"sample grid: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

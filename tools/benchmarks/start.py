"""How long a user waits before anything happens: imports, --help, and a training run's first step."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from benchmarks.timing import Busy, Row, apart

LAUNCH = os.path.join(os.path.dirname(__file__), "..", "..", "launch.py")


COMMANDS = {"import jdiff": ["-c", "import jdiff"], "launch.py --help": [LAUNCH, "--help"]}


def start(args: argparse.Namespace) -> Iterator[Row]:
    """Whole processes: small commands `--rounds` times; then a training run's first step twice, with what XLA made kept in a cache
    that is empty at first."""
    asked = args.only.split(",") if args.only else ["command", "step"]
    if "command" in asked:
        for name, command in COMMANDS.items():
            times = [_seconds(command) * 1e3 for _ in range(args.rounds)]
            yield {"case": name, "jdiff_ms": round(statistics.median(times)), "jdiff_min_ms": round(min(times))}
    if "step" in asked:
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("an empty cache", "a warm one"):
                busy, before = Busy(), time.perf_counter()
                row = apart(first_step, argparse.Namespace(**vars(args) | {"cache": cache}))
                seconds, processor_seconds = time.perf_counter() - before, row.pop("processor_s")
                case = f"first step {args.model} b{args.batch}, {kind}"
                yield {"case": case, "jdiff_ms": round(seconds * 1e3), **row, "others": busy.others(processor_seconds)}


def _seconds(command: list[str]) -> float:
    before = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before


def first_step(args: argparse.Namespace) -> Row:
    """Seconds of each part of the way there, in a new process."""
    from jdiff import config as configs
    from jdiff import train
    from jdiff.plan.training import batch_shapes

    jax.config.update("jax_compilation_cache_dir", args.cache)
    config = configs.default()
    config.model.name, config.batch_size = args.model, args.batch
    config.data.update(name="noise", path="32x32x4:1000")
    times = [time.perf_counter()]
    setup = train.Setup(config)
    times.append(time.perf_counter())
    step = setup.step.lower(setup.abstract, batch_shapes(setup)).compile()
    times.append(time.perf_counter())
    state = jax.block_until_ready(setup.fresh_state())
    times.append(time.perf_counter())
    batch = {name: jax.numpy.ones(x.shape, x.dtype, device=x.sharding) for name, x in batch_shapes(setup).items()}
    jax.block_until_ready(step(state, batch))
    times.append(time.perf_counter())
    names = ("setup_s", "compile_s", "init_s", "step_s")
    row: Row = {name: round(b - a, 2) for name, a, b in zip(names, times[:-1], times[1:], strict=True)}
    return row | {"processor_s": round(time.process_time(), 1)}

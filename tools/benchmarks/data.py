"""The input pipeline: how quick it is, and what share of a step waits for it."""

import argparse
import time
from collections.abc import Iterator

import jax

from benchmarks.timing import Busy, Row
from jdiff import data as pipeline


def data(args: argparse.Namespace) -> Iterator[Row]:
    """Images a second of a source alone, and the share of a step of `--step-ms` that waits for its batch."""
    source = pipeline.open_source(args.source, path=args.path, image_size=args.image_size)
    settings = {"batch_size": args.batch, "seed": 0, "workers": args.workers}
    reader = pipeline.batches(source, **settings)
    next(reader)
    busy, start = Busy(), time.perf_counter()
    for _ in range(args.rounds):
        next(reader)
    rate = args.rounds * args.batch / (time.perf_counter() - start)
    device = pipeline.to_device(pipeline.batches(source, **settings), jax.device_put)
    next(device)
    before, start = device.wait_seconds, time.perf_counter()
    for _ in range(args.rounds):
        next(device)
        time.sleep(args.step_ms / 1e3)  # stands for a step on an accelerator, which leaves the processors free
    waits = (device.wait_seconds - before) / (time.perf_counter() - start)
    yield {
        "case": f"data {args.source} {args.image_size}px b{args.batch} workers {args.workers}",
        "images_per_s": round(rate, 1),
        "step_ms": args.step_ms,
        "waits": round(waits, 4),
        "others": busy.others(),
    }

"""How two sides are timed so that their ratio can be believed."""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from jdiff import runtime

Row = dict[str, Any]
Call = Callable[[], Any]
Build = Callable[[argparse.Namespace], Call]
"""Makes a side's call from the benchmark's arguments; a function of a module, since a process of its own runs it."""
PAUSE = 0.05
"""Seconds between the two sides: the worker threads of both spin for some milliseconds after their last task."""


class Side:
    """A side in a process of its own, where the other's threads, allocator and memory cost it nothing.

    In one process with PyTorch, XLA's LoRA step of SD 1.5 takes a third longer than alone (docs/performance.md). Both have the
    heap that `runtime.prepare` keeps.
    """

    def __init__(self, build: Build, args: argparse.Namespace):
        self._process = ProcessPoolExecutor(1, get_context("spawn"), runtime.prepare, (args.devices,))
        self.processor_seconds = 0.0
        self._process.submit(_make, build, args).result()

    def milliseconds(self, calls: int = 1) -> float:
        """What a call takes, the mean of so many."""
        milliseconds, self.processor_seconds = self._process.submit(_time, calls).result()
        return milliseconds

    def end(self) -> int:
        """Ends the process. Returns its peak resident memory in MiB; a peer's has loaded both libraries."""
        peak = self._process.submit(_peak).result()
        self._process.shutdown()
        return peak


_CALL: Call
"""What this process was started for."""


def _make(build: Build, args: argparse.Namespace) -> None:
    global _CALL
    _CALL = build(args)


def _time(calls: int) -> tuple[float, float]:
    start = time.perf_counter()
    for _ in range(calls):
        _CALL()
    return (time.perf_counter() - start) / calls * 1e3, time.process_time()


def _peak() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def apart(function: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """What a function of a module says in a process that ends with it, and gives its memory back."""
    with ProcessPoolExecutor(1, get_context("spawn"), runtime.prepare, (args.devices,)) as process:
        return process.submit(function, args).result()


class Busy:
    """What other processes take of this machine's processors, from the time of its making."""

    def __init__(self):
        self.start = self._now()

    def _now(self) -> np.ndarray:
        """Seconds of processor time since boot: available, used, used by this process."""
        if not os.path.exists("/proc/stat"):
            return np.full(3, np.nan)
        with open("/proc/stat") as file:
            ticks = np.array([int(x) for x in file.readline().split()[1:9]]) / os.sysconf("SC_CLK_TCK")
        return np.array([ticks.sum(), ticks.sum() - ticks[3:5].sum(), sum(os.times()[:2])])

    def others(self, sides: float = 0.0) -> float:
        """Their share, 0 to 1, where both sides have had so many seconds; nan where the system does not say."""
        available, used, own = self._now() - self.start
        return round(max(float((used - own - sides) / available), 0.0), 3)


def turns(sides: dict[str, Build], args: argparse.Namespace, rounds: int, calls: int = 1) -> Row:
    """Each side's median and least milliseconds a call and its peak memory, and what others took of the machine meanwhile."""
    running: dict[str, Side] = {}
    for name, build in sides.items():
        running[name] = Side(build, args)
        running[name].milliseconds()
    times: dict[str, list[float]] = {name: [] for name in sides}
    before, busy = sum(side.processor_seconds for side in running.values()), Busy()
    for _ in range(rounds):
        for name, side in running.items():
            time.sleep(PAUSE)
            times[name].append(side.milliseconds(calls))
    row: Row = {"others": busy.others(sum(side.processor_seconds for side in running.values()) - before)}
    for name, values in times.items():
        row |= {f"{name}_ms": round(statistics.median(values), 2), f"{name}_min_ms": round(min(values), 2)}
        row[f"{name}_rss_mib"] = running[name].end()
    return row


def alternate(sides: dict[str, Build], args: argparse.Namespace, rounds: int, calls: int = 1) -> Row:
    """Milliseconds a call of each side, taken in turn (A B A B ...) after one warm-up, and ratios of the first to the second."""
    row = turns(sides, args, rounds, calls)
    a, b = sides
    row["ratio"] = round(row[f"{a}_ms"] / row[f"{b}_ms"], 3)
    row["ratio_min"] = round(row[f"{a}_min_ms"] / row[f"{b}_min_ms"], 3)
    return row


def beside_torch(
    case: str,
    ours: Build,
    theirs: Build,
    check: Callable[[argparse.Namespace], float],
    args: argparse.Namespace,
    rounds: int,
    calls: int = 1,
    flops: int | None = None,
) -> Row:
    """A case's row: how far apart both are, their times, and with the FLOPs of a call their rates."""
    row: Row = {"case": case, "error": apart(check, args)}
    row |= alternate({"jdiff": ours, "torch": theirs}, args, rounds, calls)
    if flops is not None:
        row |= {f"{side}_gflops": round(flops / row[f"{side}_min_ms"] / 1e6, 1) for side in ("jdiff", "torch")}
    return row


def in_sequence(sides: dict[str, Build], args: argparse.Namespace, rounds: int) -> Row:
    """Milliseconds a call of each side, one after the other, where both do not fit the memory of a small machine."""
    row: Row = {"others": 0.0}
    for name, build in sides.items():
        found = turns({name: build}, args, rounds)
        row |= found | {"others": max(row["others"], found["others"])}
    return row


def close(name: str, found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference relative to the largest expected magnitude; an error above the tolerance."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    if not error <= tolerance:
        raise AssertionError(f"{name}: the two sides differ by {error:.1e}, more than {tolerance:.0e}")
    return error

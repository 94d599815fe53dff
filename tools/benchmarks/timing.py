"""How two sides are timed so that their ratio can be believed."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Row = dict[str, Any]
PAUSE = 0.05
"""Seconds between the two sides: the worker threads of both spin for some milliseconds after their last task."""


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

    def others(self) -> float:
        """Their share, 0 to 1; nan where the system does not say."""
        available, used, own = self._now() - self.start
        return round(max(float((used - own) / available), 0.0), 3)


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> Row:
    """Milliseconds a call of each side, taken in turn after one warm-up round, and ratios of the first to the second."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    busy = Busy()
    for round_ in range(rounds + 1):
        for name, function in sides.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if round_:
                times[name].append((time.perf_counter() - start) / calls * 1e3)
    row: Row = {}
    for name, values in times.items():
        row |= {f"{name}_ms": round(statistics.median(values), 2), f"{name}_min_ms": round(min(values), 2)}
    a, b = sides
    row["others"] = busy.others()
    row["ratio"] = round(row[f"{a}_ms"] / row[f"{b}_ms"], 3)
    row["ratio_min"] = round(row[f"{a}_min_ms"] / row[f"{b}_min_ms"], 3)
    return row


def timed(function: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times[1:]), 2)


def close(name: str, found: Any, expected: Any, tolerance: float) -> float:
    """The largest difference relative to the largest expected magnitude; an error above the tolerance."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))
    if not error <= tolerance:
        raise AssertionError(f"{name}: the two sides differ by {error:.1e}, more than {tolerance:.0e}")
    return error


def alone(function: Callable[[], Any]) -> Row:
    """A few calls of one side, in a process of its own, for its peak memory."""
    for _ in range(3):
        function()
    return {"rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}

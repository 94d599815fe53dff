"""What a run measures of itself: means of its metrics over a window, and how fast the machine goes."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bf16 peak of one chip by how its `device_kind` begins; the longest match counts."""


def peak_flops(devices: list[Any]) -> float | None:
    """The mesh's peak FLOP/s, None where the chip's is not known (a CPU's, say)."""
    kinds = [kind for kind in PEAK_FLOPS if devices[0].device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] * len(devices) if kinds else None


def peak_memory(devices: list[Any]) -> int | None:
    """Most bytes in use so far on one of this process's devices; of a CPU's, the process's resident memory. None where unknown."""
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    if peaks:
        return max(peaks)
    if devices[0].platform != "cpu" or not sys.platform.startswith("linux"):
        return None
    import resource  # which not every system has

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Window:
    """Metrics of the steps since the last record. Kept in checkpoints, so that a resumed run writes the same records."""

    def __init__(self, values: list[dict[str, Any]] | None = None):
        self.values = list(values or [])

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One accepted step's metrics, as plain numbers."""
        self.values.append(dict(metrics))

    def means(self) -> dict[str, float]:
        """The means over the window, the loss also by quarter of the noise level where there is one; empties it."""
        if not self.values:
            return {}
        first = self.values[0]
        means = {k: float(np.mean([v[k] for v in self.values])) for k in first if not k.startswith("quarter_")}
        if "quarter_sums" in first:
            sums, counts = (np.sum([v[k] for v in self.values], axis=0) for k in ("quarter_sums", "quarter_counts"))
            means |= {f"loss_quarter_{i + 1}": float(sums[i] / counts[i]) for i in range(4) if counts[i]}
        self.values = []
        return means


class Meter:
    """Steps, images and model FLOPs a second since the last reading, without the time spent on saving and sampling."""

    def __init__(self, macs: int, batch_size: int, devices: list[Any]):
        """macs: of a record's forward pass; a training step's FLOPs are counted as six times that. devices: the mesh's."""
        self.flops, self.batch_size, self.devices = 6.0 * macs * batch_size, batch_size, devices
        self.steps, self._start, self._waited = 0, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time inside out of the count."""
        entered = time.perf_counter()
        yield
        self._start += time.perf_counter() - entered

    def read(self, waited: float) -> dict[str, float]:
        """The rates since the last call; `waited`: seconds in all that the loop stood still for data."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        rate = self.steps / seconds
        rates = {
            "steps_per_second": rate,
            "images_per_second": rate * self.batch_size,
            "model_flops_per_second": rate * self.flops,
            "data_wait_share": (waited - self._waited) / seconds,
        }
        if (peak := peak_flops(self.devices)) is not None:
            rates["mfu"] = rates["model_flops_per_second"] / peak
        if (held := peak_memory(self.devices)) is not None:
            rates["peak_memory_bytes"] = held
        self.steps, self._start, self._waited = 0, now, waited
        return rates

"""How a process of jdiff sets JAX up, whichever command it runs."""

import ctypes
import logging
import math
import os

import jax

from jdiff.paths import cache_dir

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""glibc's names for `mallopt` (malloc.h)."""

LEAST_ROWS = 4
"""Rows of a training batch that a CPU core should have at least, to be worth a device of its own."""


def cpu_devices(
    rows: int, data: int = -1, fsdp: int = 1, tensor: int = 1, least: int = LEAST_ROWS, processes: int = 1
) -> int:
    """How many devices a CPU should be split into for batches of so many rows, on a mesh of data x fsdp x tensor.

    Where `data` may be what it likes (-1): the largest divisor of rows that leaves each device `least` of them and a core of
    its own. A core a device does everything side by side, where XLA spreads only its large operations over the cores: a
    convolutional training step of 8 rows is 1.9 times as quick on two cores (docs/performance.md). Each device holds what is
    trained, so `mesh.data=1` is the way out where memory is short; weights that are only read are shared (`sharding.put`),
    so sampling takes a device for every row (least=1). Of several processes each has its share of the mesh, one device where
    `data` may be what it likes: they may stand on one machine.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (data, fsdp, tensor, processes) != (-1, 1, 1, 1):
        asked = math.prod(size for size in (data, fsdp, tensor) if size != -1) // processes
        return asked if 1 <= asked <= cores else 1
    return max(n for n in range(1, max(1, min(cores, rows // least)) + 1) if rows % n == 0)


def prepare(devices: int | None = None) -> None:
    """Quiet libraries, a persistent compilation cache (left alone where the user has set one), and on a CPU a kept heap.

    devices: how many a CPU is split into, where XLA_FLAGS does not say; other backends do not care. To be called before JAX
    is used for anything.
    """
    if devices is not None and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    quiet()
    _mallopt(M_ARENA_MAX, 1)  # before JAX starts its threads
    if jax.default_backend() == "cpu":
        _mallopt(M_MMAP_MAX, 0)
        _mallopt(M_TRIM_THRESHOLD, -1)


def quiet() -> None:
    """Libraries that say only what is wrong."""
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _mallopt(option: int, value: int) -> None:
    """Tells glibc's malloc how to work; other C libraries are left as they are.

    XLA's CPU client takes its scratch memory anew for each call, hundreds of MiB. Where malloc gives that back to the kernel,
    which it does unless told otherwise, and always in an arena that is a thread's own, the kernel zeroes it page by page: a
    DiT-S/2 training step takes a quarter longer (docs/performance.md).
    """
    found = getattr(ctypes.CDLL(None), "mallopt", None)
    if found is not None:
        found(option, value)

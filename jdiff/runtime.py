"""How a process of jdiff sets JAX up, whichever command it runs."""

import ctypes
import logging

import jax

from jdiff.paths import cache_dir

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""glibc's names for `mallopt` (malloc.h)."""


def prepare() -> None:
    """Quiet libraries, a persistent compilation cache (left alone where the user has set one), and on a CPU a kept heap."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    if jax.default_backend() == "cpu":
        keep_heap()


def keep_heap() -> None:
    """Tells glibc's malloc to give no memory back to the kernel; other C libraries are left as they are.

    XLA's CPU client takes its scratch memory anew for each call, hundreds of MiB that the kernel zeroes page by page: a
    DiT-S/2 training step is a seventh quicker without that (docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(option, value)

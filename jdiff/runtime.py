"""How a process of jdiff sets JAX up, whichever command it runs."""

import logging

import jax

from jdiff.paths import cache_dir


def prepare() -> None:
    """Quiet libraries and a persistent compilation cache (left alone where the user has set one)."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    logging.getLogger("jax").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)

"""Which platform a program is traced for: this process's own, or another that it is compiled for ahead of time."""

import contextlib

import jax

_platform = jax.make_user_context(None)
# part of the key under which JAX keeps what it has traced


def platform() -> str:
    """`cpu`, `gpu` or `tpu`, for the choices that models make by it."""
    return _platform.value or jax.default_backend()


def compiling_for(name: str) -> contextlib.AbstractContextManager[None]:
    """A context in which `platform` is `name`."""
    return _platform(name)

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


def compiler_options() -> dict[str, str] | None:
    """What XLA is told for the platform, beside its defaults.

    XLA:TPU would take a product with a kernel that is split over devices piece by piece, as the pieces come round. DiT-XL/2's
    training step on 16 chips is estimated at 356 million cycles so, and at 211 where kernels are gathered beside other work.
    """
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if platform() == "tpu" else None

"""Training steps by XLA:TPU's estimate, for chips that are not there."""

import argparse
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Row
from jdiff import config as configs
from jdiff import models, sharding, target
from jdiff.models.macs import macs
from jdiff.plan import topology, training
from jdiff.plan.program import Program

XL = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "dit_xl2_imagenet256.py")


def tpu(args: argparse.Namespace) -> Iterator[Row]:
    """DiT-XL/2's whole step, 16 pictures a chip on 16 chips, and the gradient of Stable Diffusion 1.5's UNet, 8 latents on one.
    Minutes each, the UNet's a quarter of an hour; a row that says so where libtpu is missing."""
    for name, plan in {"dit": _dit, "unet": _unet}.items():
        if not args.only or name in args.only.split(","):
            try:
                yield plan()
            except ValueError as error:
                yield {"case": f"tpu {name}", "skipped": str(error)}


def _dit() -> Row:
    config = configs.load_file(XL)
    config.data.update(name="noise", path="32x32x4:1000")
    config.mesh.fsdp = 16
    made = training.plan(config, "v5e:4x4")
    return {
        "case": f"tpu dit v5e:4x4 b{made.batch_size}",
        "memory_gib": round(made.total / 2**30, 2),
        "cycles": made.cycles,
        "estimated_ms": round(1e3 * (made.seconds or math.nan), 1),
        "mfu": round(made.mfu or math.nan, 3),
        "share_estimated": round(made.share_estimated or math.nan, 3),
        "compile_s": round(made.compile_seconds),
    }


def _unet(batch: int = 8) -> Row:
    """A kernel of splash has no estimate: counted at `kernels.SHARE` of peak, its heads of 40 padded to 128. Nothing is computed
    again: 8 latents fit a chip so, and `docs/scale.md` has what it takes otherwise."""
    where = topology.parse("v5e:1x1")
    model = models.create("sd15/unet", dtype=jnp.bfloat16, remat="none")
    over = sharding.replicated(sharding.make_mesh(1, 1, 1, topology.devices(where)))
    sizes = ((batch, 64, 64, model.in_channels), (batch,), (batch, 77, model.cross_attention_dim))
    inputs = [jax.ShapeDtypeStruct(size, jnp.float32, sharding=over) for size in sizes]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over), shapes)

    def loss(params: Any, *inputs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(model.apply({"params": params}, *inputs).astype(jnp.float32)))

    with target.compiling_for("tpu"):
        lowered = jax.jit(jax.grad(loss)).lower(params, *inputs)
        program = Program(lowered.compile(compiler_options=target.compiler_options()).as_text())
    assert where.chip.peak is not None and where.chip.flops_per_cycle is not None
    of_kernels = program.kernel_cycles(where.chip.flops_per_cycle)
    cycles = program.cycles + of_kernels
    return {
        "case": f"tpu unet v5e:1x1 b{batch}, gradient",
        "cycles": cycles,
        "kernel_cycles": of_kernels,
        "estimated_ms": round(1e3 * cycles * where.chip.flops_per_cycle / where.chip.peak, 1),
        "mfu": round(6 * macs(model, *inputs) / cycles / where.chip.flops_per_cycle, 3),
        "share_estimated": round(program.share_estimated, 3),
    }

"""A guided DDIM step of a DiT, compiled for one device of a machine: what it costs in floats and in integers."""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdiff import diffusion, quant, sharding, target, tree
from jdiff.plan import bundles, topology
from jdiff.plan.program import Program


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step. params: its bytes; temporary: those that it takes while it runs."""

    program: Program
    params: int
    temporary: int
    compile_seconds: float


def ddim_step(model: Any, params: Any, x_BHWC: jax.Array, y_B: jax.Array, guidance_scale: float = 4.0) -> jax.Array:
    """The first of 50 steps with guidance: x_BHWC, noise, and y_B, labels -> (B, H, W, C)."""
    schedule = diffusion.respace(diffusion.make_schedule("linear"), 50, "leading")
    denoise = lambda x, t, y: model.apply({"params": params}, x, t, y)  # noqa: E731
    guided = diffusion.guide(denoise, y_B, model.null_label, guidance_scale)
    return diffusion.ddim(guided, schedule, x_BHWC, steps=None, part=(0, 1))


def stored(model: Any, recipe: str | None, dtype: Any = None) -> Any:
    """Shapes of a model's parameters as a sampler holds them: rounded by a recipe, the rest (or all, for None) in `dtype`."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *model.dummy_inputs())["params"])
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype)  # noqa: E731
    if recipe is None:
        return jax.tree.map(cast, shapes)
    kernels = {path: leaf for path, leaf in tree.flatten(shapes).items() if path.endswith("kernel")}
    seen = lambda leaf: jax.ShapeDtypeStruct((*leaf.shape[: len(leaf.shape) % 2], leaf.shape[-2]), jnp.float32)  # noqa: E731
    peaks = {path: seen(leaf) for path, leaf in kernels.items()}  # what calibration would have seen
    rules = quant.find_recipe(recipe)["dit"]
    made = jax.eval_shape(lambda params, peaks: quant.quantize(params, rules, peaks=peaks), shapes, peaks)
    # scales stay as they are
    keep = lambda leaf: leaf if isinstance(leaf, quant.QTensor) else cast(leaf)  # noqa: E731
    return jax.tree.map(keep, made, is_leaf=lambda leaf: isinstance(leaf, quant.QTensor))


def compile_step(
    model: Any, recipe: str | None, batch: int, machine: str, dtype: Any = None, schedules: Path | None = None
) -> Step:
    """`ddim_step` of `batch` pictures (twice the rows, by guidance) on the first device of a machine. Errors as `topology`'s.

    schedules: the folder of `bundles.record`, by which kernels are counted too.
    """
    where = topology.parse(machine)
    mesh = sharding.make_mesh(1, 1, 1, topology.devices(where)[:1])
    put = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))  # noqa: E731
    size = (batch, model.image_size, model.image_size, model.channels)
    rows = (jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32))
    params = stored(model, recipe, dtype)
    start = time.perf_counter()
    with target.compiling_for(where.platform):
        step = jax.jit(partial(ddim_step, model))
        compiled: Any = step.lower(*jax.tree.map(put, (params, *rows))).compile()
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    made = bundles.collect(schedules) if schedules else None
    program = Program(compiled.as_text(), made, where.chip.bytes_per_cycle)
    return Step(program, quant.size(params), stats.temp_size_in_bytes, seconds)

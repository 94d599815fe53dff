"""What a training step needs, counted: bytes of its state and of what it keeps, and transfers that its placement asks for."""

import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from jdiff import train, tree


def bytes_a_device(leaves: Any) -> int:
    """Bytes that one device holds of shapes with shardings."""
    sizes = ((math.prod(x.sharding.shard_shape(x.shape)), x.dtype) for x in jax.tree.leaves(leaves))
    return sum(count * np.dtype(dtype).itemsize for count, dtype in sizes)


def saved_bytes(setup: train.Setup, batch: dict[str, Any]) -> int:
    """Bytes of all that the forward pass of a whole batch keeps for the backward one, beside what it was given."""
    state, rows = setup.shapes, setup.config.batch_size
    keys = jax.eval_shape(lambda: train.sample_keys(0, jnp.zeros((), jnp.int32), rows))

    def backward(params: Any, frozen: Any, batch: Any, keys: Any) -> Any:
        loss = lambda params: setup.task.loss(tree.merge(params, frozen), batch, keys)["loss"].mean()  # noqa: E731
        return jax.tree.leaves(jax.vjp(loss, params)[1])

    jaxpr = jax.make_jaxpr(backward)(state.params, tree.merge(state.frozen, state.base), batch, keys).jaxpr
    given = {id(var) for var in jaxpr.invars}
    kept: dict[int, Any] = {id(var): var.aval for var in jaxpr.outvars if isinstance(var, Var) and id(var) not in given}
    return sum(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize for aval in kept.values())


def ideal(setup: train.Setup) -> dict[tuple[str, int], int]:
    """(kind, devices that take part) -> bytes of whole arrays that a step must move, by where the state lies: split leaves are
    gathered for the forward pass and for the backward one, in the precision of the computation, and their gradients scattered
    once, in the same; other gradients are summed over all devices. With accumulation each micro-batch does so. Where the average is
    split over data too, gradients are scattered along it, and what comes of them is gathered, in the parameters' precision."""
    state, config, mesh = setup.abstract, setup.config, setup.mesh
    width = {"fp32": 4, "bf16": 2}[config.precision]
    found: dict[tuple[str, int], int] = defaultdict(int)
    if mesh.size == 1:
        return {}
    along, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    for leaf, average in zip(*map(jax.tree.leaves, (state.params, state.ema_params)), strict=True):
        size = math.prod(leaf.shape)
        apart = leaf.sharding.spec != average.sharding.spec
        if leaf.sharding.is_fully_replicated and not apart:
            found["all-reduce", mesh.size] += size * width
            continue
        if not leaf.sharding.is_fully_replicated:
            found["all-gather", fsdp] += 2 * size * width * config.accumulate
            found["reduce-scatter", fsdp] += size * width * config.accumulate
            size //= fsdp
        elif fsdp > 1:
            found["all-reduce", fsdp] += size * width // along
        if apart:
            found["reduce-scatter", along] += size * width
            found["all-gather", along] += size * np.dtype(leaf.dtype).itemsize
        elif along > 1:
            found["all-reduce", along] += size * width
    for leaf in jax.tree.leaves((state.frozen, state.base)):
        if not leaf.sharding.is_fully_replicated:
            found["all-gather", mesh.shape["fsdp"]] += math.prod(leaf.shape) * width * config.accumulate
    return dict(found)

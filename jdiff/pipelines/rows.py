"""A batch's rows over the devices of a mesh, and back; parameters beside them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jdiff import sharding


def spread(mesh: Mesh, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Arrays with a leading batch axis, the same on every process -> global arrays, their rows over the mesh.

    The batch is filled up to a multiple of the devices by repeating it: cut what comes of it to the old length.
    """
    count = len(next(iter(rows.values())))
    padded = math.ceil(count / mesh.size) * mesh.size
    each = padded // jax.process_count()
    mine = np.arange(jax.process_index() * each, (jax.process_index() + 1) * each) % count
    return sharding.put_batch(mesh, {name: array[mine] for name, array in rows.items()})


def gather(x: jax.Array) -> np.ndarray:
    """A global array as numpy, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def place(mesh: Mesh, params: Any) -> Any:
    """Parameters on a mesh's devices: those that lie there stay as they lie, others are put on every device."""
    where = sharding.replicated(mesh)

    def put(leaf: Any) -> jax.Array:
        there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == where.device_set
        return leaf if there else jax.device_put(leaf, where)

    return jax.tree.map(put, params)


def in_slices(function: Callable[[Any], jax.Array], rows: Any, devices: int, at_once: int) -> jax.Array:
    """`function` of a tree of rows, so that each device has at most `at_once` of its rows in work (traced).

    Rows lie over the devices in order, as `spread` puts them.
    """
    each = len(jax.tree.leaves(rows)[0]) // devices
    size = max(n for n in range(1, min(at_once, each) + 1) if each % n == 0)
    if size == each:
        return function(rows)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(devices, each // size, size, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(each // size, devices * size, *x.shape[3:])

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(each // size, devices, size, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(devices * each, *x.shape[3:])

    return join(jax.lax.map(function, jax.tree.map(cut, rows)))

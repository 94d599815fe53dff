"""A batch's rows over the devices of a mesh, and back; parameters beside them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jdiff import sharding


def spread(mesh: Mesh, rows: Mapping[str, np.ndarray], calls: int = 1) -> dict[str, jax.Array]:
    """Arrays with a leading batch axis, the same on every process -> global arrays, their rows over the mesh.

    The batch is filled up by repeating it, until the rows of work that come of it, `calls` for each, divide by the devices:
    cut what comes of it to the old length. Rows that do not divide by themselves lie whole on every device.
    """
    count = len(next(iter(rows.values())))
    devices = sharding.row_devices(mesh)
    unit = devices // math.gcd(devices, calls)
    padded = math.ceil(count / unit) * unit
    if padded % devices:
        everywhere = sharding.replicated(mesh)
        whole = {name: array[np.arange(padded) % count] for name, array in rows.items()}
        return {name: jax.make_array_from_process_local_data(everywhere, array) for name, array in whole.items()}
    mine = np.array(sharding.process_rows(mesh, padded)) % count
    return sharding.put_batch(mesh, {name: array[mine] for name, array in rows.items()})


def over(mesh: Mesh, rows: Any) -> Any:
    """A traced tree of arrays with its rows over the mesh, or whole on every device where they do not divide."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding.row_sharding(mesh, len(x))), rows)


def pinned(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of rows whose inputs and outputs lie as `over` says: else the compiler might choose to spread what one step
    hands to the next over part of the devices."""
    return lambda *rows: over(mesh, function(*over(mesh, rows)))


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
        return leaf if there else sharding.put(leaf, where)

    return jax.tree.map(put, params)


def on_fewest(mesh: Mesh, arrays: Any) -> Any:
    """Arrays that lie whole on every device, as the first device has them, without a copy: the others would do the same work.

    As they are when some are spread over the devices, or over processes.
    """
    alike = all(leaf.sharding.is_fully_replicated and leaf.is_fully_addressable for leaf in jax.tree.leaves(arrays))
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), arrays) if alike and mesh.size > 1 else arrays


def in_slices(function: Callable[[Any], jax.Array], rows: Any, mesh: Mesh, at_once: int) -> jax.Array:
    """`function` of a tree of rows, so that each device has at most `at_once` of its rows in work (traced).

    Rows lie over the devices in order, or whole on each, as `spread` puts them.
    """
    count = len(jax.tree.leaves(rows)[0])
    devices = sharding.row_devices(mesh)
    devices = 1 if count % devices else devices
    each = count // devices
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

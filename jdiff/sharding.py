"""Meshes, and where each array lies on them. Knows trees and shapes, no model."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdiff import tree

BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14
"""Leaves with fewer scalars than this are replicated: gathering them costs more than holding them."""

ALIGNMENT = 64
"""Bytes; XLA:CPU's for buffers that it does not copy."""

RULES: tree.Rules[str] = ((r"(.*/)?pos_embed", "replicate"), (r".*", "fsdp"))
"""Path -> "replicate", or "fsdp": the largest axis that the fsdp mesh axis divides is split over it."""


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp) mesh over all devices; one axis may be -1 and takes what is left.

    ValueError, naming the sizes that would do, when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n, sizes = len(devices), [data, fsdp]
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh.data={data}, mesh.fsdp={fsdp}: sizes are positive, and one of them may be -1")
    known = int(np.prod([s for s in sizes if s > 0]))
    if n % known or (-1 not in sizes and known != n):
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not cover {n} device(s); "
            f"each size must divide {n}, and one may be -1 to take what is left"
        )
    shape = [n // known if s == -1 else s for s in sizes]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def leaf_spec(path: str, leaf: Any, fsdp: int, rules: tree.Rules[str] = RULES) -> PartitionSpec:
    """Where one array lies, by its path's rule and its shape."""
    if tree.match(rules, path) == "replicate" or fsdp == 1 or np.prod(leaf.shape, dtype=np.int64) < SMALL:
        return PartitionSpec()
    # ties go to the last axis, which is the one that products keep contiguous
    axes = sorted(range(len(leaf.shape)), key=lambda i: (leaf.shape[i], i), reverse=True)
    for axis in axes:
        if leaf.shape[axis] % fsdp == 0:
            return PartitionSpec(*(["fsdp" if i == axis else None for i in range(len(leaf.shape))]))
    return PartitionSpec()


def shardings(mesh: Mesh, state: Any, rules: tree.Rules[str] = RULES) -> Any:
    """A NamedSharding for each leaf. Optimizer state and averages follow their parameter, since the rules see shapes."""
    fsdp = mesh.shape["fsdp"]
    return tree.map_with_path(lambda path, leaf: NamedSharding(mesh, leaf_spec(path, leaf, fsdp, rules)), state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over all devices."""
    return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows -> global arrays, their rows over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """So many rows over all devices, where they divide; else the same on every device."""
    return batch_sharding(mesh) if rows % mesh.size == 0 else replicated(mesh)


def put(array: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array on devices, as a copy of the caller's. The devices of one CPU share that copy where they hold the same of it."""
    if not (where.is_fully_replicated and len(where.device_set) > 1 and jax.default_backend() == "cpu"):
        return jax.device_put(array, where, may_alias=False)
    array = np.asarray(array)
    # XLA takes the memory itself, for every device, when it begins at a multiple of 64 bytes
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return jax.device_put(copy, where)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())

"""Where the rows of a batch lie, over the mesh in use (`sharding.in_use`), while a model is traced."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, PartitionSpec


def row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """The axes that so many rows are shared out over: all but `tensor`; None where they do not divide."""
    axes = tuple(name for name in mesh.axis_names if name != "tensor")
    return None if rows % math.prod(mesh.shape[name] for name in axes) else axes


def rows_apart(x: jax.Array, rest: Any = PartitionSpec.UNCONSTRAINED) -> jax.Array:
    """x (rows, ...), and its gradient, with the rows over every axis of the mesh in use but `tensor`. rest: how the other axes lie,
    as the compiler likes when left out, whole when None.

    As it is where no mesh is in use (`sharding.in_use`), or the rows do not divide. Where parameters are split over devices that
    also share out the rows, the compiler may split every product's columns instead, and then moves activations, which are many
    times as large as the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.ndim == 0:
        return x
    axes = row_axes(mesh, x.shape[0])
    if axes is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *[rest] * (x.ndim - 1)))


def boundary(x: jax.Array) -> jax.Array:
    """x (rows, ...) as it lies between two blocks: its rows apart, whole beside that."""
    return rows_apart(x, None)


Axes: TypeAlias = Sequence[str | None]
"""How an array lies, an entry an axis: "rows" where the batch's rows are shared out, "tensor" for that axis of the mesh, None where
it is whole."""


def on_each_device(
    kernel: Callable[..., Sequence[jax.Array]], *args: jax.Array, lie: Sequence[Axes], out: Sequence[Axes]
) -> list[jax.Array]:
    """`kernel(*args)`, on each device of the mesh in use with what it has of them: the compiler cannot split a kernel over devices.

    lie, out: of each argument, and of all that is made. Rows of the first argument that do not divide are whole everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    made = lambda *args: list(kernel(*args))  # noqa: E731
    if mesh.empty or mesh.size == 1:
        return made(*args)
    rows = row_axes(mesh, args[0].shape[0])
    spec = lambda axes: PartitionSpec(*[rows if axis == "rows" else axis for axis in axes])  # noqa: E731
    inputs, outputs = tuple(map(spec, lie)), [spec(axes) for axes in out]
    return jax.shard_map(made, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)(*args)


def tensor_size() -> int:
    """Over how many devices the mesh in use shares out columns and heads; 1 where none is in use."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def heads_apart(heads: int) -> str | None:
    """The axis that so many heads are shared out over: `tensor`, or None where they do not divide."""
    return None if heads % tensor_size() else "tensor"

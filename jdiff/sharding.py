"""Meshes, and where each array lies on them. Knows trees, shapes and names, no model."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jdiff import tree

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
SMALL = 2**14
"""Leaves with fewer scalars than this are not split over fsdp: gathering them costs more than holding them."""

ALIGNMENT = 64
"""Bytes; XLA:CPU's for buffers that it does not copy."""

Table = tuple[tuple[str, str], ...]
"""Path -> how an array lies. "outputs", "inputs": a kernel's outputs or inputs are split over the tensor axis, so that of two
products in a row the first gives each device the part that it needs for the second (arXiv:1909.08053). "parts": likewise, of a
layer that cuts its outputs. All but "replicate" are also split over fsdp, a kernel of parts along its inputs, others along the
largest other axis that divides; the bias of parts is not: its pieces would lie across the devices' and be passed on one by one."""
DIT: Table = (
    (r"pos_embed", "replicate"),
    (r"blocks/attn/qkv/.*", "parts"),
    (r"blocks/mlp/fc1/.*", "outputs"),
    (r"adaLN_modulation/.*", "outputs"),  # a third of the weights; what comes out is one row a sample, quickly gathered
    (r"blocks/(attn/proj|mlp/fc2)/.*", "inputs"),
)
UNET: Table = (
    (r".*/ff/net_0/proj/.*", "parts"),
    (r".*/(to_[qkv]|resnets_\d+/conv1|resnets_\d+/time_emb_proj)/.*", "outputs"),
    (r".*/(to_out_0|ff/net_2|resnets_\d+/conv2)/.*", "inputs"),
)
VAE: Table = (
    (r".*/(to_[qkv]|resnets_\d+/conv1)/.*", "outputs"),
    (r".*/(to_out_0|resnets_\d+/conv2)/.*", "inputs"),
)
CLIP: Table = (
    (r".*/([qkv]_proj|fc1)/.*", "outputs"),
    (r".*/(out_proj|fc2)/.*", "inputs"),
)
TABLES: Mapping[str, Table] = {"dit": DIT, "unet": UNET, "vae": VAE, "text": CLIP}
RULES: Table = (
    (r"(.*/)?(lora|start)/.*/scale", "replicate"),  # of ranks, not of outputs as an integer kernel's
    *((rf"(.*/)?{name}/{path}", how) for name, table in TABLES.items() for path, how in table),
    (r"(.*/)?pos_embed", "replicate"),
    (r".*", "fsdp"),
)
"""Of a training state: a model's name may stand behind others, so that its adapters, averages and moments lie as it does."""
UNREAD = r"(opt_state|ema_params)/.*"
"""Of a training state: what no pass through the model reads. It is split over data as well, so that of devices with the same
parameters each updates a part of them and passes it on (arXiv:2004.13336)."""
_OUTPUTS = {"kernel": -1, "bias": -1, "qvalue": -1, "scale": -1, "b": -1, "magnitude": -1}
SPLIT_AXIS = {"outputs": _OUTPUTS, "parts": _OUTPUTS, "inputs": {"kernel": -2, "qvalue": -2, "a": -2}}
"""Which axis of an array is split over tensor, by the last word of its path; what is not named here is not."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices of all processes; one axis may be -1 and takes what is left.

    Slices of TPUs, between which is but a data center's network, lie along data as far as that divides (`across_slices`).

    ValueError, naming the nearest sizes that would do, when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n, sizes = len(devices), [data, fsdp, tensor]
    asked = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"{asked}: sizes are positive, and one of them may be -1")
    known = math.prod(s for s in sizes if s > 0)
    if n % known or (-1 not in sizes and known != n):
        near = " or ".join(f"{d} x {f} x {t}" for d, f, t in nearest_meshes(n, sizes))
        raise ValueError(f"{asked} does not cover {n} device(s); the nearest that do are {near}, and one may be -1")
    shape = [n // known if s == -1 else s for s in sizes]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    across = across_slices(shape, slices)
    within = [s // a for s, a in zip(shape, across, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def across_slices(shape: list[int], slices: int) -> list[int]:
    """How many slices lie along each axis of a mesh: along data, which moves the least, as many as divide it, then along fsdp."""
    across = []
    for size in shape:
        across.append(math.gcd(size, slices))
        slices //= across[-1]
    return across


def nearest_meshes(n: int, sizes: list[int], most: int = 2) -> list[tuple[int, int, int]]:
    """The shapes of n devices that change the sizes asked for (-1: any) by the smallest factors."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    shapes = [(d, f, n // d // f) for d in divisors for f in divisors if n // d % f == 0]

    def away(shape: tuple[int, int, int]) -> float:
        return sum(abs(math.log(s / asked)) for s, asked in zip(shape, sizes, strict=True) if asked > 0)

    return sorted(shapes, key=lambda shape: (round(away(shape), 6), shape[::-1]))[:most]


def leaf_spec(
    path: str, leaf: Any, fsdp: int, tensor: int = 1, data: int = 1, rules: tree.Rules[str] = RULES
) -> PartitionSpec:
    """Where one array lies on a mesh of axes so long, by its path's rule and its shape.

    ValueError, naming the nearest tensor sizes that do, where the tensor axis does not divide it.
    """
    how, shape = tree.match(rules, path), leaf.shape
    axes: list[str | tuple[str, str] | None] = [None] * len(shape)
    split = tensor_axis(path, shape, how)
    if split is not None and tensor > 1:
        if shape[split] % tensor:
            raise ValueError(
                f"mesh.tensor={tensor} does not divide {path}, {tree.describe(leaf)}, along {shape[split]}; "
                f"the nearest that do are {' and '.join(map(str, nearest_divisors(shape[split], tensor)))}"
            )
        axes[split] = "tensor"
    if _goes_over_fsdp(path, shape, how):
        along = _inputs(path, shape, how, fsdp)
        along = _largest(shape, axes, fsdp) if along is None else along
        if along is not None:
            axes[along] = "fsdp"
        if data > 1 and re.fullmatch(UNREAD, path):
            if along is not None and shape[along] % (fsdp * data) == 0:
                axes[along] = ("fsdp", "data")
            else:  # along the first that divides: what comes back to the others then lies side by side
                first = next((i for i, n in enumerate(shape) if axes[i] is None and n % data == 0), None)
                if first is not None:
                    axes[first] = "data"
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def _goes_over_fsdp(path: str, shape: tuple[int, ...], how: str) -> bool:
    """Whether an array is to be split over fsdp, along an axis that divides."""
    whole = how == "replicate" or (how == "parts" and path.endswith("/bias"))
    return not whole and math.prod(shape) >= SMALL


def _inputs(path: str, shape: tuple[int, ...], how: str, size: int) -> int | None:
    """The axis of the inputs, of a kernel whose layer cuts its outputs in other places than the devices would."""
    kernel = how == "parts" and path.rpartition("/")[2] in ("kernel", "qvalue")
    return len(shape) - 2 if kernel and size > 1 and shape[-2] % size == 0 else None


def _largest(shape: tuple[int, ...], axes: list[Any], size: int) -> int | None:
    """The largest axis that is not split yet and that `size`, above 1, divides; of equal ones the last, which products keep
    contiguous."""
    fit = [i for i, n in enumerate(shape) if axes[i] is None and size > 1 and n % size == 0]
    return max(fit, key=lambda i: (shape[i], i), default=None)


def tensor_axis(path: str, shape: tuple[int, ...], how: str) -> int | None:
    """The axis of an array that is split over tensor, or None."""
    axis = SPLIT_AXIS.get(how, {}).get(path.rpartition("/")[2])
    return None if axis is None or len(shape) < -axis else len(shape) + axis


def nearest_divisors(n: int, size: int) -> list[int]:
    """The divisors of n next to `size`, below and above."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return [max(d for d in divisors if d <= size), *(d for d in divisors if d > size)][:2]


def shardings(mesh: Mesh, state: Any, rules: tree.Rules[str] = RULES) -> Any:
    """A NamedSharding for each leaf. Optimizer state and averages follow their parameter, since the rules see names and shapes."""
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    place = lambda path, leaf: NamedSharding(mesh, leaf_spec(path, leaf, fsdp, tensor, data, rules))  # noqa: E731
    return tree.map_with_path(place, state)


def unsplit(mesh: Mesh, state: Any, rules: tree.Rules[str] = RULES) -> list[str]:
    """The large arrays that no axis lets split over fsdp, as `path dtype[shape]`: they lie whole on every device of it."""
    where = tree.flatten(shardings(mesh, state, rules))
    return [
        f"{path} {tree.describe(leaf)}"
        for path, leaf in tree.flatten(state).items()
        if mesh.shape["fsdp"] > 1 and _goes_over_fsdp(path, leaf.shape, tree.match(rules, path))
        if "fsdp" not in where[path].spec
    ]


def row_devices(mesh: Mesh) -> int:
    """Over how many parts of the mesh a batch's rows are spread: the devices along tensor share theirs."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _places(mesh: Mesh) -> list[int]:
    """Which parts of a batch's rows lie on this process's devices."""
    devices = mesh.devices.reshape(row_devices(mesh), -1)
    return [i for i, along in enumerate(devices) if any(d.process_index == jax.process_index() for d in along)]


def process_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of a global batch's rows this process brings, in order. Processes side by side along tensor bring the same."""
    each = rows // row_devices(mesh)
    return [place * each + i for place in _places(mesh) for i in range(each)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the mesh, along all axes but tensor."""
    return NamedSharding(mesh, BATCH)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows, those of `process_rows`, -> global arrays, their rows over the mesh."""
    sharding, places = batch_sharding(mesh), _places(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        each = len(rows) // len(places)

        def of(index: Any) -> np.ndarray:
            i = places.index((index[0].start or 0) // each)
            return rows[i * each : (i + 1) * each]

        return jax.make_array_from_callback((each * row_devices(mesh), *rows.shape[1:]), sharding, of)

    return {name: put(rows) for name, rows in batch.items()}


def in_use(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to be traced, within which models lay what stands between their blocks on the mesh (`rows.boundary`)."""

    def inside(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return inside


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """So many rows over the mesh, where they divide; else the same on every device."""
    return batch_sharding(mesh) if rows % row_devices(mesh) == 0 else replicated(mesh)


def put(array: Any, where: jax.sharding.Sharding) -> jax.Array:
    """An array on devices, as a copy of the caller's. The devices of one CPU share that copy where they hold the same of it."""
    if not where.is_fully_addressable:  # device_put would compare the processes' arrays, one collective after another
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    if not (where.is_fully_replicated and len(where.device_set) > 1 and jax.default_backend() == "cpu"):
        return jax.device_put(array, where, may_alias=False)
    array = np.asarray(array)
    # XLA takes the memory itself, for every device, when it begins at a multiple of 64 bytes
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return jax.device_put(copy, where)


def put_all(arrays: Any, where: Any) -> Any:
    """A tree of the host's arrays, the same on every process, on devices as a tree of shardings says."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(where)):
        return jax.device_put(arrays, where)
    return jax.tree.map(put, arrays, where)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())

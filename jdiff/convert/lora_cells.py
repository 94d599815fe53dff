"""Between the adapters of a checkpoint's modules and the one adapter of a leaf of ours that holds several of them: fused q, k
and v, and stacked layers. What is put together can be taken apart again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdiff.convert import lora_places
from jdiff.convert.lora_file import Stored
from jdiff.convert.lora_places import Leaf
from jdiff.convert.rows import refuse
from jdiff.lora import fitting


class Cell(NamedTuple):
    """One module's adapter as it lies in our tree: a (…, in, R), b (R, out), its scale (one a rank where it is several modules'),
    and DoRA's magnitude (out,) or None."""

    a: np.ndarray
    b: np.ndarray
    scale: Any
    magnitude: np.ndarray | None


def together(leaf: Leaf, modules: Mapping[tuple[int, int], Stored], dtype: Any) -> dict[str, np.ndarray]:
    """A leaf's adapter {"a", "b", "scale"[, "magnitude"]} from its modules', by (layer, part).

    Parts lie side by side: a's beside one another, b's on the diagonal, a scale for each rank. Layers are filled up with ranks of
    scale 0 to the largest. dtype: of all but scale, which is float32; as they are when None.
    ConversionError for DoRA of some and not of all, whose magnitudes for the rest would be the base's, and for mixed dtypes.
    """
    decomposed = [stored for stored in modules.values() if stored.magnitude is not None]
    if decomposed and len(decomposed) < len(leaf.modules) * leaf.parts:
        raise refuse(
            f"{decomposed[0].names['a']} is DoRA, and not all the modules are that jdiff has as one kernel, {leaf.path}"
        )
    cells = {place: _cell(leaf, stored, dtype) for place, stored in modules.items()}
    kinds = sorted({str(array.dtype) for cell in cells.values() for array in (cell.a, cell.b)})
    if len(kinds) > 1 and len(cells) > 1:
        raise refuse(f"the adapters of {leaf.path} are of {' and '.join(kinds)}: give a dtype to cast to")
    layers = [_joined(leaf, [cells.get((i, j)) for j in range(leaf.parts)]) for i in range(len(leaf.modules))]
    there = [layer for layer in layers if layer is not None]
    if not leaf.stacked:
        return _parts(there[0].a, there[0].b, there[0].scale, there[0].magnitude)
    rank = max(layer.a.shape[-1] for layer in there)
    a = np.zeros((len(layers), *leaf.kernel[:-1], rank), there[0].a.dtype)
    b = np.zeros((len(layers), rank, leaf.shape[-1]), there[0].b.dtype)
    scale = np.zeros((len(layers), rank), np.float32)
    for i, layer in enumerate(layers):
        if layer is not None:
            r = layer.a.shape[-1]
            a[i, ..., :r], b[i, :r], scale[i, :r] = layer.a, layer.b, layer.scale
    alike = leaf.parts == 1 and bool((scale == scale[:, :1]).all()) and len(there) == len(layers)
    magnitudes = [layer.magnitude for layer in there if layer.magnitude is not None]
    return _parts(a, b, scale[:, 0] if alike else scale, np.stack(magnitudes) if magnitudes else None)


def _parts(a: np.ndarray, b: np.ndarray, scale: Any, magnitude: np.ndarray | None) -> dict[str, np.ndarray]:
    found = {"a": a, "b": b, "scale": np.asarray(scale, np.float32)}
    return found if magnitude is None else {**found, "magnitude": magnitude}


def _cell(leaf: Leaf, stored: Stored, dtype: Any) -> Cell:
    a, b = lora_places.factors(leaf, stored.a, stored.b)
    magnitude = None if stored.magnitude is None else np.asarray(stored.magnitude).reshape(-1)
    return cast(Cell(a, b, stored.scale, magnitude), dtype, stored.names["a"])


def _joined(leaf: Leaf, parts: Sequence[Cell | None]) -> Cell | None:
    """A layer's adapter from its fused parts'; None where none has one."""
    there = [part for part in parts if part is not None]
    if len(parts) == 1 or not there:
        return parts[0]
    out = leaf.kernel[-1]
    b = np.zeros((sum(len(part.b) for part in there), out * len(parts)), there[0].b.dtype)
    scale: list[float] = []
    for j, part in enumerate(parts):
        if part is not None:
            r = len(part.b)
            b[len(scale) : len(scale) + r, j * out : (j + 1) * out] = part.b
            scale += [part.scale] * r
    magnitudes = [part.magnitude for part in there if part.magnitude is not None]
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    return Cell(np.concatenate([part.a for part in there], -1), b, np.asarray(scale, np.float32), magnitude)


def cast(cell: Cell, dtype: Any, name: str) -> Cell:
    """The arrays in that dtype, as they are when None. ConversionError when a number is too large for it."""
    if dtype is None:
        return cell
    magnitude = None if cell.magnitude is None else _narrow(cell.magnitude, dtype, name)
    return Cell(_narrow(cell.a, dtype, name), _narrow(cell.b, dtype, name), cell.scale, magnitude)


def _narrow(x: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = x.astype(dtype, copy=False)
    if not np.isfinite(made).all():
        raise refuse(f"{name} holds numbers that are too large for {np.dtype(dtype)}: use float32 or bfloat16")
    return made


def apart(leaf: Leaf, adapter: Mapping[str, np.ndarray]) -> dict[tuple[int, int], Cell]:
    """Undoes `together`: the adapters of a leaf's modules, by (layer, part), those that have a rank of another scale than 0.

    A fused adapter with a scale for each rank is taken apart into the parts that each rank writes to; if ranks write to several,
    or all have one scale, the parts share a. Where ranks of a module differ in scale, which files cannot say, b is multiplied by
    them.
    """
    _check(leaf, adapter)
    cells: dict[tuple[int, int], Cell] = {}
    for i in range(len(leaf.modules)):
        layer = {name: array[i] if leaf.stacked else array for name, array in adapter.items()}
        cells |= {(i, j): cell for j, cell in _split(leaf, layer).items()}
    return cells


def _check(leaf: Leaf, adapter: Mapping[str, np.ndarray]) -> None:
    """ConversionError for an adapter that is not of this leaf, or not of finite numbers."""
    rank = adapter["a"].shape[-1] if adapter["a"].ndim else 0
    expected = fitting(leaf, rank)
    for name, array in adapter.items():
        if array.shape not in expected[name] or not rank:
            raise refuse(f"{leaf.path} has {name} of the shape {list(array.shape)}, not {list(expected[name][0])}")
        if not np.isfinite(array).all():
            raise refuse(f"{leaf.path} has NaN or infinity in {name}")


def _split(leaf: Leaf, layer: Mapping[str, np.ndarray]) -> dict[int, Cell]:
    """A layer's adapter by fused part."""
    a, b, scale, magnitude = layer["a"], layer["b"], layer["scale"], layer.get("magnitude")
    each = scale.ndim == 1
    scale = np.broadcast_to(scale, a.shape[-1:])
    kept = np.flatnonzero(scale)
    if not len(kept):
        if magnitude is not None:
            raise refuse(f"{leaf.path} is DoRA of scale 0, which files cannot say")
        return {}
    a, b, scale = a[..., kept], b[kept], scale[kept]
    whose = _writes_to(b, leaf.parts) if each else None
    if magnitude is not None and whose is not None and len(set(whose.tolist())) < leaf.parts:
        whose = None  # a part without ranks has magnitudes, too
    out, cells = leaf.kernel[-1], {}
    for j in range(leaf.parts):
        ranks = np.arange(len(scale)) if whose is None else np.flatnonzero(whose == j)
        if not len(ranks):
            continue
        columns = slice(j * out, (j + 1) * out)
        part_b, one = b[ranks, columns], scale[ranks]
        if np.ptp(one):
            part_b = _narrow(part_b.astype(np.float32) * one[:, None], part_b.dtype, leaf.path)
            one = np.ones_like(one)
        cells[j] = Cell(a[..., ranks], part_b, float(one[0]), None if magnitude is None else magnitude[columns])
    return cells


def _writes_to(b: np.ndarray, parts: int) -> np.ndarray | None:
    """The part that each rank of a fused b (R, parts * out) writes to; None when one writes to several, or they are not in order.

    A rank whose b is zero could be of any part between its neighbours': equal shares where they fit, else of that before it.
    """
    writes = np.asarray(b.reshape(len(b), parts, -1).astype(bool).any(-1))
    if (writes.sum(-1) > 1).any():
        return None
    silent = np.asarray(~writes.any(-1))
    equal = np.repeat(np.arange(parts), len(b) // parts)
    if len(equal) == len(b) and (silent | writes[np.arange(len(b)), equal]).all():
        return equal
    told = writes.argmax(-1)
    if (np.diff(told[~silent]) < 0).any():
        return None
    first = told[~silent][:1]  # no rank says: of the first part, as of any
    before = np.maximum.accumulate(np.where(silent, -1, told))
    return np.where(before < 0, first if len(first) else 0, before)

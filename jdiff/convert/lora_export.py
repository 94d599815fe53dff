"""Adapters of a checkpoint's modules, written as peft's folder, diffusers' file or kohya's, each with what its readers look
for in settings and header."""

import collections
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.convert import lora_config, lora_names, lora_places, tensors
from jdiff.convert.arrays import Array, contiguous
from jdiff.convert.export import FOLDERS, Report
from jdiff.convert.lora_cells import Cell
from jdiff.convert.lora_file import ADAPTER, CONFIG, DIFFUSERS, METADATA
from jdiff.convert.lora_names import Format
from jdiff.convert.lora_places import Leaf
from jdiff.convert.rows import refuse

Found = Mapping[str, Mapping[str, tuple[Leaf, Cell]]]
"""By model and the checkpoint's module."""
After = Callable[[int], None]
_STALE = (METADATA, "format", "sshs_model_hash", "sshs_legacy_hash")
"""Entries of a header that are not true of another file."""
_VERSIONS = {768: "sd_v1", 1024: "sd_v2"}
"""Width of the texts that a UNet reads -> kohya's name of the base."""


def write(
    found: Found, place: Path, alone: bool, form: Format, metadata: Mapping[str, str], text_width: int, after: After
) -> Report:
    """Writes adapters to a place that does not exist: a file when `alone` (kohya's, or diffusers' without its folder)."""
    passed = {key: metadata[key] for key in lora_config.PASSED if key in metadata}
    header = {key: value for key, value in metadata.items() if key not in _STALE}
    if form == "kohya":
        arrays = _named(found, form)
        header |= _tags(found, text_width, header)
        header["sshs_model_hash"] = data_hash(arrays)
        return _files({"": (place, arrays)}, header, after)
    header = {key: value for key, value in header.items() if key not in passed} | {"format": "pt"}
    settings = {name: _settings(written, passed) for name, written in found.items()}
    if form == "peft":
        files = {}
        for name, written in found.items():
            inside = place / FOLDERS[name] if len(found) > 1 else place
            inside.mkdir(parents=True)
            (inside / CONFIG).write_text(json.dumps(settings[name], indent=2, sort_keys=True), encoding="utf-8")
            file = inside / ADAPTER[0]
            files[file.relative_to(place).as_posix()] = (file, _named({name: written}, form))
        return _files(files, header, after)
    packed = {f"{FOLDERS[name]}.{key}": value for name, config in settings.items() for key, value in config.items()}
    header[METADATA] = json.dumps(packed, indent=2, sort_keys=True)
    if alone:
        return _files({"": (place, _named(found, form))}, header, after)
    place.mkdir()
    return _files({DIFFUSERS[0]: (place / DIFFUSERS[0], _named(found, form))}, header, after)


def _files(files: Mapping[str, tuple[Path, Mapping[str, Array]]], header: Mapping[str, str], after: After) -> Report:
    report = Report()
    for name, (file, arrays) in files.items():
        report.hashes[name] = tensors.write(file, arrays, header, None, after)
        report.arrays += len(arrays)
    return report


def _named(found: Found, form: Format) -> dict[str, Array]:
    """A file's arrays by name."""
    arrays: dict[str, Array] = {}
    for model, written in found.items():
        for module, (leaf, cell) in written.items():
            a, b = lora_places.stored(leaf, cell.a, cell.b)
            parts = {"a": a, "b": b}
            if form == "kohya":
                parts["alpha"] = _alpha(cell)
            if cell.magnitude is not None:
                parts["magnitude"] = cell.magnitude.reshape(lora_places.magnitudes(leaf, form))
            named = {lora_names.spell(form, model, module, part, leaf.table): x for part, x in parts.items()}
            # diffusers knows a text encoder's adapters by attention's names, or by the spelling before peft's
            old = form == "diffusers" and model == "text" and not any("self_attn" in name for name in written)
            arrays |= {lora_names.older(name) if old else name: x for name, x in named.items()}
    return arrays


def _alpha(cell: Cell) -> np.ndarray:
    """kohya's alpha, of the same dtype as the factors where that holds it."""
    alpha = np.asarray(lora_config.alpha(cell.scale, len(cell.b)), np.float32)
    with np.errstate(over="ignore"):
        near = alpha.astype(cell.a.dtype)
    return near if near.astype(np.float32) == alpha else alpha


def _settings(written: Mapping[str, tuple[Leaf, Cell]], passed: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings of one model's adapters."""
    dora = {cell.magnitude is not None for _, cell in written.values()}
    if len(dora) > 1:
        raise refuse("some adapters are DoRA and some are not, which peft's settings cannot say: use kohya's format")
    pairs = {module: (len(cell.b), cell.scale) for module, (_, cell) in written.items()}
    return lora_config.make(pairs, dora.pop(), passed)


def _tags(found: Found, text_width: int, given: Mapping[str, str]) -> dict[str, str]:
    """What kohya's scripts say of an adapter, and user interfaces read: the kind, ranks, alphas, the base's version."""
    every = [one for written in found.values() for one in written.values()]
    wide = [cell for leaf, cell in every if len(leaf.kernel) == 4 and leaf.kernel[:2] != (1, 1)]
    plain = [cell for leaf, cell in every if len(leaf.kernel) == 2 or leaf.kernel[:2] == (1, 1)]
    dora = any(cell.magnitude is not None for _, cell in every)
    tags = {"ss_network_module": "lycoris.kohya" if dora else given.get("ss_network_module", "networks.lora")}
    tags["ss_network_dim"], tags["ss_network_alpha"] = _sizes(plain or wide)
    extra: dict[str, Any] = {"algo": "lora", "dora_wd": True} if dora else {}
    if wide:
        extra["conv_dim"], extra["conv_alpha"] = _sizes(wide)
    if extra:
        tags["ss_network_args"] = json.dumps(extra)
    version = given.get("ss_base_model_version", _VERSIONS.get(text_width))
    if version is not None:
        tags |= {"ss_base_model_version": version, "ss_v2": given.get("ss_v2", str(version == "sd_v2"))}
    return tags


def _sizes(cells: Iterable[Cell]) -> tuple[str, str]:
    """(rank, alpha) as kohya's scripts say them: "Dynamic" where they differ."""
    pairs = {(len(cell.b), lora_config.alpha(cell.scale, len(cell.b))) for cell in cells}
    ranks, alphas = (collections.Counter(values) for values in zip(*pairs, strict=True))
    return (
        str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        str(next(iter(alphas))) if len(alphas) == 1 else "Dynamic",
    )


def data_hash(arrays: Mapping[str, Array]) -> str:
    """sha256 of what follows a safetensors file's header: kohya's `sshs_model_hash`, by which user interfaces know an adapter
    whatever its header says."""
    digest = hashlib.sha256()
    for name in sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name)):
        digest.update(contiguous(arrays[name], arrays[name].dtype).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

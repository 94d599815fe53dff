"""Adapters as a file holds them: peft's folder, diffusers' or kohya's file, told by their content and checked on their own,
before any model is asked for. Runs no code of a file's."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import tree
from jdiff.convert import files, lora_config, lora_names
from jdiff.convert.arrays import Array, is_float
from jdiff.convert.bundle import COMPONENTS
from jdiff.convert.engine import MOST
from jdiff.convert.lora_config import Settings
from jdiff.convert.lora_names import Format
from jdiff.convert.rows import ConversionError, refuse

CONFIG = "adapter_config.json"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in a safetensors header."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One module's adapter, in PyTorch's order of axes: a (R, in, …), b (out, R, …), magnitude as the file has it, or None.

    scale: alpha / R. table: of an embedding's table. names: its arrays' names, by part.
    """

    a: Array
    b: Array
    scale: float
    magnitude: Array | None
    table: bool
    names: Mapping[str, str]

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class LoRAFile:
    """A file's or folder's adapters, complete pairs of finite numbers.

    adapters: by model ("unet", "text", "dit", "vae"; "" where the names do not say it) and the checkpoint's module, whose dots
    are underscores in kohya's. metadata: the safetensors header's, and what peft's settings say of the base.
    """

    path: Path
    format: Format
    adapters: dict[str, dict[str, Stored]]
    metadata: dict[str, str]

    @property
    def total(self) -> int:
        """How many arrays."""
        return sum(len(one.names) for found in self.adapters.values() for one in found.values())


def read(path: str | Path) -> LoRAFile:
    """The adapters of a file, or of a folder that holds one of peft's or diffusers' names or a single file.

    A folder with `unet/` and `text_encoder/` of peft's is read as one. ConversionError, in one line, for what is no LoRA
    (and what it is), for names of no adapter, halves without their other half, ranks that differ, NaN, and settings that
    jdiff does not have.
    """
    parts = [_read(*source) for source in _sources(Path(path))]
    adapters: dict[str, dict[str, Stored]] = {}
    for part in parts:
        adapters |= part.adapters
    return LoRAFile(
        Path(path), parts[0].format, adapters, {key: v for part in parts for key, v in part.metadata.items()}
    )


def _sources(path: Path) -> list[tuple[str, Path, Path | None]]:
    """(model or "", file, settings beside it) of each file to read."""
    if path.is_file():
        config = path.parent / CONFIG
        return [("", path, config if path.name in ADAPTER and config.is_file() else None)]
    if not path.is_dir():
        raise refuse(f"{path} does not exist")
    if (path / CONFIG).is_file():
        return [("", _first(path, ADAPTER), path / CONFIG)]
    inside = {folder: path / folder for folder in COMPONENTS if (path / folder / CONFIG).is_file()}
    if inside:
        return [(COMPONENTS[name], _first(folder, ADAPTER), folder / CONFIG) for name, folder in inside.items()]
    there = [path / name for name in DIFFUSERS if (path / name).is_file()]
    there = there or sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(there) == 1 or (there and there[0].name in DIFFUSERS):
        return [("", there[0], None)]
    names = [file.name for file in there]
    raise refuse(
        f"{path} holds {'several files, name one: ' + ', '.join(names[:MOST]) if names else 'no adapter'}; a folder of one has "
        f"{CONFIG} or {DIFFUSERS[0]}"
    )


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise refuse(f"{folder} has {CONFIG}, but no {' or '.join(names)}")


def _read(model: str, file: Path, config: Path | None) -> LoRAFile:
    content, header = files.open_file(file)
    try:
        lora_names.refuse_others(content)
        arrays = _arrays(content)
        form = lora_names.told(arrays)
        metadata = dict(header)
        settings: dict[str, Settings] = {}
        if config is not None:
            found = files.read_json(config)
            settings[""] = lora_config.read(found)
            metadata |= {key: str(found[key]) for key in lora_config.PASSED if found.get(key)}
        elif form == "diffusers":
            settings = _settings(header)
        elif form == "peft":
            raise refuse(f"it lacks {CONFIG} beside it, which says its alpha")
        adapters = _pairs(arrays, form, settings)
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error
    metadata.pop(METADATA, None)
    return LoRAFile(file, form, {model: adapters[""]} if model and "" in adapters else adapters, metadata)


def _arrays(content: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise refuse(f"{str(name)[:80]!r} is no array, so this is no LoRA")
    return dict(content)


def _settings(header: Mapping[str, str]) -> dict[str, Settings]:
    """Each model's settings in a diffusers file's header; {} where it has none."""
    if METADATA not in header:
        return {}
    try:
        found = json.loads(header[METADATA])
        assert isinstance(found, dict)
    except (ValueError, AssertionError, RecursionError) as error:
        raise ConversionError(f"its {METADATA} cannot be read: {error}") from error
    configs: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        folder, dot, rest = key.partition(".")
        known = dot and folder in COMPONENTS
        configs.setdefault(COMPONENTS[folder] if known else "", {})[rest if known else key] = value
    return {model: lora_config.read(config) for model, config in configs.items()}


def _pairs(
    arrays: Mapping[str, np.ndarray], form: Format, settings: Mapping[str, Settings]
) -> dict[str, dict[str, Stored]]:
    """The adapters of a file's arrays, by model and module. ConversionError lists all that is wrong with them."""
    keys = {name: lora_names.parse(name, form) for name in arrays}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    tables: set[tuple[str, str]] = set()
    problems = []
    for name, key in keys.items():
        if key is not None:
            parts = groups.setdefault((key.model, key.module), {})
            if key.part in parts:
                problems.append(f"{name} says again what {parts[key.part]} says")
            parts[key.part] = name
            tables |= {(key.model, key.module)} if key.table else set()
    if not groups:
        raise refuse(f"it holds no LoRA that jdiff knows: its arrays begin with {list(arrays)[:3]}")
    halves = [lora_names.partner(name) for parts in groups.values() for name in parts.values()]
    lacking = [name for name in halves if name not in arrays]
    unknown = [name for name, key in keys.items() if key is None]
    for i, name in enumerate(unknown):
        problems.append(f"unexpected: {name}{tree.nearest(name, lacking) if i < MOST else ''}")
    adapters: dict[str, dict[str, Stored]] = {}
    for (model, module), names in groups.items():
        parts = {part: arrays[name] for part, name in names.items()}
        wrong = list(_wrong(names, parts))
        if not wrong:
            stored = _stored(names, parts, (model, module) in tables)
            if model in settings:
                wrong = list(_unsettled(stored, settings[model], module))
                stored = dataclasses.replace(stored, scale=settings[model].of(module)[1])
            adapters.setdefault(model, {})[module] = stored
            with np.errstate(over="ignore", under="ignore"):
                if not np.isfinite(np.float32(stored.scale)) or not np.float32(stored.scale):
                    wrong.append(
                        f"{names['a']} is scaled by {stored.scale}, which is no number of float32 other than 0"
                    )
        problems += wrong
    models = {model for model, _ in groups}
    problems += [
        f"it has settings of a {model or 'single model'}, and no adapter of it"
        for model in settings
        if model not in models
    ]
    if problems:
        raise refuse(listed(problems))
    return adapters


def _stored(names: Mapping[str, str], parts: Mapping[str, np.ndarray], table: bool) -> Stored:
    """One module's adapter, scaled as its arrays say: by alpha / R, or not at all."""
    alpha = parts.get("alpha")
    scale = 1.0 if alpha is None else float(alpha.reshape(())) / len(parts["a"])
    return Stored(parts["a"], parts["b"], scale, parts.get("magnitude"), table, names)


def _unsettled(stored: Stored, settings: Settings, module: str) -> Iterator[str]:
    """Where one module's arrays and peft's settings say different things."""
    name, rank = stored.names["a"], settings.of(module)[0]
    if rank != stored.rank:
        yield f"{name} has rank {stored.rank}, and its settings say {rank}"
    if settings.dora != (stored.magnitude is not None):
        there = "lacks" if stored.magnitude is None else "has"
        yield f"{name} {there} magnitudes, and its settings say use_dora={settings.dora}"
    if "alpha" in stored.names:
        yield f"{stored.names['alpha']} is there beside settings that say alpha, too"


def _wrong(names: Mapping[str, str], parts: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What is wrong with one module's arrays, by part, each with its name."""
    for part, array in parts.items():
        if part != "alpha" and not is_float(array.dtype):
            yield f"{names[part]} is of {array.dtype}, not of floating-point numbers that jdiff reads"
        elif part == "alpha" and (array.size != 1 or not np.isfinite(array).all() or not array.any()):
            # kohya's scripts take 0 for the rank, others for nothing
            yield f"{names[part]} is {array.reshape(-1)[:3].tolist()}, not one finite number other than 0"
        elif not np.isfinite(array).all():
            yield f"{names[part]} holds NaN or infinity"
    if "a" not in parts or "b" not in parts:
        half = next((names[part] for part in ("a", "b") if part in names), None)
        without = "a and b" if half is None else lora_names.partner(half)
        yield f"{half or next(iter(names.values()))} is there without {without}"
        return
    for part in ("a", "b"):
        if parts[part].ndim not in (2, 4) or 0 in parts[part].shape:
            yield f"{names[part]} has the shape {list(parts[part].shape)}, which is no factor's of rank 1 or more"
            return
    if parts["a"].shape[0] != parts["b"].shape[1]:
        yield f"{names['a']} has rank {parts['a'].shape[0]} and {names['b']} {parts['b'].shape[1]}"


def listed(problems: Sequence[str]) -> str:
    """The first few, and how many there are besides."""
    return "; ".join(problems[:MOST]) + (f"; and {len(problems) - MOST} more" if len(problems) > MOST else "")

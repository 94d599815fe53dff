"""LoRA and DoRA files in and out: peft's folders, diffusers' `pytorch_lora_weights.safetensors` of three generations, and
kohya's; told by their content, read and written without PyTorch, every array accounted for.

    file = lora.read("style.safetensors")
    adapters = lora.fit(file, {"unet": unet, "text": text})  # as `jdiff.lora` has them, by model
    lora.write(adapters, {"unet": unet, "text": text}, "style", "peft")

The tables that convert whole models say where each module lies. DiT's q, k and v are one kernel of ours, whose adapter is the
three side by side, and its layers are stacked: see `lora_cells`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import tree
from jdiff.convert import clip, lora_cells, lora_export, lora_names, lora_places
from jdiff.convert.arrays import Array
from jdiff.convert.engine import MOST, Naming
from jdiff.convert.export import Report, vacant
from jdiff.convert.lora_cells import Cell
from jdiff.convert.lora_file import LoRAFile, Stored, listed, read
from jdiff.convert.lora_names import FORMATS, Format
from jdiff.convert.lora_places import Leaf
from jdiff.convert.namings import namings, prefixed
from jdiff.convert.rows import ConversionError, refuse
from jdiff.lora import by_path
from jdiff.paths import whole

__all__ = ["Format", "Landing", "LoRAFile", "fit", "from_adapters", "land", "read", "write"]

Adapters = Any
Modules = Mapping[str, Any]
Landed = dict[str, tuple[Leaf, dict[tuple[int, int], Stored]]]
"""By path: the leaf, and the adapters of its modules by (layer, part)."""


@dataclasses.dataclass(frozen=True)
class Landing:
    """Where a file's arrays go in models.

    namings: each model's spelling in the file. places: what goes where, by model. matched, total: how many arrays fit, of how
    many. problems: what does not, a line each.
    """

    namings: dict[str, Naming]
    places: dict[str, Landed]
    matched: int
    total: int
    problems: tuple[str, ...]


def land(file: LoRAFile, modules: Modules) -> Landing:
    """Holds a file's names and shapes against models: "unet", "text", "dit" or "vae" -> module. What does not fit is listed in
    the result; `fit` raises it."""
    spelt: dict[str, Naming] = {}
    places: dict[str, Landed] = {}
    matched, problems = 0, []
    for said, adapters in file.adapters.items():
        candidates = {said: modules[said]} if said in modules else {} if said else dict(modules)
        best = _best(candidates, adapters, file.format)
        if best is None:
            problems.append(
                f"{len(adapters)} adapters are of a {said or 'model'}, and the models given are {[*modules]}"
            )
            continue
        model, spelt[model], there = best
        left = [module for module in there if module not in adapters]
        copies: dict[tuple[str, int, int], dict[int, Stored]] = {}
        for module, stored in adapters.items():
            if module not in there:
                near = tree.nearest(module, left) if len(problems) < MOST else ""
                problems.append(f"{next(iter(stored.names.values()))}: the {model} has no module {module!r}{near}")
                continue
            leaf, layer, part, copy = there[module]
            wrong = _misfits(leaf, stored, file.format, module)
            problems += wrong
            if not wrong:
                matched += len(stored.names)
                copies.setdefault((leaf.path, layer, part), {})[copy] = stored
                places.setdefault(model, {}).setdefault(leaf.path, (leaf, {}))[1][layer, part] = stored
        for (path, layer, part), found in copies.items():
            problems += _unlike(places[model][path][0].modules[layer][part], found)
    return Landing(spelt, places, matched, file.total, tuple(problems))


def _best(
    candidates: Modules, adapters: Mapping[str, Stored], form: Format
) -> tuple[str, Naming, Mapping[str, tuple[Leaf, int, int, int]]] | None:
    """The model and spelling with the most of a file's modules, the first of equals, and where they lie; None for no models."""
    found = [
        (model, naming, lora_places.by_module(lora_places.leaves(module, naming), form))
        for model, module in candidates.items()
        for naming in namings(module)
    ]
    return max(found, key=lambda one: sum(module in one[2] for module in adapters), default=None)


def _misfits(leaf: Leaf, stored: Stored, form: Format, module: str) -> list[str]:
    """What is wrong with an adapter for a module of this leaf."""
    if stored.table != leaf.table:
        return [f"{stored.names['a']}: {module} is {'a' if leaf.table else 'no'} table of embeddings"]
    wrong = [
        f"{stored.names[part]} has the shape {list(shape)}, not {expected} of {module}: it is for another model"
        for part, shape, expected in lora_places.fits(leaf, stored.a, stored.b)
    ]
    if stored.magnitude is not None and not lora_places.magnitude_fits(leaf, stored.magnitude, form):
        shape, out = list(stored.magnitude.shape), leaf.kernel[-1]
        wrong.append(f"{stored.names['magnitude']} has the shape {shape}, not one number for each of {out} outputs")
    return wrong


def _unlike(names: tuple[str, ...], copies: Mapping[int, Stored]) -> list[str]:
    """A module that the checkpoint has several times over (diffusers' DiT: its embedders) is one with us: all copies have to
    have an adapter, and the same."""
    without = [name for i, name in enumerate(names) if i not in copies]
    if without:
        return [f"{next(iter(copies.values())).names['a']}: {without[0]}, its copy, has no adapter"]
    first = copies[0]
    for stored in copies.values():
        pairs = ((first.a, stored.a), (first.b, stored.b), (first.magnitude, stored.magnitude))
        if first.scale != stored.scale or not all(_same(*pair) for pair in pairs):
            return [f"{stored.names['a']} is unlike {first.names['a']}, of which it must be a copy"]
    return []


def _same(x: Array | None, y: Array | None) -> bool:
    return x is y if x is None or y is None else np.array_equal(x, y)


def fit(file: LoRAFile, modules: Modules, dtype: Any = np.float32) -> dict[str, Adapters]:
    """A file's adapters as trees of numpy arrays as in `jdiff.lora`, by model: those of `modules` that the file adapts.

    dtype: what a, b and magnitudes are cast to; as they are when None. Scales are float32.

    ConversionError lists every array that is of no module of the models, with the nearest, and every shape that is not theirs;
    or says what no adapter of ours can hold: DoRA of some layers or parts of a kernel and not of others.
    """
    landing = land(file, modules)
    if landing.problems:
        raise refuse(f"{file.path}: {landing.matched} of {landing.total} arrays fit: {listed(landing.problems)}")
    try:
        return {
            model: tree.nested({path: lora_cells.together(*found, dtype) for path, found in landed.items()})
            for model, landed in landing.places.items()
        }
    except ConversionError as error:
        raise ConversionError(f"{file.path}: {error}") from error


def from_adapters(adapters: Mapping[str, Adapters], modules: Modules, path: str | Path) -> LoRAFile:
    """Adapters of ours, by model, as if a file of peft's held them: for what is done alike with files and with runs.

    path: what errors call it. ConversionError as `write`'s.
    """
    found: dict[str, dict[str, Stored]] = {}
    for model, one in adapters.items():
        for module, (leaf, cell) in _by_module(model, one, modules, "peft", None, None).items():
            a, b = lora_places.stored(leaf, cell.a, cell.b)
            names = {
                part: lora_names.spell("peft", model, module, part, leaf.table) for part in ("a", "b", "magnitude")
            }
            if cell.magnitude is None:
                del names["magnitude"]
            found.setdefault(model, {})[module] = Stored(a, b, cell.scale, cell.magnitude, leaf.table, names)
    return LoRAFile(Path(path), "peft", found, {})


def write(
    adapters: Mapping[str, Adapters],
    modules: Modules,
    path: str | Path,
    format: Format = "peft",
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
    namings: Mapping[str, Naming] | None = None,
    after: Callable[[int], None] = lambda _: None,
) -> Report:
    """Undoes `read` and `fit`: writes adapters, by model, to what must not exist; it appears when it is whole.

    format: "peft": a folder of adapter_config.json and adapter_model.safetensors, for several models one in each of `unet/`,
      `text_encoder/`, …; "diffusers": a folder with pytorch_lora_weights.safetensors, or that file itself when `path` ends so;
      "kohya": a .safetensors file, of a unet and a text encoder.
    dtype: what arrays are cast to; as they are when None. metadata: what else is said: of the base in peft's settings
      (`lora_config.PASSED`), anything in the header. namings: the models' spellings, as `Landing` has them; the formats' present
      ones when None. after: called with the bytes of each array written.

    Fused and stacked adapters are taken apart (see `lora_cells.apart`); rsLoRA becomes the alpha that does the same.

    ConversionError for adapters that are not the models', that hold NaN, or that the format has no place for.
    """
    path = Path(path)
    if format not in FORMATS:
        raise refuse(f"the format {format!r} is none{tree.nearest(format, FORMATS)}; use one of {', '.join(FORMATS)}")
    if (path.suffix == ".safetensors") != (format == "kohya") and format != "diffusers":
        raise refuse(f"{path}: {format} is {'a file NAME.safetensors' if format == 'kohya' else 'a folder'}")
    vacant(path)
    found = {
        model: _by_module(model, tree_, modules, format, (namings or {}).get(model), dtype)
        for model, tree_ in adapters.items()
    }
    found = {model: written for model, written in found.items() if written}
    if not found:
        raise refuse(f"{path} would hold no adapter")
    widths = [getattr(modules.get("unet"), "cross_attention_dim", 0), getattr(modules.get("text"), "width", 0)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        alone = path.suffix == ".safetensors"
        report = lora_export.write(found, partial, alone, format, metadata or {}, max(widths), after)
    report.hashes = {name or path.name: digest for name, digest in report.hashes.items()}
    return report


def _by_module(
    model: str, adapters: Adapters, modules: Modules, form: Format, naming: Naming | None, dtype: Any
) -> dict[str, tuple[Leaf, Cell]]:
    """One model's adapters by the checkpoint's module."""
    if model not in modules:
        raise refuse(f"there are adapters of a {model}, and the models given are {[*modules]}")
    if form == "kohya" and model not in lora_names.KOHYA:
        raise refuse(f"kohya's format has no place for a {model}: use peft or diffusers")
    try:
        given = by_path(adapters)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    leaves = {leaf.path: leaf for leaf in lora_places.leaves(modules[model], naming or _present(modules[model], form))}
    written: dict[str, tuple[Leaf, Cell]] = {}
    for path, parts in given.items():
        if path not in leaves:
            raise refuse(f"the {model} has no kernel {path!r}{tree.nearest(path, leaves)}")
        leaf = leaves[path]
        if leaf.table and form == "kohya":
            raise refuse(f"kohya's format has no adapters of tables, and {path} is one: use peft")
        cells = lora_cells.apart(leaf, {part: np.asarray(value) for part, value in parts.items()})
        for (layer, part), cell in cells.items():
            cell = lora_cells.cast(cell, dtype, path)
            written |= dict.fromkeys(leaf.modules[layer][part], (leaf, cell))
    return written


def _present(module: Any, form: Format) -> Naming:
    """The spelling that most of a format's readers know. transformers 5 dropped `text_model.`, which diffusers strips where it
    has to and which kohya's names have; peft takes names as they are."""
    old = type(module).__name__ == "CLIPText" and form != "peft"
    return Naming("diffusers", prefixed(clip.PREFIX)) if old else Naming("diffusers")

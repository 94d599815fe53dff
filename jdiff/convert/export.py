"""Writes a bundle: as a diffusers folder, DiT's .pt, CompVis' single file, or one safetensors file."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import models, tree
from jdiff.convert import cards, configs, engine, files, namings, tensors, torchfile
from jdiff.convert.arrays import Array
from jdiff.convert.bundle import COMPONENTS, Bundle, Format, Part
from jdiff.convert.engine import Naming
from jdiff.convert.rows import refuse
from jdiff.diffusion.schedulers import STABLE_DIFFUSION_V1
from jdiff.paths import whole
from jdiff.tokens import Tokenizer

FORMATS = ("diffusers", "dit", "compvis", "safetensors")
FOLDERS = {ours: folder for folder, ours in COMPONENTS.items()}
_LIBRARY = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text": ["transformers", "CLIPTextModel"],
    "dit": ["diffusers", "DiTTransformer2DModel"],
}
_COPIED = (".json", ".txt", ".model", ".safetensors")
"""What is taken over of a pipeline's folders that jdiff has no model for; never a pickle."""
After = Callable[[int], None]


@dataclasses.dataclass
class Report:
    """What was written. arrays: how many. hashes: sha256 of each weight file, by its place. notes: lines worth saying."""

    arrays: int = 0
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def write(
    bundle: Bundle,
    dest: str | Path,
    to: Format | None = None,
    *,
    dtype: Any = None,
    tokenizer: str | Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
    title: str = "",
    after: After = lambda _: None,
) -> Report:
    """Writes a bundle to `dest`, which must not exist; it appears when it is whole.

    to: the format; the source's own when None, and then names, dtypes and arrays that are no parameters come back as they
      were. dtype: what floating-point arrays are cast to; as they are when None. tokenizer: the folder of one, which a diffusers
      pipeline needs and a single file does not hold. scheduler: a scheduler_config.json; the source's, or Stable Diffusion
      v1's, when None. title: what the card calls the source. after: called with the bytes of each array written.

    ConversionError when the format cannot hold the models, something is missing, or `dest` exists.
    """
    dest, to = Path(dest), to or bundle.format
    if to not in FORMATS:
        raise refuse(f"the format {to!r} is none; use one of {', '.join(FORMATS)}")
    vacant(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    room, needed = shutil.disk_usage(dest.parent).free, needs(bundle, dtype)
    if room < needed:
        raise refuse(f"{dest.parent} has room for {room >> 20} MiB, and {needed >> 20} are needed: make room")
    with whole(dest) as partial:
        if to == "diffusers":
            report = _write_diffusers(bundle, partial, dtype, tokenizer, scheduler, title, after)
        else:
            report = _write_single(bundle, partial, dest.suffix, to, dtype, after)
    shift = {"dit": 0, "diffusers": 1}.get(to)
    if "dit" in bundle.parts and shift is not None and bundle.parts["dit"].module.freq_shift != shift:
        report.notes.append(
            "diffusers forms the timestep's frequencies with 127 where the official code has 128: outputs there differ a little"
        )
    if list(report.hashes) == [""]:
        report.hashes = {dest.name: report.hashes[""]}
    return report


def vacant(dest: Path) -> None:
    """ConversionError when something lies there already."""
    if dest.exists():
        raise refuse(f"{dest} exists: remove it or choose another place")


def needs(bundle: Bundle, dtype: Any = None) -> int:
    """About how many bytes an export takes: one for each of the parameters', and a little more."""
    kinds = [(tree.count(part.params), np.dtype(dtype) if dtype else part.dtype) for part in bundle.parts.values()]
    return sum(count * kind.itemsize for count, kind in kinds) + (1 << 20)


def arrays(part: Part, naming: Naming | None = None) -> dict[str, Array]:
    """A part's arrays under `naming`, its own when None."""
    return engine.write(part.module, part.params, naming or part.naming)


def _metadata(bundle: Bundle, names: tuple[str, ...]) -> str:
    """What a reader of jdiff's would otherwise have to guess from shapes."""
    return json.dumps({"models": {name: models.describe(bundle.parts[name].module) for name in names}})


# Single files


def _write_single(bundle: Bundle, file: Path, suffix: str, to: str, dtype: Any, after: After) -> Report:
    same = to == bundle.format
    kinds = tuple(bundle.parts)
    if to == "dit" and kinds[:1] != ("dit",):
        raise refuse(f"the dit format holds a DiT, and this is {' and '.join(kinds)}: use another format")
    if to == "compvis" and "dit" in kinds:
        raise refuse("CompVis' format has no place for a DiT: use dit, diffusers or safetensors")
    if to == "compvis" and "clip" in kinds:
        raise refuse("CompVis' format has no place for a CLIP: use diffusers or safetensors")
    if to == "safetensors" and len(kinds) > 1:
        raise refuse(f"one safetensors file holds one model, and this is {', '.join(kinds)}: use compvis or diffusers")
    report = Report()
    found: dict[str, Array] = {}
    for name, part in bundle.parts.items():
        if to == "dit" and name != "dit":
            report.notes.append(f"left out: {name}, which DiT's format does not hold")
            continue
        found |= arrays(part, part.naming if same else _naming(part, to, len(kinds)))
    if same:
        found |= {n: a for n, a in bundle.extras.items() if not bundle.wrapper or bundle.wrapper == ("state_dict",)}
        placed = {name: i for i, name in enumerate(bundle.order)}
        found = {name: found[name] for name in sorted(found, key=lambda name: placed.get(name, len(placed)))}
    elif bundle.extras:
        report.notes.append(f"left out: {len(bundle.extras)} arrays that are no parameters")
    report.arrays = len(found)
    record = _metadata(bundle, kinds if to != "dit" else ("dit",))
    if suffix == ".safetensors" or to == "safetensors":
        report.hashes[""] = tensors.write(file, found, {"format": "pt", "jdiff": record}, dtype, after)
        return report
    state = _state(found, record)
    if same and bundle.wrapper in (("ema",), ("model",)):
        other = "model" if bundle.wrapper == ("ema",) else "ema"
        rest = {name.removeprefix(f"{other}."): array for name, array in bundle.extras.items()}
        state = {"model": _state(rest, record), "ema": state}
        report.arrays += len(rest)
    elif to == "compvis":
        state = {"state_dict": state}
    torchfile.write(file, state, dtype, after)
    report.hashes[""] = torchfile.check(file, state, dtype)
    return report


def _state(found: Mapping[str, Array], record: str) -> Any:
    from jdiff.convert.pickles import StateDict

    state = StateDict(found)
    state.attributes["jdiff"] = record
    return state


def _naming(part: Part, to: str, parts: int) -> Naming:
    kind = type(part.module).__name__
    if to == "dit" or (to == "safetensors" and kind == "DiT"):
        return Naming("dit")
    if to == "compvis":
        prefix = "" if kind == "AutoencoderKL" and parts == 1 else namings.PREFIXES[kind][0]
        return Naming("compvis", namings.prefixed(prefix))
    return Naming("diffusers")


# Folders


def _write_diffusers(
    bundle: Bundle,
    folder: Path,
    dtype: Any,
    tokenizer: str | Path | None,
    scheduler: Mapping[str, Any] | None,
    title: str,
    after: After,
) -> Report:
    report = Report()
    same = bundle.format == "diffusers"
    component = bundle.index is None and len(bundle.parts) == 1
    text_pipeline = {"unet", "vae", "text"} <= set(bundle.parts)
    source = bundle.folder if bundle.index is not None else None
    words = (
        Path(tokenizer) if tokenizer else source / "tokenizer" if source and (source / "tokenizer").is_dir() else None
    )
    if text_pipeline and words is None:
        raise refuse("a diffusers pipeline needs a tokenizer, and this checkpoint holds none: give the folder of one")
    for name, part in bundle.parts.items():
        place = folder if component else folder / FOLDERS[name]
        _write_component(part, place, "" if component else f"{FOLDERS[name]}/", same, dtype, report, after)
    if not same and bundle.extras:
        report.notes.append(f"left out: {len(bundle.extras)} arrays that are no parameters")
    index = None if bundle.index is None else dict(bundle.index)
    if source is not None and index is not None:
        report.notes += _copy_rest(source, folder, index, bool(tokenizer), scheduler is not None)
    if words is not None and not component and not (folder / "tokenizer").exists():
        Tokenizer.from_folder(words)  # an error now rather than when the pipeline is opened
        (folder / "tokenizer").mkdir()
        _copy_files(words, folder / "tokenizer")
    if not component and index is None and text_pipeline:
        index = _index(bundle, folder, scheduler)
    if index is not None:
        if scheduler is not None:
            _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            index["scheduler"] = ["diffusers", scheduler.get("_class_name", "PNDMScheduler")]
        _write_json(folder / "model_index.json", index)
    elif not component:
        report.notes.append(f"no model_index.json: {', '.join(bundle.parts)} are no whole pipeline")
    (folder / "README.md").write_text(cards.card(bundle, report.hashes, title, dtype, component), encoding="utf-8")
    return report


def _write_component(
    part: Part, folder: Path, prefix: str, same: bool, dtype: Any, report: Report, after: After
) -> None:
    folder.mkdir(parents=True)
    found = arrays(part, part.naming if same else Naming("diffusers"))
    if same:
        found |= part.extras
    elif part.extras:
        report.notes.append(f"left out: {', '.join(part.extras)}")
    stored = np.dtype(dtype or part.dtype).name
    config = dict(part.config) if part.config is not None else configs.to_config(part.module, stored)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = stored
    _write_json(folder / "config.json", config)
    name = files.NAMES[1 if type(part.module).__name__ in ("CLIPText", "CLIP") else 0] + ".safetensors"
    record = json.dumps({"models": {"model": models.describe(part.module)}})
    report.hashes[prefix + name] = tensors.write(folder / name, found, {"format": "pt", "jdiff": record}, dtype, after)
    report.arrays += len(found)


def _index(bundle: Bundle, folder: Path, scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    """model_index.json and the scheduler's folder of a Stable Diffusion pipeline."""
    if scheduler is None:
        config = {"_class_name": "PNDMScheduler", **STABLE_DIFFUSION_V1, "trained_betas": None}
        _write_json(folder / "scheduler" / "scheduler_config.json", config)
    repaints = bundle.parts["unet"].module.in_channels != bundle.parts["vae"].module.latent_channels
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if repaints else "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": _LIBRARY["text"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": _LIBRARY["unet"],
        "vae": _LIBRARY["vae"],
    }


def _copy_rest(source: Path, folder: Path, index: dict[str, Any], own_words: bool, own_scheduler: bool) -> list[str]:
    """Copies a pipeline's other folders; one with weights in pickles is left out of the index, and said."""
    notes = []
    for path in sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith(".")):
        replaced = (own_words and path.name == "tokenizer") or (own_scheduler and path.name == "scheduler")
        if path.name in COMPONENTS or replaced or path.name not in index:
            continue
        names = [p.name for p in path.iterdir() if p.is_file()]
        pickled = any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)
        if pickled and not any(name.endswith(".safetensors") for name in names):
            index[path.name] = [None, None]
            notes.append(f"left out: {path.name}/, whose weights are a pickle that jdiff has no model for")
            continue
        (folder / path.name).mkdir(parents=True)
        _copy_files(path, folder / path.name)
    return notes


def _copy_files(source: Path, dest: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED:
            shutil.copyfile(path, dest / path.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")

"""A checkpoint of any format as its models: what was found, and all that it takes to write the same again."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import models, tree
from jdiff.convert import clip, configs, dit, engine, files, hub, tensors, unet, vae
from jdiff.convert.arrays import Array
from jdiff.convert.engine import Naming
from jdiff.convert.namings import averaged, find, namings, prefixed
from jdiff.convert.rows import ConversionError, refuse

Format = Literal["diffusers", "dit", "compvis", "safetensors"]
"""How a checkpoint is written."""
Weights = Literal["ema", "raw"] | None
COMPONENTS = {"unet": "unet", "transformer": "dit", "vae": "vae", "text_encoder": "text"}
"""Folder of a diffusers pipeline -> what jdiff calls the model."""
KINDS = {"DiT": "dit", "UNet": "unet", "AutoencoderKL": "vae", "CLIPText": "text", "CLIP": "clip"}
_SCHEDULE = (
    "betas|alphas_cumprod(_prev)?|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
    "|sqrt_recip(m1)?_alphas_cumprod|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]"
    "|lvlb_weights|logvar|scale_factor"
)
COMPVIS_IGNORED = (
    (_SCHEDULE, "the noise schedule's tables, which follow from its settings"),
    (r"model_ema\.(decay|num_updates)", "the moving average's settings"),
    (r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids", "a buffer: 0, 1, 2, …"),
    (r"cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)", "of CLIP's contrastive loss"),
    (r"(first_stage_model\.)?loss\..*", "the adversary and the perceptual network of the autoencoder's training"),
    (r"embedding_manager\..*", "textual inversion's, which holds no model"),
)
"""Arrays of CompVis' files that are none of the models' parameters, and why."""
_AVERAGE = (r"model_ema\..*", "the moving average, where the raw parameters were asked for")
_RAW = (r"model\.diffusion_model\..*", "the raw parameters, where there is a moving average")


@dataclasses.dataclass
class Part:
    """A model of a checkpoint.

    params: its tree, of numpy arrays, views of the file, or `arrays.Stacked` of them. naming: how it was spelt.
    config: its config.json, when there was one. extras: arrays that came beside it in its folder.
    """

    module: Any
    params: Any
    naming: Naming
    config: dict[str, Any] | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        """Of its first parameter."""
        return np.dtype(jax.tree.leaves(self.params)[0].dtype)

    def parameters(self) -> int:
        """How many numbers."""
        return tree.count(self.params)


@dataclasses.dataclass
class Bundle:
    """A checkpoint: its models by name ("dit", "unet", "vae", "text", "clip"), and what else it held.

    format: that of the source; None for models of jdiff's own. folder: of a diffusers pipeline or component, else None.
    index: a pipeline's model_index.json. extras: arrays of a single file that are no parameters; reasons: why, by name.
    order: all names of a single file, as they came. wrapper: keys under which a single file has its state dict.
    notes: what was chosen, in a line each. mapped, total: how many arrays the models took, of how many.
    """

    format: Format | None
    parts: dict[str, Part]
    folder: Path | None = None
    index: dict[str, Any] | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    order: tuple[str, ...] = ()
    wrapper: tuple[str, ...] = ()
    notes: list[str] = dataclasses.field(default_factory=list)
    mapped: int = 0
    total: int = 0

    @property
    def main(self) -> str:
        """The model that the others serve: the first of dit, unet, vae, text, clip."""
        return next(name for name in ("dit", "unet", "vae", "text", "clip") if name in self.parts)

    def parameters(self) -> int:
        """Of all models."""
        return sum(part.parameters() for part in self.parts.values())


def from_models(found: Mapping[str, tuple[Any, Any]]) -> Bundle:
    """A bundle of jdiff's own (module, params), by name."""
    parts = {name: Part(module, params, namings(module)[0]) for name, (module, params) in found.items()}
    count = sum(len(jax.tree.leaves(part.params)) for part in parts.values())
    return Bundle(None, parts, mapped=count, total=count)


def read(
    path: str | Path,
    *,
    weights: Weights = None,
    heads: int | None = None,
    dtype: Any = jnp.float32,
    mixed: bool = False,
) -> Bundle:
    """Any checkpoint that jdiff reads, told by its content.

    path: a diffusers pipeline or component folder, a transformers CLIP folder, one file (DiT's or SiT's .pt, a CompVis
      checkpoint or autoencoder, a component's weights), or the hub's OWNER/NAME (see `hub.locate`).
    weights: the moving average or the raw parameters, where a file has both; the average when None, and then both come back
      on export.
    heads: what a single file cannot say, where it is not the usual (see `dit.infer`, `unet.infer`).
    dtype: of the computation. mixed: whether a model's parameters may differ in dtype.

    ConversionError, in one line, when it is none of these or does not fit.
    """
    path = hub.locate(path, weights)
    if path.is_dir():
        if (path / files.QUANTIZED).is_file():
            raise refuse(f"{path} is quantized, and its floats are gone: give the checkpoint that it was made from")
        if (path / "model_index.json").is_file():
            return _read_pipeline(path, weights, dtype, mixed)
        return _read_component(path, weights, dtype, mixed)
    if not path.is_file():
        raise refuse(f"{path} does not exist")
    if path.stem.split(".")[0] in files.NAMES and (path.parent / "config.json").is_file():
        return _read_component(path.parent, weights, dtype, mixed, [path])
    return _read_single(path, weights, heads, dtype, mixed)


def _read_pipeline(folder: Path, weights: Weights, dtype: Any, mixed: bool) -> Bundle:
    index = files.read_json(folder / "model_index.json")
    bundle = Bundle("diffusers", {}, folder, index)
    for name, ours in COMPONENTS.items():
        if (folder / name).is_dir():
            part = _read_component(folder / name, weights, dtype, mixed)
            bundle.parts[ours] = next(iter(part.parts.values()))
            bundle.mapped, bundle.total = bundle.mapped + part.mapped, bundle.total + part.total
            bundle.reasons |= {f"{name}/{key}": reason for key, reason in part.reasons.items()}
            bundle.notes += [f"{name}: {note}" for note in part.notes]
    if not bundle.parts:
        raise refuse(f"{folder} has a model_index.json, but none of {list(COMPONENTS)}")
    listed = [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    missing = [name for name in listed if name in COMPONENTS and not (folder / name).is_dir()]
    if missing:
        raise refuse(f"{folder} lacks {missing[0]}/, which its model_index.json lists")
    return bundle


def _read_component(folder: Path, weights: Weights, dtype: Any, mixed: bool, given: list[Path] | None = None) -> Bundle:
    config = files.read_config(folder)
    try:
        module = configs.from_config(config, dtype)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"{folder / 'config.json'}: {error}") from error
    variants = (".non_ema", "", ".fp16") if weights == "raw" else ("", ".fp16")
    paths = given or files.weight_files(folder, variants)
    arrays = files.read_arrays(paths)
    module = _as_recorded(module, paths[0], dtype)
    with _named(folder):
        naming = find(module, arrays, [naming for naming in namings(module) if naming.table == "diffusers"])
        (params,), reasons = engine.read(
            [(module, naming)], arrays, files.IGNORED.get(type(module).__name__, ()), mixed
        )
    extras = {name: arrays[name] for name in reasons}
    part = Part(module, params, naming, config, extras)
    bundle = Bundle("diffusers", {KINDS[type(module).__name__]: part}, folder, reasons=reasons)
    bundle.mapped, bundle.total = len(arrays) - len(extras), len(arrays)
    if len(paths) > 1 or paths[0].stem not in files.NAMES:
        bundle.notes.append(f"read from {', '.join(path.name for path in paths)}")
    return bundle


def _as_recorded(module: Any, file: Path, dtype: Any) -> Any:
    """DiT's frequencies as the file's own record has them: diffusers' config cannot say that they are not diffusers'."""
    if type(module).__name__ != "DiT" or not tensors.looks_like(file):
        return module
    records = _records(tensors.read(file)[1])
    recorded = _build("DiT", records, models.describe(module), dtype) if records else module
    return module.clone(freq_shift=recorded.freq_shift)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts a path in front of the errors inside."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def _read_single(path: Path, weights: Weights, heads: int | None, dtype: Any, mixed: bool) -> Bundle:
    content, metadata = files.open_file(path)
    with _named(path):
        if isinstance(content.get("ema"), dict) and isinstance(content.get("model"), dict):
            return _read_training(content, weights, heads, dtype, mixed)
        wrapper: tuple[str, ...] = ()
        notes = []
        if isinstance(content.get("state_dict"), dict):
            rest = sorted(str(key) for key in content if key != "state_dict")
            notes += [f"left out: {', '.join(rest)} (the training's, not the models')"] if rest else []
            content, wrapper = content["state_dict"], ("state_dict",)
        arrays, records = _flat(content), _records({**metadata, **getattr(content, "attributes", {})})
        bundle = _classify(arrays, weights, records, heads, dtype, mixed)
    bundle.wrapper, bundle.order = wrapper, tuple(arrays)
    bundle.notes = notes + bundle.notes
    return bundle


def _flat(content: Mapping[Any, Any]) -> dict[str, Array]:
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise refuse(f"{str(name)[:80]!r} is no array, so this is no state dict")
    return dict(content)


def _records(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """jdiff's own description of the models in a file that it wrote; {} for others'."""
    if "jdiff" not in metadata:
        return {}
    try:
        records = json.loads(metadata["jdiff"])["models"]
        assert isinstance(records, dict) and all(isinstance(record, dict) for record in records.values())
        return records
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ConversionError(f"its description of the models cannot be read: {error}") from error


def _build(kind: str, records: Mapping[str, Any], fields: dict[str, Any], dtype: Any) -> Any:
    """The module that a record describes, else one with the inferred fields."""
    try:
        for record in records.values():
            if record.get("class") == kind:
                return models.build(record, dtype)
        return models.build({**fields, "class": kind}, dtype)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(f"no {kind} has these sizes: {error}") from error


def _read_training(content: Mapping[Any, Any], weights: Weights, heads: int | None, dtype: Any, mixed: bool) -> Bundle:
    """A checkpoint of DiT's and SiT's train.py: {model, ema, opt, args}."""
    arguments = content.get("args")
    arguments = arguments if isinstance(arguments, dict) else {}
    taken = "model" if weights == "raw" else "ema"
    sections = {name: _flat(content[name]) for name in ("model", "ema")}
    records = _records(getattr(content[taken], "attributes", {}))
    chosen = _classify(sections[taken], None, records, heads, dtype, mixed)
    module = chosen.parts["dit"].module
    named = arguments.get("num_classes")
    if isinstance(named, int) and named != module.num_classes:
        raise refuse(
            f"its args say num_classes={named}, but its label table is of {module.num_classes} and the empty label"
        )
    left = sorted(str(key) for key in content if key not in sections)
    chosen.notes = [
        f"took {taken}, the {'raw parameters' if taken == 'model' else 'moving average'}, of model and ema",
        *([f"left out: {', '.join(left)} (the training's, not the model's)"] if left else []),
    ]
    if weights is None:
        chosen.wrapper = (taken,)
        chosen.extras = {f"model.{name}": array for name, array in sections["model"].items()}
        chosen.reasons = dict.fromkeys(chosen.extras, _RAW[1])
        chosen.total += len(chosen.extras)
    chosen.order = tuple(sections[taken])
    return chosen


def _classify(
    arrays: dict[str, Array], weights: Weights, records: Mapping[str, Any], heads: int | None, dtype: Any, mixed: bool
) -> Bundle:
    sizes = {name: tuple(array.shape) for name, array in arrays.items()}
    if "x_embedder.proj.weight" in sizes or "blocks.0.attn.qkv.weight" in sizes:
        module = _build("DiT", records, {} if records else dit.infer(sizes, heads), dtype)
        return _one("dit", module, Naming("dit"), arrays, mixed)
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for name in sizes):
        return _read_compvis(arrays, weights, records, heads, dtype, mixed)
    if any(map(vae.is_compvis, sizes)) and not any(".mid_block." in name for name in sizes):
        module = _build("AutoencoderKL", records, {} if records else vae.infer(sizes), dtype)
        return _one("compvis", module, Naming("compvis"), arrays, mixed)
    whole_clip = any(name.startswith("vision_model.") for name in sizes)
    if not whole_clip and any(name.endswith("encoder.layers.0.self_attn.q_proj.weight") for name in sizes):
        prefix = clip.PREFIX if any(name.startswith(clip.PREFIX) for name in sizes) else ""
        bare = {name.removeprefix(prefix): shape for name, shape in sizes.items()}
        module = _build("CLIPText", records, {} if records else clip.infer(bare, heads), dtype)
        return _one("safetensors", module, Naming("diffusers", prefixed(prefix)), arrays, mixed)
    if records:
        record = next(iter(records.values()))
        module = _build(str(record.get("class")), {"": record}, {}, dtype)
        return _one("safetensors", module, find(module, arrays), arrays, mixed)
    diffusers = r"(encoder\.|decoder\.)?(down_blocks|mid_block|transformer_blocks)\."
    if whole_clip or any(re.match(diffusers, name) for name in sizes):
        raise refuse("it holds a component in diffusers' or transformers' names, whose config.json must lie beside it")
    raise refuse(f"it holds no model that jdiff has; its arrays begin with {list(sizes)[:3]}")


def _one(fmt: Format, module: Any, naming: Naming, arrays: dict[str, Array], mixed: bool) -> Bundle:
    """A bundle of a file with one model."""
    kind = type(module).__name__
    ignored = (*files.IGNORED.get(kind, ()), *(COMPVIS_IGNORED if kind == "AutoencoderKL" else ()))
    (params,), reasons = engine.read([(module, naming)], arrays, ignored, mixed)
    bundle = Bundle(fmt, {KINDS[kind]: Part(module, params, naming)}, reasons=reasons)
    bundle.extras = {name: arrays[name] for name in reasons}
    bundle.mapped, bundle.total = len(arrays) - len(reasons), len(arrays)
    return bundle


def _read_compvis(
    arrays: dict[str, Array], weights: Weights, records: Mapping[str, Any], heads: int | None, dtype: Any, mixed: bool
) -> Bundle:
    """Stable Diffusion in one file: UNet, autoencoder and text encoder, those that are there."""

    def under(prefix: str) -> dict[str, tuple[int, ...]]:
        return {n.removeprefix(prefix): tuple(a.shape) for n, a in arrays.items() if n.startswith(prefix)}

    if any(name.startswith("cond_stage_model.model.") for name in arrays):
        raise refuse("its text encoder is OpenCLIP's (SD 2.x), which jdiff reads from a diffusers folder only")
    parts: dict[str, tuple[Any, Naming]] = {}
    ignored = COMPVIS_IGNORED
    notes = []
    average = any(name.startswith("model_ema.diffusion_model") for name in arrays)
    if shapes := under("model.diffusion_model."):
        fields = {} if "unet" in records else unet.infer(shapes, heads)
        module = _build("UNet", records, fields, dtype)
        use_average = average and weights != "raw"
        parts["unet"] = module, Naming("compvis", averaged if use_average else prefixed("model.diffusion_model."))
        if average:
            ignored = (*ignored, _RAW if use_average else _AVERAGE)
            notes.append(f"took the UNet's {'moving average' if use_average else 'raw parameters'}; the file has both")
    if shapes := under("first_stage_model."):
        module = _build("AutoencoderKL", records, {} if "vae" in records else vae.infer(shapes), dtype)
        parts["vae"] = module, Naming("compvis", prefixed("first_stage_model."))
    prefix = "cond_stage_model.transformer."
    prefix += clip.PREFIX if under(prefix + clip.PREFIX) else ""
    if shapes := under(prefix):
        module = _build("CLIPText", records, {} if "text" in records else clip.infer(shapes, heads), dtype)
        parts["text"] = module, Naming("compvis", prefixed(prefix))
    trees, reasons = engine.read(list(parts.values()), arrays, ignored, mixed)
    found = {name: Part(parts[name][0], params, parts[name][1]) for name, params in zip(parts, trees, strict=True)}
    bundle = Bundle("compvis", found, reasons=reasons, notes=notes)
    bundle.extras = {name: arrays[name] for name in reasons}
    if average and weights is not None:  # what was not asked for does not come back
        other = "model.diffusion_model." if weights == "ema" else "model_ema."
        bundle.extras = {n: a for n, a in bundle.extras.items() if not n.startswith((other, "model_ema."))}
        if weights == "ema":
            found["unet"].naming = Naming("compvis", prefixed("model.diffusion_model."))
    bundle.mapped, bundle.total = len(arrays) - len(reasons), len(arrays)
    return bundle

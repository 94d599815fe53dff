"""From a path to something that runs: `load` gives (model, params), `pipeline` a sampler around them."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdiff import checkpoint, convert, models, sharding, tokens, tree
from jdiff import config as configs
from jdiff.convert.files import read_json
from jdiff.diffusion import schedulers
from jdiff.diffusion.process import make_process
from jdiff.pipelines import ClassPipeline, TextPipeline

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
"""A config's `precision` as the models' dtype."""
FOLDERS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
"""Diffusers' pipelines whose folders are opened; what one is asked for, not its name, says what it does."""
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PASSED_OVER = {
    "safety_checker": "judges finished pictures; jdiff has none",
    "requires_safety_checker": "whether users are to be warned of that",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "of IP-Adapters, which a picture does without",
}
"""Entries of a model_index.json that are not opened, and why."""


def load(
    path: str | Path, *, weights: Literal["ema", "raw"] = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """(model, params) of a training run's newest whole checkpoint, or of `step`: its main model, a dit, unet or vae; or of any
    checkpoint that `convert.read` reads: a diffusers folder's (of a pipeline's the dit or unet), DiT's .pt, a CompVis file's
    UNet, or one on the hub by OWNER/NAME.

    weights: the moving average, or the parameters that were being trained, where there are both; step is a run's. mesh: where
    the arrays go (replicated over the default mesh when None), dtypes as stored. Raises CheckpointError or ConversionError, in
    one line, when nothing there can be used.
    """
    path = convert.locate(path, weights)
    if _is_foreign(path):
        if path.is_dir():
            _not_a_run(path, weights, step)
        bundle = convert.read(path, weights=weights)
        part = bundle.parts[bundle.main]
        return part.module, convert.put(part.params, sharding.replicated(mesh or sharding.make_mesh()))
    found, meta = load_run(path, weights=weights, step=step, mesh=mesh)
    return found[meta["main"]]


def _is_foreign(path: Path) -> bool:
    """Whether `convert.read` is to open it, not the checkpoint manager."""
    return path.is_file() or any((path / name).exists() for name in ("config.json", "model_index.json"))


def load_run(
    workdir: Path, *, weights: str = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
    """({name: (model, params)}, metadata): every model that the run's metadata describes; arguments are `load`'s."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is unknown; use 'ema' or 'raw'")
    if not workdir.exists():
        raise checkpoint.CheckpointError(f"{workdir} does not exist")
    there = checkpoint.steps(workdir)
    if not there:
        raise checkpoint.CheckpointError(
            f"{workdir} holds no checkpoint; a training run's folder has them in checkpoints/STEP"
        )
    if step is not None and step not in there:
        raise checkpoint.CheckpointError(f"{workdir} has no checkpoint of step {step}; it has {there}")
    where = sharding.replicated(mesh or sharding.make_mesh())

    def read(step: int) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
        meta = checkpoint.read_meta(workdir, step)
        dtype = DTYPES[meta["config"]["precision"]]
        found = {name: models.build(record, dtype) for name, record in meta["models"].items()}
        item = "ema_params" if weights == "ema" else "params"
        target = {name: checkpoint.shapes(meta, name, ("params", "frozen"), where) for name in (item, "frozen")}
        for name, model in found.items():
            expected = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
            wrong = tree.differences(expected, tree.merge(target[item], target["frozen"]).get(name, {}))
            if wrong:
                raise checkpoint.CheckpointError(
                    f"checkpoint {step} of {workdir} does not fit its own record of {name}: {len(wrong)} array(s) "
                    f"differ, first: {wrong[0]}"
                )
        items = checkpoint.restore(workdir, step, target, meta)
        full = tree.merge(items[item], items["frozen"])
        return {name: (model, full[name]) for name, model in found.items()}, meta

    return read(step) if step is not None else checkpoint.newest_whole(there, read)


def pipeline(
    path: str | Path,
    *,
    weights: Literal["ema", "raw"] = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    vae_precision: Literal["fp32", "bf16"] = "fp32",
    tokenizer: str | Path | None = None,
) -> ClassPipeline | TextPipeline:
    """A sampler for a training run, with its own settings of the diffusion, or for any checkpoint that `convert.read` reads:
    Stable Diffusion in diffusers' layout or in CompVis' single file, or a DiT, which samples as the official code does.

    weights, step: of a run, as in `load`. mesh: all devices when None. precision: of the models' work: the run's own, or
    "fp32" for others, when None. vae_precision: of the autoencoder's. tokenizer: its folder or hub repository, which a single
    file of CompVis needs. Raises CheckpointError, ConversionError or ValueError, in one line, for what is missing or not
    supported.
    """
    path, mesh = convert.locate(path, weights), mesh or sharding.make_mesh()
    for name, value in (("precision", precision), ("vae_precision", vae_precision)):
        if value not in (None, *DTYPES):
            raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, DTYPES))}")
    if path.is_file() or (path / "config.json").exists():
        return _from_bundle(path, mesh, DTYPES[precision or "fp32"], DTYPES[vae_precision], weights, tokenizer)
    if (path / "model_index.json").exists():
        _not_a_run(path, weights, step)
        return _from_folder(path, mesh, DTYPES[precision or "fp32"], DTYPES[vae_precision])
    found, meta = load_run(path, weights=weights, step=step, mesh=mesh)
    config = configs.from_dict(meta["config"])
    if precision is not None:
        found = {name: (model.clone(dtype=DTYPES[precision]), params) for name, (model, params) in found.items()}
    if config.task == "text_to_image":
        return _from_text_run(path, mesh, found, meta, DTYPES[vae_precision])
    if config.task != "class_to_image":
        raise ValueError(f"{path} is a run of {config.task}, which makes no pictures of its own: use jdiff.load")
    model, params = found["dit"]
    process = make_process(config.diffusion, model.learn_sigma)
    preview = None
    if config.data.name == "latents":
        from jdiff.data.latents import Latents

        preview = Latents(config.data.path).preview
    return ClassPipeline(model, params, process, mesh=mesh, class_names=meta["class_names"], preview=preview)


def _from_text_run(path: Path, mesh: Mesh, found: dict[str, Any], meta: dict[str, Any], vae_dtype: Any) -> TextPipeline:
    """The text pipeline of a training run."""
    tokenizer = tokens.Tokenizer.from_folder(path / "tokenizer")
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise ValueError(f"{path / 'tokenizer'} is not the tokenizer that the run was trained with")
    modules = {name: model for name, (model, _) in found.items()}
    params = {name: params for name, (_, params) in found.items()}
    height, width = meta["size"]
    return TextPipeline(
        modules["unet"],
        modules["vae"].clone(dtype=vae_dtype),
        modules["text"],
        tokenizer,
        schedulers.from_config(meta["scheduler"]),
        params,
        mesh=mesh,
        size=(height, width),
        clip_skip=meta["clip_skip"],
    )


def _from_folder(folder: Path, mesh: Mesh, dtype: Any, vae_dtype: Any) -> TextPipeline:
    """The text pipeline of a folder that diffusers wrote."""
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") not in FOLDERS:
        raise convert.ConversionError(f"{folder} holds a {index.get('_class_name')}; jdiff opens {', '.join(FOLDERS)}")
    for name, value in index.items():
        known = name in PARTS or name in PASSED_OVER or name.startswith("_")
        if not known and value not in (None, [None, None]):
            raise convert.ConversionError(f"{folder}: model_index.json has {name}={value}, which jdiff does not have")
    if missing := [name for name in PARTS if not (folder / name).is_dir()]:
        raise convert.ConversionError(f"{folder} lacks the folder(s) {', '.join(missing)}")
    # the small files first, so that what is wrong with them is said before gigabytes are read
    tokenizer = tokens.Tokenizer.from_folder(folder / "tokenizer")
    scheduler = schedulers.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    sample_size = convert.read_config(folder / "unet").get("sample_size") or 64
    unet, unet_params = convert.load_component(folder / "unet", dtype)
    vae, vae_params = convert.load_component(folder / "vae", vae_dtype)
    text, text_params = convert.load_component(folder / "text_encoder", dtype)
    params = {"unet": unet_params, "vae": vae_params, "text": text_params}
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    size = (height * vae.downscale, width * vae.downscale)
    return TextPipeline(unet, vae, text, tokenizer, scheduler, params, mesh=mesh, size=size)


def _from_bundle(
    path: Path, mesh: Mesh, dtype: Any, vae_dtype: Any, weights: Literal["ema", "raw"], words: str | Path | None
) -> ClassPipeline | TextPipeline:
    """The pipeline of one file, or of a DiT's folder."""
    bundle = convert.read(path, weights=weights, dtype=dtype)
    where = sharding.replicated(mesh)
    params = {name: convert.put(part.params, where) for name, part in bundle.parts.items()}
    modules = {name: part.module for name, part in bundle.parts.items()}
    if "dit" in modules:
        process = make_process(configs.default().diffusion, modules["dit"].learn_sigma)
        return ClassPipeline(modules["dit"], params["dit"], process, mesh=mesh)
    if missing := {"unet", "vae", "text"} - set(modules):
        raise convert.ConversionError(
            f"{path} holds no {' and no '.join(sorted(missing))}, which making pictures takes"
        )
    if words is None:
        raise ValueError(
            f"{path} holds no tokenizer: give tokenizer=, its folder or the hub's openai/clip-vit-large-patch14"
        )
    folder = convert.locate(words)
    inner = folder / "tokenizer"
    return TextPipeline(
        modules["unet"],
        modules["vae"].clone(dtype=vae_dtype),
        modules["text"],
        tokens.Tokenizer.from_folder(inner if inner.is_dir() else folder),
        schedulers.make_scheduler("pndm"),
        params,
        mesh=mesh,
        size=512,
    )


def _not_a_run(path: str | Path, weights: str, step: int | None) -> None:
    for name, value, default in (("weights", weights, "ema"), ("step", step, None)):
        if value != default:
            raise ValueError(f"{name}={value}: {path} is no training run, and has one set of weights")

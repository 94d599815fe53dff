"""From a path to something that runs: `load` gives (model, params), `pipeline` a sampler around them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdiff import checkpoint, convert, lora, models, quant, sharding, tree
from jdiff import config as configs
from jdiff.convert import lora as lora_files
from jdiff.convert import quantized as quantized_files
from jdiff.convert.arrays import release
from jdiff.convert.files import QUANTIZED, read_json
from jdiff.diffusion import schedulers
from jdiff.diffusion.process import make_process
from jdiff.pipelines import ClassPipeline, TextPipeline, gather, to_uint8
from jdiff.pipelines.rows import place, spread
from jdiff.tokens import Tokenizer

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}
"""A config's `precision` as the models' dtype."""
_STABLE = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
FOLDERS = {
    "StableDiffusionPipeline": _STABLE,
    "StableDiffusionImg2ImgPipeline": _STABLE,
    "StableDiffusionInpaintPipeline": _STABLE,
    "DiTPipeline": ("transformer",),
}
"""Diffusers' pipelines whose folders are opened, and what each must hold; what one is asked for, not its name, says what it
does."""
OPENED = (*_STABLE, "transformer", "id2label")
"""Entries of a model_index.json that are read."""
PASSED_OVER = {
    "safety_checker": "judges finished pictures; jdiff has none",
    "requires_safety_checker": "whether users are to be warned of that",
    "feature_extractor": "prepares pictures for the safety checker",
    "image_encoder": "of IP-Adapters, which a picture does without",
}
"""Entries of a model_index.json that are not opened, and why."""
Weights = Literal["ema", "raw"]
Loras = Sequence[str | Path | tuple[str | Path, float]]
"""Adapters: files of peft, diffusers or kohya, or LoRA runs of jdiff's, each alone or with its strength."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """How a checkpoint's kernels were rounded: the recipe's name, and models' fingerprints before that ({} when not taken).

    balanced: inputs of kernels were divided channel by channel (`evaluate.calibration.balance`), so that adapters that were made
    for the original do not fit.
    """

    recipe: str
    digests: dict[str, str]
    balanced: bool = False


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a path holds: models by name ("dit", "unet", "vae", "text"), and what a pipeline takes beside them.

    models: (module, params) each: a run's on the mesh, others as views of their files. main: the one that the others serve.
    meta: a run's metadata, else None. tokenizer, scheduler (a scheduler_config.json), size (height and width of pictures):
    Stable Diffusion's, None where they are not there. class_names: of a model of classes, [] where they are not known.
    quantized: None when no kernel is. scales: of main's kernels by path, where a run has learned them (quant.mode=lsq).
    """

    models: dict[str, tuple[Any, Any]]
    main: str
    meta: dict[str, Any] | None = None
    tokenizer: Tokenizer | None = None
    scheduler: dict[str, Any] | None = None
    size: tuple[int, int] | None = None
    clip_skip: int = 0
    class_names: list[str] = dataclasses.field(default_factory=list)
    quantized: Quantized | None = None
    scales: dict[str, jax.Array] | None = None

    @property
    def modules(self) -> dict[str, Any]:
        """The models without their params."""
        return {name: module for name, (module, _) in self.models.items()}


def load(
    path: str | Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
    lora: Loras = (),
    quantize: str | None = None,
) -> tuple[Any, Any]:
    """(model, params) of a training run's newest whole checkpoint, or of `step`: its main model, a dit, unet or vae; or of any
    checkpoint that `convert.read` reads: a diffusers folder's (of a pipeline's the dit or unet), DiT's .pt, a CompVis file's
    UNet, or one on the hub by OWNER/NAME; or of what tools/quantize.py made of one.

    weights: the moving average, or the parameters that were being trained, where there are both; step is a run's. mesh: where
    the arrays go (replicated over the default mesh when None), dtypes as stored. lora: what to attach, as in `pipeline`; a
    LoRA run of jdiff's has its adapters attached to its base already. quantize: a recipe of `quant.RECIPES`, for a dit or unet
    that is not quantized yet. Raises CheckpointError or ConversionError, in one line,
    when nothing there can be used.
    """
    mesh = mesh or sharding.make_mesh()
    opened = open_checkpoint(path, weights=weights, step=step, mesh=mesh)
    opened = opened if quantize is None else quantized(opened, quantize, lora)
    module, params = opened.models[opened.main]
    all_params = {name: params for name, (_, params) in opened.models.items()}
    attached, _ = attach(opened.modules, {**all_params, opened.main: on(mesh, params)}, lora, mesh, opened.quantized)
    return module, place(mesh, attached[opened.main])


def on(mesh: Mesh, params: Any) -> Any:
    """Parameters on a mesh's devices: those that are there already as they lie, others one after another from their files."""
    on_device = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    return place(mesh, params) if on_device else convert.put(params, sharding.replicated(mesh))


def open_checkpoint(
    path: str | Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> Opened:
    """See `Opened`. dtype: of the models' computation: a run's own, or float32, when None. Errors as `load`'s."""
    path = convert.locate(path, weights)
    if (path / QUANTIZED).is_file():
        return _open_quantized(path, weights, step, dtype)
    if path.is_file() or any((path / name).exists() for name in ("config.json", "model_index.json")):
        return _open_foreign(path, weights, step, dtype or jnp.float32)
    (found, scales), meta = _load_run(path, weights, step, mesh)
    if dtype is not None:
        found = {name: (module.clone(dtype=dtype), params) for name, (module, params) in found.items()}
    opened = Opened(found, meta["main"], meta, class_names=meta["class_names"], scales=scales)
    if meta["config"]["task"] != "text_to_image":
        return opened
    tokenizer = Tokenizer.from_folder(path / "tokenizer")
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise ValueError(f"{path / 'tokenizer'} is not the tokenizer that the run was trained with")
    height, width = meta["size"]
    settings = {"size": (height, width), "scheduler": meta["scheduler"], "clip_skip": meta["clip_skip"]}
    return dataclasses.replace(opened, tokenizer=tokenizer, **settings)


def _one_set(path: Path, weights: Weights, step: int | None) -> None:
    """ValueError where other weights are asked for than a folder has."""
    for name, value, default in (("weights", weights, "ema"), ("step", step, None)):
        if value != default:
            raise ValueError(f"{name}={value}: {path} is no training run, and has one set of weights")


FACTS = ("main", "meta", "scheduler", "size", "clip_skip", "class_names")
"""What of a checkpoint its quantized copy keeps, beside models and tokenizer."""
KEPT = ("config", "main", "models", "class_names", "step", "scheduler", "size", "clip_skip")
"""And of a run's metadata."""


def _open_quantized(path: Path, weights: Weights, step: int | None, dtype: Any) -> Opened:
    """What `save_quantized` wrote."""
    _one_set(path, weights, step)
    found, content = quantized_files.read(path)
    missing = [key for key in FACTS if key not in content.get("facts", {})]
    missing += [key for key in ("recipe", "digests", "balanced") if key not in content]
    if missing:
        raise convert.ConversionError(f"{path / QUANTIZED} lacks {missing}")
    facts = {key: content["facts"][key] for key in FACTS}
    if dtype is None:
        dtype = DTYPES[facts["meta"]["config"]["precision"]] if facts["meta"] else jnp.float32
    modules = {name: (module.clone(dtype=dtype), params) for name, (module, params) in found.items()}
    words = Tokenizer.from_folder(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    how = Quantized(content["recipe"], content["digests"], content["balanced"])
    facts["size"] = facts["size"] and tuple(facts["size"])
    return Opened(modules, tokenizer=words, quantized=how, **facts)


def save_quantized(opened: Opened, dest: str | Path, after: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Writes a checkpoint that `quantized` made; errors and result as `convert.quantized.write`'s."""
    assert opened.quantized is not None
    facts = {key: getattr(opened, key) for key in FACTS}
    if opened.meta is not None:
        facts["meta"] = {key: opened.meta[key] for key in KEPT if key in opened.meta}
    record = {**dataclasses.asdict(opened.quantized), "facts": facts}
    return quantized_files.write(dest, opened.models, record, opened.tokenizer, after)


def quantized(
    opened: Opened,
    recipe: str,
    loras: Loras | None = None,
    peaks: Mapping[str, jax.Array] | None = None,
    moments: Mapping[str, jax.Array] | None = None,
) -> Opened:
    """A checkpoint with the kernels of its dit or unet rounded, one after another.

    loras: what will be attached; the models' fingerprints, which a LoRA run is checked against, are taken only if there is a run
    among them, or when None. peaks, moments: of `quant.observe`, for a static recipe and for GPTQ. ValueError for a recipe that
    there is not, a model that it has no rules for, one quantized already, or one that has learned scales for another recipe.
    """
    rules = quant.find_recipe(recipe)
    if opened.quantized is not None:
        raise ValueError(f"quantize={recipe!r}: this checkpoint is quantized already, by {opened.quantized.recipe}")
    if opened.main not in rules:
        raise ValueError(
            f"quantize={recipe!r}: recipes are for {' and '.join(rules)}, and this is a model of {opened.main}"
        )
    trained = (
        opened.meta["config"]["quant"]["recipe"] if opened.meta is not None and opened.scales is not None else recipe
    )
    if recipe != trained:
        raise ValueError(f"quantize={recipe!r}: this run has learned scales for {trained}: use that")
    paths = [entry[0] if isinstance(entry, tuple) else entry for entry in loras or ()]
    fingerprints = loras is None or any((Path(path) / "checkpoints").is_dir() for path in paths)
    digests = {name: tree.fingerprint(params) for name, (_, params) in opened.models.items()} if fingerprints else {}
    module, params = opened.models[opened.main]
    made = quant.quantize(params, rules[opened.main], parts_of(module), peaks, opened.scales, release, moments)
    return dataclasses.replace(
        opened, models={**opened.models, opened.main: (module, made)}, quantized=Quantized(recipe, digests)
    )


def parts_of(module: Any) -> dict[str, tuple[int, ...]]:
    """Parts of kernels' inputs that have scales of their own: see `quant.quantize`."""
    return module.concatenated() if hasattr(module, "concatenated") else {}


def _open_foreign(path: Path, weights: Weights, step: int | None, dtype: Any) -> Opened:
    """A checkpoint of the PyTorch world's."""
    if path.is_dir():
        _one_set(path, weights, step)
    index = path / "model_index.json"
    if not index.exists():
        bundle = convert.read(path, weights=weights, dtype=dtype)
        return Opened({name: (part.module, part.params) for name, part in bundle.parts.items()}, bundle.main)
    # the small files first, so that what is wrong with them is said before gigabytes are read
    content = read_json(index)
    _check_index(path, content)
    tokenizer = Tokenizer.from_folder(path / "tokenizer") if "unet" in content else None
    scheduler = read_json(path / "scheduler" / "scheduler_config.json") if "unet" in content else None
    bundle = convert.read(path, weights=weights, dtype=dtype)
    found = {name: (part.module, part.params) for name, part in bundle.parts.items()}
    size = None
    if "unet" in bundle.parts:
        sample_size = (bundle.parts["unet"].config or {}).get("sample_size") or 64
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        downscale = bundle.parts["vae"].module.downscale
        size = (height * downscale, width * downscale)
    labels = content.get("id2label")
    names = [str(labels[key]) for key in sorted(labels, key=int)] if isinstance(labels, dict) else []
    return Opened(found, bundle.main, None, tokenizer, scheduler, size, class_names=names)


def _check_index(folder: Path, index: dict[str, Any]) -> None:
    """A pipeline's folder is of a kind that jdiff opens, and whole."""
    if index.get("_class_name") not in FOLDERS:
        raise convert.ConversionError(f"{folder} holds a {index.get('_class_name')}; jdiff opens {', '.join(FOLDERS)}")
    for name, value in index.items():
        known = name in OPENED or name in PASSED_OVER or name.startswith("_")
        if not known and value not in (None, [None, None]):
            raise convert.ConversionError(f"{folder}: model_index.json has {name}={value}, which jdiff does not have")
    if missing := [name for name in FOLDERS[index["_class_name"]] if not (folder / name).is_dir()]:
        raise convert.ConversionError(f"{folder} lacks the folder(s) {', '.join(missing)}")


def tokenizer_folder(source: str | Path) -> Path:
    """A tokenizer's folder, given it, the pipeline's that holds it, or either's place on the hub."""
    folder = convert.locate(source)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def open_bundle(
    source: str | Path, *, weights: Weights | None = None, heads: int | None = None, mixed: bool = False
) -> tuple[convert.Bundle, dict[str, Any]]:
    """(a checkpoint or run as `convert.write` takes it, what that needs besides: a run's scheduler and tokenizer).

    Arguments are `convert.read`'s; a run's moving average is taken unless weights is "raw". ValueError for a LoRA run.
    """
    path = convert.locate(source, weights)
    if not (path / "checkpoints").is_dir():
        return convert.read(path, weights=weights, heads=heads, mixed=mixed), {}
    found, meta = load_run(path, weights=weights or "ema")
    if "lora" in meta:
        raise ValueError(f"{source} is a LoRA run: give its base, {meta['config']['init_from']}, and the run as LORA")
    words = path / "tokenizer" if (path / "tokenizer").is_dir() else None
    return convert.from_models(found), {"scheduler": meta.get("scheduler"), "tokenizer": words}


def load_run(
    workdir: Path, *, weights: str = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[dict[str, tuple[Any, Any]], dict[str, Any]]:
    """({name: (model, params)}, metadata): every model that the run's metadata describes; arguments are `load`'s.

    A LoRA run's models are those of its base, its adapters attached.
    """
    (found, _), meta = _load_run(workdir, weights, step, mesh)
    return found, meta


def _load_run(
    workdir: Path, weights: str, step: int | None, mesh: Mesh | None
) -> tuple[tuple[dict[str, tuple[Any, Any]], dict[str, jax.Array] | None], dict[str, Any]]:
    """((`load_run`'s models, `Opened.scales`), metadata)."""
    mesh = mesh or sharding.make_mesh()

    def read(step: int, meta: dict[str, Any]) -> tuple[dict[str, tuple[Any, Any]], dict[str, jax.Array] | None]:
        if "lora" in meta:
            return _adapted(workdir, step, meta, weights, mesh), None
        dtype = DTYPES[meta["config"]["precision"]]
        found = {name: models.build(record, dtype) for name, record in meta["models"].items()}
        full = _restore(workdir, step, meta, weights, mesh, found)
        return {name: (model, full[name]) for name, model in found.items()}, learned_scales(full, meta["main"])

    return _newest(workdir, weights, step, read)


def learned_scales(full: Any, name: str) -> dict[str, jax.Array] | None:
    """A model's scales by its kernels' paths, of a tree in training or a run's; None where none were learned."""
    if "scales" not in full:
        return None
    return {path.removesuffix("/scale"): scale for path, scale in tree.flatten(full["scales"][name]).items()}


def load_adapters(
    workdir: Path, *, weights: str = "ema", step: int | None = None, mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """(adapters by model, metadata) of a LoRA run; arguments are `load`'s. CheckpointError when it is another kind of run."""
    mesh = mesh or sharding.make_mesh()

    def read(step: int, meta: dict[str, Any]) -> Any:
        if "lora" not in meta:
            raise checkpoint.CheckpointError(f"{workdir} is no LoRA run: its checkpoints hold whole models")
        return _adapters(workdir, step, meta, weights, mesh)

    return _newest(workdir, weights, step, read)


def _adapters(workdir: Path, step: int, meta: dict[str, Any], weights: str, mesh: Mesh) -> Any:
    full = _restore(workdir, step, meta, weights, mesh, {})
    return lora.relative(full["lora"], full["start"]) if "start" in full else full["lora"]


def _newest(workdir: Path, weights: str, step: int | None, read: Any) -> tuple[Any, dict[str, Any]]:
    """(what `read(step, metadata)` makes of the newest whole checkpoint or of `step`, its metadata)."""
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

    def of(step: int) -> tuple[Any, dict[str, Any]]:
        meta = checkpoint.read_meta(workdir, step)
        return read(step, meta), meta

    return of(step) if step is not None else checkpoint.newest_whole(there, of)


def _restore(workdir: Path, step: int, meta: dict[str, Any], weights: str, mesh: Mesh, found: dict[str, Any]) -> Any:
    """A checkpoint's full tree. found: the modules that it must fit, by name."""
    item, where = "ema_params" if weights == "ema" else "params", sharding.replicated(mesh)
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
    return tree.merge(items[item], items["frozen"])


def _adapted(workdir: Path, step: int, meta: dict[str, Any], weights: str, mesh: Mesh) -> dict[str, tuple[Any, Any]]:
    """A LoRA run's base, its adapters attached."""
    base = open_checkpoint(meta["config"]["init_from"], mesh=mesh, dtype=DTYPES[meta["config"]["precision"]])
    params = on(mesh, {name: base.models[name][1] for name in meta["models"]})
    check_base(meta["lora"], params, f"{workdir}: init_from={meta['config']['init_from']}")
    attached = lora.attach(params, _adapters(workdir, step, meta, weights, mesh), 1.0)
    return {name: (base.models[name][0], attached[name]) for name in meta["models"]}


def check_base(record: dict[str, Any], params: Any, what: str, before: Mapping[str, str] | None = None) -> None:
    """ValueError when params (by model) are not those that the adapters of a LoRA run's record were trained on. before: their
    fingerprints before they were quantized, by model, which will do."""
    for name, digest in record["base"].items():
        if digest != (before or {}).get(name) and digest != tree.fingerprint(params[name]):
            raise ValueError(
                f"{what} holds another {name} than the adapters were trained on: give that base, or train with "
                "--config.lora.any_base=true to take this one"
            )


def attach(
    modules: Mapping[str, Any], params: Any, loras: Loras, mesh: Mesh, quantized_as: Quantized | None = None
) -> tuple[Any, list[tuple[str, float]]]:
    """(params, by model, with the adapters of some files or LoRA runs attached, each one's name and strength).

    modules: params' own, by name. quantized_as: `Opened.quantized`. ValueError when a file has adapters for a model that is not
    among params, or a run's were trained on another base, or they do not fit a balanced copy.
    """
    base, names = params, []
    modules = {name: modules[name] for name in params}
    for entry in loras:
        path, strength = entry if isinstance(entry, tuple) else (entry, 1.0)
        if (Path(path) / "checkpoints").is_dir():
            adapters, meta = load_adapters(Path(path), mesh=mesh)
            check_base(meta["lora"], base, f"the base of lora={path}", quantized_as and quantized_as.digests)
        elif quantized_as is not None and quantized_as.balanced:
            raise ValueError(f"lora={path}: adapters of others do not fit a balanced copy: make one without --balance")
        else:
            adapters = lora_files.fit(lora_files.read(convert.locate(path)), modules)
        params = lora.attach(params, on(mesh, adapters), float(strength))
        names.append((Path(path).stem, float(strength)))
    return params, names


def pipeline(
    path: str | Path,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    mesh: Mesh | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    vae_precision: Literal["fp32", "bf16"] = "fp32",
    tokenizer: str | Path | None = None,
    lora: Loras = (),
    quantize: str | None = None,
) -> ClassPipeline | TextPipeline:
    """A sampler for a training run, with its own settings of the diffusion, or for any checkpoint that `convert.read` reads:
    Stable Diffusion in diffusers' layout or in CompVis' single file, or a DiT, which samples as the official code does.

    weights, step: of a run, as in `load`. mesh: all devices when None. precision: of the models' work: the run's own, or
    "fp32" for others, when None. vae_precision: of the autoencoder's. tokenizer: its folder or hub repository, which a single
    file of CompVis needs. lora: adapters to attach, `[("a.safetensors", 0.8), "b.safetensors"]`; their strengths are changed by
    the pipeline's `set_lora_scale`. quantize: a recipe of `quant.RECIPES`, for what tools/quantize.py has not quantized already.
    Raises CheckpointError, ConversionError or ValueError, in one line, for what is missing or not supported.
    """
    mesh = mesh or sharding.make_mesh()
    for name, value in (("precision", precision), ("vae_precision", vae_precision)):
        if value not in (None, *DTYPES):
            raise ValueError(f"{name}={value!r} is unknown; use {' or '.join(map(repr, DTYPES))}")
    dtype = None if precision is None else DTYPES[precision]
    opened = open_checkpoint(path, weights=weights, step=step, mesh=mesh, dtype=dtype)
    opened = opened if quantize is None else quantized(opened, quantize, lora)
    if opened.main == "dit":
        base = on(mesh, {"dit": opened.models["dit"][1]})
        params, names = attach(opened.modules, base, lora, mesh, opened.quantized)
        pipe = _class_pipeline(opened, params["dit"], names, mesh, DTYPES[vae_precision])
    else:
        words = _check_text(path, opened, tokenizer)
        base = on(mesh, {name: params for name, (_, params) in opened.models.items()})
        params, names = attach(opened.modules, base, lora, mesh, opened.quantized)
        pipe = _text_pipeline(opened, words, params, names, mesh, DTYPES[vae_precision])
    pipe.quantized = opened.quantized
    return pipe


def _check_text(path: str | Path, opened: Opened, tokenizer: str | Path | None) -> Tokenizer:
    """The tokenizer of a model of texts, its own or another's; ConversionError or ValueError for what is missing."""
    if opened.meta is not None and opened.main != "unet":
        task = opened.meta["config"]["task"]
        raise ValueError(f"{path} is a run of {task}, which makes no pictures of its own: use jdiff.load")
    if missing := {"unet", "vae", "text"} - set(opened.models):
        raise convert.ConversionError(
            f"{path} holds no {' and no '.join(sorted(missing))}, which making pictures takes"
        )
    if opened.tokenizer is not None:
        return opened.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizer: give tokenizer=, its folder or the hub's openai/clip-vit-large-patch14"
        )
    return Tokenizer.from_folder(tokenizer_folder(tokenizer))


def _text_pipeline(
    opened: Opened, words: Tokenizer, params: Any, loras: list[tuple[str, float]], mesh: Mesh, vae_dtype: Any
) -> TextPipeline:
    """The pipeline of a UNet, its text encoder and its autoencoder."""
    modules, record = opened.modules, opened.scheduler
    return TextPipeline(
        modules["unet"],
        modules["vae"].clone(dtype=vae_dtype),
        modules["text"],
        words,
        schedulers.make_scheduler("pndm") if record is None else schedulers.from_config(record),
        params,
        mesh=mesh,
        size=opened.size or 512,
        clip_skip=opened.clip_skip,
        loras=loras,
    )


def _class_pipeline(
    opened: Opened, params: Any, loras: list[tuple[str, float]], mesh: Mesh, vae_dtype: Any
) -> ClassPipeline:
    """The pipeline of a DiT; its latents are shown through its autoencoder where it has one, else by a run's preview."""
    model, meta, preview = opened.models["dit"][0], opened.meta, None
    config = configs.default() if meta is None else configs.from_dict(meta["config"])
    if meta is not None and config.data.name == "latents":
        from jdiff.data.latents import Latents

        preview = Latents(config.data.path).preview
    elif "vae" in opened.models:
        vae, vae_params = opened.models["vae"][0].clone(dtype=vae_dtype), on(mesh, opened.models["vae"][1])
        preview = partial(_decoded, jax.jit(partial(_decode, vae)), vae_params, mesh)
    process = make_process(config.diffusion, model.learn_sigma)
    settings = {"class_names": opened.class_names, "preview": preview, "loras": loras}
    return ClassPipeline(model, params, process, mesh=mesh, **settings)


def _decode(vae: Any, params: Any, z_BhwC: jax.Array) -> jax.Array:
    return vae.apply({"params": params}, z_BhwC / vae.scaling_factor, method="decode").astype(jnp.float32)


def _decoded(decode: Any, params: Any, mesh: Mesh, z_BhwC: np.ndarray) -> np.ndarray:
    """Latents as pictures, as many at once as there are devices: uint8 (B, H, W, 3)."""
    parts = np.array_split(z_BhwC, range(mesh.size, len(z_BhwC), mesh.size))
    made = [gather(decode(params, spread(mesh, {"z": z})["z"]))[: len(z)] for z in parts]
    return to_uint8(np.concatenate(made))

"""What an experiment consists of: every key with its default, and the checks made before anything is compiled."""

import math
import runpy
import traceback
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jdiff.tree import nearest

Config: TypeAlias = Any
"""An `ml_collections.ConfigDict`, whose attributes no type checker can know."""


def default(task: str = "class_to_image") -> Config:
    """All keys of a task. A config file starts from this and changes what it needs; a None has the type given in `placeholder`.

    Locked: setting a key that is not here is an error. ValueError for a task that there is not.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown{nearest(task, TASKS)}; the tasks are {list(TASKS)}")
    values = {
        "task": task,
        "init_from": placeholder(str),  # any checkpoint to start from: its models, and what belongs to them
        "seed": 0,
        "total_steps": 400_000,
        "batch_size": 256,  # global: rows of all devices and all accumulation steps together
        "accumulate": 1,  # gradient accumulation: micro-batches a step
        "precision": "fp32",  # of the computation: fp32 | bf16; parameters, loss and optimizer are fp32
        "log_every": 50,
        "sample_every": 5_000,
        "checkpoint_every": 5_000,
        "keep": 3,  # checkpoints kept
        "max_refused": 10,  # consecutive steps refused for a non-finite loss or gradient before the run stops
        "data": {
            "name": "openmoji",  # openmoji | captions | imagefolder | tfds | latents | noise
            "path": placeholder(str),  # a folder, or the TFDS name; of noise its shape and classes, as 32x32x4:1000
            "only": placeholder(str),  # classes, by comma; None reads all
            "split": "all",  # of openmoji: all | train | heldout (a tenth)
            "image_size": 32,
            "flip": True,
            "workers": 0,  # decoding processes; 0 decodes in a thread, the quickest for small pictures
            "max_bad_rate": 0.35,  # share of broken images above which the run stops
        },
        **TASKS[task](),
        "lora": {  # adapters, trained in place of the models of init_from
            "rank": 0,  # 0: none, and the models themselves are trained
            "alpha": placeholder(float),  # None: the rank, a scale of 1
            # names of jdiff.lora.TARGETS or regexes of paths, PATTERN@RANK/ALPHA for sizes of their own
            "targets": ("attn",),
            "method": "kaiming",  # kaiming | gaussian | pissa: how they begin
            "rslora": False,  # scale alpha / sqrt(rank)
            "dora": False,
            "dropout": 0.0,
            "plus_ratio": 1.0,  # LoRA+: the learning rate of b over that of a
            "any_base": False,  # a resumed run may go on with another base
        },
        "optim": {
            "lr": 1e-4,
            "schedule": "constant",  # constant | cosine | linear
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip_norm": placeholder(float),
        },
        "ema": {"decay": 0.9999, "warmup": False},
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "log": {"tensorboard": True, "wandb": "off"},  # wandb: off | online | offline
    }
    return ConfigDict(values).lock()


QUANT = {
    "mode": "none",  # none | train: the model acts as what it will be rounded to | lsq: and learns the scales
    "recipe": "w8a8",  # w8a8 | w8 | w4
}
"""Training through integers, of the tasks that have it."""


def _class_to_image() -> dict[str, Any]:
    """Labels to pictures or latents with a DiT."""
    return {
        "model": {
            "name": "DiT-S/2",
            # the fields of the model that may be overridden; None keeps the named model's own
            "patch_size": placeholder(int),
            "width": placeholder(int),
            "depth": placeholder(int),
            "heads": placeholder(int),
            "mlp_ratio": placeholder(float),
            "learn_sigma": placeholder(bool),
            "label_dropout": placeholder(float),
            "qk_norm": placeholder(bool),
            "scan_layers": placeholder(bool),
            "remat": placeholder(str),  # none | dots | full
        },
        "diffusion": {
            "kind": "gaussian",  # gaussian | flow
            "schedule": "linear",  # linear | scaled_linear | cosine
            "zero_terminal_snr": False,
            "prediction_type": "eps",  # eps | v | x0
            "variance": "fixed_small",  # fixed_small | fixed_large; a learn_sigma model has learned_range
            "snr_gamma": placeholder(float),  # Min-SNR-gamma
            "time_sampling": "uniform",  # of flow's t: uniform | logit_normal
        },
        "sample": {
            "sampler": "ddim",  # ddpm | ddim for gaussian; euler | heun for flow
            "steps": 50,
            "guidance": 4.0,
            "count": 16,  # pictures a grid; labels go round
        },
        "quant": dict(QUANT),
        "distill": {
            # a checkpoint of classes; its output, on pictures of its own, is what is trained for then, and no data are read
            "teacher": placeholder(str),
            "count": 512,  # of these pictures, made as those of `sample`
        },
        "eval_every": 0,  # steps between scores of the average's samples, made as those of `sample`; 0: none
        "eval": {
            "network": placeholder(str),  # whose features: a classifier's run, Inception's file or CLIP's folder
            "metrics": ("fid", "kid"),  # fid | sfid | kid | is | precision | recall
            "num": 1_000,  # samples; labels go round
            "reference": 10_000,  # pictures of the data at most
            "resamples": 20,  # bootstrap sets for an interval
        },
    }


def _text_to_image() -> dict[str, Any]:
    """Captions to pictures or latents with a UNet, a text encoder and a fixed autoencoder: Stable Diffusion."""
    return {
        "unet": {  # see models.UNet; of these init_from leaves remat alone to be set
            "block_out_channels": (320, 640, 1280, 1280),
            "attention": (True, True, True, False),
            "heads": (8, 8, 8, 8),
            "layers_per_block": 2,
            "transformer_depth": 1,
            "norm_num_groups": 32,
            "linear_projection": False,
            "remat": "none",  # none | attention | full
        },
        "text": {  # see models.CLIPText; of these init_from leaves train and clip_skip to be set
            "train": False,
            "clip_skip": 0,
            "vocab_size": 49408,  # at most, of a tokenizer learnt from the captions
            "width": 768,
            "hidden": 3072,
            "layers": 12,
            "heads": 12,
            "max_length": 77,
            "activation": "quick_gelu",  # quick_gelu | gelu
            "tokenizer": placeholder(str),  # a folder or hub repository, where init_from is a file, which has none
        },
        "vae": {"path": placeholder(str)},  # any checkpoint of one; init_from's when None
        "captions": {
            "shuffle_tags": False,  # captions are tags, joined by ", ", in a new order at each reading
            "keep_tags": 1,  # of them, how many stay in front
            "on_long": "error",  # error | truncate_loudly: captions beyond the tokenizer's length
            "prompt": placeholder(str),  # of all pictures in a folder without captions: DreamBooth's instance prompt
        },
        "prior": {  # DreamBooth's pictures of the subject's class, half of each epoch
            "path": placeholder(str),  # a folder of them
            "prompt": placeholder(str),  # of all of them, where they have no captions
            "weight": 1.0,  # of their loss
        },
        "buckets": {
            "use": False,  # pictures of many shapes, about data.image_size squared in area
            "step": 64,  # what their sides are multiples of
            "max_ratio": 2.0,
        },
        "diffusion": {
            # both are init_from's when None; without it scaled_linear, as Stable Diffusion's, and eps
            "schedule": placeholder(str),  # linear | scaled_linear | cosine
            "prediction_type": placeholder(str),  # eps | v | x0
            "zero_terminal_snr": False,
            "snr_gamma": placeholder(float),  # Min-SNR-gamma
            "caption_dropout": 0.1,
            "noise_offset": 0.0,
            "input_perturbation": 0.0,
            "timestep_bias": {
                "strategy": "none",  # none | later | earlier | range
                "multiplier": 1.0,
                "begin": 0,  # of range
                "end": 1000,
                "portion": 0.25,  # of later and earlier
            },
        },
        "sample": {
            "scheduler": "ddim",  # see diffusion.SCHEDULERS
            "steps": 50,
            "guidance": 7.5,
            "prompts": ("a red apple", "a house by the sea", "a portrait of a woman", "a dog in the snow"),
        },
        "quant": dict(QUANT),
    }


def _autoencoder() -> dict[str, Any]:
    """Pictures to latents and back: AutoencoderKL with a PatchGAN."""
    return {
        "vae": {
            "block_out_channels": (128, 256, 512, 512),  # a level each, from the picture's size down by halves
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": 32,
        },
        "loss": {
            "kl_weight": 1e-6,
            "edge_weight": 0.0,  # of our stand-in for LPIPS, see tasks/autoencoder_loss.py; 0 leaves it out
        },
        "lpips": {
            "path": placeholder(str),  # safetensors of VGG16 and LPIPS' weights, a file or a folder; None: no LPIPS
            "weight": 1.0,
        },
        "gan": {
            "start": 50_001,  # the first step with a discriminator
            "weight": 0.5,  # times the adaptive weight
            "width": 64,
        },
        "heldout": {
            "path": placeholder(str),  # pictures for psnr and ssim; openmoji's are those that data.split=train leaves
            "count": 256,
        },
        "sample": {"count": 16},  # held-out pictures a grid
    }


def _classifier() -> dict[str, Any]:
    """Pictures to their class: features for scores."""
    return {
        "model": {"widths": (32, 64, 128), "norm_num_groups": 8},
        "loss": {"label_smoothing": 0.1},
        "heldout": {
            "path": placeholder(str),  # as of an autoencoder
            "count": 256,
        },
        "sample": {"rows": 4},  # of a grid of held-out pictures, a column for each class they are taken for
    }


TASKS = {
    "class_to_image": _class_to_image,
    "text_to_image": _text_to_image,
    "autoencoder": _autoencoder,
    "classifier": _classifier,
}
"""What can be trained, and the keys that only it has."""
CHOICES = {
    "precision": ("fp32", "bf16"),
    "data.name": ("openmoji", "captions", "imagefolder", "tfds", "latents", "noise"),
    "data.split": ("all", "train", "heldout"),
    "diffusion.kind": ("gaussian", "flow"),
    "diffusion.schedule": ("linear", "scaled_linear", "cosine"),
    "diffusion.prediction_type": ("eps", "v", "x0"),
    "diffusion.variance": ("fixed_small", "fixed_large"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "diffusion.timestep_bias.strategy": ("none", "later", "earlier", "range"),
    "model.remat": ("none", "dots", "full"),
    "unet.remat": ("none", "attention", "full"),
    "captions.on_long": ("error", "truncate_loudly"),
    "quant.mode": ("none", "train", "lsq"),
    "quant.recipe": ("w8a8", "w8", "w4"),
    "lora.method": ("kaiming", "gaussian", "pissa"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "log.wandb": ("off", "online", "offline"),
}
"""Keys (of whichever task has them) and their values."""
SAMPLERS = {"gaussian": ("ddpm", "ddim"), "flow": ("euler", "heun")}
POSITIVE = (
    *("total_steps", "batch_size", "accumulate", "log_every", "sample_every", "checkpoint_every", "keep"),
    *("max_refused", "data.image_size", "optim.lr", "optim.eps", "optim.clip_norm", "sample.steps", "sample.count"),
    *("diffusion.snr_gamma", *(f"model.{field}" for field in ("patch_size", "width", "depth", "heads", "mlp_ratio"))),
    *(f"unet.{field}" for field in ("block_out_channels", "heads", "layers_per_block", "transformer_depth")),
    *("unet.norm_num_groups", *(f"text.{field}" for field in ("vocab_size", "width", "hidden", "layers", "heads"))),
    *("text.max_length", "buckets.step", "diffusion.timestep_bias.multiplier"),
    *("vae.block_out_channels", "vae.layers_per_block", "vae.latent_channels", "vae.norm_num_groups"),
    *("gan.width", "heldout.count", "distill.count", "lora.alpha", "lora.plus_ratio"),
    *("model.widths", "model.norm_num_groups", "sample.rows", "eval.num", "eval.reference"),
)
"""Keys whose value, where one is set, is above 0: each number of a list."""
NOT_NEGATIVE = (
    *("seed", "data.workers", "optim.warmup_steps", "optim.weight_decay", "text.clip_skip", "captions.keep_tags"),
    *("diffusion.noise_offset", "diffusion.input_perturbation", "lora.rank", "prior.weight"),
    *("loss.kl_weight", "loss.edge_weight", "lpips.weight", "gan.start", "gan.weight", "eval_every", "eval.resamples"),
)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config (or a plain nested dict of one) as `{"optim.lr": 1e-4, …}`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """The config that a plain nested dict (a checkpoint's record) describes; keys unknown to its task are an error.

    A JSON list stands for a tuple; without a `task` it is of class_to_image.
    """
    config = default(values.get("task", "class_to_image"))
    known = flat(config)
    for key, value in flat(values).items():
        if key not in known:
            raise ValueError(f"unknown config key {key!r}{nearest(key, known)}")
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return config


def check(config: Config, devices: int = 1) -> None:
    """Raises a ValueError of one line for the first key whose value cannot work, `devices` being those of the mesh that a
    batch's rows are spread over."""
    values = flat(config)
    known = flat(default(values["task"]))
    if values.keys() != known.keys():
        wrong = sorted(values.keys() ^ known.keys())
        raise ValueError(
            f"task={values['task']!r} has other keys than this config ({wrong[0]}): start from default(task)"
        )
    choices = CHOICES | {"sample.sampler": SAMPLERS.get(values.get("diffusion.kind", ""), ())}
    for key, allowed in choices.items():
        if key in values and values[key] not in allowed and not (values[key] is None and known[key] is None):
            raise ValueError(f"{key}={values[key]!r} is not one of {list(allowed)}{nearest(str(values[key]), allowed)}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is not a finite number")
    for key in POSITIVE:
        value = values.get(key)
        if value is not None and not all(v > 0 for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{key}={value} must be above 0")
    for key in NOT_NEGATIVE:
        if values.get(key, 0) < 0:
            raise ValueError(f"{key}={values[key]} must not be below 0")
    for key in (
        "ema.decay",
        "data.max_bad_rate",
        "model.label_dropout",
        "diffusion.caption_dropout",
        "loss.label_smoothing",
    ):
        value = values.get(key)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{key}={value} must lie between 0 and 1")
    for key in ("optim.b1", "optim.b2", "lora.dropout"):
        if not 0 <= values[key] < 1:
            raise ValueError(f"{key}={values[key]} must be at least 0 and below 1")
    if values["task"] == "class_to_image":
        _check_diffusion(values)
    if "quant.mode" in values:
        _check_quant(values)
    if values["data.name"] != "openmoji" and values["data.split"] != "all":
        raise ValueError(
            f"data.split={values['data.split']!r} is openmoji's; data.name={values['data.name']!r} has one split"
        )
    if values["data.name"] != "openmoji" and not values["data.path"]:
        raise ValueError(f"data.path is missing, and data.name={values['data.name']!r} needs it: --config.data.path=…")
    check_batch(config.batch_size, config.accumulate, devices)


def _check_diffusion(values: dict[str, Any]) -> None:
    if values["diffusion.zero_terminal_snr"] and values["diffusion.prediction_type"] == "eps":
        raise ValueError(
            "diffusion.prediction_type='eps' is undefined with diffusion.zero_terminal_snr; use 'v' or 'x0'"
        )
    if values["diffusion.kind"] == "gaussian" and values["sample.steps"] > 1000:
        raise ValueError(f"sample.steps={values['sample.steps']} is more than the schedule's 1000")
    if values["eval_every"] and values["eval.network"] is None:
        raise ValueError(
            f"eval_every={values['eval_every']} needs a network to score by: --config.eval.network=…, a run of "
            "configs/classifier_openmoji.py or Inception's file; or set 0"
        )


def _check_quant(values: dict[str, Any]) -> None:
    mode, recipe = values["quant.mode"], values["quant.recipe"]
    if mode == "none" and recipe != QUANT["recipe"]:
        raise ValueError(f"quant.recipe={recipe!r} does nothing with quant.mode='none': set train or lsq")
    if mode != "none" and values["lora.rank"]:
        raise ValueError(
            f"quant.mode={mode!r} trains the model itself, and lora.rank={values['lora.rank']} adapters: set one of them; "
            "adapters over integers are trained on a quantized init_from"
        )
    if mode == "lsq" and values["init_from"] is None:
        raise ValueError("quant.mode='lsq' needs init_from: its scales start from the kernels of a trained model")


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Refuses a batch that does not divide over devices and accumulation, naming the nearest that do."""
    unit = accumulate * devices
    if batch_size % unit:
        near = sorted({max(batch_size // unit, 1) * unit, (batch_size // unit + 1) * unit})
        raise ValueError(
            f"batch_size={batch_size} does not divide over {devices} device(s) x accumulate={accumulate}; "
            f"the nearest that do are {' and '.join(map(str, near))}"
        )


def load_file(path: str) -> Config:
    """Runs a config file's `get_config()`; ValueError when there is no such file or function."""
    file = Path(path)
    if not file.is_file():
        there = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise ValueError(f"--config={path}: no such file{nearest(path, there)}")
    try:
        module = runpy.run_path(str(file), run_name="jdiff_config")
        config = module["get_config"]() if "get_config" in module else None
    except Exception as error:  # the file is the user's own code
        lines = [
            f":{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
        ]
        text = " ".join(str(error).split())
        raise ValueError(f"--config={path}{lines[-1] if lines else ''}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={path}: the file has no function get_config() that returns a config")
    return config


def override(config: Config, key: str, text: str) -> None:
    """Sets `key` (as `optim.lr`) to what `text` says, which must be of the key's type; `none` empties an optional key
    that has no such value of its own. A key of several numbers takes them by comma, as `--config.vae.block_out_channels=32,64`.

    ValueError names an unknown key with the nearest that exists, or the type that was expected.
    """
    known = flat(config)
    if key == "task":
        raise ValueError("task is set by the config file, whose other keys depend on it; choose another --config")
    if key not in known:
        groups = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
        hint = f"; it is a group of {[k for k in known if k.startswith(key + '.')]}" if key in groups else ""
        raise ValueError(f"unknown config key {key!r}{hint or nearest(key, known)}")
    *parents, name = key.split(".")
    group = config
    for parent in parents:
        group = group[parent]
    empties = text.lower() == "none" and "none" not in CHOICES.get(key, ())
    if empties and flat(default(config.task)).get(key, text) is None:
        group[name] = None
    elif isinstance(group[name], tuple):
        kind = type(group[name][0])
        listed = text if kind is str else text.strip("()[] ")  # a text may itself begin with a bracket
        group[name] = tuple(_parse(key, part.strip(), kind) for part in listed.rstrip(",").split(","))
    else:
        group[name] = _parse(key, text, group.get_type(name))


def _parse(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            return text.lower() in ("true", "1", "yes", "on")
        raise ValueError(f"{key}={text!r} is not a boolean: use true or false")
    try:
        return kind(text.replace("_", "")) if kind in (int, float) else kind(text)
    except ValueError:
        raise ValueError(f"{key}={text!r} is not of type {kind.__name__}") from None

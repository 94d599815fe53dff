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


def default() -> Config:
    """All keys. A config file starts from this and changes what it needs; a None has the type given in `placeholder`.

    Locked: setting a key that is not here is an error.
    """
    config = ConfigDict(
        {
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
                "name": "openmoji",  # openmoji | imagefolder | tfds | latents
                "path": placeholder(str),  # a folder, or the TFDS name
                "image_size": 32,
                "flip": True,
                "workers": 0,  # decoding processes; 0 decodes in a thread, the quickest for small pictures
                "max_bad_rate": 0.35,  # share of broken images above which the run stops
            },
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
            "mesh": {"data": -1, "fsdp": 1},
            "sample": {
                "sampler": "ddim",  # ddpm | ddim for gaussian; euler | heun for flow
                "steps": 50,
                "guidance": 4.0,
                "count": 16,  # pictures a grid; labels go round
            },
            "log": {"tensorboard": True, "wandb": "off"},  # wandb: off | online | offline
        }
    )
    return config.lock()


CHOICES = {
    "precision": ("fp32", "bf16"),
    "data.name": ("openmoji", "imagefolder", "tfds", "latents"),
    "diffusion.kind": ("gaussian", "flow"),
    "diffusion.schedule": ("linear", "scaled_linear", "cosine"),
    "diffusion.prediction_type": ("eps", "v", "x0"),
    "diffusion.variance": ("fixed_small", "fixed_large"),
    "diffusion.time_sampling": ("uniform", "logit_normal"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "log.wandb": ("off", "online", "offline"),
}
SAMPLERS = {"gaussian": ("ddpm", "ddim"), "flow": ("euler", "heun")}
POSITIVE = (
    *("total_steps", "batch_size", "accumulate", "log_every", "sample_every", "checkpoint_every", "keep"),
    *("max_refused", "data.image_size", "optim.lr", "optim.eps", "optim.clip_norm", "sample.steps", "sample.count"),
    *("diffusion.snr_gamma", *(f"model.{field}" for field in ("patch_size", "width", "depth", "heads", "mlp_ratio"))),
)
"""Keys whose value, where one is set, is above 0."""
NOT_NEGATIVE = ("seed", "data.workers", "optim.warmup_steps", "optim.weight_decay")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config (or a plain nested dict of one) as `{"optim.lr": 1e-4, …}`."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        values |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """The config that a plain nested dict (a checkpoint's record) describes; keys unknown to `default` are an error."""
    config, known = default(), flat(default())
    for key, value in flat(values).items():
        if key not in known:
            raise ValueError(f"unknown config key {key!r}{nearest(key, known)}")
        config.update_from_flattened_dict({key: value})
    return config


def check(config: Config, devices: int = 1) -> None:
    """Raises a ValueError of one line for the first key whose value cannot work, `devices` being the mesh's size."""
    values = flat(config)
    choices = CHOICES | {"sample.sampler": SAMPLERS.get(values["diffusion.kind"], ())}
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise ValueError(f"{key}={values[key]!r} is not one of {list(allowed)}{nearest(str(values[key]), allowed)}")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} is not a finite number")
    for key in POSITIVE:
        if values[key] is not None and not values[key] > 0:
            raise ValueError(f"{key}={values[key]} must be above 0")
    for key in NOT_NEGATIVE:
        if values[key] < 0:
            raise ValueError(f"{key}={values[key]} must not be below 0")
    for key in ("ema.decay", "data.max_bad_rate", "model.label_dropout"):
        if values[key] is not None and not 0 <= values[key] <= 1:
            raise ValueError(f"{key}={values[key]} must lie between 0 and 1")
    for key in ("optim.b1", "optim.b2"):
        if not 0 <= values[key] < 1:
            raise ValueError(f"{key}={values[key]} must be at least 0 and below 1")
    if values["diffusion.zero_terminal_snr"] and values["diffusion.prediction_type"] == "eps":
        raise ValueError(
            "diffusion.prediction_type='eps' is undefined with diffusion.zero_terminal_snr; use 'v' or 'x0'"
        )
    if values["diffusion.kind"] == "gaussian" and values["sample.steps"] > 1000:
        raise ValueError(f"sample.steps={values['sample.steps']} is more than the schedule's 1000")
    if values["data.name"] in ("imagefolder", "tfds", "latents") and not values["data.path"]:
        raise ValueError(f"data.path is missing, and data.name={values['data.name']!r} needs it: --config.data.path=…")
    check_batch(config.batch_size, config.accumulate, devices)


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
    """Sets `key` (as `optim.lr`) to what `text` says, which must be of the key's type; `none` empties an optional key.

    ValueError names an unknown key with the nearest that exists, or the type that was expected.
    """
    known = flat(config)
    if key not in known:
        groups = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
        hint = f"; it is a group of {[k for k in known if k.startswith(key + '.')]}" if key in groups else ""
        raise ValueError(f"unknown config key {key!r}{hint or nearest(key, known)}")
    *parents, name = key.split(".")
    group = config
    for parent in parents:
        group = group[parent]
    kind = group.get_type(name)
    if text.lower() == "none" and flat(default()).get(key, text) is None:
        group[name] = None
    else:
        group[name] = _parse(key, text, kind)


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

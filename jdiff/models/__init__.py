"""The models by name, by record, and by a PyTorch checkpoint's configuration."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jdiff.tree import nearest

CLASSES = {
    "DiT": "dit",
    "UNet": "unet",
    "AutoencoderKL": "vae",
    "CLIPText": "clip",
    "CLIP": "clip_pair",
    "Classifier": "classifier",
}
"""Every model's class and its file."""


def _class(name: str) -> Any:
    return getattr(importlib.import_module(f"jdiff.models.{CLASSES[name]}"), name)


def _named() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (class, fields)."""
    found = {}
    for cls, file in CLASSES.items():
        configs = importlib.import_module(f"jdiff.models.{file}").CONFIGS
        found |= {name: (cls, fields) for name, fields in configs.items()}
    return found


def _fields(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]


def list_models() -> list[str]:
    """The names that `create` takes."""
    return list(_named())


def create(name: str, **overrides: Any) -> Any:
    """The module called `name`, any of its fields overridden: `create("DiT-S/2", num_classes=10, depth=6)`.

    ValueError names an unknown model or field and the nearest that exists.
    """
    named = _named()
    if name not in named:
        raise ValueError(f"unknown model {name!r}{nearest(name, named)}; the models are {list(named)}")
    cls, fields = _class(named[name][0]), named[name][1]
    for key in overrides:
        if key not in _fields(cls):
            raise ValueError(
                f"{name} has no setting {key!r}{nearest(key, _fields(cls))}; its settings are {_fields(cls)}"
            )
    return cls(**{**fields, **overrides})


def describe(module: Any) -> dict[str, Any]:
    """What a model is, as plain values that JSON holds: its class and its fields. How it is run (dtype) is left out."""
    values = {name: getattr(module, name) for name in _fields(type(module)) if name != "dtype"}
    return {"class": type(module).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def build(record: Mapping[str, Any], dtype: Any = jnp.float32) -> Any:
    """Undoes `describe`. ValueError for a class or field that this jdiff does not know."""
    values = dict(record)
    name = values.pop("class", None)
    if name not in CLASSES:
        raise ValueError(f"a model's record has the class {name!r}; this jdiff knows {list(CLASSES)}: update jdiff")
    cls = _class(name)
    for key in values:
        if key not in _fields(cls):
            raise ValueError(
                f"a record of {name} has the unknown field {key!r}{nearest(key, _fields(cls))}: update jdiff"
            )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, dtype=dtype)


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Any:
    """The module that a diffusers or transformers `config.json` describes: UNet2DConditionModel, AutoencoderKL, CLIPTextModel,
    CLIPModel.

    Every key is read, known to change nothing, or refused in a ValueError that names it.
    """
    from jdiff.models import configs

    name, fields = configs.read(config)
    return _class(name)(**fields, dtype=dtype)

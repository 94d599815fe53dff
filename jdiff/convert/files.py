"""Files of a diffusers or transformers folder: config.json and safetensors. Nothing here runs code from a file."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff import models
from jdiff.convert.engine import ConversionError, from_torch

NAMES = ("diffusion_pytorch_model", "model")
"""How a component's weights are called, before `[.fp16].safetensors`; diffusers' components first, then transformers'."""


def read_config(folder: Path) -> dict[str, Any]:
    """A component folder's config.json; ConversionError when it is missing or no JSON object."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{folder} is no component folder: {file} is missing") from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{file} holds no object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: one, or the shards that an index lists. fp16 variants only where there is no other."""
    for variant in ("", ".fp16"):
        for name in NAMES:
            single, index = folder / f"{name}{variant}.safetensors", folder / f"{name}.safetensors.index{variant}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                try:
                    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                except (OSError, ValueError, KeyError, AttributeError) as error:
                    raise ConversionError(f"{index} cannot be read: {error}") from error
                return [folder / shard for shard in shards]
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise ConversionError(
        f"{folder} holds no weights ({' or '.join(f'{n}.safetensors' for n in NAMES)}); it holds {there}"
    )


def read_arrays(files: list[Path]) -> dict[str, np.ndarray]:
    """All arrays of safetensors files, by name. ConversionError names a file that is missing, cut short or not what it says."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = {}
    for file in files:
        try:
            found = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise ConversionError(f"{file} cannot be read: {error}") from error
        twice = sorted(set(found) & set(arrays))
        if twice:
            raise ConversionError(f"{file} holds {twice[0]} again, which another shard holds")
        arrays |= found
    return arrays


def load_component(folder: str | Path, dtype: Any = jnp.float32, store: Any = None) -> tuple[Any, Any]:
    """(module, params) of a component folder: config.json and safetensors beside it.

    dtype: of the computation. store: of the parameters; the files' own when None. Params are a tree of numpy arrays.
    """
    folder = Path(folder)
    module = models.from_config(read_config(folder), dtype)
    params = from_torch(module, read_arrays(weight_files(folder)))
    if store is not None:
        params = _cast(params, store)
    return module, params


def _cast(params: Any, dtype: Any) -> Any:
    import jax

    return jax.tree.map(lambda x: np.asarray(x, dtype), params)

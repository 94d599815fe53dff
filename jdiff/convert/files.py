"""Component folders of diffusers and transformers: config.json and weights beside it, in one file or in shards."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import sharding
from jdiff.convert import clip, configs, inception, namings, tensors, torchfile
from jdiff.convert.arrays import Array, contiguous, numbers, release
from jdiff.convert.engine import Arrays, read, write
from jdiff.convert.rows import ConversionError, refuse

NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
"""How a component's weights are called, before `[.fp16].safetensors` or `.bin`; diffusers' first, then transformers'."""
QUANTIZED = "quantized.json"
"""The file by which a folder of jdiff's own quantized checkpoints is told: see `quantized`."""
IGNORED = {"CLIPText": clip.IGNORED, "CLIP": clip.WHOLE_IGNORED, "Inception": inception.IGNORED}
"""Class -> arrays that components of it may hold besides, with the reason why they are no parameters."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object; ConversionError when it is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise refuse(f"{file} holds no object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """A component folder's config.json; ConversionError when it is missing or no JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise refuse(f"{folder} is no component folder: {file} is missing")
    return read_json(file)


def weight_files(folder: Path, variants: tuple[str, ...] = ("", ".fp16")) -> list[Path]:
    """The files of a component's weights: one, or the shards that an index lists; safetensors before .bin.

    variants: which to look for, the first that is there. ConversionError when there is none, or the index is broken.
    """
    for suffix in ("safetensors", "bin"):
        for variant in variants:
            for name in NAMES:
                single = folder / f"{name}{variant}.{suffix}"
                if single.is_file():
                    return [single]
                for index in (
                    folder / f"{name}.{suffix}.index{variant}.json",
                    folder / f"{name}{variant}.{suffix}.index.json",
                ):
                    if index.is_file():
                        return _shards(folder, index)
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise refuse(f"{folder} holds no weights ({' or '.join(f'{n}.safetensors' for n in NAMES)}); it holds {there}")


def _shards(folder: Path, index: Path) -> list[Path]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise refuse(f"{index} has no weight_map of names to files")
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name:
            raise refuse(f"{index} names the shard {name!r}, which is not a file beside it")
        if not (folder / name).is_file():
            raise refuse(f"{folder} lacks the shard {name}, which {index.name} lists")
    return [folder / name for name in names]


def read_arrays(files: list[Path]) -> dict[str, Array]:
    """All arrays of safetensors and PyTorch files, by name, as views of them.

    ConversionError names a file that is missing, cut short, not what it says, or that holds an array which another one holds.
    """
    arrays: dict[str, Array] = {}
    for file in files:
        found = read_flat(file)[0]
        twice = sorted(set(found) & set(arrays))
        if twice:
            raise refuse(f"{file} holds {twice[0]} again, which another shard holds")
        arrays |= found
    return arrays


def read_flat(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """(arrays by name, metadata) of one file whose content is a flat dict of arrays."""
    content, metadata = open_file(file)
    odd = [name for name, value in content.items() if not isinstance(value, np.ndarray) or not isinstance(name, str)]
    if odd:
        raise refuse(f"{file}: {str(odd[0])[:80]} is no array")
    return dict(content), metadata


def open_file(file: Path) -> tuple[dict[Any, Any], dict[str, str]]:
    """(content, metadata) of a safetensors or PyTorch file, told by its first bytes; content of the latter may be nested."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(512)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error}") from error
    if head[:4] == torchfile.MAGIC:
        content = torchfile.read(file)
        if not isinstance(content, dict):
            raise refuse(f"{file} holds a {type(content).__name__}, not a state dict")
        return content, {}
    if torchfile.is_legacy(head) and not tensors.looks_like(file):
        raise torchfile.refuse_legacy(file)
    return tensors.read(file)


def from_torch(module: Any, arrays: Arrays, mixed: bool = False) -> Any:
    """A checkpoint's arrays (numpy, by name) as `module`'s tree of numpy arrays: views where they can be, dtypes as they are.

    Names may be any that jdiff reads for that module. mixed: whether the dtypes may differ.
    ConversionError lists every array that is missing, unexpected, of another shape or of another dtype.
    """
    naming = namings.find(module, arrays)
    (params,), _ = read([(module, naming)], arrays, IGNORED.get(type(module).__name__, ()), mixed)
    return jax.tree.map(numbers, params)


def to_torch(module: Any, params: Any, table: str = "diffusers") -> dict[str, np.ndarray]:
    """Undoes `from_torch`: arrays by the checkpoint's names and in its layouts, C-contiguous.

    table: whose names: "diffusers" (and transformers), "compvis" or "dit".
    """
    arrays = write(module, params, namings.Naming(table))
    return {name: contiguous(array, array.dtype) for name, array in arrays.items()}


def put(params: Any, where: jax.sharding.Sharding) -> Any:
    """A tree's arrays on devices, one after another: the host holds one at a time besides, not a second copy of all."""

    def place(leaf: Array) -> jax.Array:
        placed = jax.block_until_ready(sharding.put(numbers(leaf), where))
        release(leaf)
        return placed

    return jax.tree.map(place, params)


def load_component(folder: str | Path, dtype: Any = jnp.float32, store: Any = None) -> tuple[Any, Any]:
    """(module, params) of a component folder: config.json and the weights beside it.

    dtype: of the computation. store: of the parameters; the files' own when None. Params are a tree of numpy arrays.
    """
    folder = Path(folder)
    module = configs.from_config(read_config(folder), dtype)
    params = from_torch(module, read_arrays(weight_files(folder)), mixed=store is not None)
    if store is not None:
        params = jax.tree.map(lambda x: np.asarray(x, store), params)
    return module, params

"""CLIP as a network of features, and of texts in the same space, from transformers' folder; pictures prepared as by its processor.

The pool is the projected embedding, as it comes: not of length 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import convert, sharding, tree
from jdiff.evaluate.features import Network, by_rows
from jdiff.models.clip_pair import CLIP
from jdiff.tokens import Tokenizer

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3
"""PIL's number of it."""


def open_clip(folder: str | Path) -> Network:
    """The network of a folder with CLIPModel's config.json and weights and CLIP's tokenizer.

    ConversionError when it holds another model; ValueError for a tokenizer that is another's, or a preprocessor_config.json
    that asks for another preparation.
    """
    folder = Path(folder)
    module, params = convert.load_component(folder)
    if not isinstance(module, CLIP):
        raise convert.ConversionError(
            f"{folder} holds a {type(module).__name__}, and scores take CLIP whole: both towers"
        )
    _check_preparation(folder / "preprocessor_config.json", module.image_size)
    tokenizer = Tokenizer.from_folder(folder)
    if (tokenizer.eos_id, tokenizer.max_length) != (module.eos_id, module.max_length):
        raise ValueError(
            f"{folder}: the tokenizer ends texts with {tokenizer.eos_id} at {tokenizer.max_length}, CLIP with {module.eos_id} at "
            f"{module.max_length}: they are not of one model"
        )

    def apply(params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        pool_BD: Any = module.apply({"params": params}, prepared(image_BHWC, module.image_size), method="image")
        return (pool_BD,)

    def encode(params: Any, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        text_BD: Any = module.apply({"params": params}, rows["ids"], method="text")
        return {"text": text_BD}

    def texts(prompts: Sequence[str]) -> np.ndarray:
        ids = {"ids": _whole(tokenizer, prompts)}
        return next(by_rows(encode, params, [ids], sharding.make_mesh()))["text"]

    title = f"CLIP {tree.fingerprint(params)} at {module.image_size} px"
    return Network(title, params, apply, ("pool_ND",), texts)


def _whole(tokenizer: Tokenizer, prompts: Sequence[str]) -> np.ndarray:
    """Ids of prompts, (N, S). ValueError for one that CLIP would read in part."""
    rows, room = [tokenizer.encode(prompt) for prompt in prompts], tokenizer.max_length - 2
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) > room:
            raise ValueError(
                f"CLIP reads {room} tokens, and this prompt has {len(row)}, so it has no score: {prompt!r}"
            )
    return tokenizer.frame(rows)


def prepared(image_BHWC: jax.Array, size: int) -> jax.Array:
    """uint8 -> (B, size, size, 3) as transformers' CLIPImageProcessor does it: the shorter side to `size`, the middle cut out,
    CLIP's mean and deviation taken off.

    The resize is PIL's bicubic one, which goes over the columns first and rounds to bytes after either pass.
    """
    H, W = image_BHWC.shape[1:3]
    high, wide = (int(size * n / min(H, W)) for n in (H, W))
    x_BHWC = image_BHWC.astype(jnp.float32)
    for axis, n, to in (("w", W, wide), ("h", H, high)):
        if n != to:
            into = "bhxc" if axis == "w" else "bxwc"
            x_BHWC = jnp.einsum(f"x{axis},bhwc->{into}", bicubic(n, to), x_BHWC, precision="highest")
            x_BHWC = jnp.clip(jnp.floor(x_BHWC + 0.5), 0, 255)
    top, left = (high - size) // 2, (wide - size) // 2
    x_BHWC = x_BHWC[:, top : top + size, left : left + size]
    return (x_BHWC / 255.0 - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)


def bicubic(n: int, size: int) -> np.ndarray:
    """(size, n): the weights of n samples in each of `size`: Keys' kernel (a = -1/2), widened where it shrinks, as PIL has it."""
    scale = n / size
    width = max(scale, 1.0)
    distance = np.abs(np.arange(n) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / width
    near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _check_preparation(file: Path, size: int) -> None:
    """ValueError for a preprocessor_config.json, where there is one, that asks for another preparation than `prepared`."""
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    sizes: tuple[Any, ...] = (size, {"shortest_edge": size}), (size, {"height": size, "width": size})
    allowed = {"size": sizes[0], "crop_size": sizes[1], "image_mean": (list(MEAN),), "image_std": (list(DEVIATION),)}
    allowed |= {"resample": (BICUBIC,), "rescale_factor": (1 / 255,)}
    allowed |= {f"do_{step}": (True,) for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    for key, values in allowed.items():
        if key in found and found[key] not in values:
            raise ValueError(f"{file}: {key}={found[key]} is not supported, only {values[-1]}")

"""What a user sends: checked before anything is made of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from jdiff.convert import tensors
from jdiff.data.images import bounded, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 2**26
"""A picture's, 8192 x 8192."""
MOST_LORA_BYTES = 2**30


def open_picture(path: str | Path | None) -> Image.Image:
    """A picture file, upright and RGB; ValueError for none, for what is no picture of `FORMATS`, or a larger one."""
    if path is None:
        raise ValueError("there is no picture: choose one")
    try:
        with Image.open(bounded(path), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"the picture has {image.width} x {image.height} pixels, above {MOST_PIXELS:,}")
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture cannot be read as {', '.join(FORMATS)}") from error


def check_loras(paths: Sequence[Path], scales: str) -> list[tuple[Path, float]]:
    """Files with their strengths, given by comma, 1 for all where none is given; ValueError for anything but safetensors."""
    for path in paths:
        if path.suffix != ".safetensors" or not tensors.looks_like(path):
            raise ValueError(f"{path.name} is no safetensors file: a LoRA must be one")
        if path.stat().st_size > MOST_LORA_BYTES:
            raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, above {MOST_LORA_BYTES:,}")
    words = [word.strip() for word in scales.split(",") if word.strip()]
    if len(words) not in (0, len(paths)):
        raise ValueError(f"LoRA strengths: {len(words)} given for {len(paths)} file(s); give one for each, by comma")
    try:
        strengths = [float(word) for word in words] or [1.0] * len(paths)
    except ValueError:
        raise ValueError(f"LoRA strengths: {scales!r} are not numbers by comma, as in 0.8, 1") from None
    return list(zip(paths, strengths, strict=True))


def fitted(size: tuple[int, int], width: int, height: int, unit: int) -> tuple[int, int]:
    """(width, height) in multiples of `unit`, of the shape of `size` (width, height) and about the area of width x height."""
    ratio = (width * height / (size[0] * size[1])) ** 0.5
    wide, high = (max(unit, round(n * ratio / unit) * unit) for n in size)
    return wide, high


def keep_outside(made: Image.Image, original: Image.Image, mask: Image.Image, feather: float) -> Image.Image:
    """`made` where the mask is white, `original`'s own pixels elsewhere, going over within `feather` pixels inside the edge.

    All of one size, the mask of mode L. A repainted picture went through the autoencoder, which changes all of it a little.
    """
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(feather)), np.float32)
    # a blurred edge is a half on the line itself: from there inwards it goes from nothing to all
    inside = np.clip(2 * soft - 255, 0, 255) * (np.asarray(mask) > 0)
    return Image.composite(made, original, Image.fromarray(inside.astype(np.uint8)))

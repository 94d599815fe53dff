"""Samples as pictures: checked, in bytes, side by side, on disk."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from jdiff.paths import whole


def to_uint8(x_BHWC: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, rounded; FloatingPointError when a number is not finite."""
    if not np.isfinite(x_BHWC).all():
        bad = [i for i, x in enumerate(x_BHWC) if not np.isfinite(x).all()]
        raise FloatingPointError(
            f"picture(s) {bad} hold NaN or infinity: the weights are not sound, or precision is too low"
        )
    return np.clip(np.round((np.asarray(x_BHWC, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(image_BHWC: jax.Array) -> jax.Array:
    """0..255 -> [-1, 1], in fp32 (or the type of floats)."""
    return image_BHWC.astype(jnp.promote_types(image_BHWC.dtype, jnp.float32)) / 127.5 - 1.0


def grid(pictures_BHWC: np.ndarray, columns: int | None = None, least: int = 64, gap: int = 2) -> Image.Image:
    """Pictures side by side on white, near square unless `columns` is given; small ones enlarged to at least `least` pixels."""
    B, H, W, _ = pictures_BHWC.shape
    across = min(B, columns or math.ceil(math.sqrt(B)))
    rows, zoom = math.ceil(B / across), max(1, math.ceil(least / max(H, W)))
    sheet = Image.new("RGB", (across * (W * zoom + gap) + gap, rows * (H * zoom + gap) + gap), "white")
    for i, picture in enumerate(pictures_BHWC):
        row, column = divmod(i, across)
        tile = Image.fromarray(picture).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + column * (W * zoom + gap), gap + row * (H * zoom + gap)))
    return sheet


def save_png(image: Image.Image, path: Path, facts: dict[str, Any]) -> None:
    """Writes a PNG whole or not at all, `facts` in its text chunk `jdiff`."""
    info = PngInfo()
    info.add_text("jdiff", json.dumps(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)

"""Any picture file to RGB of one size."""

import io
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970
"""Pictures whose header claims more are refused before they are decoded (PIL's own limit for decompression bombs)."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # else PIL warns, at every reading, of half as many


def decode(file: str | BinaryIO | bytes, size: int) -> np.ndarray:
    """A picture as uint8 RGB (size, size, 3), cropped as `center_crop` does.

    Upright by its EXIF tag, the first frame of an animation, transparency over white, 16-bit greys scaled to 8. ValueError
    or OSError (PIL's) with the reason when it cannot be decoded whole.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels is more than the limit of {MAX_PIXELS:,}")
        image.load()
        return np.asarray(center_crop(to_rgb(ImageOps.exif_transpose(image)), size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB."""
    if image.mode.startswith("I"):  # 16-bit greys, which PIL would clip rather than scale
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65_535:
            raise ValueError(f"greys of {grey.min()}..{grey.max()} are not 16-bit")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pictures have no defined white; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (openai/guided-diffusion `center_crop_arr`): halvings by box, the rest by bicubic, then the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too slim to enlarge to a side of {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

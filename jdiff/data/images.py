"""Any picture file to RGB of the wanted size."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 178_956_970
"""Pictures whose header claims more are refused before they are decoded (PIL's own limit for decompression bombs)."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # else PIL warns, at every reading, of half as many


def bounded(file: str | Path | BinaryIO | bytes) -> io.BytesIO:
    """A picture's file read whole, for PIL: reading from disk, it makes room for as many bytes as a PNG's chunk claims to have."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    return io.BytesIO(Path(file).read_bytes() if isinstance(file, str | Path) else file.read())


def decode(
    file: str | BinaryIO | bytes, size: int | tuple[int, int], rng: np.random.Generator | None = None
) -> np.ndarray:
    """A picture as uint8 RGB (size, size, 3), or (*size, 3), cropped as `crop` does.

    Upright by its EXIF tag, the first frame of an animation, transparency over white, 16-bit greys scaled to 8. ValueError
    or OSError (PIL's) with the reason when it cannot be decoded whole.
    """
    with Image.open(bounded(file)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels is more than the limit of {MAX_PIXELS:,}")
        image.load()
        height, width = (size, size) if isinstance(size, int) else size
        return np.asarray(crop(to_rgb(ImageOps.exif_transpose(image)), height, width, rng))


def header_size(file: str | BinaryIO | bytes) -> tuple[int, int]:
    """(height, width) as the picture is seen, from its header alone: swapped where its EXIF tag turns it."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        # the base class's: PNG's own decodes the whole picture to look for a tag behind it
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
        turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size PIL has turned already
        return (image.width, image.height) if turned else (image.height, image.width)


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


def crop(image: Image.Image, height: int, width: int, rng: np.random.Generator | None = None) -> Image.Image:
    """Shrinks or enlarges as little as covers (height, width), then cuts out the middle, or where `rng` says.

    Halvings by box, the rest by bicubic; for squares it is ADM's crop (openai/guided-diffusion `center_crop_arr`).
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too slim to enlarge to {width} x {height}")
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    spare = (wide - width, high - height)
    left, top = (n // 2 if rng is None else int(rng.integers(n + 1)) for n in spare)
    return image.crop((left, top, left + width, top + height))

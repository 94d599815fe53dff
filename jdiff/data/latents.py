"""A cache of VAE latents, made by tools/cache_latents.py: each picture's posterior, as it is and mirrored.

A folder: `meta.json`, `moments-NNNNN.npy` (float16 or float32, (n, 2, h, w, 2C): the last axis holds mean and log variance,
the second the picture and its mirror image) and `labels.npy`; of pictures with captions also `captions.npz`, and when made
with --text `context-NNNNN.npy`, (n, S, E): the text encoder's output for each caption, all captions numbered through, and
`null_context.npy` (S, E), that of the empty one. A record is a fresh sample of the posterior times the scaling factor, as DiT
trains (facebookresearch/DiT train.py: `latent_dist.sample().mul_(0.18215)`).
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jdiff.data.packed import Texts
from jdiff.data.source import DataError
from jdiff.npz import mapped

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
    """The cached latents as records of (h, w, C), with `caption` and `context` where they are kept; see `jdiff.data.Source`.

    null_context: the text encoder's output for "", float32 (S, E), to stand in for dropped captions; None without contexts.
    """

    name = "latents"
    kind: Literal["image", "latent"] = "latent"
    buckets = None

    def __init__(self, path: str):
        self.root, meta = Path(path), read_meta(path)
        try:
            h, w, c = map(int, meta["shape"])
            self.shape: tuple[int, int, int] = (h, w, c)
            self.class_names, self.fingerprint = list(map(str, meta["class_names"])), str(meta["fingerprint"])
            self.has_captions, texts = bool(meta.get("captions")), meta.get("context")
            self._scale, self._counts = float(meta["scaling_factor"]), list(map(int, meta["shard_counts"]))
            self._matrix = np.asarray(meta["preview"], np.float64).reshape(c + 1, 3)
            self._starts = np.cumsum([0, *self._counts])
            of_texts = (list(map(int, texts["shard_counts"])), tuple(map(int, texts["shape"]))) if texts else None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{self.root / 'meta.json'} lacks what it should hold ({error!r})"
            raise DataError(f"{what}; make the cache anew with tools/cache_latents.py") from error
        self._moments = Shards(self.root, "moments", self._counts, (2, h, w, 2 * c))
        self._captions, self._contexts, self.null_context = None, None, None
        try:
            self.labels = np.array(mapped(self.root / "labels.npy"))
            if self.has_captions:
                self._captions = Texts.load(self.root / "captions.npz")
            if of_texts:
                self.null_context = mapped(self.root / "null_context.npy").astype(np.float32)
        except ValueError as error:
            raise DataError(
                f"data.path={path!r}: labels, captions or null_context cannot be read ({error}); make the cache anew"
            ) from error
        classes = len(self.class_names)
        fits = self.labels.dtype.kind == "i" and ((self.labels >= 0) & (self.labels < classes)).all()
        if self.labels.shape != (self._starts[-1],) or not fits:
            raise DataError(f"data.path={path!r}: labels.npy is not of {self._starts[-1]} labels; make the cache anew")
        if self._captions is not None and len(self._captions) != len(self.labels):
            raise DataError(
                f"data.path={path!r}: captions.npz is not of {len(self.labels)} records; make the cache anew"
            )
        if self.null_context is not None and of_texts:
            counts, shape = of_texts
            if self.null_context.shape != shape:
                raise DataError(
                    f"data.path={path!r}: null_context.npy is not of the shape {shape}; make the cache anew"
                )
            self._contexts = Shards(self.root, "context", counts, shape)

    @property
    def num_classes(self) -> int:
        """As many as the pictures' source had."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def preview(self, latents_BHWC: np.ndarray) -> np.ndarray:
        """Samples as small RGB pictures, without a VAE."""
        return preview(self._matrix, latents_BHWC)

    def texts(self, index: int) -> list[str]:
        """All of a record's captions; DataError when the cache has none."""
        if self._captions is None:
            raise DataError(f"data.path={str(self.root)!r} was made from pictures without captions")
        return self._captions.of(index)

    def read(self, index: int, flip: bool, rng: np.random.Generator) -> dict[str, Any]:
        """See `Source.read`; the posterior's noise comes from `rng`. Also `context`, float32 (S, E), of the caption drawn."""
        moments = np.asarray(self._moments[index][int(flip)], np.float32)
        mean, log_variance = np.split(moments, 2, axis=-1)
        noise = rng.standard_normal(mean.shape, np.float32)
        latent = mean + np.exp(0.5 * np.clip(log_variance, -30.0, 20.0)) * noise
        record = {"latent": latent * np.float32(self._scale), "label": self.labels[index]}
        if self._captions is not None:
            number = self._captions.draw(index, rng)
            record["caption"] = self._captions.text(number)
            if self._contexts is not None:
                record["context"] = np.asarray(self._contexts[number], np.float32)
        return record


class Shards:
    """Rows of one shape, in the files NAME-NNNNN.npy of `counts` rows each, which are mapped anew in each process.

    DataError when one of them is not there, or is of another shape.
    """

    def __init__(self, root: Path, name: str, counts: list[int], shape: tuple[int, ...]):
        self._root, self._name, self._counts = root, name, counts
        self._starts = np.cumsum([0, *counts])
        self._arrays: list[np.ndarray] | None = None
        for i, shard in enumerate(self._open()):
            if shard.shape != (counts[i], *shape):
                raise DataError(f"{shard_path(root, i, name)} has the shape {shard.shape}: make the cache anew")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def _open(self) -> list[np.ndarray]:
        if self._arrays is None:
            try:
                paths = [shard_path(self._root, i, self._name) for i in range(len(self._counts))]
                self._arrays = [mapped(path) for path in paths]
            except ValueError as error:
                raise DataError(
                    f"data.path={str(self._root)!r}: a shard cannot be read ({error}); make the cache anew"
                ) from error
        return self._arrays

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._open()[shard][index - self._starts[shard]]


def shard_path(root: Path, index: int, name: str = "moments") -> Path:
    """Where one shard lies."""
    return root / f"{name}-{index:05d}.npy"
